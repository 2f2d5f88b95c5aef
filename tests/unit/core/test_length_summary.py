"""Lengths in a few figures, all of which occur."""

import numpy as np

from adder.core.length_summary import summarise


def test_percentiles_are_lengths_that_occur():
    found = summarise(np.arange(1, 101))
    assert found == {"count": 100, "min": 1, "mean": 50.5, "p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    assert summarise([7, 7, 1000])["p50"] == 7


def test_of_no_lengths_there_is_the_count_alone():
    assert summarise([]) == {"count": 0}
