"""Plots of many runs at once: axes, outliers, the front of cost against score."""

import re

import pytest

from adder.report.comparison import plots


def test_a_run_that_diverged_does_not_flatten_the_others():
    def curve(end):
        return [(n, 2.0 - 0.015 * n) for n in range(99)] + [(99, end)]

    series = [plots.RunCurve(f"r{n}", f"r{n}", n, curve(0.5)) for n in range(4)]
    series.append(plots.RunCurve("lost", "r4", 4, curve(900.0)))
    drawn = plots.overlay(series, "step", str, "loss")
    assert "1 run above the axis, up to 900" in drawn
    # A loss of 2 stands near the top, not on the floor as it would on an axis up to 900.
    assert float(re.search(r'class="curve" points="54.0,([\d.]+)', drawn).group(1)) < 60


def test_axes_of_numbers_and_of_words():
    share, labels = plots._scale([1e-5, 1e-4, 1e-3])
    assert [share(value) for value in (1e-5, 1e-4, 1e-3)] == pytest.approx([0, 0.5, 1])
    assert [text for _, text in labels] == ["1e-05", "0.0001", "0.001"]
    share, _ = plots._scale([8, 16, 12])
    assert share(12) == 0.5  # less than a factor of eight: linear
    share, labels = plots._scale(["qlora", None, True, 3])
    assert sorted(share(value) for value in ("qlora", None, True, 3)) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [text for _, text in labels] == ["3", "none", "qlora", "true"]


def test_labels_of_an_axis_do_not_lie_on_one_another():
    labels = [(19, "19"), (85.5, "85.5"), (86, "86"), (90, "90")]
    assert [text for _, text in plots._apart(labels, lambda value: -2 * value)] == ["90", "19"]
    assert [text for _, text in plots._apart(labels, lambda value: -3 * value)] == ["90", "19", "85.5"]


def test_the_line_of_the_cost_plot_joins_the_runs_that_no_cheaper_one_beats():
    points = [
        plots.RunPoint(name, "r0", 0, x, y, None, "")
        for name, x, y in (("a", 1, 5), ("b", 2, 4), ("c", 3, 9), ("d", 3, 8))
    ]
    assert [one.name for one in plots._front(points, lower_is_better=False)] == ["a", "c"]
    assert [one.name for one in plots._front(points, lower_is_better=True)] == ["a", "b"]


def test_curves_of_very_many_runs_are_drawn_once():
    for count, lines in ((plots.MANY, 2), (plots.MANY + 1, 1)):
        series = [plots.RunCurve(f"r{n}", "rest", n, [(0, 1.0), (1, 0.5)]) for n in range(count)]
        drawn = plots.overlay(series, "step", str, "loss")
        assert drawn.count("<polyline") == lines * count and drawn.count('class="hit"') == 2 * count
