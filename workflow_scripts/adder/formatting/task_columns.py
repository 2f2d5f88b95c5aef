"""Columns that belong to what is asked: a context, an input, options to choose from. They become part of the prompt."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from adder.data.field_template import folded
from adder.formatting.api_messages import is_said
from adder.formatting.column_names import COMPANION, values_line
from adder.formatting.marks import ROW_MARKS
from adder.formatting.messages import BLANK, as_text
from adder.formatting.rejected import Rejected

Row = Mapping[str, Any]

CONTEXTS = (
    *("context", "contexts", "passage", "passages", "document", "documents", "article", "story", "background"),
    *("paragraph", "paragraphs", "schema", "table", "tables", "body", "definition", "premise", "dialogue", "dialog"),
    *("transcript", "support"),
)
OPTIONS = ("choices", "options")
TASK_COLUMNS = ("input", *CONTEXTS, *OPTIONS)
_TASK = frozenset(TASK_COLUMNS)
TITLES = ("title", "name")
TEXTS = (
    *("text", "content", "contents", "page_content", "passage", "passage_text", "body", "document", "sentences"),
    *("snippet", "snippets"),
)
OPTION_LABELS = ("label", "id", "key", "letter")  # of an option that is an object
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LABEL = re.compile(r"\(?([A-Za-z]|\d{1,2})\)?[.):]?")  # a reply that names an option and says nothing else
# Columns that hold options, of which nothing is read.
OPTION_NAME = re.compile(
    r"[a-j]|(op|opt|option|choice|answer|ans|ending|distractor|incorrect|wrong|candidate|alternative)s?_?([a-j]|\d+)?(_.*)?"
)
OPTION_NUMBER = re.compile(r"(?:op|opt|option|choice|ans|ending|candidate|alternative)_?(\d+) \1")
MEDIA_NAME = re.compile(r"(.*_)?(image|img|picture|photo|screenshot|audio|speech|video|frame)s?(_.*)?")
MEDIA_FILE = re.compile(
    r"(?i)data:(image|audio|video)/.*|\S.*\.(png|jpe?g|webp|gif|bmp|tiff?|wav|mp3|flac|ogg|m4a|mp4|avi|mov|webm)"
)
LONG_TEXT = 200  # characters of a text that a row may be about
LONGEST_LABEL = 10  # characters of such a reply, spaces around it included
NO_OPTIONS = "the reply names an option that the prompt doesn't show"


def prompt_of(row: Row, column: str) -> str:
    """What a row asks: the text of `column` with input, context and options around it.

    A context stands before a question and behind an instruction; what the question says already isn't said twice.
    """
    beside = [name for name in row if name in _TASK and name != column and row[name] not in BLANK]
    if not beside:  # nearly all there are
        if row[column] in BLANK:
            raise Rejected("content is empty", column)
        return as_text(row[column], column)
    asked = "" if row.get(column) in BLANK else as_text(row[column], column)
    contexts = [text for name in CONTEXTS if (text := document_text(row.get(name), name)) and text not in asked]
    given = row.get("input")
    extra = [as_text(given, "input")] if column != "input" and given not in BLANK else []
    options = [text for name in OPTIONS if (text := _options(row.get(name), name, asked))]
    if column == "instruction":
        parts = [asked, *extra, *contexts, *options]
    else:
        parts = [*contexts, asked, *extra, *options]
    text = "\n\n".join(part for part in parts if part)
    if not asked and not extra:
        raise Rejected("content is empty", column)
    return text


def check_options(row: Row, column: str, reply: Any, prompt: str, read: Iterable[str]) -> None:
    """Refuse a reply that is the name or number of an option where the prompt doesn't tell which that is.

    column: what the reply's is called. read: the columns that are read. Raises Rejected.
    """
    if isinstance(reply, str) and len(reply) > LONGEST_LABEL:  # nearly all there are
        return
    named = LABEL.fullmatch(reply.strip()) if isinstance(reply, str) else None
    number = isinstance(reply, int) and not isinstance(reply, bool)
    given = [option for name in OPTIONS for option in labelled(row.get(name), name)]
    if given:
        shown = {label for label, _ in given} | {text for _, text in given}
        plain = named[1] if named else str(reply)
        if (named or number) and plain not in shown and plain.upper() not in shown:
            letters = ", ".join(label for label, _ in given)
            line = f"`{values_line(column, f'[{letters}]')}` says which one a number is, counted from 0"
            raise Rejected(NO_OPTIONS, f"the reply is {str(reply)[:40]!r}; {line}; `convert:` says it otherwise")
        return
    refuse_hidden_options(row, reply, prompt, read)


def refuse_hidden_options(row: Row, reply: Any, prompt: str, read: Iterable[str]) -> None:
    """Refuse a reply that is an option's letter where columns that nothing reads may hold the options, and the prompt
    shows none. read: the columns that are read. Raises Rejected.
    """
    named = LABEL.fullmatch(reply.strip()) if isinstance(reply, str) and len(reply) <= LONGEST_LABEL else None
    if named is None or _shows(prompt, named[1]):
        return
    known = set(read)
    unread = [name for name in row if name not in known and row[name] not in BLANK and _holds_options(name, row[name])]
    if not named[1].isalpha():  # a number may be the answer itself, but where an option has just that
        unread = unread if any(OPTION_NUMBER.fullmatch(folded(name) + f" {int(named[1])}") for name in unread) else []
    if unread:
        raise Rejected(
            NO_OPTIONS, f"the reply is {str(reply)[:40]!r}, and nothing reads the columns {', '.join(unread[:8])}"
        )


def unread_names(columns: Iterable[str], read: Iterable[str]) -> list[str]:
    """Of a row's columns those that nothing reads and that may hold more than what describes the row."""
    known = {*read, *ROW_MARKS}
    return [name for name in columns if name not in known and COMPANION.fullmatch(folded(name)) is None]


