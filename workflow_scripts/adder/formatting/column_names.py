"""What columns are called: names that other projects use for a prompt and its reply, and what may stand beside a text.

Names are compared without case, and with `_` for spaces and hyphens.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from adder.data.field_template import folded

# What is asked: the row format whose prompt it is, and that format's two columns.
_ALPACA = ("alpaca", "instruction", "output")
_PROMPT = ("prompt_completion", "prompt", "completion")
_QUESTION = ("question_answer", "question", "answer")
ASKS = {
    **dict.fromkeys(("instruction", "instructions"), _ALPACA),
    "prompt": _PROMPT,
    **dict.fromkeys(
        (
            *("question", "query", "problem", "inputs", "input", "user", "human", "message_1", "user_input"),
            *("input_text", "text_input", "message"),
        ),
        _QUESTION,
    ),
}
REPLIES = (
    *("output", "completion", "answer", "response", "solution", "targets", "reply", "assistant", "gpt", "message_2"),
    *("answerkey", "answer_key", "outputs", "model_output", "assistant_response", "output_text", "answers"),
)
EXTRA = "input"  # stands beside what is asked, and is it only where nothing else is
SPEAKERS, ANSWERING = ("user", "human"), ("assistant", "gpt")  # only together: `user` may as well be who wrote a row
# Beside a text these leave it a text to learn: where it is from, when, how good and how long it is.
COMPANION = re.compile(
    r"(.*_)?(id|ids|idx|index|uuid|guid|url|uri|urls|link|domain|host|source|src|date|time|timestamp|year|month|day"
    r"|created|updated|modified|published|crawl|dump|snapshot|score|scores|probability|prob|perplexity|ppl|quality"
    r"|datetime|lang|language|license|licence|length|len|count|counts|size|tokens|chars|words|hash|sha|sha1|sha256|md5"
    r"|meta|metadata|path|file|filename|version|subset|split|shard|offset|line|row|author|authors|at)(_\d+)?|(date|url|crawl|meta|warc)_\w+"
)


class Reading(NamedTuple):
    """A row format, and the actual names of columns that have others there: {canonical: actual}."""

    row_format: str
    columns: dict[str, str]


def canonical_names(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """{known name: actual} of columns that are known but for case, spaces and hyphens; exact names need none."""
    there, wanted = set(names), set(known)
    by_folded: dict[str, list[str]] = {}
    for name in there - wanted:
        by_folded.setdefault(folded(name), []).append(name)
    return {
        canonical: actual[0]
        for canonical, actual in sorted(by_folded.items())
        if canonical in wanted - there and len(actual) == 1
    }


def pair_readings(names: Iterable[str], chosen: Iterable[str] = ()) -> list[Reading]:
    """Every way to read columns as a prompt and its reply; `chosen`: columns that the user named, which are the ones.

    Of {question, solution, answer} there are two: which of them is to be learnt nobody can tell from their names.
    """
    asks, replies = _pairs(names, set(chosen))
    found: list[Reading] = []
    for ask in asks:
        row_format, question, answer = ASKS[folded(ask)]
        found += [Reading(row_format, {question: ask, answer: reply}) for reply in replies]
    return found


def asked_columns(names: Iterable[str], chosen: Iterable[str] = ()) -> list[str]:
    """The columns that may hold what is asked."""
    asks = _of(names, ASKS, set(chosen))
    return [name for name in asks if folded(name) != EXTRA] or asks


def reply_columns(names: Iterable[str], chosen: Iterable[str] = ()) -> list[str]:
    """The columns that may hold the reply."""
    return _of(names, REPLIES, set(chosen))


def _pairs(names: Iterable[str], named: set[str]) -> tuple[list[str], list[str]]:
    """The columns that may hold what is asked, and those that may hold the reply."""
    asks = _of(names, ASKS, named)
    replies = _of(names, REPLIES, named)
    spoken = [name for name in replies if folded(name) in ANSWERING]
    others = [name for name in asks if folded(name) not in (EXTRA, *SPEAKERS)]
    if others or not spoken:
        asks = [name for name in asks if folded(name) not in SPEAKERS]
        replies = [name for name in replies if folded(name) not in ANSWERING]
    return others or asks, replies


@lru_cache(1024)
def is_lone_text(names: frozenset[str]) -> bool:
    """Whether the columns are a text with nothing beside it that could be learnt from it, or it from that."""
    others = {folded(name) for name in names} - {"text"}
    address = not others.isdisjoint(("url", "uri", "link"))
    return all(COMPANION.fullmatch(name) or (address and name == "title") for name in others)


def line_for(columns: Mapping[str, str]) -> str:
    """The line of a source's settings that maps columns."""
    return "columns: {" + ", ".join(f"{canonical}: {_quoted(actual)}" for canonical, actual in columns.items()) + "}"


def values_line(column: str, names: str) -> str:
    """The line of a source's settings that gives a column's values names."""
    return f"values: {{{_quoted(column)}: {names}}}"


def _of(names: Iterable[str], known: Iterable[str], named: set[str]) -> list[str]:
    there = [name for name in names if folded(name) in set(known)]
    chosen = [name for name in there if name in named]
    return sorted(chosen or there)


def _quoted(name: str) -> str:
    plain = re.fullmatch(r"[A-Za-z_][\w ]*\w", name) and name.lower() not in ("yes", "no", "on", "off", "true", "false")
    return name if plain or (len(name) == 1 and name.isalpha() and name.lower() not in "yn") else f'"{name}"'
