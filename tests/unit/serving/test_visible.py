"""Nothing that a model writes reaches the terminal as a command to it."""

import pytest

from adder.serving.visible import visible


@pytest.mark.parametrize("text", ["", "plain", "two\n\tlines", "Grüße, 你好, שלום", "👨\u200d👩\u200d👧"])
def test_what_people_write_stays(text):
    assert visible(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("a\rb", "a\\rb"),
        ("\x07\x9b", "\\x07\\x9b"),
        ("abc\u202egnp.exe", "abc\\u202egnp.exe"),
        ("\u2066\ufeff", "\\u2066\\ufeff"),
        ("\ud800", "\\ud800"),
    ],
)
def test_commands_to_a_terminal_are_shown_as_escapes(text, shown):
    assert visible(text) == shown
