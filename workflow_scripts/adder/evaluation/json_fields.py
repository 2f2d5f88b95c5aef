"""JSON replies compared with their references field by field."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

from adder.evaluation.reference_forms import JsonObject, same


class FieldComparison(TypedDict):
    """One field of a reply; a field that is missing is None, as one that is null."""

    expected: Any
    found: Any
    correct: bool


class FieldScores(TypedDict):
    """The scores of one field over all replies, 0 to 1; a ratio without anything to divide by is None."""

    precision: float | None
    recall: float | None
    f1: float | None
    accuracy: float | None
    n: int


class FieldCounts(NamedTuple):
    """Numbers of values among the fields of replies; null is the absence of a value on either side."""

    right: int
    found: int
    expected: int


def flatten(value: JsonObject, prefix: str = "") -> dict[str, Any]:
    """Fields of an object with those of nested objects under dotted names; a list or an empty object is one value."""
    fields: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            fields |= flatten(inner, f"{prefix}{key}.")
        else:
            fields[prefix + key] = inner
    return fields


def compare_fields(expected: JsonObject, found: JsonObject | None) -> dict[str, FieldComparison]:
    """Compare field by field, by dotted names.

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


def count_fields(fields: Mapping[str, FieldComparison]) -> FieldCounts:
    """Count the values of one reply.

    Summed over replies, right / found is the precision and right / expected the recall of slot filling.
    """
    values = fields.values()
    found = sum(field["found"] is not None for field in values)
    expected = sum(field["expected"] is not None for field in values)
    right = sum(field["correct"] and field["expected"] is not None for field in values)
    return FieldCounts(right, found, expected)


def field_table(replies: Sequence[Mapping[str, FieldComparison]]) -> dict[str, FieldScores]:
    """The scores of each field that a reference has, by name, over the replies' fields.

    `n`: references with a value for it. `accuracy` is over the replies where reference or reply names the field, and
    counts null where null was expected as right.
    """
    names = dict.fromkeys(name for fields in replies for name, field in fields.items() if _in_reference(field))
    table: dict[str, FieldScores] = {}
    for name in names:
        own = [{name: fields[name]} for fields in replies if name in fields]
        right, found, expected = _sum_of(map(count_fields, own))
        table[name] = {
            "precision": _share(right, found),
            "recall": _share(right, expected),
            "f1": _share(2 * right, found + expected),
            "accuracy": _share(sum(fields[name]["correct"] for fields in own), len(own)),
            "n": expected,
        }
    return table


def _sum_of(counts: Iterable[FieldCounts]) -> FieldCounts:
    return FieldCounts(*map(sum, zip(*counts, strict=True)))


def _in_reference(field: FieldComparison) -> bool:
    # A field that only a reply names has no expected value; so has one whose reference is null, which is then correct
    # or holds a value. Made-up names would fill the table with a rambling model's inventions.
    return field["expected"] is not None


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
