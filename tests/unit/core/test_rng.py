"""What is drawn aside leaves the generators as they were."""

import random

import numpy as np
import torch

from adder.core.rng import undisturbed


def test_every_generator_goes_on_as_if_nothing_had_been_drawn():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first, expected = draw(), draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert draw() == first
    with undisturbed():
        draw()
    assert draw() == expected
