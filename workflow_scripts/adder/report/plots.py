"""Plots as inline SVG: plain functions from data to an SVG string.

Nothing here names a colour: every mark carries a class, and the page's style sheet colours the classes for light and
dark. Each plot is drawn 440 units wide, so that it stays legible on a phone and stands two abreast on a desktop.
Labels go through `escape`, for they may come from data.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple, TypeVar

Point = tuple[float, float]
Show = Callable[[float], str]
Item = TypeVar("Item")

WIDTH = 440
MAX_HOVERED = 150  # points of a curve that answer to the pointer; more would only make the page heavy
MAX_DRAWN = 1500  # points that are drawn: more than there are pixels


class Series(NamedTuple):
    """A curve; `kind` is its CSS class, `dots`: whether each point has one."""

    name: str
    kind: str
    points: Sequence[Point]
    dots: bool = False


class Mark(NamedTuple):
    """A line across a plot at `x`, its label above; `kind` is its CSS class."""

    x: float
    kind: str
    label: str


@dataclass(frozen=True)
class Part:
    """A part of a whole; `kind` is its CSS class."""

    name: str
    count: int
    kind: str


class BarRow(NamedTuple):
    """A horizontal bar; `kind` is its CSS class, `note` stands behind its value."""

    name: str
    value: float
    kind: str
    note: str = ""


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) between `low` and `high`, about `wanted` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def log_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers between two positive ones, about `wanted` of them, that stand evenly on a logarithmic axis."""
    decades = math.log10(high / low)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors, stride = ((1, 3), 1) if decades < 3 else ((1,), max(1, round(decades / wanted)))
    found = [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
    return [float(f"{value:.6g}") for value in found if low <= value <= high]


def ceiling(value: float) -> float:
    """The smallest round number that lies a little above `value`: where an axis can end."""
    if not value > 0 or not math.isfinite(value):
        return 1.0
    power = 10 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 15) if power * factor >= value * 1.02)


def interval(
    base: Mapping[str, Any] | None, tuned: Mapping[str, Any] | None, high: float, show: Show, label: str
) -> str:
    """Base above tuned on one scale from 0 to `high`, each a dot with its 95 % interval.

    `base` and `tuned` are {"value", "ci95": [low, high] or None}; an absent or non-finite one is left out.
    """
    left, right = 8, 312

    def x(value: float) -> str:
        return f"{left + (right - left) * min(max(value / high, 0.0), 1.0):.1f}"

    marks = [f'<line class="axis" x1="{left}" x2="{right}" y1="42" y2="42"/>']
    for name, score, y in (("base", base, 12), ("tuned", tuned, 28)):
        if not score or not _finite(score["value"]):
            continue
        ci = score.get("ci95")
        text = f"{name}: {show(score['value'])}"
        if ci and all(map(_finite, ci)):
            text += f", 95 % CI {show(ci[0])} to {show(ci[1])}"
            low_x, high_x = x(ci[0]), x(ci[1])
            whisker = f'<line class="whisker" x1="{low_x}" x2="{high_x}" y1="{y}" y2="{y}"/>'
        else:
            whisker = ""
        dot = f'<circle cx="{x(score["value"])}" cy="{y}" r="4.5"/>'
        track = f'<line class="track" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>'
        marks.append(f'<g class="{name}"><title>{escape(text)}</title>{track}{whisker}{dot}</g>')
    marks.append(f'<text class="tick" x="{left}" y="55">{escape(show(0.0))}</text>')
    marks.append(f'<text class="tick end" x="{right}" y="55">{escape(show(high))}</text>')
    return svg(320, 58, label, marks)