def is_media_name(name: str) -> bool:
    """Whether a column may hold an image, audio or video by its name."""
    return MEDIA_NAME.fullmatch(folded(name)) is not None


def is_media(value: Any) -> bool:
    """Whether a value is a file's name or content that is an image, audio or video; `datasets` has {bytes, path}."""
    if isinstance(value, list):
        return any(map(is_media, value))
    if isinstance(value, dict):
        return not value.keys().isdisjoint(("bytes", "path", "url", "array")) and any(value.values())
    return isinstance(value, str) and MEDIA_FILE.fullmatch(value) is not None


def text_size(value: Any) -> int:
    """Characters of a text, or of the texts in a list or an object."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(text_size, value.values()))
    return sum(map(text_size, value)) if isinstance(value, list) else 0


def labelled(options: Any, where: str) -> list[tuple[str, str]]:
    """Options as (label, text): from a list of texts, {"label": [...], "text": [...]}, or {label: text}."""
    if options in (*BLANK, {}) or isinstance(options, str):
        return []
    if isinstance(options, dict):
        texts = options.get("text")
        labels = options.get("label")
        if isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels):
            return [(str(label), as_text(text, where)) for label, text in zip(labels, texts, strict=True)]
        return [(str(label), as_text(text, where)) for label, text in options.items() if text not in BLANK]
    if not isinstance(options, list):
        raise Rejected("options are no list", where)
    pairs: list[tuple[str, str]] = []
    for number, option in enumerate(options):
        label = LETTERS[number] if number < len(LETTERS) else str(number + 1)
        if isinstance(option, dict) and "text" in option:
            name = next((option[key] for key in OPTION_LABELS if isinstance(option.get(key), str | int)), label)
            label, option = str(name), option["text"]
        pairs.append((label, as_text(option, where)))
    return pairs


def _options(options: Any, where: str, asked: str) -> str:
    if isinstance(options, str):
        return "" if options.strip() in asked else options
    pairs = labelled(options, where)
    return "" if pairs and all(text in asked for _, text in pairs) else options_text(options, where)


def options_text(options: Any, where: str) -> str:
    """Options as lines, each with its letter or label."""
    return "\n".join(f"{label}. {text}" for label, text in labelled(options, where))


def document_text(value: Any, where: str) -> str:
    """A context as text: documents one after the other, each under its title."""
    if value in (*BLANK, {}) or (isinstance(value, str) and not value.strip()):
        return ""
    if is_said(value):
        raise Rejected(
            "a context that is messages", f"`columns: {{chat_history: {where}}}` has them stand before the rest"
        )
    if (table := _table_text(value)) is not None:
        return table
    if isinstance(value, list):
        return "\n\n".join(text for part in value if (text := document_text(part, where)))
    if isinstance(value, dict):
        documents = _side_by_side(value)
        if documents:
            return document_text(documents, where)
        keys = (*TEXTS, *(key for key in value if str(key).endswith("_text")))
        body = next((value[key] for key in keys if isinstance(value.get(key), str)), None)
        sentences = value.get("sentences")
        if body is None and isinstance(sentences, list) and all(isinstance(one, str) for one in sentences):
            body = " ".join([one.strip() for one in sentences])
        if body is not None:
            title = next((value[key] for key in TITLES if isinstance(value.get(key), str)), "")
            return f"{title}\n{body}".strip()
    return as_text(value, where)


def _side_by_side(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents in lists of titles, texts and what else each has, as `datasets` stores a list of objects; none
    where a value is something else.
    """
    lists = [one for one in value.values() if isinstance(one, list)]
    texts = [value[key] for key in TEXTS if isinstance(value.get(key), list)]
    if not texts or len(lists) < len(value) or len(value) < 2 or len(set(map(len, lists))) > 1:
        return []
    return [dict(zip(value, cells, strict=True)) for cells in zip(*lists, strict=True)]


def _table_text(value: Any) -> str | None:
    """A table as lines of cells: a list of rows, or `{header, rows}`; None for what is none."""
    caption, rows = "", value
    if isinstance(value, dict) and isinstance(value.get("header"), list) and isinstance(value.get("rows"), list):
        caption = next((f"{value[key]}\n" for key in TITLES if isinstance(value.get(key), str) and value[key]), "")
        rows = [value["header"], *value["rows"]]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        return None
    if not all(isinstance(cell, str | int | float) or cell is None for row in rows for cell in row):
        return None
    return caption + "\n".join(" | ".join("" if cell is None else str(cell) for cell in row) for row in rows)


def _shows(prompt: str, letter: str) -> bool:
    """Whether a prompt lists options: one of this letter with a sign behind it, or in brackets."""
    return re.search(rf"(?mi)(^|[\s(\[]){re.escape(letter)}\s*[.):\]]", prompt) is not None


def _holds_options(name: str, value: Any) -> bool:
    """Whether a column may be one of the options, or all of them."""
    if is_said(value):
        return False
    texts = isinstance(value, dict) or (isinstance(value, list) and not any(isinstance(one, float) for one in value))
    return texts or OPTION_NAME.fullmatch(folded(name)) is not None
