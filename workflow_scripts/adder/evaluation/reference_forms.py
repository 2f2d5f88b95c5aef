"""What references look like: JSON, worked answers ("#### 42") or plain text. An exact match goes by it.

Apart from the registry of scores, whose changes are none of the training's, which counts exact matches too.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Never

from adder.evaluation.quantities import Decimal, habit, parse_quantity, same_quantity, without_latex

# What stands behind the four signs of a worked answer in GSM8K's form.
FINAL_ANSWER = re.compile(r"####(?!#)[^\S\n]*(\S[^\n]*)")
NAMED = re.compile(r"^\s*[A-Za-z]\w?\s*=\s*")  # x = before a number
SPACE_BESIDE_SIGN = re.compile(r"\s*([^\w\s])\s*")
LETTER = re.compile(r"^\((\w)\)$")  # (a) of several choices
ROOT = re.compile(r"(\\sqrt)(\d)")
CLOCK = re.compile(r"^0(?=\d:\d\d)")
LONGEST_ANSWER = 40  # characters; a heading of Markdown begins like a final answer, and is mostly longer

JsonObject = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """A form that references may have.

    name: the value of `evaluate.metrics` that asks for it, and `kind` in scores.json.
    words: one such reference in words.
    read: what of a text is compared; None for a text that hasn't this form.
    same: whether what was read of a reference and of a reply says the same.
    suits: whether all of some references are such that `auto` takes this form.
    """

    name: str
    words: str
    read: Callable[[str], object | None]
    same: Callable[[Any, Any], bool]
    suits: Callable[[Sequence[str]], bool]


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
    """What stands behind the last "####", to the end of its line; None without one."""
    found = FINAL_ANSWER.findall(text)
    return found[-1].strip() if found else None


def same_answer(decimal: Decimal, one: str, other: str) -> bool:
    """Whether two final answers are one: the same number where both are numbers, else the same text but for case."""
    if ("=" in one) != ("=" in other):  # what is asked for has a name in one of them
        one, other = NAMED.sub("", one), NAMED.sub("", other)
    numbers = parse_quantity(one, decimal), parse_quantity(other, decimal)
    if numbers[0] and numbers[1]:
        return same_quantity(numbers[0], numbers[1])
    return _plain(one) == _plain(other)


def _plain(text: str) -> str:
    """A text as it is compared: spaces count between words and numbers only, and signs around all of it don't."""
    plain = SPACE_BESIDE_SIGN.sub(r"\1", " ".join(without_latex(text).casefold().split())).strip(" .*$")
    plain = LETTER.sub(r"\1", plain)
    return CLOCK.sub("", ROOT.sub(r"\1{\2}", plain))


def _are_answers(decimal: Decimal, references: Sequence[str]) -> bool:
    """Whether each reference ends in a line "#### answer", a short one with a number, and these have this habit."""
    for text in references:
        last = text.rstrip().rpartition("\n")[2].strip()
        answer = final_answer(last)
        if (
            answer is None
            or not last.startswith("####")
            or len(answer) > LONGEST_ANSWER
            or not re.search(r"\d", answer)
        ):
            return False
    return habit(references) == decimal


def _each(read: Callable[[str], object | None], references: Sequence[str]) -> bool:
    return all(read(text) is not None for text in references)


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


# In the order in which references are tried; every text has the last form.
FORMS = {
    form.name: form
    for form in (
        Form("json", "a JSON object", parse_object, same, partial(_each, parse_object)),
        Form(
            "final_answer",
            'a text with "#### answer"',
            final_answer,
            partial(same_answer, "point"),
            partial(_are_answers, "point"),
        ),
        Form(
            "final_answer_comma",
            'a text with "#### answer"',
            final_answer,
            partial(same_answer, "comma"),
            partial(_are_answers, "comma"),
        ),
        Form("text", "a text", str.strip, same, partial(_each, str.strip)),
    )
}


def choose_kind(references: Sequence[str]) -> str:
    """Return the name of the first form that suits all references; "text" where there is none."""
    return next(form.name for form in FORMS.values() if form.suits(references)) if references else "text"


def is_match(kind: str, reference: str, reply: str) -> bool:
    """Whether a reply says what its reference says, in the form `kind`.

    "json": all fields equal, types included; the order of keys and white space don't matter. "final_answer": the same
    number, or text, behind the last "####" ("final_answer_comma": with decimal commas). "text": equal but for white
    space around.
    """
    form = FORMS[kind]
    wanted, found = form.read(reference), form.read(reply)
    return found is not None and wanted is not None and form.same(wanted, found)
