"""An automatic choice with its reason: what the report prints beside every value that Adder picked by itself."""

from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypedDict, TypeVar, cast

Value = TypeVar("Value")
Alternative = TypeVar("Alternative")


class ChoiceRecord(TypedDict):
    """A choice as stages write it."""

    value: Any
    reason: str
    alternatives: list[Any]


@dataclass(frozen=True)
class Choice(Generic[Value, Alternative]):
    """A chosen value, the sentence that says why, and what else was weighed (one dictionary an alternative)."""

    value: Value
    reason: str
    alternatives: list[Alternative] = field(default_factory=list)

    def to_dict(self) -> ChoiceRecord:
        """Return the choice as JSON-able data."""
        return cast(ChoiceRecord, asdict(self))
