"""The generators of random numbers, kept as they are while something else runs."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever is drawn inside, Python's, numpy's and torch's generators go on as if nothing had been."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    before_cuda = torch.cuda.get_rng_state_all() if cuda else []
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if cuda:
            torch.cuda.set_rng_state_all(before_cuda)
