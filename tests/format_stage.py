"""The stage "format" run over rows given in a test, what it wrote, and a check that every row is accounted for."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from adder.core.files import read_json, read_jsonl, read_table, write_json
from adder.core.progress import Progress
from adder.core.stage_spec import Context, Runtime
from adder.formatting.accepted_rows import CLASSES
from adder.formatting.records import Card
from adder.formatting.row_formats import SourceFormat, source_format, to_conversation
from adder.formatting.run import COUNTS, FormatInputs, run
from adder.formatting.stage import FormatSettings

FILES = [
    *("card.json", "duplicates.jsonl", "heldout.parquet", "leaked.jsonl", "near_duplicates.jsonl"),
    *("rejects.jsonl", "train.parquet"),
]
QUESTIONS = [f"question {number}" for number in range(400)]
SENTENCE = "the quick brown fox jumps over the lazy dog and runs far away into the dark green forest"
PLAIN: dict[str, Any] = {"max_rejected": 1.0, "max_leaked": 1.0, "near_duplicates": "off", "overlap": "off"}
HELDOUT: dict[str, Any] = dict.fromkeys(("share", "size", "group_by", "stratify_by"))


def user(text: Any) -> dict[str, Any]:
    """A user message."""
    return {"role": "user", "content": text}


def reply(text: Any, **more: Any) -> dict[str, Any]:
    """An assistant message."""
    return {"role": "assistant", "content": text, **more}


def system(text: Any) -> dict[str, Any]:
    """A system message."""
    return {"role": "system", "content": text}


def call(name: str, arguments: Any, **identity: str) -> dict[str, Any]:
    """A tool call."""
    return {"type": "function", **identity, "function": {"name": name, "arguments": arguments}}


def result(text: str, **more: Any) -> dict[str, Any]:
    """What a tool call came to."""
    return {"role": "tool", "content": text, **more}


def qa(question: str, answer: Any = "yes", **more: Any) -> dict[str, Any]:
    """A row of the format question_answer."""
    return {"question": question, "answer": answer, **more}


def numbered(start: int, count: int) -> str:
    """So many words, each with its number."""
    return " ".join(f"w{n}" for n in range(start, start + count))


def format_settings(**changes: Any) -> FormatSettings:
    """Settings that neither look for similar rows nor refuse rejects, with these changes."""
    return FormatSettings(**{**PLAIN, **HELDOUT, **changes})


def read(
    row: dict[str, Any],
    row_format: str = "auto",
    columns: dict[str, str] | None = None,
    system_prompt: str | None = None,
) -> Any:
    """The conversation of one row, read as a source of its own would be."""
    return to_conversation(row, format_of(row, row_format, columns), system_prompt)


def format_of(row: dict[str, Any], row_format: str = "auto", columns: dict[str, str] | None = None) -> SourceFormat:
    """How a source of such rows is read."""
    return source_format("rows", row_format, columns or {}, Counter({tuple(row): 1}))


class Formatted:
    """What one run of the stage wrote."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.card: Card = read_json(out / "card.json")
        self.train, self.heldout = (self.rows(name) for name in ("train", "heldout"))
        self.rejects, self.duplicates, self.leaked, self.near_duplicates = (
            list(read_jsonl(out / f"{name}.jsonl")) for name in ("rejects", "duplicates", "leaked", "near_duplicates")
        )

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Rows of one file, with the messages of each."""
        rows = read_table(self.out / f"{split}.parquet").to_pylist()
        for row in rows:
            row |= json.loads(row["conversation"])
        return rows

    def prompts(self, split: str) -> set[str]:
        """What the rows of one file ask."""
        return {row["messages"][-2]["content"] for row in getattr(self, split)}

    def ids(self, split: str) -> list[str]:
        """Ids of the rows of one file."""
        return [row["id"] for row in getattr(self, split)]


def format_rows(
    tmp_path: Path,
    records: list[Any],
    heldout: dict[str, Any] | None = None,
    reading: dict[str, dict[str, Any]] | None = None,
    **changes: Any,
) -> Formatted:
    """Run the stage over records: rows as dictionaries, or (split, row), or records as rows.jsonl has them.

    heldout: {share}, {size}, ...; reading: {source: {row_format, columns, weight}}; changes of the stage's settings.
    """
    data, out = tmp_path / "data", tmp_path / "format"
    data.mkdir(parents=True)
    out.mkdir()
    written = []
    for number, record in enumerate(records, 1):
        split, row = record if isinstance(record, tuple) else (None, record)
        written.append(row if "source" in row else {"source": "rows", "row": number, "split": split, "data": row})
    # Escaped as a stranger would write it, so that half surrogate pairs get here too.
    (data / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in written))
    write_reading(data, {record["source"]: (reading or {}).get(record["source"], {}) for record in written})
    context = Context(Progress.silent(), Runtime(threads=1))
    summary = run(format_settings(**(heldout or {}), **changes), FormatInputs(data), out, context)
    formatted = Formatted(out)
    assert summary == {name: formatted.card[name] for name in COUNTS}
    assert_all_accounted_for(formatted)
    return formatted


def write_reading(data: Path, readings: dict[str, dict[str, Any]]) -> None:
    """Write reading.json as the stage "data" does, each source as it is by default with these changes."""
    plain = {"row_format": "auto", "columns": {}, "weight": 1.0, "split": None}
    write_json(data / "reading.json", {name: plain | changes for name, changes in readings.items()})


def assert_all_accounted_for(formatted: Formatted) -> None:
    """Every row is in exactly one class, and the files hold what the card says."""
    card = formatted.card
    for counts in [card, *card["by_source"].values()]:
        assert counts["rows_in"] == sum(counts[name] for name in (*CLASSES, "rejected"))
    assert card["accepted"] == card["train"] + card["heldout"]
    assert card["rejected"] == sum(card["rejects_by_reason"].values()) == len(formatted.rejects)
    assert card["train_rows"] == card["train"] + card["repeats"] == len(formatted.train)
    assert card["duplicates"] == len(formatted.duplicates)
    assert card["heldout"] == len(formatted.heldout)
    assert card["leaked"] == sum(row["dropped"] for row in formatted.leaked)
    assert card["near_duplicates"] == sum(row["dropped"] for row in formatted.near_duplicates)
    ids = formatted.ids("train") + formatted.ids("heldout")
    assert len(set(ids)) == len(ids)
    assert sorted(path.name for path in formatted.out.iterdir()) == FILES
