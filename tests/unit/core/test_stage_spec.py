"""What a stage asks for, and with what it is run."""

import pytest

from adder.core.errors import UserError
from adder.core.machine import graphics_cards
from adder.core.progress import Progress
from adder.core.stage_spec import CLUSTER_CORES, Context, Memory, Runtime
from adder.workflow.stages import SPECS


def test_memory_grows_with_the_model():
    memory = Memory(base_mb=8000, bytes_per_parameter=2.0)
    assert memory.megabytes(135_000_000) == 8270
    assert memory.megabytes(8_000_000_000) == 24_000 and memory.megabytes(70_000_000_000) == 148_000
    assert Memory(base_mb=1000).megabytes(8_000_000_000) == 1000


def test_what_a_cluster_is_asked_for_follows_from_the_declaration_and_runtime():
    """GPUs where there are to be any, several for a training alone, whose processes each load the model."""
    train, merge, lengths = (SPECS[name] for name in ("train", "merge", "lengths"))
    two = Runtime(gpus=2, threads=3)
    assert [spec.gpus(Runtime()) for spec in (train, merge, lengths)] == [1, 1, 0]
    assert [spec.gpus(two) for spec in (train, merge, lengths)] == [2, 1, 0]
    assert [spec.gpus(Runtime(device="cpu", gpus=2)) for spec in (train, merge)] == [0, 0]
    assert [spec.cores(Runtime()) for spec in (train, lengths)] == [CLUSTER_CORES, 1]
    assert [spec.cores(two) for spec in (train, lengths)] == [3, 1]
    assert train.megabytes(two, 8_000_000_000) == 40_000 and merge.megabytes(two, 8_000_000_000) == 56_000


def test_a_context_says_where_and_on_how_many_threads():
    context = Context(Progress.silent(), Runtime(device="cpu", threads=3))
    assert (context.device, context.threads) == ("cpu", 3)
    assert Context(Progress.silent()).threads >= 1


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(graphics_cards, "look", lambda: graphics_cards.Surroundings("2.13.0+cpu", None))
    with pytest.raises(UserError, match="runtime.device: 'cuda' was asked for"):
        _ = Context(Progress.silent(), Runtime(device="cuda")).device
