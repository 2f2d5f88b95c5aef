"""Replies to a few held-out prompts while training: what the model says, not only how low its loss is."""

from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig

from adder.core.files import read_jsonl, write_jsonl
from adder.core.progress import Progress
from adder.evaluation.reference_forms import choose_kind, is_match
from adder.tokenization.token_table import TokenTable
from adder.training.distributed import collectives

IGNORED = -100
LONGEST = 256  # new tokens: a look at the replies, not an evaluation
MARGIN = 8  # tokens more than the longest reference, so that a reply that doesn't end can be told


def choose_prompts(tokens: Path, count: int) -> list[dict]:
    """Up to `count` held-out examples as {id, prompt, reference} (ids), the same ones every time: smallest digests.

    The prompt is what stands before the last run of labelled tokens; examples without any are left out.
    """
    table = TokenTable(tokens)
    chosen = []
    for row in np.argsort(table.column("digest"), kind="stable").tolist():
        if len(chosen) == count:
            break
        labels, ids = table.labels(row), table.input_ids(row)
        labelled = np.flatnonzero(labels != IGNORED)
        if not len(labelled):
            continue
        end = int(labelled[-1]) + 1
        start = int(np.flatnonzero(labels[:end] == IGNORED)[-1]) + 1 if (labels[:end] == IGNORED).any() else 0
        if start:
            name = table.ids([row])[0]
            chosen.append({"id": name, "prompt": ids[:start].tolist(), "reference": ids[start:end].tolist()})
    return chosen


class Sampler:
    """Lets the model reply to fixed prompts and keeps the replies in `file`, which outlives a kill.

    `dtype`: of the matrix products, as in training. Each row is {step, id, prompt, reference, reply, exact_match,
    finished}; step 0 is the base. Rows later than `resumed_step` are dropped: they will come again.
    """

    def __init__(self, prompts: list[dict], tokenizer, dtype: str, file: Path, resumed_step: int, progress: Progress):
        self.prompts, self.tokenizer, self.dtype, self.file, self.progress = prompts, tokenizer, dtype, file, progress
        known = list(read_jsonl(file)) if file.exists() else []
        self.rows = [row for row in known if row["step"] <= resumed_step]
        references = [self._text(prompt["reference"]) for prompt in prompts]
        self.kind = choose_kind(references)
        self.limit = min(LONGEST, max((len(prompt["reference"]) for prompt in prompts), default=0) + MARGIN)

    def sample(self, model: torch.nn.Module, step: int) -> float | None:
        """Reply to every prompt; return the share of exact matches, None without prompts. Trains and draws nothing.

        To be called in every process: of a model in shards none has all.
        """
        if not self.prompts:
            return None
        if not any(row["step"] == step for row in self.rows):
            for prompt, ids in zip(self.prompts, self._generate(model), strict=True):
                reply, reference = self._text(ids), self._text(prompt["reference"])
                self.rows.append(
                    {
                        "step": step,
                        "id": prompt["id"],
                        "prompt": self.tokenizer.decode(prompt["prompt"]),
                        "reference": reference,
                        "reply": reply,
                        "exact_match": int(is_match(self.kind, reference, reply)),
                        "finished": len(ids) < self.limit,
                    }
                )
            if collectives.is_main():
                self.file.parent.mkdir(parents=True, exist_ok=True)
                write_jsonl(self.file, self.rows)
        now = [row for row in self.rows if row["step"] == step]
        right = sum(row["exact_match"] for row in now)
        first = " ".join(now[0]["reply"].split())[:70]
        self.progress.say(
            f"step {step}: {right} of {len(now)} sampled replies are right; the first: {first or '(empty)'}"
        )
        return right / len(now)

    def describe(self, step: int) -> dict:
        """The replies of one step in numbers, as the doctor takes them."""
        now = [row for row in self.rows if row["step"] == step]
        return {
            "count": len(now),
            "exact_match": sum(row["exact_match"] for row in now) / len(now),
            "unfinished_share": sum(not row["finished"] for row in now) / len(now),
            "empty_share": sum(not row["reply"] for row in now) / len(now),
            "reply_tokens": sum(len(prompt["reference"]) for prompt in self.prompts) / len(self.prompts),
        }

    @torch.no_grad()
    def _generate(self, model: torch.nn.Module) -> list[list[int]]:
        """New ids of each reply, greedy, its end included."""
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        width = max(len(prompt["prompt"]) for prompt in self.prompts)
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(self.prompts), width), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(self.prompts):
            ids[row, width - len(prompt["prompt"]) :] = torch.tensor(prompt["prompt"])
            mask[row, width - len(prompt["prompt"]) :] = 1
        ends = sorted({prompt["reference"][-1] for prompt in self.prompts} | {self.tokenizer.eos_token_id} - {None})
        config = GenerationConfig(
            max_new_tokens=self.limit, do_sample=False, use_cache=True, eos_token_id=ends, pad_token_id=pad
        )
        try:
            with torch.autocast(device.type, getattr(torch, self.dtype), enabled=self.dtype != "float32"):
                output = model.generate(
                    input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
                )
        finally:
            model.train(was_training)
        replies = []
        for row in output[:, width:].tolist():
            end = next((index for index, token in enumerate(row) if token in ends), len(row) - 1)
            replies.append(row[: end + 1])
        return replies

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
