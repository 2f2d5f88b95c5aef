"""What a terminal and a file are shown."""

import io

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
