"""What every section of the report's page is: a template, and what it shows of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from adder.report.facts import RunFacts
from adder.report.run_metrics import Metrics
from adder.report.stage import ReportSettings

View = dict[str, Any]
"""What a template shows, by the names that it has for each part."""
Figure = tuple[str, str, str]
"""A key figure: what it is, its value, and a note."""


class RunReport(NamedTuple):
    """What a section is made from: what the report was told, what the stages left, and the figures made of it."""

    settings: ReportSettings
    facts: RunFacts
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class PageSection:
    """A section of the page.

    name: of its template, `templates/<name>.html.jinja`, and of what that shows within it.
    anchor: where links to it lead.
    title: what the navigation calls it.
    view: what its template shows; a section with nothing to show is left out.
    """

    name: str
    anchor: str
    title: str
    view: Callable[[RunReport], View]
