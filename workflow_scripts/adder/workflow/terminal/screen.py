"""Writing to the terminal: lines that stay, and below them one that changes. What isn't a terminal gets the former."""

import os
import textwrap
import threading
from typing import TextIO

from adder.core.display.text import printable, shortened, width

CLEAR = "\r\033[K"
COLOURS = {"good": "\033[32m", "bad": "\033[31m", "warning": "\033[33m", "faint": "\033[2m", "strong": "\033[1m"}
RESET = "\033[0m"
LEAST_ROOM, INDENTED = 30, 6  # columns for a text beside its lead, or else below it
NARROWEST = 20  # columns; less is taken for no answer


class Screen:
    """Lines on `stream`, by several threads. colour: whether a terminal may be given colours at all.

    NO_COLOR turns colours off, and TERM=dumb these and the line that changes.
    """

    def __init__(self, stream: TextIO, colour: bool = True):
        self.stream = stream
        self.is_live = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.has_colours = self.is_live and colour and not os.environ.get("NO_COLOR")
        self.lock = threading.RLock()
        self._live = ""
        self.marks = {"done": "✓", "failed": "✗", "notice": "!", "planned": "·"}
        if not _can_encode(stream, "".join(self.marks.values()) + "█░…·"):
            self.marks = {"done": "+", "failed": "x", "notice": "!", "planned": "-"}
            self.is_live = False

    @property
    def columns(self) -> int | None:
        """The terminal's width; None where there is none, and lines are as long as they are."""
        if not self.stream.isatty():
            return None
        try:
            found = os.get_terminal_size(self.stream.fileno()).columns
        except (OSError, ValueError):
            found = 0
        return found if found >= NARROWEST else 80

    def coloured(self, text: str, colour: str) -> str:
        """Text in one of COLOURS, where there are colours."""
        return f"{COLOURS[colour]}{text}{RESET}" if self.has_colours and text else text

    def line(self, text: str = "", hanging: int = 0, lead: str = "", colour: str | None = None) -> None:
        """Write a line that stays: `lead` as it is (printable, at most `hanging` columns wide) and then `text`, which
        is broken to the terminal's width with its further lines indented by `hanging`. Where that leaves little room it
        stands below. Paths stay in one piece.
        """
        columns = self.columns
        below = columns is not None and columns - hanging < LEAST_ROOM
        if below and text:
            self.line(lead=lead.rstrip())
            lead, hanging = "", INDENTED
        rows: list[str] = []
        for part in printable(text).split("\n"):
            room = max((columns or 0) - 1 - hanging, NARROWEST)
            rows += (
                textwrap.wrap(part, room, break_on_hyphens=False, break_long_words=False) or [""] if columns else [part]
            )
        led = lead + " " * (hanging - width(lead))
        shown = [self.coloured(row, colour) if colour else row for row in rows]
        whole = ("\n" + " " * hanging).join(shown)
        with self.lock:
            self._write(f"{CLEAR if self._live else ''}{led}{whole}".rstrip() + "\n" + self._live)

    def live(self, text: str) -> None:
        """Make `text` the line below all others, which the next call replaces; an empty one takes it away."""
        if not self.is_live:
            return
        with self.lock:
            if not text and not self._live:
                return
            self._live = shortened(printable(text).replace("\n", " "), (self.columns or 80) - 1)
            self._write(CLEAR + self._live)

    def _write(self, text: str) -> None:
        """Write past the stream's buffer where there is a file behind it: a signal may come in the midst of this and
        have something to write too, which a buffer refuses with a RuntimeError.
        """
        try:
            encoding: str | None = getattr(self.stream, "encoding", None)
            if encoding is None:  # text in memory
                self.stream.write(text)
                return
            left = text.encode(encoding, "backslashreplace")
            while left:
                left = left[os.write(self.stream.fileno(), left) :]
        except (OSError, ValueError):  # the terminal is gone; no reason to end anything
            pass


def _can_encode(stream: TextIO, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
