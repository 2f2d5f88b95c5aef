"""An automatic choice with its reason: what the report prints beside every value that Adder picked by itself."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Choice:
    """A chosen value, the sentence that says why, and what else was weighed (one dict an alternative)."""

    value: Any
    reason: str
    alternatives: list[dict] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Return the choice as JSON-able data."""
        return asdict(self)
