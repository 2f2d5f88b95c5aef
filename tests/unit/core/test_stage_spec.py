"""What a stage asks for, and with what it is run."""

import pytest

from adder.core.errors import UserError
from adder.core.machine import graphics_cards
from adder.core.progress import Progress
from adder.core.stage_spec import Context, Memory, Runtime


def test_memory_grows_with_the_model():
    memory = Memory(base_mb=8000, bytes_per_parameter=2.0)
    assert memory.megabytes(135_000_000) == 8270
    assert memory.megabytes(8_000_000_000) == memory.megabytes(None) == 24_000
    assert Memory(base_mb=1000).megabytes(None) == 1000


def test_a_context_says_where_and_on_how_many_threads():
    context = Context(Progress.silent(), Runtime(device="cpu", threads=3))
    assert (context.device, context.threads) == ("cpu", 3)
    assert Context(Progress.silent()).threads >= 1


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(graphics_cards, "look", lambda: graphics_cards.Surroundings("2.13.0+cpu", None))
    with pytest.raises(UserError, match="runtime.device: 'cuda' was asked for"):
        _ = Context(Progress.silent(), Runtime(device="cuda")).device
