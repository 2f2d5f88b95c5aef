"""Progress for people: one line that updates itself on a terminal, a line now and then where output is a file."""

import io
import shutil
import sys
import time
from typing import TextIO

PLAIN_INTERVAL = 15.0  # seconds between lines where nobody can see a line change in place
TERMINAL_INTERVAL = 0.1


class Progress:
    """Write the status of a running stage to `stream` (default: standard error), each line led by the stage's name."""

    def __init__(self, name: str = "", stream: TextIO | None = None):
        self.name = name
        self.stream = sys.stderr if stream is None else stream
        self.on_terminal = self.stream.isatty()
        self._last_time = 0.0
        self._line_open = False

    @classmethod
    def silent(cls) -> "Progress":
        """A progress that shows nothing, for tests and notebooks."""
        return cls(stream=io.StringIO())

    def line(self, text: str, last: bool = False) -> None:
        """Show `text` as the current status; it replaces the line before it. `last` always shows and keeps it."""
        now = time.monotonic()
        interval = TERMINAL_INTERVAL if self.on_terminal else PLAIN_INTERVAL
        if not last and now - self._last_time < interval:
            return
        self._last_time = now
        if not self.on_terminal:
            self._write(f"{self._led(text)}\n")
            return
        width = shutil.get_terminal_size().columns - 1
        self._write(f"\r\033[K{self._led(text)[:width]}" + ("\n" if last else ""))
        self._line_open = not last

    def say(self, text: str) -> None:
        """Show `text` on a line of its own that stays."""
        self._write(("\r\033[K" if self._line_open else "") + f"{self._led(text)}\n")
        self._line_open = False

    def _led(self, text: str) -> str:
        return f"{self.name}: {text}" if self.name else text

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # the terminal is gone; what is shown there is not worth a training
            pass
