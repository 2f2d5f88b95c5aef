"""Progress for people: one line that updates itself on a terminal, a line now and then where output is a file.

Where Snakemake's logger plugin has the terminal, progress goes to the log and to the job's status file instead.
"""

import io
import shutil
import sys
import time
from pathlib import Path
from typing import TextIO

from adder.core.display.status import StageStatus, write_status
from adder.core.display.text import printable, shortened

PLAIN_INTERVAL = 15.0  # seconds between lines where nobody can see a line change in place
TERMINAL_INTERVAL = 0.1
STATUS_INTERVAL = 0.5
# What begins so is shown also when the stage has gone well.
NOTICES = ("warning: ", "advice: ")


def duration(seconds: float) -> str:
    """Seconds for people: `12 s`, `4:39`, `1:02:03`."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"


class Progress:
    """Write the status of a running stage to `stream` (default: standard error), each line led by the stage's name.

    status: a file that is kept up to date with the same, for other processes (core/display/status.py).
    """

    def __init__(self, name: str = "", stream: TextIO | None = None, status: Path | None = None):
        self.name = name
        self.stream = sys.stderr if stream is None else stream
        self.on_terminal = self.stream.isatty()
        self._last_time = 0.0
        self._line_open = False
        self._status_file, self._status, self._status_time = status, StageStatus(began=time.time()), 0.0
        self._keep_status()

    @classmethod
    def silent(cls) -> "Progress":
        """A progress that shows nothing, for tests and notebooks."""
        return cls(stream=io.StringIO())

    def line(self, text: str, last: bool = False, left: float | None = None) -> None:
        """Show `text` as the current status; it replaces the line before it. `last` always shows and keeps it.

        left: seconds until the stage is done, where it can tell.
        """
        now = time.monotonic()
        self._status.text, self._status.left, self._status.at = text, left, time.time()
        if last or now - self._status_time >= STATUS_INTERVAL:
            self._keep_status()
        interval = TERMINAL_INTERVAL if self.on_terminal else PLAIN_INTERVAL
        if not last and now - self._last_time < interval:
            return
        self._last_time = now
        if left is not None:
            text += f", roughly {duration(left)} left"
        if not self.on_terminal:
            self._write(f"{self._led(text)}\n")
            return
        width = shutil.get_terminal_size().columns - 1
        self._write(f"\r\033[K{shortened(self._led(text), width)}" + ("\n" if last else ""))
        self._line_open = not last

    def say(self, text: str) -> None:
        """Show `text` on a line of its own that stays. Warnings and advice (NOTICES) are kept like notes."""
        self._status.text, self._status.at = text, time.time()
        if text.startswith(NOTICES) and text not in self._status.notices:
            self._status.notices.append(text)
        self._keep_status()
        self._show(text)

    def note(self, text: str) -> None:
        """Show something that people should know of also when the stage has gone well."""
        self._status.notices.append(text)
        self.say(text)

    def fail(self, text: str, lead: str = "cannot go on: ") -> None:
        """Show why the stage ends here, one sentence; `lead` is for those who see no state beside it."""
        self._status.error = text
        self._keep_status()
        self._show(lead + text)

    def _show(self, text: str) -> None:
        self._write(("\r\033[K" if self._line_open else "") + f"{self._led(text)}\n")
        self._line_open = False

    def _led(self, text: str) -> str:
        return printable(f"{self.name}: {text}" if self.name else text)

    def _keep_status(self) -> None:
        if self._status_file is not None:
            self._status_time = time.monotonic()
            write_status(self._status_file, self._status)

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # the terminal is gone; what is shown there is not worth a training
            pass
