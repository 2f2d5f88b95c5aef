"""Plots of many runs at once, as inline SVG like those of `plots`.

Every mark of a run stands in a group of class `run` with the run's number in `data-run`, by which the page's script
shows, hides and highlights it. `kind` is the CSS class of its colour. Labels go through `escape`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple, Protocol

from adder.report.formatting import in_words
from adder.report.plots import WIDTH, Box, Show, log_ticks, needs_log, svg, thin, ticks, usual_top

MAX_TARGETS = 1500  # points of a plot that answer to the pointer; more would only make the page heavy
# Of more runs the curves lie on one another: their points answer to the pointer, and lines of their own for it would
# only double the page.
MANY = 100
AXIS_STEP = 130  # between the axes of parallel coordinates: room for a setting's name
MAX_NAMED = 8  # runs that have their name beside their dot; of more only those that no cheaper one beats
LINE = 11  # height of a line of labels
LETTER = 6.2  # width of a letter, roughly, at the style sheet's size


class OfRun(Protocol):
    """A mark of a run."""

    @property
    def kind(self) -> str:
        """CSS class of its colour."""
        ...

    @property
    def run(self) -> int:
        """The run's number."""
        ...


class RunCurve(NamedTuple):
    """A run's curve."""

    name: str
    kind: str
    run: int
    points: Sequence[tuple[float, float]]


class Axis(NamedTuple):
    """An axis of parallel coordinates: a value a run; `flip`: the smallest value on top."""

    name: str
    values: Sequence[Any]
    flip: bool = False


class RunLine(NamedTuple):
    """A run's line through parallel coordinates, and what it says under the pointer."""

    name: str
    kind: str
    run: int
    title: str


class RunPoint(NamedTuple):
    """A run's dot with its 95 % interval in y, and what it says under the pointer."""

    name: str
    kind: str
    run: int
    x: float
    y: float
    ci95: Sequence[float] | None
    title: str


