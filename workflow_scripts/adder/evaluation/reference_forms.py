"""What references look like: JSON, worked answers ("#### 42") or plain text. An exact match goes by it.

Apart from the registry of scores, whose changes are none of the training's, which counts exact matches too.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Never

# The last line of a worked answer in GSM8K's form.
FINAL_ANSWER = re.compile(r"####\s*(-?[\d.,]*\d)")

JsonObject = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """A form that references may have.

    name: the value of `evaluate.metrics` that asks for it, and `kind` in scores.json.
    words: one such reference in words.
    read: what of a text is compared; None for a text that hasn't this form.
    """

    name: str
    words: str
    read: Callable[[str], object | None]


def parse_object(text: str) -> JsonObject | None:
    """The JSON object that `text` is, white space aside; None for anything else (NaN isn't JSON, nor is a fence)."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refuse(name: str) -> Never:
    raise ValueError(f"{name} isn't JSON")


def final_answer(text: str) -> str | None:
    """The number behind the last "####" without thousands commas and trailing zeros of a fraction, or None."""
    found = FINAL_ANSWER.findall(text)
    if not found:
        return None
    number = found[-1].replace(",", "").rstrip(".")
    return number.rstrip("0").rstrip(".") if "." in number else number


# In the order in which references are tried; every text has the last form.
FORMS = {
    form.name: form
    for form in (
        Form("json", "a JSON object", parse_object),
        Form("final_answer", 'a text with "#### number"', final_answer),
        Form("text", "a text", str.strip),
    )
}


def choose_kind(references: Sequence[str]) -> str:
    """Return the name of the first form that every reference has; "text" where there is none."""
    fitting = (form.name for form in FORMS.values() if all(form.read(text) is not None for text in references))
    return next(fitting) if references else "text"


def is_match(kind: str, reference: str, reply: str) -> bool:
    """Whether a reply says what its reference says, in the form `kind`.

    "json": all fields equal, types included; the order of keys and white space don't matter. "final_answer": the same
    number behind the last "####". "text": equal but for white space around.
    """
    read = FORMS[kind].read
    found = read(reply)
    return found is not None and same(read(reference), found)


def same(a: Any, b: Any) -> bool:
    """Equality of JSON values. JSON has one kind of number (20 is 20.0), but true isn't 1 and "20" isn't 20."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    numbers = (int, float)
    if isinstance(a, numbers) and isinstance(b, numbers):
        return isinstance(a, bool) == isinstance(b, bool) and a == b
    return type(a) is type(b) and a == b
