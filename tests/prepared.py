"""Sources as a configuration has them, run through the stages "data" and "format": what users bring, and what it
became."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adder.core.progress import Progress
from adder.core.stage_spec import Context, Runtime
from adder.formatting.run import FormatInputs, run
from data_stages import write_rows
from format_stage import Formatted, assert_all_accounted_for, format_settings


def prepare(
    folder: Path,
    listed: list[dict[str, Any]],
    heldout: dict[str, Any] | None = None,
    tests: Iterable[Any] = (),
    heldout_sources: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> tuple[Formatted, str]:
    """Read the sources and format their rows; what that made, and all that it showed. changes: of format's settings."""
    written = write_rows(folder / "data", listed, heldout_sources, tests)
    out, stream = folder / "format", io.StringIO()
    out.mkdir()
    settings = format_settings(**(heldout or ({} if heldout_sources else {"size": 1})), **changes)
    run(settings, FormatInputs(folder / "data"), out, Context(Progress("format", stream), Runtime(threads=1)))
    formatted = Formatted(out)
    assert_all_accounted_for(formatted)
    return formatted, written.shown + stream.getvalue()


def conversations(formatted: Formatted) -> list[list[dict[str, Any]]]:
    """The messages of all rows that are used, in the order of their ids."""
    rows = sorted(formatted.train + formatted.heldout, key=lambda row: (len(row["id"]), row["id"]))
    return [row["messages"] for row in rows]
