"""Lines that stay above one that changes, at any width."""

import io
import os

import pytest

from adder.core.display.text import width
from adder.workflow.terminal import screen as screens
from adder.workflow.terminal.screen import CLEAR, Screen


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 0


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(screens.os, "get_terminal_size", lambda number: os.terminal_size((40, 24)))
    return Terminal()


def test_the_line_that_changes_stays_below(terminal):
    screen = Screen(terminal, colour=False)
    screen.live("step 1")
    screen.line("done")
    screen.live("step 2")
    screen.live("")
    assert terminal.getvalue() == f"{CLEAR}step 1{CLEAR}done\nstep 1{CLEAR}step 2{CLEAR}"


def test_long_text_is_broken_below_itself_and_the_changing_line_is_cut(terminal):
    screen = Screen(terminal, colour=False)
    screen.line("word " * 30, hanging=6, lead="  x ")
    rows = terminal.getvalue().splitlines()
    assert rows[0].startswith("  x   word") and all(row.startswith("      word") for row in rows[1:])
    assert max(map(width, rows)) < 40
    terminal.truncate(0)
    screen.live("日本" * 40)
    assert width(terminal.getvalue().rpartition(CLEAR)[2]) < 40


def test_text_with_little_room_beside_its_lead_stands_below(terminal):
    Screen(terminal, colour=False).line("word " * 12, hanging=25, lead="  x a long name     3:20  ")
    rows = terminal.getvalue().splitlines()
    assert rows[0] == "  x a long name     3:20" and all(row.startswith("      word") for row in rows[1:])
    assert max(map(width, rows)) < 40


def test_no_escape_sequence_where_there_is_no_terminal():
    file = io.StringIO()
    screen = Screen(file)
    screen.live("step 1")
    screen.line("word " * 30, hanging=4, lead="  x ", colour="bad")
    assert file.getvalue() == "  x " + "word " * 29 + "word\n"


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("NO_COLOR", "1")])
def test_what_the_environment_refuses_is_left_out(terminal, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    screen = Screen(terminal)
    screen.line("bad news", colour="bad")
    screen.live("step 1")
    assert terminal.getvalue() == ("bad news\n" if name == "TERM" else f"bad news\n{CLEAR}step 1")


def test_marks_of_an_encoding_that_has_no_others():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert all(mark.isascii() for mark in Screen(stream).marks.values())


def test_text_of_data_moves_no_cursor(terminal):
    screen = Screen(terminal)
    screen.line("a\x1b[2Jb\u202e")
    screen.live("c\x9bd\r")
    assert terminal.getvalue() == f"a\\x1b[2Jb\\u202e\n{CLEAR}c\\x9bd\\x0d"


def test_a_signal_may_write_in_the_midst_of_a_line(tmp_path):
    """As Ctrl-C does, whose handler runs between any two steps of the main thread."""
    with (tmp_path / "terminal").open("w") as stream:
        screen, write, wrote = Screen(stream), os.write, []

        def interrupted(file: int, data: bytes) -> int:
            if not wrote:
                wrote.append("the handler's line")
                screen.line(wrote[0])
            return write(file, data[:4])

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(os, "write", interrupted)
            screen.line("the main thread's line")
    assert (tmp_path / "terminal").read_text() == "the handler's line\nthe main thread's line\n"


def test_a_terminal_that_is_gone_ends_nothing():
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError("gone")

    Screen(Gone()).line("still here")
