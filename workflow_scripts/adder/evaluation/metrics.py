"""How right a reply is, by what the references look like: JSON objects, worked answers ("#### 42"), or plain text."""

import json
import re
from collections.abc import Sequence
from typing import Any

from adder.core.choice import Choice
from adder.core.errors import UserError

# The last line of a worked answer in GSM8K's form.
FINAL_ANSWER = re.compile(r"####\s*(-?[\d.,]*\d)")


def choose_kind(references: Sequence[str]) -> str:
    """Return how to score: "json" if every reference is a JSON object, "final_answer" if every one ends in
    "#### number", else "text"."""
    if references and all(parse_object(text) is not None for text in references):
        return "json"
    if references and all(FINAL_ANSWER.search(text) for text in references):
        return "final_answer"
    return "text"


def choose_metrics(references: Sequence[str], wanted: str | list[str] = "auto") -> Choice:
    """Choose how replies are scored: a list of exact_match, json, final_answer, rouge_l and chrf.

    exact_match is always there; with json it compares objects, with final_answer the numbers behind "####". Raises
    UserError where a metric is asked for that a reference has no form for.
    """
    if wanted == "auto":
        kind = choose_kind(references)
        if kind == "json":
            return Choice(["exact_match", "json"], "every reference is a JSON object")
        if kind == "final_answer":
            return Choice(["exact_match", "final_answer"], 'every reference ends in "#### number"')
        return Choice(["exact_match", "rouge_l", "chrf"], "the references are free text")
    for name, form, fits in (
        ("json", "a JSON object", lambda text: parse_object(text) is not None),
        ("final_answer", 'a text with "#### number"', FINAL_ANSWER.search),
    ):
        odd = next((text for text in references if not fits(text)), None) if name in wanted else None
        if odd is not None:
            raise UserError(
                f"evaluate.metrics: {name!r} needs {form} as each reference, but one is {odd[:80]!r}; leave it out"
            )
    return Choice(list(dict.fromkeys(["exact_match", *wanted])), "as set")


def kind_of(metrics: Sequence[str]) -> str:
    """What exact_match compares under these metrics: "json", "final_answer" or "text"."""
    return next((name for name in ("json", "final_answer") if name in metrics), "text")


def score(kind: str, reference: str, reply: str) -> dict:
    """Score one reply: {exact_match: 0/1}, and for "json" also json_valid 0/1 and `fields` as compare_fields has it.

    "json": all fields equal, types included; the order of keys and white space don't matter. "final_answer": the same
    number behind the last "####". "text": equal but for white space around.
    """
    if kind == "json":
        expected, found = parse_object(reference), parse_object(reply)
        return {
            "exact_match": int(same(expected, found)),
            "json_valid": int(found is not None),
            "fields": compare_fields(expected, found),
        }
    if kind == "final_answer":
        expected, found = final_answer(reference), final_answer(reply)
        return {"exact_match": int(found is not None and expected == found)}
    return {"exact_match": int(reference.strip() == reply.strip())}


def parse_object(text: str) -> dict | None:
    """The JSON object that `text` is, white space aside; None for anything else (NaN isn't JSON, nor is a fence)."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refuse(name: str):
    raise ValueError(f"{name} isn't JSON")


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


def flatten(value: dict, prefix: str = "") -> dict[str, Any]:
    """Fields of an object with those of nested objects under dotted names; a list or an empty object is one value."""
    fields: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            fields |= flatten(inner, f"{prefix}{key}.")
        else:
            fields[prefix + key] = inner
    return fields


def compare_fields(expected: dict, found: dict | None) -> dict[str, dict]:
    """Field by field, {name: {expected, found, correct}}; a field that is missing is None, as one that is null.

    `found` is None for a reply that isn't a JSON object: then nothing is correct, not even a field left empty.
    """
    left, right = flatten(expected), flatten(found or {})
    return {
        name: {
            "expected": left.get(name),
            "found": right.get(name),
            "correct": found is not None and same(left.get(name), right.get(name)),
        }
        for name in [*left, *(name for name in right if name not in left)]
    }


def count_fields(fields: dict[str, dict]) -> tuple[int, int, int]:
    """(right, found, expected) values among the fields of one reply; null is the absence of a value on either side.

    Summed over replies, right / found is the precision and right / expected the recall of slot filling.
    """
    values = fields.values()
    found = sum(field["found"] is not None for field in values)
    expected = sum(field["expected"] is not None for field in values)
    right = sum(field["correct"] and field["expected"] is not None for field in values)
    return right, found, expected


def field_table(replies: Sequence[dict[str, dict]]) -> dict[str, dict]:
    """{name: {precision, recall, f1, accuracy, n}} of each field that a reference has, over the replies' `fields`.

    `n`: references with a value for it. `accuracy` is over the replies where reference or reply names the field, and
    counts null where null was expected as right. A ratio without anything to divide by is None.
    """
    names = dict.fromkeys(name for fields in replies for name, field in fields.items() if _in_reference(field))
    table = {}
    for name in names:
        own = [{name: fields[name]} for fields in replies if name in fields]
        right, found, expected = (sum(counts) for counts in zip(*map(count_fields, own), strict=True))
        table[name] = {
            "precision": _share(right, found),
            "recall": _share(right, expected),
            "f1": _share(2 * right, found + expected),
            "accuracy": _share(sum(fields[name]["correct"] for fields in own), len(own)),
            "n": expected,
        }
    return table


def _in_reference(field: dict) -> bool:
    # A field that only a reply names has no expected value; so has one whose reference is null, which is then correct
    # or holds a value. Made-up names would fill the table with a rambling model's inventions.
    return field["expected"] is not None


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def final_answer(text: str) -> str | None:
    """The number behind the last "####" without thousands commas and trailing zeros of a fraction, or None."""
    found = FINAL_ANSWER.findall(text)
    if not found:
        return None
    number = found[-1].replace(",", "").rstrip(".")
    return number.rstrip("0").rstrip(".") if "." in number else number
