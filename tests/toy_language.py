"""Rows of a toy language that a tiny model learns in seconds, and the inputs of a training on them."""

import random
import shutil
from pathlib import Path

import pyarrow as pa

from adder.core.files import write_json, write_table
from adder.training.stage import TrainSettings
from tiny import tiny_tokenizer, write_tokens
from training_stage import train_settings

VOCABULARY = 24  # tokens that the toy language uses, from FIRST on
FIRST = 3


def example(ids: list[int], prompt: int, number: int) -> dict:
    return {"id": f"rows:{number}", "input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def chain(number: int, factor: int = 5, noise: float = 0.1, length: int = 16, shift: int = 0) -> dict:
    """A row of the toy language: each token follows from the one before, but for a share of random ones."""
    chance = random.Random(number)
    ids = [chance.randrange(VOCABULARY)]
    while len(ids) < length:
        follows = (ids[-1] * factor + 3) % VOCABULARY
        ids.append(chance.randrange(VOCABULARY) if chance.random() < noise else follows)
    return example([FIRST + shift + token for token in ids], 4, number)


def babble(number: int, length: int = 16) -> dict:
    """A row without any rule: it can only be learnt by heart."""
    chance = random.Random(number)
    return example([FIRST + chance.randrange(300) for _ in range(length)], 4, number)


def leaking(number: int) -> dict:
    """A row whose answer already stands at the end of its prompt."""
    chance = random.Random(number)
    prompt = [FIRST + chance.randrange(VOCABULARY) for _ in range(4)]
    return example(prompt + prompt[-1:] * 4, 4, number)


def many(make, count: int, first: int = 0, **options) -> list[dict]:
    return [make(first + number, **options) for number in range(count)]


def heldout(make=chain, **options) -> list[dict]:
    return many(make, 8, 50_000, **options)


def write_inputs(folder: Path, model: Path, rows: list[dict], held: list[dict], per_pack: int) -> dict[str, Path]:
    inputs = {name: folder / name for name in ("model", "tokenize", "lengths")}
    for path in inputs.values():
        path.mkdir(parents=True)
    shutil.copytree(model, inputs["model"] / "model")
    write_json(inputs["model"] / "source.json", {"source": "tiny", "revision": None})
    tiny_tokenizer().save_pretrained(inputs["tokenize"] / "tokenizer")
    write_tokens(inputs["tokenize"] / "train.arrow", rows)
    write_tokens(inputs["tokenize"] / "heldout.arrow", held)
    packs = [list(range(at, min(at + per_pack, len(rows)))) for at in range(0, len(rows), per_pack)]
    table = {
        "rows": packs,
        "starts": [[0] * len(pack) for pack in packs],
        "seq_lengths": [[len(rows[number]["input_ids"]) for number in pack] for pack in packs],
    }
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in table])
    write_table(inputs["lengths"] / "packs.parquet", pa.table(table, schema=schema))
    return inputs


def quick_settings(per_step: int = 4, learning_rate: float = 3e-3, **changes) -> TrainSettings:
    """Settings of the train stage for one quick epoch."""
    values = {
        "epochs": 1,
        "learning_rate": learning_rate,
        "effective_batch_size": per_step,
        "micro_batch_size": 1,
        "gradient_checkpointing": False,
        "compute_dtype": "float32",
        "eval_samples": 8,
        "eval_times": 4,
        "samples": 0,
    }
    if changes.get("method") != "full":
        values |= {"lora_r": 4, "lora_dropout": 0}
    return train_settings(**{**values, **changes})
