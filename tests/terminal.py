"""A command in a terminal of its own, and what stands on its screen in the end."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path

from adder.core.display.text import width


class Terminal:
    """A command in a pseudo-terminal of `columns`; `raw` is all that it has written, `status` how it ended."""

    def __init__(self, command: list[str], cwd: Path, environment: dict[str, str], columns: int = 100):
        self.columns = columns
        self.own, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        variables = {name: value for name, value in environment.items() if name not in ("NO_COLOR", "COLUMNS")}
        streams = {"stdin": other, "stdout": other, "stderr": other}
        self.process = subprocess.Popen(
            command, cwd=cwd, env=variables | {"TERM": "xterm-256color"}, start_new_session=True, **streams,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(other)
        self._bytes = b""

    def run(self, meanwhile: Callable[["Terminal"], object] = lambda terminal: None) -> int:
        """Read until the command ends; `meanwhile` is called after each piece of output."""
        while True:
            try:
                piece = os.read(self.own, 65536)
            except OSError:  # Linux's way of saying that nobody writes there any more
                break
            if not piece:
                break
            self._bytes += piece
            meanwhile(self)
        os.close(self.own)
        return self.process.wait(timeout=60)

    def press(self, keys: str) -> None:
        """Type; "\\x03" is Ctrl-C."""
        os.write(self.own, keys.encode())

    @property
    def raw(self) -> str:
        """All that was written, with the escape sequences."""
        return self._bytes.decode(errors="replace")

    def screen(self) -> list[str]:
        """The lines as they stand in the end. Raises AssertionError for what no line of ours has."""
        lines = [""]
        column = 0
        for part in re.findall(r"\033\[[0-9;]*[A-Za-z]|\r|\n|[^\033\r\n]+|\033", self.raw):
            if part == "\r":
                column = 0
            elif part == "\n":
                lines.append("")
            elif part == "\033[K":
                lines[-1] = lines[-1][:column]
            elif part.startswith("\033"):
                assert re.fullmatch(r"\033\[\d*m", part), f"{part!r} has reached the terminal"
            else:
                lines[-1] = lines[-1][:column] + part + lines[-1][column + len(part) :]
                column += len(part)
                assert width(lines[-1]) <= self.columns or part.startswith("Using workflow"), f"wraps: {part!r}"
        return [line.rstrip() for line in lines]
