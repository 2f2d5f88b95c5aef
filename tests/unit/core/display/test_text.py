"""What data and names may bring reaches a terminal as text, never as a command to it."""

import unicodedata

import pytest

from adder.core.display.text import one_line, printable, shortened, width

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\u202egnp.exe\u2066\u200f\u061c\ufeff\u2028\ud800\U000e0041\x00\x7f"


def test_no_character_that_a_terminal_obeys_is_left():
    every = "".join(map(chr, range(0x110000)))
    left = {unicodedata.category(one) for one in printable(every)} - {unicodedata.category("\n")}
    assert not left & {"Cf", "Cs", "Zl", "Zp"} - {unicodedata.category("\u200d")}
    assert [one for one in printable(every) if unicodedata.category(one) == "Cc"] == ["\t", "\n"]
    assert sorted({one for one in printable(every) if unicodedata.category(one) == "Cf"}) == [
        "\xad",
        "\u200c",
        "\u200d",
    ]


def test_what_was_there_can_still_be_read():
    shown = printable(f"a{EVIL}z")
    assert shown.startswith("a\\x1b[2J\\x1b]0;owned\\x07\\x9b31m\\x0d\\u202egnp.exe\\u2066") and shown.endswith(
        "\\x7fz"
    )
    shown.encode("utf-8")


@pytest.mark.parametrize("text", ["plain", "Möbel für Gäste", "日本語", "مرحبا", "👩‍💻 ok", "two\nlines\tand a tab"])
def test_text_of_any_language_stays_as_it_is(text):
    assert printable(text) == text


def test_one_line_is_one():
    assert one_line(" a\n\tb\r\n c ") == "a b c"


@pytest.mark.parametrize(("text", "columns"), [("abc", 3), ("日本", 4), ("e\u0301", 1), ("", 0)])
def test_width_counts_columns(text, columns):
    assert width(text) == columns


@pytest.mark.parametrize("columns", range(12))
def test_shortened_text_fits(columns):
    for text in ("short", "a longer text", "日本語日本語日本語"):
        made = shortened(text, columns)
        assert width(made) <= columns and (made == text or made == "" or made.endswith("…"))
