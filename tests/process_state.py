"""What tests share with those that run after them in the same process, put back as it was."""

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Put back what is changed inside: environment, working directory, import path, logging, signals, torch's settings.

    Modules that were imported from temporary folders are forgotten, so that another of their name is found.
    """
    environment, folder, path = dict(os.environ), Path.cwd(), list(sys.path)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        os.chdir(folder)
        sys.path[:] = path
        root.handlers[:] = handlers
        root.setLevel(level)
        for number, handler in signals.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)
        _reset_torch()
        temporary = str(Path(tempfile.gettempdir()).resolve() / "pytest-of-")
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(temporary):
                del sys.modules[name]


def _reset_torch() -> None:
    """As torch is when it has just been imported; where nobody has, nothing is to be done."""
    if "torch" in sys.modules:
        import torch

        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].partition(",")[0]))
