"""A model's own replies to held-out prompts, generated and scored through lm-eval."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Never, NotRequired, Protocol, TypedDict

import torch
from datasets import Dataset, DatasetDict
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from lm_eval.tasks import TaskManager
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerFast

from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.progress import Progress
from adder.evaluation import speculative_decoding
from adder.evaluation.reply_text import ReplyReader
from adder.evaluation.token_observer import TokenObserver

if TYPE_CHECKING:
    HFLM: Any = object  # lm-eval's registry hides its type
else:
    from lm_eval.models.huggingface import HFLM

TASK = "heldout"


class ReplyCounts(TypedDict):
    """Tokens that were computed of a reply, the one that ends it included, and whether it was cut at the limit.

    looped: there, and true, where it repeated itself for so long that the rest of it was not computed.
    """

    new_tokens: int
    truncated: bool
    looped: NotRequired[bool]


class Question(TypedDict):
    """A prompt as a rendered text, and the reply that it should get."""

    prompt: str
    reference: str


class ScoredReply(TypedDict):
    """A reply. Beside it stand its scores, each under its name in metrics.SCORES."""

    reply: str
    exact_match: NotRequired[int]


class ReplyModel(Protocol):
    """An lm-eval model that notes what it generates: `written` is by the prompt's ids."""

    written: dict[tuple[int, ...], ReplyCounts]


def choose_backend(wanted: Literal["auto", "hf", "vllm"], device: str) -> Choice[str, Never]:
    """What generates the replies, "hf" or "vllm". Raises UserError where vLLM is asked for and can't run."""
    installed = find_spec("vllm") is not None
    if wanted == "vllm" and not (installed and device == "cuda"):
        missing = "no CUDA device is used here" if installed else "the package vllm isn't installed"
        raise UserError(f"evaluate.backend: 'vllm' was asked for, but {missing}; use 'auto' or 'hf'")
    if wanted != "auto":
        return Choice(wanted, "as set")
    if installed and device == "cuda":
        return Choice("vllm", "vLLM is installed and there is a GPU")
    return Choice("hf", "transformers: vLLM needs a GPU" if installed else "transformers: vLLM isn't installed")


class HfReplyModel(HFLM):
    """lm-eval's Hugging Face model, which also counts what it generates.

    Replies are greedy and end at any of `stop_ids`; the base's own generation_config (a repetition penalty, say) is
    left out, so that base and tuned model answer under the same rules. `total`: how many replies there will be.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        stop_ids: list[int],
        batch_size: int,
        context: int,
        total: int,
        progress: Progress,
    ) -> None:
        model.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id)
        # Prompts come rendered, with every control token that they need: none may be added.
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=context,
            add_bos_token=False,
        )
        self.reader = ReplyReader(tokenizer)
        self.stop_ids = torch.tensor(stop_ids, device=model.device)
        self._stops = frozenset(stop_ids)
        self.total = total
        self.progress = progress
        self.started = time.perf_counter()
        self.replies = self.new_tokens = 0
        self.written: dict[tuple[int, ...], ReplyCounts] = {}

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """A reply's text up to its end, with the control tokens in it, which may part reasoning and answer."""
        if not skip_special_tokens:
            return super().tok_decode(tokens, skip_special_tokens=False)
        ids = tokens.tolist() if isinstance(tokens, torch.Tensor) else tokens
        return self.reader.text([ids] if isinstance(ids, int) else ids, self._stops)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        start = context.shape[1]
        observer = TokenObserver(lambda ids: self._show_batch(ids[:, start:]))
        output = super()._model_generate(
            context, max_length, stop, logits_processor=LogitsProcessorList([observer]), **generation_kwargs
        )
        masks = generation_kwargs["attention_mask"]
        lengths, ended = reply_lengths(output[:, start:], self.stop_ids)
        for ids, mask, length, end in zip(context, masks, lengths.tolist(), ended.tolist(), strict=True):
            self.written[tuple(ids[mask.bool()].tolist())] = {"new_tokens": length, "truncated": not end}
        self.replies += len(output)
        self.new_tokens += int(lengths.sum())
        return output

    def _show_batch(self, new_ids: torch.Tensor) -> None:
        lengths, ended = reply_lengths(new_ids, self.stop_ids)
        self.show(self.replies + int(ended.sum()), self.new_tokens + int(lengths.sum()))

    def show(self, replies: int, new_tokens: int) -> None:
        """Say how far the generation is."""
        speed = new_tokens / max(time.perf_counter() - self.started, 1e-9)
        self.progress.line(f"generating: {replies:,} of {self.total:,} replies, {speed:,.0f} new tokens/s")


