"""Replies to a few held-out prompts while training: what the model says, not only how low its loss is."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from adder.core.files import read_jsonl, write_jsonl
from adder.core.labels import IGNORE_INDEX
from adder.core.progress import Progress
from adder.evaluation.reference_forms import choose_kind, is_match
from adder.evaluation.reply_text import ReplyReader
from adder.tokenization.token_table import TokenTable
from adder.training.distributed import collectives
from adder.training.records import SampleRow

LONGEST = 256  # new tokens: a look at the replies, not an evaluation
SHORTEST = 32  # new tokens that are worth a look
SHARE = 0.03  # of the training's time that samples may take on a GPU
STEP_SECONDS = 0.03  # of a token of all replies: Llama-3.1-8B's shape on NF4 with its adapter, on an H200
# On a CPU nothing is timed: a token of all replies takes as long as training on so many. (SmolLM2-135M, two cores.)
CPU_STEP_TOKENS = 20
SMALL = 50_000  # tokens of a training that is over so soon that nobody waits for its samples
MARGIN = 8  # tokens more than the longest reference, so that a reply that doesn't end can be told


@dataclass(frozen=True)
class Prompt:
    """A held-out example's name, the token ids of its prompt and those of the reply that is right."""

    id: str
    prompt: list[int]
    reference: list[int]


@dataclass(frozen=True)
class SampleTimes:
    """At which of a training's `steps` there are samples: `most`, evenly over evaluations `every` so many steps.

    The start and the last step always have one.
    """

    most: int
    steps: int
    every: int

    def has(self, step: int) -> bool:
        """Whether the evaluation at a step has a sample."""
        share = (self.most - 1) / self.steps
        return step in (0, self.steps) or int(step * share) > int((step - self.every) * share)


def cpu_sample_times(tokens: float, limit: int, steps: int, every: int) -> SampleTimes | None:
    """What keeps samples of `limit` tokens within SHARE of a training on `tokens` on a CPU; None for all there are."""
    if tokens < SMALL:
        return None
    return SampleTimes(max(2, int(SHARE * tokens / (CPU_STEP_TOKENS * limit))), steps, every)


def choose_prompts(tokens: Path, count: int) -> list[Prompt]:
    """Up to `count` held-out examples, the same ones every time: smallest digests.

    The prompt is what stands before the last run of labelled tokens; examples without any are left out.
    """
    table = TokenTable(tokens)
    chosen: list[Prompt] = []
    for row in np.argsort(table.column("digest"), kind="stable").tolist():
        if len(chosen) == count:
            break
        labels, ids = table.labels(row), table.input_ids(row)
        labelled = np.flatnonzero(labels != IGNORE_INDEX)
        if not len(labelled):
            continue
        end = int(labelled[-1]) + 1
        start = int(np.flatnonzero(labels[:end] == IGNORE_INDEX)[-1]) + 1 if (labels[:end] == IGNORE_INDEX).any() else 0
        if start:
            name = table.ids(np.array([row]))[0]
            chosen.append(Prompt(name, ids[:start].tolist(), ids[start:end].tolist()))
    return chosen


