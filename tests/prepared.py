"""Sources as a configuration has them, run through the stages "data" and "format": what users bring, and what it
became."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from adder.core.files import read_json
from adder.core.labels import IGNORE_INDEX
from adder.core.progress import Progress
from adder.core.stage_spec import Context, Runtime
from adder.formatting.run import FormatInputs, run
from adder.formatting.stage import Format
from adder.packing import run as packing
from adder.packing.records import LengthsRecord
from adder.packing.stage import LengthsSettings
from adder.tokenization import run as tokenization
from adder.tokenization.records import TokenizeRecord
from adder.tokenization.stage import TokenizeSettings
from adder.tokenization.token_table import TokenTable
from data_stages import write_rows
from format_stage import Formatted, assert_all_accounted_for, format_settings


def prepare(
    folder: Path,
    listed: list[dict[str, Any]],
    heldout: dict[str, Any] | None = None,
    tests: Iterable[Any] = (),
    heldout_sources: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> tuple[Formatted, str]:
    """Read the sources and format their rows; what that made, and all that it showed. changes: of format's settings."""
    written = write_rows(folder / "data", listed, heldout_sources, tests)
    out, stream = folder / "format", io.StringIO()
    out.mkdir()
    settings = format_settings(**(heldout or ({} if heldout_sources else {"size": 1})), **changes)
    run(settings, FormatInputs(folder / "data"), out, Context(Progress("format", stream), Runtime(threads=1)))
    formatted = Formatted(out)
    assert_all_accounted_for(formatted)
    return formatted, written.shown + stream.getvalue()


class Trained(NamedTuple):
    """What the stages up to "lengths" made of sources: conversations, what training reads of them, and all they
    said."""

    formatted: Formatted
    texts: list[str]  # of each training example, its control tokens included
    learnt: list[str]  # what of it carries loss
    tokenize: TokenizeRecord
    lengths: LengthsRecord
    shown: str


def prepare_to_train(
    folder: Path, listed: list[dict[str, Any]], model: Path, heldout: dict[str, Any] | None = None
) -> Trained:
    """Run the stages "data", "format", "tokenize" and "lengths" with their defaults. model: a model directory."""
    defaults = {name: field.default for name, field in Format.model_fields.items()}
    formatted, shown = prepare(folder, listed, heldout or {"share": 0.1}, **defaults)
    stream = io.StringIO()
    parent, tokens, lengths = folder / "model", folder / "tokenize", folder / "lengths"
    for path in (parent, tokens, lengths):
        path.mkdir()
    (parent / "model").symlink_to(model)
    context = Context(Progress("tokenize", stream), Runtime(threads=1))
    tokenization.run(TokenizeSettings(), tokenization.TokenizeInputs(folder / "format", parent), tokens, context)
    choices = LengthsSettings(effective_batch_size=16, max_examples=None)
    packing.run(choices, packing.LengthsInputs(tokens, parent), lengths, context)
    tokenizer = AutoTokenizer.from_pretrained(tokens / "tokenizer")
    table = TokenTable(tokens / "train.arrow")
    texts = [tokenizer.decode(table.input_ids(row)) for row in range(len(table))]
    labels = [table.labels(row) for row in range(len(table))]
    learnt = [tokenizer.decode(one[one != IGNORE_INDEX]) for one in labels]
    records = read_json(tokens / "tokenize.json"), read_json(lengths / "lengths.json")
    return Trained(formatted, texts, learnt, *records, shown + stream.getvalue())


def conversations(formatted: Formatted) -> list[list[dict[str, Any]]]:
    """The messages of all rows that are used, in the order of their ids."""
    rows = sorted(formatted.train + formatted.heldout, key=lambda row: (len(row["id"]), row["id"]))
    return [row["messages"] for row in rows]