class SpeculativeReplyModel(HfReplyModel):
    """The same replies by speculative_decoding: `requests` are the prompts of lm-eval's documents, in their order.

    No prompt is tokenised or read twice. `losses` are those of the requests' labels, None without labels.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        stop_ids: list[int],
        batch_size: int,
        context: int,
        requests: Sequence[speculative_decoding.Request],
        progress: Progress,
    ) -> None:
        super().__init__(model, tokenizer, stop_ids, batch_size, context, len(requests), progress)
        self.requests = requests
        self.losses: list[torch.Tensor | None] = []

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Reply to lm-eval's requests, which all come with the same options."""
        args: Any = requests[0].args
        options: dict[str, Any] = args[1]
        asked = [self.requests[int(request.doc_id or 0)] for request in requests]
        limit = options["max_gen_toks"]
        found = speculative_decoding.generate(
            self.model, asked, self.stop_ids.tolist(), limit, int(self.batch_size), partial(self._observe, limit)
        )
        self.losses = [reply.losses for reply in found]
        for request, reply in zip(asked, found, strict=True):
            prompt = tuple(request.ids[: request.prompt_length])
            self.written[prompt] = {"new_tokens": reply.computed, "truncated": not reply.ended}
            if reply.looped is not None:
                self.written[prompt]["looped"] = True
        until = handle_stop_sequences(
            options["until"], eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        )
        return [postprocess_generated_text(self.tok_decode(reply.ids), until, None) for reply in found]

    def _observe(self, limit: int, found: list[speculative_decoding.Reply]) -> None:
        self.show(sum(reply.is_done(limit) for reply in found), sum(reply.computed for reply in found))


def reply_lengths(new_ids: torch.Tensor, stop_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of each reply through its end token, and whether it has one. `new_ids`: (replies, tokens), end-padded."""
    stops = torch.isin(new_ids, stop_ids)
    ended = stops.any(dim=1)
    if not new_ids.shape[1]:
        return torch.zeros(len(new_ids), dtype=torch.long), ended
    first = stops.int().argmax(dim=1) + 1
    return torch.where(ended, first, new_ids.shape[1]), ended


def generate(
    model: ReplyModel,
    questions: Sequence[Question],
    max_new_tokens: int,
    stop: str,
    score: Callable[[str, str], Mapping[str, float]],
) -> list[ScoredReply]:
    """Run lm-eval's generate_until over `questions`; return the replies in their order.

    `stop`: text of the end-of-turn token, cut from a reply where the tokenizer doesn't hide it as a special one.
    `score(reference, reply)` gives the scores of one reply.
    """
    table = Dataset.from_list([{"prompt": q["prompt"], "reference": q["reference"]} for q in questions])
    names = list(score(questions[0]["reference"], questions[0]["reference"]))
    task = {
        "task": TASK,
        "custom_dataset": lambda **_: DatasetDict({"test": table}),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "reference",
        "generation_kwargs": {"until": [stop], "max_gen_toks": max_new_tokens, "do_sample": False},
        "process_results": lambda doc, results: score(doc["reference"], results[0]),
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names],
    }
    manager = TaskManager(include_defaults=False)
    # `evaluate`, not `simple_evaluate`: that one also asks the hub about the model and lists the machine's packages.
    lm: Any = model
    results: Any = evaluate(lm, manager.load([task]), bootstrap_iters=0, log_samples=True)
    samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
    replies: list[Any] = [
        {"reply": sample["filtered_resps"][0], **{name: sample[name] for name in names}} for sample in samples
    ]
    return replies


def say_total(replies: int, new_tokens: int, seconds: float, progress: Progress) -> None:
    """Leave one line about the whole generation."""
    progress.line(f"generated {replies:,} replies, {new_tokens / max(seconds, 1e-9):,.0f} new tokens/s", last=True)
