"""JSON objects that name a key more than once: readers keep the last value, and nobody can tell which is meant."""

import json
from typing import Any


class RepeatedKeyError(ValueError):
    """The message names the key."""


def refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object that `pairs` are, for `object_pairs_hook`. Raises RepeatedKeyError for a key with two values."""
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            if found[key] is not value and found[key] != value:
                raise RepeatedKeyError(f"the key '{key[:40]}' stands more than once in one object, with other values")
    return found


def check_keys(text: bytes, value: dict[str, Any]) -> None:
    """Raise RepeatedKeyError where the JSON `text`, of which `value` was read, has a key twice, with other values.

    Counting tells nearly always; only where text within a string looks like keys is it read again.
    """
    try:
        if text.count(b'":') != _keys(value):
            json.loads(text, object_pairs_hook=refuse_repeated)
    except RecursionError:  # is refused for its nesting
        return


def _keys(value: dict[str, Any]) -> int:
    """How many keys all objects in a value have."""
    count = len(value)
    for one in value.values():
        if type(one) is dict:
            count += _keys(one)
        elif type(one) is list:
            count += _keys_in_list(one)
    return count


def _keys_in_list(values: list[Any]) -> int:
    count = 0
    for one in values:
        if type(one) is dict:
            count += _keys(one)
        elif type(one) is list:
            count += _keys_in_list(one)
    return count
