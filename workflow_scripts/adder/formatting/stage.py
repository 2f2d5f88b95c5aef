"""The stage "format": raw rows to conversations, split into training and held-out."""

from typing import Literal

from pydantic import Field

from adder.core.section import Section
from adder.core.stage_spec import Memory, StageSpec


class Format(Section):
    """Rows to conversations, and which of them are worth training on."""

    system_prompt: str | None = Field(default=None, min_length=1)
    """System message for conversations that have none."""
    max_rejected: float = Field(default=0.1, ge=0, le=1)
    """Share of unusable rows above which the run stops."""
    drop_duplicates: bool = True
    """Drop rows that repeat an earlier one, whatever their case and spacing."""
    near_duplicates: Literal["report", "drop", "off"] = "report"
    """What to do with training rows that nearly repeat an earlier one, found by MinHash."""
    near_duplicate_similarity: float = Field(default=0.8, gt=0, le=1)
    """Share of their three-word sequences (Jaccard) from which two rows are near-duplicates."""
    overlap: Literal["drop", "report", "off"] = "drop"
    """What to do with training rows whose prompt overlaps with a held-out or test prompt, found by 8-word sequences."""
    overlap_share: float = Field(default=0.5, gt=0, le=1)
    """Share of the held-out prompt's own words, above which that counts (Lambert et al. 2024, arXiv:2411.15124)."""
    max_leaked: float = Field(default=0.05, ge=0, le=1)
    """Share of the training rows dropped because held-out or test rows ask the same, above which the run stops."""


class FormatSettings(Format):
    """What decides the conversations: the section `format`, and how rows are held out."""

    share: float | None = None
    """See `data.heldout`."""
    size: int | None = None
    """See `data.heldout`."""
    group_by: str | None = None
    """See `data.heldout`."""
    keep_passages: bool = True
    """See `data.heldout`."""
    stratify_by: str | None = None
    """See `data.heldout`."""


# What is in neither part, as the stage's summary counts it.
DROPPED = ("rejected", "duplicates", "near_duplicates", "leaked", "left_out", "undesired")
FORMAT = StageSpec(
    name="format",
    rule="format_data",
    run="adder.formatting.run",
    settings=FormatSettings,
    section="format",
    takes={name: f"data.heldout.{name}" for name in ("share", "size", "group_by", "stratify_by", "keep_passages")},
    message="Turning rows into conversations",
    result=lambda found: ", ".join(
        [f"{found['train']:,} rows to train on", f"{found['heldout']:,} held out"]
        + [f"{found[name]:,} {name.replace('_', ' ')}" for name in DROPPED if found.get(name)]
    ),
    reads={"data": ("rows.jsonl", "reading.json")},
    shows={"format": "card.json", "rejects": "rejects.jsonl"},
    threads=None,
    memory=Memory(base_mb=4000),
)
