"""Which parts of a reply are to be learnt, as a list of spans says: axolotl's `train_detail` and the like."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from adder.formatting.marks import LEARNT, UNLEARNT
from adder.formatting.rejected import Rejected, json_type

BEGINS = ("begin_offset", "begin", "start_offset", "start", "start_char", "from")
ENDS = ("end_offset", "end", "end_char", "stop", "to")
INCLUSIVE = "end_offset"  # axolotl's own, whose end is the span's last character
KIND = "spans of a reply that can't be read"

Part = tuple[int, int]


class _Span(NamedTuple):
    begin: int
    end: int
    learnt: bool


def unlearnt_parts(value: Any, key: str, content: str, where: str) -> list[Part]:
    """The parts of a content, (start, end) in characters, that carry no loss, in order; white space around them is left
    out. What no span speaks of is learnt only where all spans say what isn't.

    An `end_offset` is the last character of its span, another end the first one behind it, unless the spans themselves
    show otherwise: by how they adjoin, and by where the last one ends. Raises Rejected for what can't be read.
    """
    if not isinstance(value, list):
        raise Rejected(KIND, f"{where} has {key}: {json_type(value)}, not a list")
    spans = sorted(_span(span, f"{where}, {key}") for span in value)
    if not spans:
        return []
    inclusive = _ends_are_inclusive(spans, INCLUSIVE in value[0], len(content))
    spans = [span._replace(end=span.end + inclusive) for span in spans]
    if any(one.end > other.begin and one.learnt != other.learnt for one, other in pairwise(spans)):
        raise Rejected(KIND, f"{where}, {key}: spans that overlap say both yes and no")
    if spans[0].begin < 0 or any(span.end > len(content) or span.end < span.begin for span in spans):
        raise Rejected(KIND, f"{where}, {key}: a span isn't within the {len(content):,} characters of the text")
    learnt = [not any(span.learnt for span in spans)] * len(content)
    for span in spans:
        learnt[span.begin : span.end] = [span.learnt] * (span.end - span.begin)
    return [(start, end) for start, end in _without_space(learnt, content) if start < end]


def covers(parts: list[Part], content: str) -> bool:
    """Whether parts are all of a content but white space."""
    return sum(end - start for start, end in parts) >= len(content.strip()) and bool(parts)


def _span(span: Any, where: str) -> _Span:
    if isinstance(span, list) and len(span) in (2, 3):  # [begin, end] are learnt
        span = dict(zip(("begin", "end", "train"), span, strict=False))
    if not isinstance(span, dict):
        raise Rejected(KIND, f"{where}: {json_type(span)} among them, not an object")
    begin, end = (next((span[key] for key in keys if key in span), None) for keys in (BEGINS, ENDS))
    for value in (begin, end):
        if not isinstance(value, int) or isinstance(value, bool):
            raise Rejected(KIND, f"{where}: a span needs begin_offset and end_offset as whole numbers")
    assert isinstance(begin, int) and isinstance(end, int)
    marks = [bool(span[key]) != (key in UNLEARNT) for key in (*LEARNT, *UNLEARNT) if span.get(key) is not None]
    if len(set(marks)) > 1 or any(span.get(key) not in (None, 0, 1) for key in (*LEARNT, *UNLEARNT)):
        raise Rejected(KIND, f"{where}: a span needs `train: true` or `train: false`")
    return _Span(begin, end, marks[0] if marks else True)


def _ends_are_inclusive(spans: list[_Span], named_so: bool, length: int) -> bool:
    last = max(span.end for span in spans)
    pairs = list(pairwise(spans))
    if last >= length or any(one.end == other.begin for one, other in pairs):
        return False
    adjoin = bool(pairs) and all(one.end + 1 == other.begin for one, other in pairs)
    return named_so or (adjoin and last == length - 1)


def _without_space(learnt: list[bool], content: str) -> Iterator[Part]:
    start = 0
    while start < len(learnt):
        end = start
        while end < len(learnt) and learnt[end] == learnt[start]:
            end += 1
        if not learnt[start]:
            text = content[start:end]
            yield start + len(text) - len(text.lstrip()), start + len(text.rstrip())
        start = end
