"""The stages "model" and "data" run on sources as a configuration has them, and rows for tests of what reads them."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from adder.core.files import read_json, read_jsonl
from adder.core.progress import Progress
from adder.core.stage_spec import Context, NoInputs
from adder.data import fetch_model, fetch_rows, raw_rows, sources
from adder.data.model_types import ModelRecord, ModelSettings
from adder.data.records import Reading, RowRecord, RowSummary, SourceRecord
from adder.data.row_types import Row
from adder.data.stage import RowSettings, Source

SUMS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(3000)]
SUM_LINES = "".join(json.dumps(row) + "\n" for row in SUMS).encode()
GREETINGS = [{"question": "Grüße?", "answer": "ja"}, {"question": "2+2\u2028?", "answer": "4"}]


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(st.characters(), max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=12,
)


class Written(NamedTuple):
    """What the stage "data" wrote, returned and showed."""

    summary: RowSummary
    records: list[RowRecord]
    entries: list[SourceRecord]
    reading: dict[str, Reading]
    shown: str


def write_model(out: Path, source: Path | str, progress: Progress | None = None, **settings: Any) -> ModelRecord:
    """Run the stage "model" into the folder `out`, made here; return its source.json."""
    out.mkdir(parents=True)
    context = Context(progress or Progress.silent())
    fetch_model.run(ModelSettings(source=str(source), **settings), NoInputs(), out, context)
    return read_json(out / "source.json")


def write_rows(
    out: Path, listed: list[dict[str, Any]], heldout: list[dict[str, Any]] | None = None, tests: Iterable[Any] = ()
) -> Written:
    """Run the stage "data" into the folder `out`, made here; sources as in a configuration."""
    out.mkdir(parents=True)
    stream = io.StringIO()
    settings = RowSettings.model_validate({"sources": listed, "heldout_sources": heldout, "tests": list(tests)})
    summary = fetch_rows.run(settings, NoInputs(), out, Context(Progress("data", stream)))
    records = list(read_jsonl(out / "rows.jsonl"))
    return Written(
        summary, records, read_json(out / "sources.json"), read_json(out / "reading.json"), stream.getvalue()
    )


def data(records: Iterable[RowRecord]) -> list[dict[str, Any]]:
    """The rows themselves, all of which could be read."""
    return [record["data"] for record in records if "data" in record]


def read(path: Path, **settings: Any) -> list[tuple[int, Row]]:
    """(row number, row) of one source, a file or pattern."""
    source = Source(path=str(path), **settings)
    named = [(str(n), file) for n, file in enumerate(sources.fetch(source, "data.sources.0", Progress.silent()))]
    return [(number, row) for _, number, row in raw_rows.read_source(source, named)]
