"""The stage "lengths" run over examples whose tokens carry their own number, and a check of the packs it makes."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from adder.core.files import read_json
from adder.core.labels import IGNORE_INDEX
from adder.core.progress import Progress
from adder.core.stage_spec import Context
from adder.packing.records import LengthsRecord
from adder.packing.run import LengthsInputs, run
from adder.packing.stage import LengthsSettings
from adder.training.packed_dataset import PackedExamples
from tiny import write_tokens

CHOICES: dict[str, Any] = {"effective_batch_size": 16, "max_examples": None, "max_dropped": 1.0}


class Packed:
    """What one run of the stage made: the examples it read, the packs as training reads them, and lengths.json."""

    def __init__(self, rows: list[dict[str, Any]], tokens: Path, out: Path):
        self.rows, self.tokens, self.out = rows, tokens, out
        self.record: LengthsRecord = read_json(out / "lengths.json")
        examples = PackedExamples(tokens, out / "packs.parquet", seed=0, reshuffle=False)
        self.packs = [examples.pack(number) for number in range(len(examples.seq_lengths))]


def pack(folder: Path, lengths: Any, context: int | None = 512, name: str = "out", **settings: Any) -> Packed:
    """Run the stage on examples of these lengths; half of their tokens carry loss. `name`: of the result's folder."""
    generator = np.random.default_rng(0)
    ids = [[1000 * number + position for position in range(length)] for number, length in enumerate(lengths)]
    labels = [[token if generator.random() < 0.5 else IGNORE_INDEX for token in example] for example in ids]
    rows = [
        # A digest that is the row's own, in no order.
        {"id": f"rows:{n + 1}", "input_ids": ids[n], "labels": labels[n], "digest": (n * 2654435761) % 2**32}
        for n in range(len(ids))
    ]
    inputs = LengthsInputs(folder / "tokenize", folder / "model")
    inputs.tokenize.mkdir(exist_ok=True)
    (inputs.model / "model").mkdir(parents=True, exist_ok=True)
    tokens = inputs.tokenize / "train.arrow"
    write_tokens(tokens, rows)
    (inputs.model / "model" / "config.json").write_text(json.dumps({"max_position_embeddings": context}))
    out = folder / name
    out.mkdir()
    run(LengthsSettings(**{**CHOICES, **settings}), inputs, out, Context(Progress.silent()))
    return Packed(rows, tokens, out)


def pieces_of(rows: list[dict[str, Any]], packs: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    """(example, first token, last token) of every piece in order; ids and labels must be the example's own there."""
    seen = []
    for found in packs:
        position = 0
        assert len(found["input_ids"]) == len(found["labels"]) == found["seq_lengths"].sum()
        for length in found["seq_lengths"]:
            number, start = divmod(int(found["input_ids"][position]), 1000)
            here, there = slice(position, position + length), slice(start, start + length)
            assert found["input_ids"][here].tolist() == rows[number]["input_ids"][there]
            assert found["labels"][here].tolist() == [IGNORE_INDEX, *rows[number]["labels"][there][1:]]
            seen.append((number, start, start + int(length)))
            position += length
    return seen


def examples_of(rows: list[dict[str, Any]], packs: list[dict[str, Any]]) -> list[int]:
    """Numbers of the examples in order; every piece must be an example from its start to its end."""
    found = pieces_of(rows, packs)
    assert all((start, end) == (0, len(rows[number]["input_ids"])) for number, start, end in found)
    return [number for number, _, _ in found]
