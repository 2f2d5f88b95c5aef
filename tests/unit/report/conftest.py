"""Reports that many tests look at and none changes."""

from pathlib import Path

import pytest

from report_pages import EVERYTHING, make


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with tasks, a judge, a choice of the merge's base, price and energy."""
    return make(tmp_path_factory.mktemp("everything"), **EVERYTHING)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a plain run."""
    return make(tmp_path_factory.mktemp("report"))
