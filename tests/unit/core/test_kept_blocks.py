"""Rows that were read once aren't read again, and what comes out is the same as from nothing."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from adder.core import row_blocks
from adder.core.stage_spec import Context, NoInputs
from adder.data import fetch_rows
from adder.data.stage import RowSettings, Source
from adder.formatting import block_converter
from adder.formatting.run import FormatInputs, run
from adder.formatting.similarity.heldout_overlap import HeldoutIndex
from earlier_results import context_beside, digests
from format_stage import format_settings


def row(number: int) -> str:
    """A line of a file; some rows can't be used, some hold what only a few rows do."""
    kind = random.Random(number).randrange(40)
    if number % 500 == 77:
        return "{broken"  # the reason names the line, so its block is another where lines are added before it
    if kind == 1:
        return json.dumps({"question": f"{number}?", "answer": ""})
    if kind == 2:
        return ""
    more: dict[str, Any] = {"topic": f"t{number % 3}", "label": kind != 3, "n": 2**70 + number}
    alike = number + 13 if kind > 30 else number  # overlaps with another row
    words = " ".join(str(alike * place % 997) for place in range(1, 14))
    asks = "Please tell me what is" if kind > 30 else "What is"
    return json.dumps({"question": f"{asks} {words}?", "answer": f"It is {number} {words}", **more})


class Edited:
    """A file of rows that changes, and the stages "data" and "format" over it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, 0
        self.rows = [row(number) for number in range(1500)]

    def run(self, context: Context, **settings: Any) -> Path:
        """Run both stages; the folder of the second."""
        self.runs += 1
        folder = self.folder / str(self.runs)
        (folder / "data").mkdir(parents=True)
        (folder / "format").mkdir()
        path = self.folder / "rows.jsonl"
        path.write_text("\n".join(self.rows) + "\n")
        fetch_rows.run(RowSettings(sources=[Source(path=str(path))]), NoInputs(), folder / "data", context)
        checks = {"overlap": "drop", "near_duplicates": "report", "max_leaked": 1.0}
        given = {"size": 40, "max_rejected": 0.5} | checks | settings
        run(format_settings(**given), FormatInputs(folder / "data"), folder / "format", context)
        return folder / "format"

    def change(self, choice: random.Random) -> None:
        """Add, remove, change or move some rows at one place."""
        place, count, fresh = choice.randrange(len(self.rows)), choice.choice([1, 1, 3]), choice.randrange(2000, 10**6)
        new = [row(fresh + number) for number in range(count)]
        what = choice.randrange(5)
        if what == 0:
            self.rows += new
        elif what == 1:
            self.rows[place:place] = new
        elif what == 2:
            del self.rows[place : place + count]
        elif what == 3:
            self.rows[place : place + count] = new
        else:
            self.rows.append(self.rows.pop(place))


@pytest.fixture
def converted(monkeypatch) -> list[int]:
    """How many rows each block had that was converted, or surveyed, in this process."""
    monkeypatch.setattr(row_blocks, "SIZE", 12_000)
    counts: list[int] = []
    read = block_converter.parse_line
    monkeypatch.setattr(block_converter, "parse_line", lambda line: (counts.append(1), read(line))[1])
    return counts


def test_after_any_edit_the_bytes_are_those_from_nothing(tmp_path, converted, monkeypatch):
    compared: list[int] = []
    look = HeldoutIndex.look
    monkeypatch.setattr(HeldoutIndex, "look", lambda index, texts: (compared.append(len(texts)), look(index, texts))[1])
    edited, choice = Edited(tmp_path), random.Random(5)
    earlier = [edited.run(context_beside())]
    assert len(converted) > 2 * 1400 and sum(compared) > 900
    assert {"blocks.bin", "blocks.json", "overlap.json"} <= digests(earlier[0]).keys()
    assert (earlier[0] / "leaked.jsonl").read_text().count("8-word overlap") > 5
    few = 0
    for number in range(8):
        edited.change(choice)
        del converted[:], compared[:]
        kept = edited.run(context_beside(*reversed(earlier[-2:])))
        few += sum(compared) < 700
        assert len(converted) < 2 * 450, f"edit {number}: {len(converted)} rows were read"
        assert digests(kept) == digests(edited.run(context_beside())), f"edit {number}"
        earlier.append(kept)
    assert few > 3  # all are compared where other rows are held out


def test_an_equal_file_is_not_read_again_but_after_a_change_of_what_is_made_of_rows(tmp_path, converted, monkeypatch):
    edited = Edited(tmp_path)
    first = edited.run(context_beside())

    def rows_read(**settings: Any) -> int:
        del converted[:]
        edited.run(context_beside(first), **settings)
        return len(converted)

    assert rows_read() == rows_read(size=50, overlap="off") == 0
    assert rows_read(system_prompt="Be brief.") > 1400
    assert rows_read(stratify_by="topic") > 1400
    assert rows_read(near_duplicates="off") > 1400
    edited.rows.append(json.dumps({"question": "a?", "answer": "b", "one more": 1}))  # a column to look at in all rows
    assert rows_read() > 1400
    del edited.rows[-1]
    monkeypatch.setattr(row_blocks, "versions", lambda *names: {"python": "another"})
    assert rows_read() > 2 * 1400


def test_results_that_are_gone_or_of_another_make_are_passed_over(tmp_path, converted):
    edited = Edited(tmp_path)
    first = edited.run(context_beside())
    index = json.loads((first / "blocks.json").read_text())
    (first / "blocks.json").write_text(json.dumps({**index, "made_by": "older code"}))
    del converted[:]
    again = edited.run(context_beside(first, tmp_path / "gone", tmp_path))
    assert len(converted) > 2 * 1400
    assert digests(again)["train.parquet"] == digests(first)["train.parquet"]


def test_several_processes_make_the_same_of_it(tmp_path, converted, monkeypatch):
    monkeypatch.setattr("adder.formatting.run.ENOUGH", 1000)
    edited = Edited(tmp_path)
    first = edited.run(context_beside(threads=2))
    edited.rows.insert(700, row(5000))
    assert digests(edited.run(context_beside(first, threads=2))) == digests(edited.run(context_beside()))
    plain = edited.run(Context(context_beside().progress))
    assert not {"blocks.bin", "blocks.json", "overlap.json"} & digests(plain).keys()
    assert digests(plain).items() < digests(edited.run(context_beside(first))).items()