def overlay(series: Sequence[RunCurve], x_name: str, show: Show, label: str, dots: bool = False) -> str:
    """A curve a run over the same x; "" without points.

    Values of very different sizes get a logarithmic axis. What lies far above all else is cut off at the axis' end, so
    that one run that diverged doesn't flatten the others; the plot says so.
    """
    every = sorted(point for one in series for point in one.points)
    if not every:
        return ""
    ys = [y for _, y in every]
    top = usual_top(ys)
    log = needs_log(ys, top)
    low = max(min(y for y in ys if y > 0), top * 1e-6) / 1.1 if log else min(0.0, *ys)
    high = max(ys) * 1.15 if log else low + (top - low) * 1.04 or 1.0
    box = Box(54, 16, WIDTH - 8, 208, every[0][0], every[-1][0], low, high, log)
    marks = box.axes(x_name, show)
    notes = ["logarithmic axis"] if log else []
    if over := sum(any(y > high for _, y in one.points) for one in series):
        notes.append(f"{over} {'run' if over == 1 else 'runs'} above the axis, up to {show(max(ys))}")
    if notes:
        marks.append(f'<text class="tick" x="{box.left}" y="{box.bottom + 31}">{escape("; ".join(notes))}</text>')
    most = max(2, MAX_TARGETS // len(series))
    for one in reversed(series):
        places = [(box.x(x), box.y(y)) for x, y in one.points]
        lines = _lines(places, len(series) > MANY)
        for (x, y), (cx, cy) in thin(list(zip(one.points, places, strict=True)), most):
            text = escape(f"{one.name} · {x_name} {x:,g} · {show(y)}")
            lines += [
                f'<g class="hit"><title>{text}</title><circle class="target" cx="{cx:.1f}" cy="{cy:.1f}" r="6"/>'
                f'<circle class="dot{"" if dots else " quiet"}" cx="{cx:.1f}" cy="{cy:.1f}" r="3"/>'
                f'<text class="read end" x="{box.right}" y="11">{text}</text></g>'
            ]
        marks.append(_run(one, lines))
    return svg(WIDTH, box.bottom + 36, label, marks)


def parallel(axes: Sequence[Axis], runs: Sequence[RunLine], label: str) -> str:
    """Parallel coordinates: an upright axis a setting and the score as the last, a line a run.

    The runs stand in the order of the axes' values. Numbers that span a factor of eight or more get a logarithmic axis;
    what isn't a number, a place each.
    """
    left, top, bottom = 74, 46, 226
    width = max(WIDTH, left + AXIS_STEP * (len(axes) - 1) + 92)
    step = (width - left - 92) / (len(axes) - 1)
    drawn_axes, places = [], []
    for place, axis in enumerate(axes):
        x = left + step * place
        share, labels = _scale(axis.values)

        def y(value: Any, share=share, flip=axis.flip) -> float:
            at = 1 - share(value) if flip else share(value)
            return bottom - (bottom - top) * at

        places.append([(x, y(value)) for value in axis.values])
        drawn_axes.append(f'<line class="axis upright" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        # Names stand on two levels, so that long ones side by side don't run into each other.
        name = f"{escape(_short(axis.name, 1.7 * AXIS_STEP))}<title>{escape(axis.name)}</title>"
        drawn_axes.append(f'<text class="name middle" x="{x:.1f}" y="{14 if place % 2 else 32}">{name}</text>')
        for value, text in _apart(labels, y):
            room = AXIS_STEP - 46 if place else left - 20
            text = f"{escape(_short(text, room))}<title>{escape(text)}</title>"
            drawn_axes.append(f'<text class="tick end" x="{x - 7:.1f}" y="{y(value) + 3.5:.1f}">{text}</text>')
    lines = list(zip(runs, zip(*places, strict=True), strict=True))
    marks = []
    for one, points in reversed(lines):
        dots = [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
        title = escape(f"{one.name}: {one.title}")
        read = f'<text class="read middle" x="{width / 2:g}" y="{bottom + 24}">{title}</text>'
        drawn = "".join([f"<title>{title}</title>", *_lines(points, len(runs) > MANY), *dots, read])
        marks.append(_run(one, [f'<g class="hit">{drawn}</g>']))
    # The axes' numbers stand above the lines, which would cross them out.
    return svg(width, bottom + 34, label, [*marks, *drawn_axes], "plot broad" if width > WIDTH else "plot")


def scatter(points: Sequence[RunPoint], x_name: str, show: Show, label: str, lower_is_better: bool) -> str:
    """Score against cost, a dot a run with its 95 % interval.

    A line joins the runs that no cheaper run beats; where there are many runs, only those have their name beside them.
    """
    ends = [end for one in points for end in (one.y, *(one.ci95 or []))]
    room = (max(ends) - min(ends)) * 0.06 or abs(ends[0]) * 0.1 or 1.0
    low = min(ends) - room if min(ends) < 0 else max(0.0, min(ends) - room)
    box = Box(54, 16, WIDTH - 8, 208, 0.0, max(one.x for one in points) * 1.08 or 1.0, low, max(ends) + room)
    marks = box.axes(x_name, show)
    front = _front(points, lower_is_better)
    marks.append(f'<polyline class="front" points="{_points([(box.x(p.x), box.y(p.y)) for p in front])}"/>')
    for one in reversed(points):
        x, y = box.x(one.x), box.y(one.y)
        title = escape(f"{one.name}: {one.title}")
        drawn = [f"<title>{title}</title>"]
        if one.ci95:
            low_y, high_y = (box.y(end) for end in one.ci95)
            drawn.append(f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{low_y:.1f}" y2="{high_y:.1f}"/>')
        drawn.append(f'<circle class="target" cx="{x:.1f}" cy="{y:.1f}" r="9"/>')
        drawn.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>')
        drawn.append(f'<text class="read end" x="{box.right}" y="11">{title}</text>')
        marks.append(_run(one, [f'<g class="hit">{"".join(drawn)}</g>']))
    named = points if len(points) <= MAX_NAMED else front
    return svg(WIDTH, box.bottom + 36, label, marks + _names(named, box))


def interval(score: Mapping[str, Any], base: float | None, low: float, high: float, text: str) -> str:
    """A score with its 95 % interval on a line from `low` to `high`, for a cell of a table; the base as a stroke."""

    def x(value: float) -> float:
        return 6 + 148 * min(max((value - low) / (high - low), 0.0), 1.0)

    marks = [f"<title>{escape(text)}</title>", '<line class="track" x1="6" x2="154" y1="9" y2="9"/>']
    if base is not None and low <= base <= high:
        marks.append(f'<line class="stroke" x1="{x(base):.1f}" x2="{x(base):.1f}" y1="2" y2="16"/>')
    if score["ci95"]:
        ends = [x(end) for end in score["ci95"]]
        marks.append(f'<line class="whisker" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="9" y2="9"/>')
    marks.append(f'<circle class="dot" cx="{x(score["value"]):.1f}" cy="9" r="4"/>')
    return svg(160, 18, text, marks, "interval")


def _scale(values: Sequence[Any]) -> tuple[Callable[[Any], float], list[tuple[Any, str]]]:
    """From a value to its share of the axis (0 at the bottom), and the axis' labels as (value, text)."""
    known = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    distinct = list(dict.fromkeys(values if len(known) == len(values) else map(in_words, values)))
    if len(known) < len(values):
        order = {text: place for place, text in enumerate(sorted(distinct))}
        last = max(1, len(order) - 1)
        shown = sorted(distinct) if len(distinct) <= 12 else []
        return lambda value: order[in_words(value)] / last, [(text, text) for text in shown]
    low, high = min(known), max(known)
    log = low > 0 and high / low >= 8
    if len(distinct) <= 6:
        labels = sorted(distinct)
    else:
        labels = log_ticks(low, high) if log else ticks(low, high, 5)

    def share(value: float) -> float:
        if low == high:
            return 0.5
        return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)

    return share, [(value, f"{value:.3g}") for value in labels]


def _apart(labels: Sequence[tuple[Any, str]], y: Callable[[Any], float]) -> list[tuple[Any, str]]:
    """The labels of an axis that don't lie on one another: its ends first, then the others."""
    kept: list[tuple[Any, str]] = []
    for value, text in [*labels[-1:], *labels[:-1]]:
        if all(abs(y(value) - y(other)) >= LINE for other, _ in kept):
            kept.append((value, text))
    return kept


def _front(points: Sequence[RunPoint], lower_is_better: bool) -> list[RunPoint]:
    """The points that no other beats at the same or less cost, by cost."""
    kept: list[RunPoint] = []
    for one in sorted(points, key=lambda point: (point.x, point.y if lower_is_better else -point.y)):
        if not kept or (one.y < kept[-1].y if lower_is_better else one.y > kept[-1].y):
            kept.append(one)
    return kept


def _names(points: Sequence[RunPoint], box: Box) -> list[str]:
    """The runs' names beside their dots, the first ones first: left, right, above or below, where there is room."""
    taken = [(box.x(one.x) - 5, box.x(one.x) + 5, box.y(one.y)) for one in points]
    marks = []
    for one in points:
        text, x, y = _short(one.name, 150), box.x(one.x), box.y(one.y)
        wide = LETTER * len(text)
        for left, at in ((x - 9 - wide, y), (x + 9, y), (x - wide / 2, y - 13), (x - wide / 2, y + 13)):
            free = all(abs(at - other) >= LINE or left + wide < start or left > end for start, end, other in taken)
            if free and box.left < left and left + wide < WIDTH:
                taken.append((left, left + wide, at))
                name = f'<text class="label" x="{left:.1f}" y="{at + 4:.1f}">{escape(text)}</text>'
                marks.append(_run(one, [name]))
                break
    return marks


def _lines(places: Sequence[tuple[float, float]], many: bool) -> list[str]:
    """A run's curve, and a wide one that can't be seen for the pointer, if it isn't one of many."""
    points = _points(places)
    wide = [] if many else [f'<polyline class="wide" points="{points}"/>']
    return [*wide, f'<polyline class="curve" points="{points}"/>']


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _run(one: OfRun, marks: Sequence[str]) -> str:
    return f'<g class="run {escape(one.kind)}" data-run="{one.run}">{"".join(marks)}</g>'


def _short(text: str, room: float) -> str:
    most = max(4, int(room / LETTER))
    return text if len(text) <= most else text[: most - 1] + "…"
