"""Text that a model has written, made safe to print: it must not move the cursor, recolour or reorder the terminal."""

import unicodedata

KEPT = "\n\t"
# Format characters (Cf) that belong to words: joiners of emoji and of Indic and Persian writing, the soft hyphen.
JOINERS = "\u200c\u200d\u00ad"


def visible(text: str) -> str:
    """`text` with control characters and bidirectional marks as escapes, such as \\x1b and \\u202e."""
    return "".join(map(_shown, text)) if not text.isprintable() else text


def _shown(character: str) -> str:
    if character in KEPT or character in JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
        return character
    return character.encode("unicode_escape").decode()
