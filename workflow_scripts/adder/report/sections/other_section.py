"""What stages show that no section knows: their figures, one block a stage."""

from collections.abc import Iterator, Mapping
from typing import Any

from adder.report.formatting import cell, heading
from adder.report.page_section import Figure, PageSection, RunReport, View


def view(run: RunReport) -> View:
    """The figures of each such stage; nothing where there is none."""
    stages = [(stage, figures(contents)) for stage, contents in run.facts.other.items()]
    return {"stages": stages} if stages else {}


def figures(contents: Mapping[str, Any]) -> list[Figure]:
    """Numbers, words, truth values and choices in what a stage shows, by their keys; of rows, how many there are."""
    found: list[Figure] = []
    for name, content in contents.items():
        if isinstance(content, dict):
            found += _scalars(content, "")
        else:
            found.append((heading(name), f"{len(content):,}", "rows"))
    return found


def _scalars(content: Mapping[str, Any], note: str) -> Iterator[Figure]:
    for key, value in content.items():
        if isinstance(value, dict) and {"value", "reason"} <= value.keys():
            yield heading(key), cell((key, value["value"])), value["reason"]
        elif isinstance(value, dict):
            yield from _scalars(value, heading(key))
        elif value is None or isinstance(value, str | int | float):
            yield heading(key), cell((key, value)), note


SECTION = PageSection(name="other", anchor="other", title="Further stages", view=view)
