"""Why a row isn't trained on."""

from typing import Any


class Rejected(Exception):
    """A row that can't be used. `kind` is counted, with `counted_as` where a kind has several; `detail` says what was
    found in this row.
    """

    def __init__(self, kind: str, detail: str = "", counted_as: str | None = None) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = f"{kind}: {counted_as}" if counted_as else kind


class Undesired(Rejected):
    """A row that says of its own reply that it is not to be learnt."""


def json_type(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
