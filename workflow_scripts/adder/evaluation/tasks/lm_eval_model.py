"""lm-eval's Hugging Face model in batches that fit, with progress, under rules that are the same for every model."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.instance import Instance
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerFast

from adder.core import hardware
from adder.core.progress import Progress
from adder.evaluation import speculative_decoding
from adder.evaluation.model_loading import choose_batch_size, context_length, eos_ids
from adder.evaluation.token_observer import TokenObserver
from adder.tokenization.chat_template import ChatTemplate, UnusableRow
from adder.tokenization.records import Token

if TYPE_CHECKING:
    HFLM: Any = object  # lm-eval's registry hides its type
else:
    from lm_eval.models.huggingface import HFLM

SCORED_TOKENS = 4096  # positions of one pass that scores given answers, padding included
LOGITS_SHARE = 0.25  # of the free memory that the logits of such a pass may take


class TaskModel(HFLM):
    """lm-eval's Hugging Face model in batches that fit, with progress.

    Generation follows the task alone, not the model's own generation_config, so that base and tuned model answer under
    the same rules; it ends at `stop`, the template's end of turn, and at `ends`, other tokens that replies end in, too.
    Questions are rendered as in training, with its date. `prompts_cut` counts prompts that
    lost their beginning to fit the context.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        stop: Token,
        ends: Sequence[Token],
        as_chat: bool,
        progress: Progress,
    ) -> None:
        stop_ids = sorted({stop["id"], *(end["id"] for end in ends), *eos_ids(model, tokenizer)})
        model.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id)
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            max_length=context_length(model),
            # A chat template writes each control token that is needed; plain text gets what the tokenizer adds.
            add_bos_token=False if as_chat else None,
        )
        self.stop, self.progress = stop, progress
        self.template = ChatTemplate(tokenizer) if as_chat else None
        self.asked = self.prompts_cut = self.done = 0

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, as training renders it: lm-eval's own has today's date in it."""
        if self.template is None:
            return super().apply_chat_template(chat_history, add_generation_prompt)
        try:
            text = self.template.render(chat_history, prompt=add_generation_prompt)
        except UnusableRow:  # as lm-eval does
            chat_history = [turn for turn in chat_history if turn["role"] != "system"]
            text = self.template.render(chat_history, prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()  # the model goes on with what this says
        return text[: text.rindex(last) + len(last)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Reply to prompts, as many at once as fit; a reply may take up half of the context at most."""
        self.asked += len(requests)
        half = self.max_length // 2
        asked = [_prompt_and_options(request) for request in requests]
        for _, options in asked:
            until = options.get("until") or []
            options["until"] = [*([until] if isinstance(until, str) else until), self.stop["token"]]
            options["max_gen_toks"] = min(_most_new_tokens(options, self.max_gen_toks), half)
        lengths = [len(self.tok_encode(prompt)) for prompt, _ in asked]
        limits = [options["max_gen_toks"] for _, options in asked]
        self._note_cut(length + limit > self.max_length for length, limit in zip(lengths, limits, strict=True))
        longest = min(max(lengths) + max(limits), self.max_length)
        self.batch_size_per_gpu = choose_batch_size("auto", self.model, len(requests), longest).value
        self.done = 0
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        longest = min(max(len(context) + len(answer) for _, context, answer in requests), self.max_length)
        if override_bs is None:  # else lm-eval has made a batch of windows already
            self.asked += len(requests)
            self._note_cut(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
            self.batch_size_per_gpu = max(1, self._scored_tokens() // longest)
            self.done = 0
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of texts, in windows as long as the context."""
        self.asked += len(requests)
        self.batch_size_per_gpu = max(1, self._scored_tokens() // self.max_length)
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def _scored_tokens(self) -> int:
        """Positions of one pass: all of its logits are kept, in the model's precision and once more as fp32."""
        each = self.model.config.get_text_config().vocab_size * (self.model.dtype.itemsize + 4)
        return min(SCORED_TOKENS, int(LOGITS_SHARE * hardware.free_memory(self.model.device.type)) // each)

    def _note_cut(self, cut: Iterable[bool]) -> None:
        count = sum(cut)
        self.prompts_cut += count
        if count:
            self.progress.say(f"warning: {count} prompts lose their beginning, to fit the context of {self.max_length}")

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.done += len(inps)
        self.progress.line(f"scored {self.done:,} answers")
        return super()._model_call(inps, attn_mask=attn_mask, labels=labels)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        start = context.shape[1]
        if self._decodes_in_slots() and _is_greedy(options):
            return self._decode(context, options["attention_mask"], max_length - start, stop)
        observer = TokenObserver(lambda ids: self._show(len(context), ids.shape[1] - start))
        output = super()._model_generate(
            context, max_length, stop, logits_processor=LogitsProcessorList([observer]), **options
        )
        self.done += len(context)
        return output

    def _decodes_in_slots(self) -> bool:
        """Whether speculative_decoding replies: on a GPU that is many times as fast as transformers' generate."""
        return self.model.device.type == "cuda" and speculative_decoding.supports(self.model)

    def _decode(self, context: torch.Tensor, mask: torch.Tensor, limit: int, stop: list[str]) -> torch.Tensor:
        """As _model_generate, by speculative_decoding."""
        asked = [ids[own.bool()].tolist() for ids, own in zip(context, mask, strict=True)]
        requests = [speculative_decoding.Request(ids, len(ids)) for ids in asked]
        ends: Any = self.model.generation_config.eos_token_id
        found = speculative_decoding.generate(
            self.model,
            requests,
            ends,
            limit,
            len(asked),
            lambda replies: self._show(len(asked), max(len(reply.ids) for reply in replies)),
            self._stops_at([text for text in stop if text]),
        )
        output = torch.full((len(asked), context.shape[1] + limit), self.tokenizer.pad_token_id, device=context.device)
        output[:, : context.shape[1]] = context
        for row, reply in enumerate(found):
            ids = torch.tensor(reply.ids, device=context.device)
            output[row, context.shape[1] : context.shape[1] + len(ids)] = ids
        self.done += len(asked)
        return output

    def _stops_at(self, stop: list[str]) -> Callable[[list[int], int], bool]:
        """Whether one of these texts stands in a reply, as generate's `stops_at`."""
        longest = max((len(text.encode()) for text in stop), default=0)

        def stops(ids: list[int], new: int) -> bool:
            # A token is at least a byte: the text can't begin earlier. What the tail holds, the whole must hold too.
            tail = self.tok_decode(ids[-(new + longest) :])
            return any(text in tail for text in stop) and any(text in self.tok_decode(ids) for text in stop)

        return stops

    def _show(self, more: int, tokens: int) -> None:
        self.progress.line(f"{self.done:,} replies; token {tokens:,} of the next {more:,}")


def _is_greedy(options: dict[str, Any]) -> bool:
    """Whether nothing but the argmax is asked for."""
    known = {"attention_mask", "do_sample", "temperature", "use_cache", "pad_token_id"}
    return not options.get("do_sample") and not {name for name in options if options[name] is not None} - known


def _prompt_and_options(request: Instance) -> tuple[str, dict[str, Any]]:
    args: Any = request.args
    return args


def _most_new_tokens(options: dict[str, Any], default: int) -> int:
    """The task's limit under whichever of its names; the names are taken out, for only one may be given."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    found = [options.pop(name) for name in names if name in options]
    return found[0] if found else default
