"""The rows of a JSON file one at a time, so that memory holds the row at hand, however large the file.

Python's own decoder reads each value off a sliding piece of the text. ijson is as fast, but refuses the NaN that Python
writes and whole numbers of more than 64 bits, turns half a surrogate pair into a question mark without a word, and does
not say at which line and column a mistake is.
"""

import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from adder.data.repeated_keys import refuse_repeated

CHUNK = 1 << 20  # characters read at a time
MARGIN = 16  # characters: the longest piece of a value that reads as broken when it is cut (-Infinity, \uXXXX)
# Lists that belong to one row rather than being a list of rows.
SINGLE_ROW_KEYS = ("messages", "conversations", "contents", "chat_history")
WHITE_SPACE = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder(object_pairs_hook=refuse_repeated)


class BrokenJSON(ValueError):
    """What is wrong, and at which line and column (both from 1)."""


class SeveralValues(ValueError):
    """A whole value is followed by more: JSON lines under another name, perhaps."""


class UnknownLayout(ValueError):
    """JSON that holds no rows; the message says what it holds."""


class SeveralLists(ValueError):
    """An object with more than one list of rows, and which of them is meant isn't told; the message says it all."""


def rows(open_text: Callable[[], TextIO], split: str | None = None) -> Iterator[Any]:
    """Yield the rows of one JSON document, which `open_text` opens anew as often as it must be read.

    Rows are the items of a list; the items of the list of objects under a key of an object, of several the one named
    by `split`; or the cells of an object's lists of one length, side by side. An object with one of SINGLE_ROW_KEYS
    is one row. Raises BrokenJSON, SeveralValues, SeveralLists or UnknownLayout.
    """
    with open_text() as stream:
        document = Document(stream)
        first = document.peek()
        if first == "[" and split is not None:
            raise SeveralLists(f"holds one list of rows, so `split: {split}` names nothing there")
        if first == "[":
            yield from document.items()
            document.end()
            return
        if first != "{":
            value = document.value()
            document.end()
            raise UnknownLayout(kind(value))
        members = _survey(document)
        document.end()
    lists = {key: member for key, member in members.items() if member.is_list}
    if split is not None:
        if split not in lists:
            there = ", ".join(list(lists)[:8]) or "none"
            raise SeveralLists(f"has no list under the key '{split}', which `split` names; its lists are {there}")
        yield from _items_of(open_text, lists[split].place)
        return
    if any(key in members for key in SINGLE_ROW_KEYS):
        with open_text() as stream:
            yield Document(stream).value()
        return
    of_rows = {key: member for key, member in lists.items() if member.has_objects}
    if len(of_rows) == 1:
        yield from _items_of(open_text, next(iter(of_rows.values())).place)
    elif of_rows:
        found = ", ".join(f"{key} ({member.length:,})" for key, member in list(of_rows.items())[:8])
        raise SeveralLists(
            f"holds several lists of rows: {found}. Name the one that is meant, for example "
            f"`split: {next(iter(of_rows))}`; others can be sources of their own, also of data.heldout"
        )
    elif len(lists) > 1 and len(lists) == len(members) and len({member.length for member in lists.values()}) == 1:
        columns = [_items_of(open_text, member.place) for member in lists.values()]
        for cells in zip(*columns, strict=True):
            yield dict(zip(lists, cells, strict=True))
    else:
        raise UnknownLayout(f"an object with the keys {', '.join(list(members)[:8])}" if members else "an object")


def values(open_text: Callable[[], TextIO]) -> Iterator[Any]:
    """The values of a document that holds one behind the other. Raises BrokenJSON."""
    with open_text() as stream:
        document = Document(stream)
        while document.peek():
            yield document.value()


def behind_first(text: str) -> str:
    """What stands behind the first value of a text, "" where there is none."""
    try:
        _, end = DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return ""
    return text[end:].strip()


@dataclass
class _Member:
    """What the survey learns of one member of an object: its place, and of a list its length and what it holds."""

    place: int
    is_list: bool
    length: int = 0
    has_objects: bool = False


def _survey(document: "Document") -> dict[str, _Member]:
    members: dict[str, _Member] = {}
    for place, key in enumerate(document.keys()):
        members[key] = member = _Member(place, document.peek() == "[")
        if not member.is_list:
            document.skip()
            continue
        for item in document.items():
            member.length += 1
            member.has_objects = member.has_objects or isinstance(item, dict)
    return members


def _items_of(open_text: Callable[[], TextIO], wanted: int) -> Iterator[Any]:
    """The items of the list that is the member of an object at the place `wanted`."""
    with open_text() as stream:
        document = Document(stream)
        for place, _ in enumerate(document.keys()):
            if place == wanted:
                yield from document.items()
            else:
                document.skip()


class Document:
    """A cursor in one JSON document, of which only the piece around the cursor is in memory."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.text, self.at, self.ended = "", 0, False
        self.line, self.column = 1, 1  # where self.text begins

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self.at += len(WHITE_SPACE.match(self.text, self.at)[0])  # pyright: ignore[reportOptionalSubscript] - * always matches
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._read_on()

    def value(self) -> Any:
        """The value that begins here, read whole."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                # A number that is cut reads as a shorter one that is followed by nothing, `.`, `e` or `e+`.
                if end + 2 < len(self.text) or self.ended:
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - MARGIN
                if self.ended or not cut:
                    raise self._broken(error.msg, error.pos) from None
            except RecursionError:
                raise self._broken("nested too deep", self.at) from None
            except ValueError as error:  # a whole number of more than 4,300 digits
                raise self._broken(str(error), self.at) from None
            self._read_on()

    def items(self) -> Iterator[Any]:
        """The items of the list that begins here."""
        self._take("[")
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self._take(",", "]") == "]":
                return

    def keys(self) -> Iterator[str]:
        """The keys of the object that begins here; whoever asks must read each one's value before the next."""
        self._take("{")
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            if self.peek() != '"':
                raise self._broken("Expecting property name enclosed in double quotes", self.at)
            key = self.value()
            self._take(":")
            yield key
            if self._take(",", "}") == "}":
                return

    def skip(self) -> None:
        """Pass over the value that begins here; of a list only one item at a time is in memory."""
        if self.peek() == "[":
            deque(self.items(), maxlen=0)
        else:
            self.value()

    def end(self) -> None:
        """Raise SeveralValues unless only white space is left."""
        if self.peek():
            raise SeveralValues(str(self._broken("Extra data", self.at)))

    def _take(self, *allowed: str) -> str:
        found = self.peek()
        if found not in allowed or not found:
            raise self._broken(f"Expecting {' or '.join(repr(one) for one in allowed)}", self.at)
        self.at += 1
        return found

    def _read_on(self) -> None:
        self.line, self.column = self._position(self.at)
        rest = self.text[self.at :]
        more = self.stream.read(max(CHUNK, len(rest)))  # doubling: a value of any length is read in linear time
        self.text, self.at, self.ended = rest + more, 0, not more

    def _position(self, at: int) -> tuple[int, int]:
        breaks = self.text.count("\n", 0, at)
        if not breaks:
            return self.line, self.column + at
        return self.line + breaks, at - self.text.rindex("\n", 0, at)

    def _broken(self, message: str, at: int) -> BrokenJSON:
        line, column = self._position(at)
        return BrokenJSON(f"line {line}, column {column}: {message}")


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
