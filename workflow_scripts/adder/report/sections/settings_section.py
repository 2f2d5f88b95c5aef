"""The report's view of every setting, and where its value came from."""

from adder.report.page_section import PageSection, RunReport, View
from adder.report.resolved_settings import resolve

ORIGINS = ("chosen", "run", "config", "default")


def view(run: RunReport) -> View:
    """Every setting with its value and its origin."""
    return {"settings": resolve(run.settings, run.facts), "origins": ORIGINS}


SECTION = PageSection(name="settings", anchor="settings", title="Settings", view=view)
