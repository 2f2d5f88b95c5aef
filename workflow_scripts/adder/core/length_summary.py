"""Lengths in a few numbers, the same way wherever they are shown."""

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt


class LengthSummary(TypedDict):
    """Count, minimum, mean, percentiles and maximum of lengths; of no lengths the count alone."""

    count: int
    min: NotRequired[int]
    mean: NotRequired[float]
    p50: NotRequired[int]
    p90: NotRequired[int]
    p95: NotRequired[int]
    p99: NotRequired[int]
    max: NotRequired[int]


def summarise(lengths: Sequence[int] | npt.NDArray[Any]) -> LengthSummary:
    """Count, minimum, mean, percentiles and maximum of token counts.

    Percentiles are lengths that occur (the smallest length that at least that share of the examples doesn't exceed),
    so "p99 = 412" means that an example of 412 tokens exists. An empty sequence gives {"count": 0}.
    """
    values = np.asarray(lengths)
    if not len(values):
        return {"count": 0}
    p50, p90, p95, p99 = (int(value) for value in np.percentile(values, (50, 90, 95, 99), method="inverted_cdf"))
    return {
        "count": len(values),
        "min": int(values.min()),
        "mean": round(float(values.mean()), 2),
        "p50": p50,
        "p90": p90,
        "p95": p95,
        "p99": p99,
        "max": int(values.max()),
    }