def lines(
    series: Sequence[Series],
    x_name: str,
    show: Show,
    label: str,
    from_zero: bool = True,
    marks: Sequence[Mark] = (),
    adapt: bool = False,
    high: float | None = None,
) -> str:
    """One or more curves over the same x.

    Points that are not finite are left out. `high`: where the axis ends, else at the largest y. With `adapt` values of
    very different sizes get a logarithmic axis, and a few that lie far above all others are cut off at the end of a
    linear one; the plot says so.
    """
    series = [one._replace(points=[point for point in one.points if _finite(point[1])]) for one in series]
    every = [point for one in series for point in one.points]
    if not every:
        return ""
    xs, ys = [x for x, _ in every] + [mark.x for mark in marks], [y for _, y in every]
    top = usual_top(ys) if adapt else high or max(ys)
    log = adapt and needs_log(ys, top)
    top = max(ys) if log else top  # it has room for outliers
    if log:
        low_y, high_y = max(min(y for y in ys if y > 0), top * 1e-6) / 1.1, top * 1.15
    else:
        low_y = min(0.0, *ys) if from_zero else min(ys)
        high_y = top
        if high_y == low_y:
            low_y, high_y = low_y - (abs(low_y) or 1) * 0.1, high_y + (abs(high_y) or 1) * 0.1
        high_y += (high_y - low_y) * 0.04
    box = Box(54, 16 + 14 * len(marks), WIDTH - 8, 178 + 14 * len(marks), min(xs), max(xs), low_y, high_y, log)
    drawn = box.axes(x_name, show)
    notes = ["logarithmic axis"] if log else []
    over = sum(y > high_y for y in ys)
    if over:
        notes.append(f"{over} {'value' if over == 1 else 'values'} above the axis, up to {show(max(ys))}")
    if notes:
        drawn.append(f'<text class="tick" x="{box.left}" y="{box.bottom + 31}">{escape("; ".join(notes))}</text>')
    for number, mark in enumerate(sorted(marks, key=lambda mark: mark.x)):
        drawn += _mark(mark, box, 29 + 14 * number)
    for one in series:
        drawn += _curve(one, box, x_name, show, [mark.x for mark in marks])
    return svg(WIDTH, box.bottom + 36, label, drawn)


