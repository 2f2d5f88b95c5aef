"""Text from data, files and names as a terminal may have it: nothing in it moves the cursor or turns the line round."""

import unicodedata

# Control and format characters (escape sequences begin with one; the marks that change the direction of writing are
# among them), lone surrogates, and the separators that start a new line.
REFUSED = ("Cc", "Cf", "Cs", "Zl", "Zp")
# Joiners within words and emoji, which show nothing of their own.
HARMLESS = "\u200c\u200d\u00ad"


def printable(text: str) -> str:
    """The text with each character that a terminal would obey written as its escape; line ends and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(one if _is_shown(one) else _escape(one) for one in text)


def one_line(text: str) -> str:
    """The printable text with each run of blanks, tabs and line ends as one blank."""
    return printable(" ".join(text.split()))


def width(text: str) -> int:
    """How many columns a terminal takes for printable text."""
    return sum(_columns(one) for one in text)


def shortened(text: str, columns: int) -> str:
    """Printable text of at most so many columns; where it is longer, its end is an ellipsis."""
    if width(text) <= columns:
        return text
    taken, kept = 1, ""
    for one in text:
        taken += _columns(one)
        if taken > columns:
            break
        kept += one
    return f"{kept.rstrip()}…" if columns > 0 else ""


def _is_shown(one: str) -> bool:
    return one in "\n\t" or one in HARMLESS or unicodedata.category(one) not in REFUSED


def _escape(one: str) -> str:
    number = ord(one)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _columns(one: str) -> int:
    if unicodedata.combining(one) or one in HARMLESS:
        return 0
    return 2 if unicodedata.east_asian_width(one) in "WF" else 1
