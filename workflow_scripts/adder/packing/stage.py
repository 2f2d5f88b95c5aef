"""The stage "lengths": how long the examples are, and what follows: max_seq_length, packing, and the packs."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from adder.core.errors import UserError
from adder.core.files import read_json
from adder.core.model_config import context_length
from adder.core.section import Auto, Section
from adder.core.stage_spec import Memory, StageSpec


class PackingChoices(Section):
    """What decides sequence length and packing."""

    max_seq_length: Auto | Annotated[int, Field(ge=16)] = "auto"
    """Longest sequence in tokens. `auto` weighs the cost of each."""
    truncate: Literal["drop", "right", "left", "split"] = "drop"
    """What becomes of longer examples: dropped, cut at the end, cut at the start, or split into several."""
    max_dropped: float = Field(default=0.1, ge=0, le=1)
    """Share of examples of which nothing is trained on for their length, above which the run stops."""
    packing: Auto | bool = "auto"
    """Put several examples into one sequence, none of which sees another. `auto` compares the padding either way."""
    keep_whole: float = Field(default=0.99, gt=0, le=1)
    """Share of the examples that an `auto` length must keep whole."""


class Lengths(PackingChoices):
    """Sequence length and packing."""

    reshuffle: bool = False
    """Fill the packs anew in each epoch, with other examples of the same lengths."""


class LengthsSettings(PackingChoices):
    """What decides the packs."""

    effective_batch_size: int
    """Examples an optimizer step; see `train`."""
    max_examples: int | None
    """How many of the training examples are drawn; see `train`."""


NO_CONTEXT = (
    "lengths.max_seq_length: the model's config.json names no context length, as those of recurrent models don't; set "
    "the number of tokens that an example may have"
)


def _refuse(settings: LengthsSettings, model: Path) -> None:
    context, wanted = context_length(model), settings.max_seq_length
    named = read_json(model / "config.json").get("model_type")  # one that names no architecture is refused elsewhere
    if named and context is None and wanted == "auto":
        raise UserError(NO_CONTEXT)
    if context and wanted != "auto" and wanted > context:
        raise UserError(f"lengths.max_seq_length: {wanted} is above the model's context, {context} tokens")


LENGTHS = StageSpec(
    name="lengths",
    rule="choose_lengths",
    run="adder.packing.run",
    settings=LengthsSettings,
    section="lengths",
    takes={"effective_batch_size": "train.effective_batch_size", "max_examples": "train.max_examples"},
    message="Choosing the sequence length and packing",
    result=lambda found: (
        f"max_seq_length {found['max_seq_length']:,}: {found['examples']:,} examples in {found['packs']:,} "
        + ("packs" if found["packing"] else "padded rows")
        + (f"; {found['dropped']:,} dropped" if found["dropped"] else "")
    ),
    reads={"tokenize": ("train.arrow",), "model": ("model/config.json",)},
    refuse=_refuse,
    priority=1,
    shows={"lengths": "lengths.json"},
    minutes=30,
    memory=Memory(base_mb=4000),
)
