"""Tiles by card, and what benchmarks/cards.py found of them on cards that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adder.kernels import tiles
from adder.kernels.tiles import Tile
from adder.workflow import card_docs

ROOT = Path(__file__).resolve().parents[3]
BENCHMARK = ROOT / "benchmarks" / "cards.py"
SPILLED_BYTES = 128  # a thread: what the first-level cache holds without being felt


def test_hoppers_tiles_are_those_that_were_timed():
    assert tiles.attention_tiles(tiles.HOPPER, 64) == (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(128, 64, 4, 2))
    for size in (80, 96, 128):
        timed = Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 3)
        assert tiles.attention_tiles(tiles.HOPPER, size) == timed
    assert tiles.attention_tiles(tiles.HOPPER, 256) == (Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(32, 32, 4, 2))
    for block_r in (16, 32, 64, 128):
        assert tiles.quantise_and_matmul_tile(tiles.HOPPER, block_r) == Tile(64, 128, 4, 4)


@pytest.mark.parametrize(
    ("major", "minor", "hip", "multiplies", "may_have_fp8"),
    [
        (7, 0, None, False, False),
        (7, 5, None, False, False),
        (8, 0, None, True, False),
        (8, 6, None, True, False),
        (8, 9, None, True, True),
        (9, 0, None, True, True),
        (12, 0, None, True, True),
        (12, 1, None, True, True),
        (9, 4, "6.4", True, False),  # an MI300
        (11, 0, "6.4", True, False),  # an RX 7900
    ],
)
def test_a_card_is_what_its_vendor_and_capability_say(monkeypatch, major, minor, hip, multiplies, may_have_fp8):
    properties = SimpleNamespace(major=major, minor=minor, shared_memory_per_block_optin=99 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    tiles.card_of.cache_clear()
    card = tiles.card_of(torch.device("cuda", 0))
    tiles.card_of.cache_clear()
    assert card == ("nvidia" if hip is None else "amd", (major, minor), 99 * 1024)
    assert tiles.multiplies(card) == multiplies and tiles.may_have_fp8(card) == may_have_fp8


def test_the_fastest_tiles_found_on_a_card_are_that_cards_alone():
    ada, ampere = tiles.card_named("89"), tiles.card_named("86")
    candidates = tiles.attention_candidates(ada, 96)
    fastest = tiles.AttentionTiles(candidates.forward[1], candidates.dq[1], candidates.dkdv[1])
    before = tiles.attention_tiles(ada, 128)
    tiles.use_attention_tiles(ada, 128, fastest)
    try:
        assert tiles.attention_tiles(ada, 96) == fastest != before
        assert tiles.attention_tiles(ampere, 96) == before and tiles.attention_tiles(ada, 64) != fastest
    finally:
        tiles.use_attention_tiles(ada, 128, before)


# ---- what was compiled


@pytest.fixture(scope="module")
def table() -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / "cards.json").read_text())


def over_limits(row: dict) -> bool:
    return row["shared_bytes"] > shared_bytes(row) or row["spilled_bytes"] > SPILLED_BYTES


def shared_bytes(row: dict) -> int:
    """What a block may have on the row's card."""
    return tiles.card_named(row["capability"].replace(".", "")).shared_bytes


def test_the_table_is_of_the_kernels_as_they_are(table):
    digest = subprocess.run(
        [sys.executable, "-c", "import cards; print(cards.source_digest())"],
        capture_output=True,
        text=True,
        cwd=BENCHMARK.parent,
        check=True,
    )
    assert table["digest"] == digest.stdout.strip(), "run `python benchmarks/cards.py`: the kernels have changed"


def test_every_kernel_was_compiled_for_every_card_that_takes_it(table):
    matmuls = {"_attention_forward", "_backward_dq", "_backward_dkdv", "_decode_attention", "_dropout_matmul"}
    for capability in card_docs.COMPILED_FOR:
        found = {row["kernel"] for row in table["kernels"] if row["capability"] == capability}
        assert {"_rms_norm", "_rms_norm_backward", "_apply_rope", "_swiglu", "_dequantise", "_cross_entropy"} <= found
        assert bool(matmuls & found) == (capability != "7.5") and (matmuls <= found or capability == "7.5")
        assert ("_quantise_and_matmul" in found) == (capability in ("8.9", "9.0", "10.0", "12.0"))
        ranks = {row["rank"] for row in table["kernels"] if row["capability"] == capability}
        assert capability == "7.5" or {8, 16, 32, 64, 128, 256} <= ranks
    assert not table["failures"]


def test_no_kernel_needs_more_than_its_card_has(table):
    """What is over a limit is listed in the table with its reason, and still is."""
    over = [row for row in table["kernels"] if over_limits(row)]
    assert all(row["shared_bytes"] <= shared_bytes(row) for row in over)
    unexplained = [row for row in over if reason(row, table) is None]
    assert not unexplained
    assert all(any(reason(row, table) == each["reason"] for row in over) for each in table["exceptions"])


def reason(row: dict, table: dict) -> str | None:
    """Why a row may spill more; None where nothing says so."""
    for each in table["exceptions"]:
        same = row["kernel"] == each["kernel"] and row["capability"] in each["capabilities"]
        if same and (row["rank"] or 0) >= each["from_rank"]:
            return each["reason"]
    return None


@pytest.mark.parametrize("card", ["86", "120"])
def test_a_sample_compiles_to_what_the_table_says(table, card, tmp_path):
    """All kernels of one model, by the Triton that is here: within the card's limits, and the table's own figures."""
    triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    out, cache = tmp_path / "cards.json", {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, BENCHMARK, "--cards", card, "--models", "Llama-3.2-1B", "--ranks", "16", "--out", out]
    subprocess.run(command, check=True, env=os.environ | cache, capture_output=True)
    rows = json.loads(out.read_text())["kernels"]
    assert len(rows) > 20 and not any(over_limits(row) and reason(row, table) is None for row in rows)
    if table["triton"] == triton.__version__:
        known = {figures(row) for row in table["kernels"]}
        assert {figures(row) for row in rows} <= known


def figures(row: dict) -> tuple:
    names = ("kernel", "capability", "rank", "variant", "tile", "shared_bytes", "registers", "spilled_bytes")
    return tuple(row[name] for name in names)
