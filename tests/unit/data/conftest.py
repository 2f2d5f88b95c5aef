"""Fixtures of the tests of what is fetched."""

import shutil
from pathlib import Path

import pytest

from adder.data import http_download
from model_files import write_gguf


@pytest.fixture
def downloads(tmp_path, monkeypatch) -> Path:
    """An own folder of fetched files, and no waiting between two attempts."""
    monkeypatch.setenv("ADDER_DOWNLOADS", str(tmp_path / "downloads"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(http_download, "FIRST_WAIT", 0.001)
    return tmp_path / "downloads"


@pytest.fixture
def model_copy(tiny_model_dir, tmp_path) -> Path:
    """A copy of the tiny model to break."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model_dir, tmp_path_factory) -> Path:
    """The tiny model as one .gguf file."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_model_dir, license="mit")
