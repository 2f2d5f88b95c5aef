"""lm-eval's Hugging Face model in batches that fit, with progress, under rules that are the same for every model."""

from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from adder.core import hardware
from adder.core.progress import Progress
from adder.evaluation.run import choose_batch_size, eos_ids

SCORED_TOKENS = 4096  # positions of one pass that scores given answers, padding included
LOGITS_SHARE = 0.25  # of the free memory that the logits of such a pass may take


class Respondent(HFLM):
    """lm-eval's Hugging Face model in batches that fit, with progress.

    Generation follows the task alone, not the model's own generation_config, so that base and tuned model answer under
    the same rules; it ends at `stop`, the template's end of turn ({id, token}), too. `prompts_cut` counts prompts that
    lost their beginning to fit the context.
    """

    def __init__(self, model, tokenizer, stop: dict, as_chat: bool, progress: Progress):
        stop_ids = sorted({stop["id"], *eos_ids(model, tokenizer)})
        model.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id)
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            max_length=model.config.get_text_config().max_position_embeddings,
            # A chat template writes each control token that is needed; plain text gets what the tokenizer adds.
            add_bos_token=False if as_chat else None,
        )
        self.stop, self.progress = stop, progress
        self.asked = self.prompts_cut = self.done = 0

    def generate_until(self, requests, disable_tqdm=False):
        """Reply to prompts, as many at once as fit; a reply may take up half of the context at most."""
        self.asked += len(requests)
        half = self.max_length // 2
        for request in requests:
            options = request.args[1]
            until = options.get("until") or []
            options["until"] = [*([until] if isinstance(until, str) else until), self.stop["token"]]
            options["max_gen_toks"] = min(_most_new_tokens(options, self.max_gen_toks), half)
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        limits = [request.args[1]["max_gen_toks"] for request in requests]
        self._note_cut(length + limit > self.max_length for length, limit in zip(lengths, limits, strict=True))
        longest = min(max(lengths) + max(limits), self.max_length)
        self.batch_size_per_gpu = choose_batch_size("auto", self.model, len(requests), longest).value
        self.done = 0
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        longest = min(max(len(context) + len(answer) for _, context, answer in requests), self.max_length)
        if override_bs is None:  # else lm-eval has made a batch of windows already
            self.asked += len(requests)
            self._note_cut(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
            self.batch_size_per_gpu = max(1, self._scored_tokens() // longest)
            self.done = 0
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-likelihood of whole texts, in windows as long as the context."""
        self.asked += len(requests)
        self.batch_size_per_gpu = max(1, self._scored_tokens() // self.max_length)
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def _scored_tokens(self) -> int:
        """Positions of one pass: its logits are kept whole, in the model's precision and once more as fp32."""
        each = self.model.config.get_text_config().vocab_size * (self.model.dtype.itemsize + 4)
        return min(SCORED_TOKENS, int(LOGITS_SHARE * hardware.free_memory(self.model.device.type)) // each)

    def _note_cut(self, cut) -> None:
        count = sum(cut)
        self.prompts_cut += count
        if count:
            self.progress.say(f"warning: {count} prompts lose their beginning, to fit the context of {self.max_length}")

    def _model_call(self, inps, attn_mask=None, labels=None):
        self.done += len(inps)
        self.progress.line(f"scored {self.done:,} answers")
        return super()._model_call(inps, attn_mask=attn_mask, labels=labels)

    def _model_generate(self, context, max_length, stop, **options):
        watch = Watch(context.shape[1], lambda tokens: self._show(len(context), tokens))
        output = super()._model_generate(
            context, max_length, stop, logits_processor=LogitsProcessorList([watch]), **options
        )
        self.done += len(context)
        return output

    def _show(self, more: int, tokens: int) -> None:
        self.progress.line(f"{self.done:,} replies; token {tokens:,} of the next {more:,}")


class Watch(LogitsProcessor):
    """Tells how many tokens the replies of a batch have so far; changes nothing."""

    def __init__(self, start: int, tell):
        self.start, self.tell = start, tell

    def __call__(self, input_ids, scores):
        """Return the scores as they are."""
        self.tell(input_ids.shape[1] - self.start)
        return scores


def _most_new_tokens(options: dict, default: int) -> int:
    """The task's limit under whichever of its names; the names are taken out, for only one may be given."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    found = [options.pop(name) for name in names if name in options]
    return found[0] if found else default
