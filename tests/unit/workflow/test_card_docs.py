"""The table of cards says what the code does on each, and no more than was run or compiled."""

import json
from pathlib import Path

import pytest

from adder.kernels import tiles
from adder.workflow import card_docs

TABLE = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "cards.json"


def test_every_card_has_its_row():
    lines = card_docs.table().splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == [row.called for row in card_docs.CARDS]
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("called", "said"),
    [
        ("T4", "7.5 | fp16, scaled | each example by itself, by torch | those without matmuls | with torch's"),
        ("RTX 3090, A10G", "8.6 | bf16 | Adder's kernel | all | yes | no |"),
        ("RTX 5090", "12.0 | bf16 | Adder's kernel | all | yes | where a trial step agrees |"),
        ("MI300X", "gfx942 | bf16 | Adder's kernel | all | yes | no |"),
    ],
)
def test_what_is_used_on_a_card(called, said):
    line = next(line for line in card_docs.table().splitlines() if line.startswith(f"| {called} |"))
    assert line.startswith(f"| {called} | {said}")


def test_nothing_is_called_compiled_that_was_not():
    table = json.loads(TABLE.read_text())
    compiled = {row["capability"] for row in table["kernels"]}
    assert compiled == {*card_docs.COMPILED_FOR}
    for line in card_docs.table().splitlines()[2:]:
        called, capability, *_, tried = (cell.strip() for cell in line.strip("|").split(" | "))
        assert (tried == "run for real") == (called in {"H100", "H200"})
        assert tried == "run for real" or (tried == "not tried") == (capability not in compiled)


def test_memory_is_counted_as_it_was_measured():
    """Llama-3.1-8B with all layers checkpointed on an H100: 9.5, 13.4 and 19.6 GB at 4, 8 and 16 packs of 2,048."""
    shape = card_docs.MODELS["Llama-3.1-8B"]
    for packs, measured in ((4, 9.5), (8, 13.4), (16, 19.6)):
        allocated = card_docs.qlora_bytes(shape, packs * 2048) - card_docs.OVERHEAD * card_docs.GIB
        assert allocated / card_docs.GB == pytest.approx(measured, rel=0.1)


def test_larger_cards_take_larger_models():
    assert [card_docs.largest_model(gb) for gb in (2, 6, 12, 24, 80)] == [
        "–",
        "Llama-3.2-3B",
        "Llama-3.1-8B",
        "Qwen2.5-14B",
        "Llama-3.1-70B",
    ]
    assert tiles.card_named("86").shared_bytes == 99 * 1024
