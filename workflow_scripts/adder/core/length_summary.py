"""Lengths in a few numbers, the same way wherever they are shown."""

from collections.abc import Sequence

import numpy as np


def summarise(lengths: Sequence[int] | np.ndarray) -> dict:
    """Count, minimum, mean, percentiles and maximum of token counts.

    Percentiles are lengths that occur (the smallest length that at least that share of the examples doesn't exceed),
    so "p99 = 412" means that an example of 412 tokens exists. An empty sequence gives {"count": 0}.
    """
    values = np.asarray(lengths)
    if not len(values):
        return {"count": 0}
    percentiles = (50, 90, 95, 99)
    found = np.percentile(values, percentiles, method="inverted_cdf")
    return {
        "count": len(values),
        "min": int(values.min()),
        "mean": round(float(values.mean()), 2),
        **{f"p{p}": int(value) for p, value in zip(percentiles, found, strict=True)},
        "max": int(values.max()),
    }
