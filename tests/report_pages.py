"""The report of made-up stage folders, and parts of its page as words."""

import shutil
from pathlib import Path
from typing import Any

from adder.core.progress import Progress
from adder.core.stage_spec import Context
from adder.report import run
from adder.report.stage import ReportSettings
from page_parser import Page
from report_fixture import TASKS, write_stage_folders

# With everything that a page can have.
EVERYTHING: dict[str, Any] = {
    "tasks": tuple(TASKS), "judged": True, "merge_bases": True, "price_per_hour": 2.4, "energy": True,
}  # fmt: skip


def make(folder: Path, **options: Any) -> Path:
    """Write stage folders and the report of them; return the report's folder. `options`: of write_stage_folders."""
    settings, inputs = write_stage_folders(folder / "stages", **options)
    return make_again(folder, settings, inputs)


def make_again(folder: Path, settings: ReportSettings, inputs: dict[str, Path]) -> Path:
    """Write the report of these stage folders into `folder`/report, in place of one that is there."""
    out = folder / "report"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    write_report(settings, inputs, out)
    return out


def write_report(settings: ReportSettings, inputs: dict[str, Path], out: Path) -> None:
    """Run the stage, without a word."""
    run.run(settings, inputs, out, Context(Progress.silent()))


def page_of(out: Path) -> Page:
    """The page in a report's folder; its tags nest."""
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert page.stack == []
    return page


def section(out: Path, name: str) -> str:
    """The words of one section of the page."""
    text = (out / "report.html").read_text(encoding="utf-8")
    start = text.index(f'<section id="{name}"')
    return " ".join(" ".join(Page(text[start : text.index("\n</section>", start)] + "</section>").text).split())
