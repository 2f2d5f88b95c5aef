"""Plots: round ticks, escaped labels, spikes that neither vanish nor flatten the rest."""

import itertools
import re

from adder.report import formatting, plots
from page_parser import Page
from report_fixture import HOSTILE


def test_weighed_lengths_are_drawn_as_far_as_they_are_in_sight():
    drawn = plots.histogram([0, 100, 200], [3, 4], 150, "Lengths", "tokens", [64, 128, 150, 4096])
    assert drawn.count('class="weighed"') == 2 and "weighed: 128 tokens" in drawn


def test_plots_escape_their_labels():
    part = plots.Part(HOSTILE, 3, "tuned")
    drawn = [
        plots.flow(3, [part], HOSTILE),
        plots.bars([plots.BarRow(HOSTILE, 1.0, "plain", HOSTILE)], str, HOSTILE),
        plots.lines([plots.Series(HOSTILE, "tuned", [(1, 1.0), (2, 2.0)])], HOSTILE, str, HOSTILE),
        plots.histogram([0, 1, 2], [3, 4], 1, HOSTILE, HOSTILE),
        plots.stacked([part], HOSTILE),
        plots.change({"value": 0.1, "ci95": [0.0, 0.2]}, -0.1, 0.3, HOSTILE),
    ]
    for svg in drawn:
        assert "<script" not in svg
        page = Page(svg)
        assert page.stack == [] and page.tags[0][1]["aria-label"] == HOSTILE


def test_ticks_are_round_and_inside():
    assert plots.ticks(0, 2.3, 4) == [0, 1, 2]
    assert plots.ticks(1, 122, 7) == [20, 40, 60, 80, 100, 120]
    assert plots.ticks(5, 5) == [5]


def test_an_axis_has_no_power_of_ten_beside_plain_numbers():
    def labels(top):
        series = plots.Series("rate", "plain", [(1, 0.0), (2, top)])
        drawn = plots.lines([series], "step", formatting.number, "Rate")
        return re.findall(r'class="tick end" x="48"[^>]*>([^<]+)<', drawn)

    assert labels(0.0018) == ["0", "0.0005", "0.001", "0.0015"]
    assert labels(2e-4) == ["0", "1×10⁻⁴", "2×10⁻⁴"]


def test_a_curve_with_holes_or_a_single_point_is_drawn():
    series = plots.Series("loss", "tuned", [(1, 2.0), (2, float("nan")), (3, 1.0)])
    assert plots.lines([series], "step", str, "Loss").count('class="hit"') == 2
    assert "polyline" in plots.lines([series._replace(points=[(1, 2.0)])], "step", str, "Loss")
    assert plots.lines([series._replace(points=[])], "step", str, "Loss") == ""
    long = series._replace(points=[(n, float(n)) for n in range(100_000)])
    assert len(plots.lines([long], "step", str, "Loss")) < 150_000


def test_one_spike_does_not_flatten_the_curve():
    level = [(n, 1.0 + 0.5 * (n % 7) / 7) for n in range(1, 101)]
    spiked = [(x, 400.0 if x == 60 else y) for x, y in level]
    series = plots.Series("loss", "tuned", spiked)
    drawn = plots.lines([series], "step", str, "Loss", adapt=True)
    assert "1 value above the axis, up to 400.0" in drawn and drawn.count('class="over tuned"') == 1
    assert "step 60 · loss 400.0" in drawn
    heights = [float(pair.split(",")[1]) for pair in re.search(r'polyline[^>]*points="([^"]*)"', drawn)[1].split()]
    assert sorted(heights)[50] < 100, "the usual values use the height of the plot"
    assert "above the axis" not in plots.lines([series], "step", str, "Loss")
    # A loss that climbs for good, or begins high, is no outlier.
    climbed = [1.0] * 50 + [9.0] * 50
    assert plots.usual_top(climbed) == 9.0 and plots.usual_top(climbed[::-1]) == 9.0
    assert plots.usual_top([0.0, 0.0, 0.0]) == 0.0


def test_losses_of_very_different_sizes_get_a_logarithmic_axis():
    falling = [(n, 3.0 * 0.9**n) for n in range(100)]
    held = plots.Series("held-out loss", "heldout", [(99, 0.01)], dots=True)
    series = [plots.Series("loss", "tuned", falling), held]
    drawn = plots.lines(series, "step", str, "Loss", adapt=True)
    assert "logarithmic axis" in drawn and "above the axis" not in drawn
    heights = [float(pair.split(",")[1]) for pair in re.search(r'polyline[^>]*points="([^"]*)"', drawn)[1].split()]
    steps = [after - before for before, after in itertools.pairwise(heights)]
    assert max(steps) - min(steps) < 0.3, "a constant ratio is a straight line"
    zero = [plots.Series("loss", "tuned", [*falling, (100, 0.0)])]
    assert "nan" not in plots.lines(zero, "step", str, "Loss", adapt=True)
    assert plots.log_ticks(0.01, 3.5) == [0.01, 0.03, 0.1, 0.3, 1, 3]
    assert plots.log_ticks(1e-4, 1e4) == [1e-4, 0.01, 1, 100, 1e4]


def test_a_thinned_curve_keeps_its_spikes():
    points = [(n, 40.0 if n == 5_557 else 1.0) for n in range(20_000)]
    drawn = plots.lines([plots.Series("loss", "tuned", points)], "step", str, "Loss", marks=[
        plots.Mark(777, "best", HOSTILE)
    ])  # fmt: skip
    assert "step 5,557 · loss 40.0" in drawn and "step 777 · loss 1.0" in drawn and "<script" not in drawn
    heights = [float(pair.split(",")[1]) for pair in re.search(r'polyline[^>]*points="([^"]*)"', drawn)[1].split()]
    assert min(heights) < max(heights) - 100 and len(heights) <= plots.MAX_DRAWN


def test_labels_of_marks_stay_on_the_plot():
    series = plots.Series("loss", "tuned", [(n, 1.0 + n) for n in range(101)])
    marks = [plots.Mark(x, "best", f"gradient explodes, loss spikes, best and kept: step {x}") for x in (
        0, 45, 55, 100
    )]  # fmt: skip
    drawn = plots.lines([series], "step", str, "Loss", marks=marks)
    labels = re.findall(r'<text class="mark best (start|end)" x="([\d.]+)" y="([\d.]+)">([^<]*)', drawn)
    assert len(labels) == 4 and len({y for _, _, y, _ in labels}) == 4
    for anchor, x, _, label in labels:
        left = float(x) - (6.0 * len(label) if anchor == "end" else 0)
        assert left >= 0 and left + 6.0 * len(label) <= plots.WIDTH