def usual_top(values: Sequence[float]) -> float:
    """Where an axis for these values (in order of x) should end: their maximum, or the largest that isn't an outlier.

    Outliers lie above three times both the level at the start and what 98 % of the values stay below: a spike, not a
    curve that climbs or begins high.
    """
    first = sorted(values[:5])
    usual = max(first[len(first) // 2], sorted(values)[int(0.98 * (len(values) - 1))])
    if usual <= 0 or max(values) <= 3 * usual:
        return max(values)
    return max(value for value in values if value <= 2 * usual) * 1.1


def needs_log(values: Sequence[float], top: float) -> bool:
    """Whether half of the values, none of them negative, would lie in the lowest 6 % of a linear axis up to `top`."""
    middle = sorted(values)[len(values) // 2]
    return min(values) >= 0 < middle < 0.06 * top


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    limit: float | None,
    label: str,
    unit: str,
    others: Sequence[float] = (),
) -> str:
    """Bars of `counts` between `edges` (one more edge than counts); `limit` is a line, and bars past it stand out.

    `others` are limits that were weighed and not taken: faint lines, as far as they are in sight.
    """
    if not counts or not max(counts):
        return ""
    low_x, high_x = edges[0], edges[-1]
    shown_limit = limit if limit is not None and limit <= low_x + 4 * (high_x - low_x) else None
    if shown_limit is not None:
        high_x = max(high_x, shown_limit + 0.12 * (shown_limit - low_x))
    box = Box(46, 24, WIDTH - 8, 178, low_x, high_x, 0, max(counts) * 1.05)
    marks = box.axes(unit, lambda n: f"{n:,.0f}")
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if not count:
            continue
        past = " past" if limit is not None and low >= limit else ""
        x, width = box.x(low), max(box.x(high) - box.x(low) - 0.6, 0.6)
        title = f"<title>{low:,.0f} to {high:,.0f} {escape(unit)}: {count:,}</title>"
        y = box.y(count)
        marks.append(
            f'<rect class="bar{past}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{box.bottom - y:.1f}">'
            f"{title}</rect>"
        )
    for other in others:
        if low_x < other <= high_x and other != limit:
            x = box.x(other)
            title = f"<title>weighed: {other:,.0f} {escape(unit)}</title>"
            marks.append(f'<line class="weighed" x1="{x:.1f}" x2="{x:.1f}" y1="24" y2="{box.bottom}">{title}</line>')
    if shown_limit is not None:
        x = box.x(shown_limit)
        anchor = "end" if x > WIDTH * 0.5 else "start"
        shift = -5 if anchor == "end" else 5
        marks.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="12" y2="{box.bottom}"/>')
        marks.append(
            f'<text class="limit {anchor}" x="{x + shift:.1f}" y="18">max_seq_length {shown_limit:,.0f}</text>'
        )
    return svg(WIDTH, 214, label, marks)


def flow(total: int, parts: Sequence[Part], label: str) -> str:
    """Where `total` rows went: a band a part, as thick as its share (never thinner than a visible line).

    Parts of no rows are listed without a band.
    """
    if not total:
        return ""
    top, tall, gap = 8, 150, 14
    heights = [max(1.5, tall * part.count / total) if part.count else 0 for part in parts]
    marks, source_y, target_y = [], top + gap * (len(parts) - 1) / 2, float(top)
    whole = sum(heights)
    marks.append(f'<rect class="node" x="84" y="{source_y:.1f}" width="7" height="{whole:.1f}"/>')
    middle = source_y + whole / 2
    marks.append(f'<text class="name end" x="76" y="{middle - 2:.1f}">rows in</text>')
    marks.append(f'<text class="count end" x="76" y="{middle + 14:.1f}">{total:,}</text>')
    label_y = -100.0
    for part, height in zip(parts, heights, strict=True):
        share = f"{part.name}: {part.count:,} of {total:,} rows"
        if height:
            low, high = target_y, target_y + height
            path = (
                f"M91,{source_y:.1f} C180,{source_y:.1f} 180,{low:.1f} 268,{low:.1f} V{high:.1f} "
                f"C180,{high:.1f} 180,{source_y + height:.1f} 91,{source_y + height:.1f} Z"
            )
            marks.append(f'<path class="band {part.kind}" d="{path}"><title>{escape(share)}</title></path>')
            marks.append(f'<rect class="node {part.kind}" x="268" y="{low:.1f}" width="7" height="{height:.1f}"/>')
        label_y = max(target_y + height / 2 + 4, label_y + 15)
        marks.append(
            f'<text class="name" x="284" y="{label_y:.1f}">{escape(part.name)} '
            f'<tspan class="count">{part.count:,}</tspan></text>'
        )
        source_y += height
        target_y += height + gap
    return svg(WIDTH, max(target_y, label_y + 12), label, marks)


def bars(rows: Sequence[BarRow], show: Show, label: str) -> str:
    """Horizontal bars, one a row; the value stands behind the bar."""
    if not rows:
        return ""
    most = max(row.value for row in rows) or 1
    left, room, step = 112, WIDTH - 112 - 92, 23
    marks = []
    for number, row in enumerate(rows):
        y = 4 + number * step
        width = max(1.5, room * row.value / most)
        text = show(row.value) + (f" {row.note}" if row.note else "")
        marks.append(
            f"<g><title>{escape(row.name)}: {escape(text)}</title>"
            f'<text class="name end" x="{left - 8}" y="{y + 12}">{escape(row.name)}</text>'
            f'<rect class="bar {row.kind}" x="{left}" y="{y + 2}" width="{width:.1f}" height="13" rx="2"/>'
            f'<text class="tick" x="{left + width + 7:.1f}" y="{y + 12}">{escape(text)}</text></g>'
        )
    return svg(WIDTH, 4 + len(rows) * step, label, marks)


def pair(base: float | None, tuned: float | None, label: str) -> str:
    """Two dots on a line from 0 to 1, for a cell of a table."""
    marks = ['<line class="track" x1="6" x2="114" y1="8" y2="8"/>']
    shown = [(name, 6 + 108 * value) for name, value in (("base", base), ("tuned", tuned)) if value is not None]
    if len(shown) == 2:
        marks.append(f'<line class="whisker" x1="{shown[0][1]:.1f}" x2="{shown[1][1]:.1f}" y1="8" y2="8"/>')
    marks += [f'<circle class="{name}" cx="{x:.1f}" cy="8" r="4"/>' for name, x in shown]
    return svg(120, 16, label, marks, "pair")


def stacked(parts: Sequence[Part], label: str) -> str:
    """One bar of parts side by side, each as wide as its share.

    Parts of nothing are left out.
    """
    total = sum(part.count for part in parts)
    marks, x = [], 0.0
    for part in parts:
        width = WIDTH * part.count / total if total else 0
        if width:
            kind, wide = escape(part.kind), max(width - 1.5, 1)
            title = f"<title>{escape(part.name)}: {part.count:,} of {total:,}</title>"
            marks.append(
                f'<rect class="part {kind}" x="{x:.1f}" y="1" width="{wide:.1f}" height="18" rx="2">{title}</rect>'
            )
        x += width
    return svg(WIDTH, 20, label, marks)


def change(found: Mapping[str, Any], worst: float | None, span: float, label: str) -> str:
    """A difference with its interval on a line from -`span` to `span` with 0 in its middle, for a cell of a table.

    `found` is {"value", "ci95"}; `worst`: where a limit stands, such as the largest drop that is allowed.
    """
    left, right, middle = 6, 134, 70

    def x(value: float) -> float:
        return middle + (right - middle) * min(max(value / span, -1.0), 1.0)

    marks = [f"<title>{escape(label)}</title>", f'<line class="track" x1="{left}" x2="{right}" y1="9" y2="9"/>']
    marks.append(f'<line class="zero" x1="{middle}" x2="{middle}" y1="1" y2="17"/>')
    if worst is not None:
        title = "<title>the guard's limit</title>"
        marks.append(f'<line class="guard" x1="{x(worst):.1f}" x2="{x(worst):.1f}" y1="1" y2="17">{title}</line>')
    if found["ci95"] and all(map(_finite, found["ci95"])):
        low, high = found["ci95"]
        marks.append(f'<line class="whisker" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="9" y2="9"/>')
    marks.append(f'<circle class="tuned" cx="{x(found["value"]):.1f}" cy="9" r="4.5"/>')
    return svg(140, 18, label, marks, "change")


class Box:
    """The rectangle that data is drawn in, and the two scales."""

    def __init__(
        self,
        left: float,
        top: float,
        right: float,
        bottom: float,
        low_x: float,
        high_x: float,
        low_y: float,
        high_y: float,
        log: bool = False,
    ):
        """`left` to `bottom`: the rectangle; `low_x` to `high_y`: the values at its sides; `log`: a logarithmic y."""
        self.left, self.top, self.right, self.bottom = left, top, right, bottom
        self.low_x, self.high_x, self.low_y, self.high_y, self.log = low_x, high_x, low_y, high_y, log

    def x(self, value: float) -> float:
        """Where a value of x lies."""
        width = self.high_x - self.low_x
        return self.left + (self.right - self.left) * ((value - self.low_x) / width if width else 0.5)

    def y(self, value: float) -> float:
        """Values beyond the axis lie on its end."""
        value = min(max(value, self.low_y), self.high_y)
        share = (value - self.low_y) / (self.high_y - self.low_y)
        if self.log:
            share = math.log(value / self.low_y) / math.log(self.high_y / self.low_y)
        return self.bottom - (self.bottom - self.top) * share

    def axes(self, x_name: str, show: Show) -> list[str]:
        """Grid lines with their numbers, and the name of x at the right end."""
        marks = []
        values = (log_ticks if self.log else ticks)(self.low_y, self.high_y, 4)
        for value in values:
            y = self.y(value)
            marks.append(f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            text = escape(_tick(value, values, show))
            marks.append(f'<text class="tick end" x="{self.left - 6}" y="{y + 3.5:.1f}">{text}</text>')
        marks.append(f'<line class="axis" x1="{self.left}" x2="{self.right}" y1="{self.bottom}" y2="{self.bottom}"/>')
        for value in ticks(self.low_x, self.high_x, 7):
            x = self.x(value)
            anchor = "end" if x > self.right - 12 else "middle"
            marks.append(f'<text class="tick {anchor}" x="{x:.1f}" y="{self.bottom + 15}">{value:,g}</text>')
        marks.append(f'<text class="tick end" x="{self.right}" y="{self.bottom + 31}">{escape(x_name)}</text>')
        return marks


def _mark(mark: Mark, box: Box, y: float) -> list[str]:
    """A line across the plot at the mark's x, and its label at height `y`, beside the line where there is room."""
    x, kind = box.x(mark.x), escape(mark.kind)
    width = 6.6 * len(mark.label)  # roughly, at the style sheet's size
    if x - 4 - width > 0 and x > (box.left + box.right) / 2:
        anchor, at = "end", x - 4
    else:
        anchor, at = "start", max(0.0, min(x + 4, WIDTH - width))
    line = f'<line class="mark {kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 9}" y2="{box.bottom}"/>'
    return [line, f'<text class="mark {kind} {anchor}" x="{at:.1f}" y="{y}">{escape(mark.label)}</text>']


def _curve(one: Series, box: Box, x_name: str, show: Show, always: Sequence[float] = ()) -> list[str]:
    """The line, its dots where asked for, and a strip a point that shows the point's numbers under the pointer.

    Points at an x in `always` answer to the pointer however many there are.
    """
    drawn = _outline(one.points, MAX_DRAWN)
    kind = escape(one.kind)
    path = " ".join(f"{box.x(x):.1f},{box.y(y):.1f}" for x, y in drawn)
    marks = [f'<polyline class="curve {kind}" points="{path}"/>']
    over = [box.x(x) for x, y in drawn if y > box.high_y]
    marks += [f'<path class="over {kind}" d="M{x - 4:.1f},{box.top} h8 l-4,-6 Z"/>' for x in over]
    hovered = set(thin(one.points, MAX_HOVERED)) | {point for point in one.points if point[0] in always}
    if one.points:
        hovered |= {max(one.points, key=lambda point: point[1]), min(one.points, key=lambda point: point[1])}
    hovered = sorted(hovered)
    places = [box.x(x) for x, _ in hovered]
    for number, (x, y) in enumerate(hovered):
        before = (places[number - 1] + places[number]) / 2 if number else box.left
        after = (places[number] + places[number + 1]) / 2 if number + 1 < len(places) else box.right
        cx, cy = places[number], box.y(y)
        text = escape(f"{x_name} {x:,g} · {one.name} {show(y)}")
        if one.dots:  # dots answer for themselves, so that they do not hide the strips of the curve below
            target = f'<circle class="target" cx="{cx:.1f}" cy="{cy:.1f}" r="9"/>'
            shown = "dot"
        else:
            width, height = max(after - before, 0.5), box.bottom - box.top
            target = f'<rect x="{before:.1f}" y="{box.top}" width="{width:.1f}" height="{height}"/>'
            shown = "dot quiet"
        marks.append(
            f'<g class="hit"><title>{text}</title>{target}'
            f'<circle class="{shown} {kind}" cx="{cx:.1f}" cy="{cy:.1f}" r="3.2"/>'
            f'<text class="read end" x="{box.right}" y="12">{text}</text></g>'
        )
    return marks


def thin(points: Sequence[Item], most: int) -> list[Item]:
    """At most `most` of the items, evenly chosen, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(n * (len(points) - 1) / (most - 1))] for n in range(most)]


def _outline(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` of the points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    ends = [n * len(points) // (most // 2) for n in range(most // 2 + 1)]
    kept = []
    for start, end in itertools.pairwise(ends):
        stretch = points[start:end]
        pair = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(pair)
    return kept


def _tick(value: float, values: Sequence[float], show: Show) -> str:
    """A tick's number; no power of ten among `values`, the axis's, that are written without."""
    if 1e-4 <= value < 0.001 <= max(values) and "×" in show(value):
        return f"{value:.5f}".rstrip("0")
    return _plain(show(value))


def _plain(text: str) -> str:
    """A tick's number without the digits that only say how exact it is: 0.500 as 0.5."""
    return text.rstrip("0").rstrip(".") if "." in text and text[-1] == "0" else text


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def svg(width: float, height: float, label: str, marks: Sequence[str], kind: str = "plot") -> str:
    """Marks as one SVG element, which screen readers call `label`; `kind` is its CSS class."""
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:g} {math.ceil(height)}" role="img" aria-label="{escape(label)}">'
        + "".join(marks)
        + "</svg>"
    )
