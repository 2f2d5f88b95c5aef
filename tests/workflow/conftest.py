"""One finished tiny run that the workflow tests change things on."""

import pytest

from project import FirstRun, Project


@pytest.fixture(scope="session")
def project(first_run: FirstRun, tmp_path_factory) -> Project:
    return first_run.copy(tmp_path_factory.mktemp("project"))
