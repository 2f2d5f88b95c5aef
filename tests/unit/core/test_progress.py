"""What a terminal and a file are shown."""

import io

from adder.core.display.status import read_status
from adder.core.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_one_line_change():
    terminal = Terminal()
    progress = Progress("train", terminal)
    progress.line("step 1")
    progress.say("a sentence")
    progress.line("step 2", last=True)
    assert terminal.getvalue() == ("\r\033[Ktrain: step 1\r\033[Ktrain: a sentence\n\r\033[Ktrain: step 2\n")


def test_a_file_gets_a_line_now_and_then_and_the_last_one():
    file = io.StringIO()
    progress = Progress("train", file)
    for step in range(100):
        progress.line(f"step {step}", last=step == 99)
    assert file.getvalue() == "train: step 0\ntrain: step 99\n"


def test_a_lost_terminal_ends_nothing():
    tried = []

    class Gone(io.StringIO):
        def write(self, text):
            tried.append(text)
            raise OSError("gone")

    Progress("train", Gone()).say("still here")
    assert tried == ["train: still here\n"]


def test_silence(capsys):
    progress = Progress.silent()
    progress.say("a sentence")
    progress.line("a line", last=True)
    assert capsys.readouterr() == ("", "")


def test_a_status_file_has_the_latest_line_the_warnings_and_why_it_ended(tmp_path):
    file = tmp_path / "train.status.json"
    progress = Progress("train", io.StringIO(), file)
    assert read_status(file).text == ""
    progress.say("warning: 3 rows are cut")
    progress.say("loading")
    progress.line("step 1/2", last=True, left=8.0)
    status = read_status(file)
    assert (status.text, status.left, status.notices, status.error) == (
        "step 1/2",
        8.0,
        ["warning: 3 rows are cut"],
        None,
    )
    progress.fail("no room")
    assert read_status(file).error == "no room" and progress.stream.getvalue().endswith(
        "train: cannot go on: no room\n"
    )
    Progress("train", io.StringIO(), file)
    assert read_status(file).error is None


def test_what_data_brings_is_shown_as_text():
    terminal = Terminal()
    progress = Progress("format", terminal)
    progress.say("row '\x1b[2J\u202e'")
    progress.line("reading '\x1b]0;x\x07'")
    assert terminal.getvalue() == "format: row '\\x1b[2J\\u202e'\n\r\033[Kformat: reading '\\x1b]0;x\\x07'"