class Sampler:
    """Lets the model reply to fixed prompts and keeps the replies in `file`, which outlives a kill.

    `dtype`: of the matmuls, as in training. Rows later than `resumed_step` are dropped: they will come again.
    `allowance`: seconds that all samples together may take, None for as many as are asked for. Where they are short,
    replies are shorter, and fewer evaluations have them: the first and the last always do.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        dtype: str,
        file: Path,
        resumed_step: int,
        progress: Progress,
        allowance: float | None = None,
    ):
        self.prompts, self.tokenizer, self.dtype, self.file, self.progress = prompts, tokenizer, dtype, file, progress
        known: list[SampleRow] = list(read_jsonl(file)) if file.exists() else []
        self.rows = [row for row in known if row["step"] <= resumed_step]
        self.reader = ReplyReader(cast(PreTrainedTokenizerFast, tokenizer))
        self.kind = choose_kind([self.reader.answer(self.reader.text(prompt.reference)) for prompt in prompts])
        self.limit = min(LONGEST, max((len(prompt.reference) for prompt in prompts), default=0) + MARGIN)
        self.allowance, self.spent, self.dearest = allowance, 0.0, 0.0
        self.times: SampleTimes | None = None  # None: at every evaluation
        if allowance is not None:  # two looks at least
            self.limit = min(self.limit, max(SHORTEST, int(allowance / 2 / STEP_SECONDS)))

    def is_due(self, step: int, last: bool) -> bool:
        """Whether there is time for a sample, which every process asks at once: enough must be left for the last."""
        if self.times is not None and not last:
            return self.times.has(step)
        return last or self.allowance is None or self.spent + 2 * self.dearest <= self.allowance

    def sample(self, model: PreTrainedModel | PeftModel, step: int, last: bool = False) -> float | None:
        """Reply to every prompt; return the share of exact matches, None without prompts. Trains and draws nothing.

        To be called in every process: of a model in shards none has all. None also where there is no time for it.
        """
        if not self.prompts or not collectives.call_on_main(self.is_due, step, last):
            return None
        start = time.perf_counter()
        if not any(row["step"] == step for row in self.rows):
            for prompt, ids in zip(self.prompts, self._generate(model), strict=True):
                reply, reference = self.reader.text(ids), self.reader.text(prompt.reference)
                self.rows.append(
                    SampleRow(
                        step=step,
                        id=prompt.id,
                        prompt=decoded(self.tokenizer, prompt.prompt),
                        reference=self.reader.shown(reference).strip(),
                        reply=self.reader.shown(reply).strip(),
                        exact_match=int(is_match(self.kind, self.reader.answer(reference), self.reader.answer(reply))),
                        finished=len(ids) < self.limit,
                    )
                )
            if collectives.is_main():
                self.file.parent.mkdir(parents=True, exist_ok=True)
                write_jsonl(self.file, self.rows)
        seconds = time.perf_counter() - start
        self.spent, self.dearest = self.spent + seconds, max(self.dearest, seconds)
        now = [row for row in self.rows if row["step"] == step]
        right = sum(row["exact_match"] for row in now)
        first = " ".join(now[0]["reply"].split())[:70]
        self.progress.say(
            f"step {step}: {right} of {len(now)} sampled replies are right; the first: {first or '(empty)'}"
        )
        return right / len(now)

    @property
    def reply_tokens(self) -> float | None:
        """Mean length of the references, None without prompts."""
        if not self.prompts:
            return None
        return sum(len(prompt.reference) for prompt in self.prompts) / len(self.prompts)

    @torch.no_grad()
    def _generate(self, model: PreTrainedModel | PeftModel) -> list[list[int]]:
        """New ids of each reply, greedy, its end included."""
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        width = max(len(prompt.prompt) for prompt in self.prompts)
        pad = token_id(self.tokenizer.pad_token_id)
        assert pad is not None
        ids = torch.full((len(self.prompts), width), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(self.prompts):
            ids[row, width - len(prompt.prompt) :] = torch.tensor(prompt.prompt)
            mask[row, width - len(prompt.prompt) :] = 1
        end = token_id(self.tokenizer.eos_token_id)
        ends = sorted({prompt.reference[-1] for prompt in self.prompts} | ({end} if end is not None else set()))
        config = GenerationConfig(
            max_new_tokens=self.limit, do_sample=False, use_cache=True, eos_token_id=ends, pad_token_id=pad
        )
        try:
            with torch.autocast(device.type, getattr(torch, self.dtype), enabled=self.dtype != "float32"):
                output = model.generate(  # pyright: ignore[reportCallIssue] - a method of the bare model, by PEFT's __getattr__
                    input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
                )
        finally:
            model.train(was_training)
        replies = []
        for row in output[:, width:].tolist():
            end = next((index for index, token in enumerate(row) if token in ends), len(row) - 1)
            replies.append(row[: end + 1])
        return replies


def token_id(value: object) -> int | None:
    """A special token's id as a number; typed as anything by transformers."""
    assert value is None or isinstance(value, int)
    return value


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of one row of token ids."""
    text = tokenizer.decode(ids)
    assert isinstance(text, str)  # a list only of several rows
    return text
