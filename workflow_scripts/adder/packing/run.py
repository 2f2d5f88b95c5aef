"""How long the examples are, and what follows: max_seq_length, packing, and the packs that training reads."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from adder.core.errors import UserError
from adder.core.files import read_json, write_json, write_table
from adder.core.length_summary import summarise
from adder.core.model_config import context_length
from adder.core.stage_spec import Context
from adder.packing.best_fit_decreasing import (
    SEED,
    Packs,
    batch_padded_positions,
    best_fit_decreasing,
    one_by_one,
    waste,
)
from adder.packing.max_seq_length import choose_max_seq_length
from adder.packing.pack_or_pad import choose_packing
from adder.packing.pieces import Pieces, count_lost, cut, describe_truncation, sample
from adder.packing.records import Histogram, LengthsRecord
from adder.packing.stage import NO_CONTEXT, LengthsSettings
from adder.tokenization.token_table import TokenTable

HISTOGRAM_BINS = 40
LISTED = 1000  # ids of dropped examples that are listed; the rest is counted


@dataclass(frozen=True)
class LengthsInputs:
    """Folders of the stages that are read."""

    tokenize: Path
    model: Path


class LengthsSummary(TypedDict):
    """A few figures for the stage's record."""

    max_seq_length: int
    packing: bool
    examples: int
    dropped: int
    packs: int


def run(settings: LengthsSettings, inputs: LengthsInputs, out: Path, context: Context) -> LengthsSummary:
    """Choose max_seq_length and packing for the tokenised training examples; write `packs.parquet` and `lengths.json`.

    A pack is three lists of equal length: `rows` (of train.arrow), `starts` (the first token in each) and
    `seq_lengths`. Raises UserError when no example remains or when the max_seq_length asked for is above the model's
    context.
    """
    table = TokenTable(inputs.tokenize / "train.arrow")
    rows = sample(table.column("digest"), settings.max_examples)
    lengths = table.column("tokens")[rows].astype(np.int64)
    labelled = table.column("labelled")[rows].astype(np.int64)
    model = inputs.model / "model"
    most = context_length(model)
    if most is None:
        if settings.max_seq_length == "auto":
            raise UserError(NO_CONTEXT)
        most = settings.max_seq_length
    cutting = settings.truncate != "drop"
    count = partial(count_lost, table, rows, truncate=settings.truncate) if cutting else None
    limit = choose_max_seq_length(lengths, labelled, most, settings, read_json(model / "config.json"), count)
    pieces = cut(table, rows, lengths, labelled, limit.value, settings.truncate)
    if not len(pieces.rows):
        raise UserError(
            f"lengths.max_seq_length: {limit.value} drops every example, the shortest has {lengths.min()} tokens"
        )
    gone = np.setdiff1d(rows, pieces.rows)
    _refuse_many_dropped(len(gone), len(rows), lengths, limit.value, most, settings)
    batch = settings.effective_batch_size
    packing = choose_packing(pieces.tokens, limit.value, batch, settings.packing)
    packs = make_packs(pieces.tokens, limit.value) if packing.value else one_by_one(len(pieces.rows))
    write_table(out / "packs.parquet", pack_table(pieces, packs))
    tokens = int(pieces.tokens.sum())
    positions = len(packs) * limit.value if packing.value else batch_padded_positions(pieces.tokens, batch)
    record: LengthsRecord = {
        "tokens": summarise(lengths),
        "histogram": _histogram(lengths),
        "context": most,
        "max_seq_length": {"value": limit.value, "reason": limit.reason, "alternatives": limit.alternatives},
        "packing": {"value": packing.value, "reason": packing.reason, "alternatives": packing.alternatives},
        "available": len(table),
        "examples": len(pieces.rows),
        "packs": len(packs),
        "examples_per_pack": round(len(pieces.rows) / len(packs), 3),
        "fill": round(1 - waste(tokens, positions), 4),
        "total_tokens": tokens,
        "labelled_tokens": int(pieces.labelled.sum()),
        "truncation": describe_truncation(lengths, labelled, pieces, limit.value, settings.truncate),
        "dropped": len(gone),
        "dropped_ids": table.ids(gone[:LISTED]),
    }
    write_json(out / "lengths.json", record)
    context.progress.say(f"max_seq_length: {limit.reason}")
    context.progress.say(f"packing: {packing.reason}")
    return {
        "max_seq_length": limit.value,
        "packing": packing.value,
        "examples": record["examples"],
        "dropped": record["dropped"],
        "packs": record["packs"],
    }


def _refuse_many_dropped(
    dropped: int, total: int, lengths: npt.NDArray[np.int64], limit: int, context: int, settings: LengthsSettings
) -> None:
    """Raise UserError where a larger share of the examples than settings.max_dropped would not be trained on."""
    if dropped <= settings.max_dropped * total:
        return
    what = f"{dropped:,} of {total:,} examples ({dropped / total:.1%}) are longer than {limit:,} tokens and would be"
    if settings.truncate == "drop":
        what += " dropped"
        cuts = "`lengths.truncate: right`, `left` or `split` cuts them instead; "
    else:
        what += f" left out, as nothing that carries loss is left of them with `truncate: {settings.truncate}`"
        cuts = "another `lengths.truncate` keeps other parts of them; "
    if limit < context:
        cuts = f"a larger lengths.max_seq_length (the model's context is {context:,}) keeps them; {cuts}"
    raise UserError(
        f"{what}, more than lengths.max_dropped allows ({settings.max_dropped:.1%}); the longest has "
        f"{lengths.max():,}. {cuts[0].upper()}{cuts[1:]}a higher lengths.max_dropped leaves them out"
    )


def make_packs(lengths: npt.NDArray[np.int64], max_seq_length: int) -> Packs:
    """Packs in a shuffled order (fixed seed): as packed they would come sorted by length, long examples first."""
    packs = best_fit_decreasing(lengths, max_seq_length)
    return packs.take(np.random.default_rng(SEED).permutation(len(packs)))


def pack_table(pieces: Pieces, packs: Packs) -> pa.Table:
    """One row a pack: its pieces' `rows`, `starts` and `seq_lengths` (tokens), lists of int32."""
    borders = pa.array(packs.borders, pa.int32())
    columns = {"rows": pieces.rows, "starts": pieces.starts, "seq_lengths": pieces.tokens}
    return pa.table(
        {
            name: pa.ListArray.from_arrays(borders, pa.array(values[packs.order], pa.int32()))
            for name, values in columns.items()
        }
    )


def _histogram(lengths: npt.NDArray[np.int64]) -> Histogram:
    """Whole-numbered edges, all bins of one width, the last including the longest example."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, math.ceil((high - low + 1) / HISTOGRAM_BINS))
    counts, edges = np.histogram(lengths, bins=np.arange(low, high + width + 1, width))
    return {"edges": edges.tolist(), "counts": counts.tolist()}
