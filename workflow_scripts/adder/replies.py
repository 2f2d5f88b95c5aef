"""A model's own replies to held-out prompts, generated and scored through lm-eval."""

import time
from collections.abc import Callable

import lm_eval
import torch
from datasets import Dataset, DatasetDict
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from adder.progress import Progress

TASK = "heldout"


class Generator(HFLM):
    """lm-eval's Hugging Face model, which also counts what it generates.

    Replies are greedy and end at any of `stop_ids`; the base's own generation_config (a repetition penalty, say) is
    left out, so that base and tuned model answer under the same rules. `written` maps a prompt's ids to
    {new_tokens, truncated}: new tokens include the token that ends the reply; a truncated one was cut at the limit.
    """

    def __init__(self, model, tokenizer, stop_ids: list[int], batch_size: int, context: int, total: int, progress):
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
        self.stop_ids = torch.tensor(stop_ids, device=model.device)
        self.total = total
        self.progress = progress
        self.started = time.perf_counter()
        self.replies = self.new_tokens = 0
        self.written: dict[tuple[int, ...], dict] = {}

    def _model_generate(self, context, max_length, stop, attention_mask, **kwargs):
        start = context.shape[1]
        output = super()._model_generate(
            context,
            max_length,
            stop,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([Watch(lambda ids: self._show(ids[:, start:]))]),
            **kwargs,
        )
        lengths, ended = reply_lengths(output[:, start:], self.stop_ids)
        for ids, mask, length, end in zip(context, attention_mask, lengths.tolist(), ended.tolist(), strict=True):
            self.written[tuple(ids[mask.bool()].tolist())] = {"new_tokens": length, "truncated": not end}
        self.replies += len(output)
        self.new_tokens += int(lengths.sum())
        return output

    def _show(self, new_ids: torch.Tensor) -> None:
        lengths, ended = reply_lengths(new_ids, self.stop_ids)
        speed = (self.new_tokens + int(lengths.sum())) / max(time.perf_counter() - self.started, 1e-9)
        finished = self.replies + int(ended.sum())
        self.progress.line(f"generating: {finished:,} of {self.total:,} replies, {speed:,.0f} new tokens/s")


class Watch(LogitsProcessor):
    """Calls `see` with the ids so far before each new token; changes nothing."""

    def __init__(self, see: Callable[[torch.Tensor], None]):
        self.see = see

    def __call__(self, input_ids, scores):
        """Return the scores as they are."""
        self.see(input_ids)
        return scores


def reply_lengths(new_ids: torch.Tensor, stop_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of each reply through its end token, and whether it has one. `new_ids`: (replies, tokens), end-padded."""
    stops = torch.isin(new_ids, stop_ids)
    ended = stops.any(dim=1)
    if not new_ids.shape[1]:
        return torch.zeros(len(new_ids), dtype=torch.long), ended
    first = stops.int().argmax(dim=1) + 1
    return torch.where(ended, first, new_ids.shape[1]), ended


def generate(
    generator: Generator,
    documents: list[dict],
    max_new_tokens: int,
    stop: str,
    score: Callable[[str, str], dict[str, float]],
) -> tuple[list[str], dict[str, float]]:
    """Run lm-eval's generate_until over `documents` ({prompt, reference}, the prompt a rendered text).

    `stop`: text of the end-of-turn token, cut from a reply where the tokenizer doesn't hide it as a special one.
    `score(reference, reply)` gives the metrics of one reply. Returns the replies in order and each metric's mean.
    """
    table = Dataset.from_list([{"prompt": d["prompt"], "reference": d["reference"]} for d in documents])
    first = score(documents[0]["reference"], documents[0]["reference"])
    task = {
        "task": TASK,
        "custom_dataset": lambda **_: DatasetDict({"test": table}),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "reference",
        "generation_kwargs": {"until": [stop], "max_gen_toks": max_new_tokens, "do_sample": False},
        "process_results": lambda doc, results: score(doc["reference"], results[0]),
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in first],
    }
    manager = TaskManager(include_defaults=False)
    # `evaluate`, not `simple_evaluate`: that one also asks the hub about the model and lists the machine's packages.
    results = lm_eval.evaluate(generator, manager.load([task]), bootstrap_iters=0, log_samples=True)
    samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
    means = {name: float(results["results"][TASK][f"{name},none"]) for name in first}
    return [sample["filtered_resps"][0] for sample in samples], means


def say_total(generator: Generator, seconds: float, progress: Progress) -> None:
    """Leave one line about the whole generation."""
    speed = generator.new_tokens / max(seconds, 1e-9)
    progress.line(f"generated {generator.replies:,} replies, {speed:,.0f} new tokens/s", last=True)
