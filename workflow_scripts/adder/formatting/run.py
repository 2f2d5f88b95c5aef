"""Stage "format": raw rows to conversations, split into training and held-out, with every row accounted for.

Rows are read in blocks by workers and their conversations wait in a temporary file; in memory stay only hashes and
numbers, about 40 bytes a row (and 200 more where near-duplicates are looked for). Arrays decide which rows are trained
on; then the conversations pass through once more into the two Parquet files.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from adder.core import parallel
from adder.core.errors import UserError
from adder.core.files import read_json, write_json
from adder.core.progress import Progress
from adder.core.stage_spec import Context
from adder.data.records import Reading
from adder.formatting import block_converter, card_figures, heldout_split, minhash, passages, row_notes
from adder.formatting.accepted_rows import CLASSES, LEFT_OUT, AcceptedRows
from adder.formatting.block_converter import HELDOUT, TEST, TRAIN, UNDECIDED, ConversionRules, RejectKind, Survey
from adder.formatting.conversation_file import write_conversations
from adder.formatting.findings import decide, quality, write_findings
from adder.formatting.records import Card, Counts
from adder.formatting.row_fields import row_fields
from adder.formatting.row_formats import ColumnSets, SourceFormat, source_format
from adder.formatting.row_notes import Notes
from adder.formatting.spool import Spool
from adder.formatting.stage import FormatSettings

COUNTS = ("rows_in", *CLASSES, "rejected")
FEW_HELDOUT = 30  # an interval over fewer rows is too wide to tell anything but the plainest difference
ENOUGH = 4 << 20  # bytes of rows that are worth a worker
MOST_COLUMNS = 20  # columns of one source that are looked at for categories
MOST_NOTES = 30  # that are said of the rows
SHOWN = 200  # characters of a rejected row in a message

Readings = dict[str, Reading]
Result = TypeVar("Result")


@dataclass(frozen=True)
class FormatInputs:
    """Folders of the stages that are read."""

    data: Path


@dataclass
class Rejects:
    """How many rows rejects.jsonl holds, by kind of reason and by source; and, by source, how many are undesired."""

    kinds: dict[str, RejectKind] = field(default_factory=dict)
    by_source: Counter[str] = field(default_factory=Counter)
    undesired: Counter[str] = field(default_factory=Counter)

    def add(self, kinds: dict[str, RejectKind], by_source: Counter[str]) -> None:
        """Take those of one block."""
        self.by_source.update(by_source)
        for kind, found in kinds.items():
            known = self.kinds.get(kind, RejectKind(0, found.first))
            self.kinds[kind] = known._replace(rows=known.rows + found.rows)

    def because(self) -> str:
        """The most frequent reasons, each with its first row; "" if there are none."""
        most = sorted(self.kinds.values(), key=lambda kind: -kind.rows)[:3]
        lines = [
            f"\n  {count:,} rows: {first['reason']} (first: {first['source']}, row {first['row']}: "
            f"{str(first['data'])[:SHOWN]})"
            for count, first in most
        ]
        return "".join([". Rejected:", *lines]) if lines else ""


def run(settings: FormatSettings, inputs: FormatInputs, out: Path, context: Context) -> Counts:
    """Write train.parquet and heldout.parquet (conversation_file.SCHEMA), what was dropped and why (*.jsonl; see
    records), and card.json (records.Card).

    Where `group_by` or passages chose the held-out rows, heldout.parquet has a column more, `group` (16 hex digits),
    which tells rows that are alike to the evaluation. `share`, `size`, `group_by` and `stratify_by` are used where the
    rows have no held-out sources. Every row ends in exactly one of CLASSES or is rejected; `tests` are rows of
    protected test sets, which are in no file. Returns the card's counts.

    Raises UserError where nothing is left to train on or to hold out, more is to be held out than there is, more than
    settings.max_rejected can't be used, or a column that is named is nowhere.
    """
    rows_path, progress = inputs.data / "rows.jsonl", context.progress
    readings: Readings = read_json(inputs.data / "reading.json")
    survey = _survey(rows_path, context)
    rules = _rules(readings, survey, settings)
    column_notes = _say_formats(rules, survey, progress)
    spool = Spool(out / "spool")
    rows, rejects, columns, notes = _convert(
        rows_path, survey.rows.total(), rules, spool, out / "rejects.jsonl", context
    )
    _refuse_unusable(survey.rows.total(), rows, rejects, settings.max_rejected)

    own_sources = not rows.are(UNDECIDED).any()
    findings = decide(rows, spool, settings, context)
    copies = _weigh(rows, np.array([readings[name]["weight"] for name in rows.sources]))
    by_source = _count(rows, rejects, survey)
    counts = _total(by_source)
    _refuse_empty(counts, settings.share, rejects)

    figures = write_conversations(out / "train.parquet", spool, rows, copies * rows.are(TRAIN), progress)
    group = None
    if settings.group_by and rows.value is not None:
        group = heldout_split.groups_of(rows.prompt, rows.value)
    elif findings.by_passage:
        group = heldout_split.groups_of(rows.prompt, rows.passage)
    write_conversations(out / "heldout.parquet", spool, rows, rows.are(HELDOUT).astype(np.int64), progress, group)
    write_findings(out, rows, findings)
    about = passages.describe(rows.passage, rows.are(HELDOUT), rows.are(TRAIN)) if findings.by_passage else None
    split = heldout_split.describe(settings, counts["heldout"], counts["train"], own_sources, about)
    if about:
        progress.say(split)
    train_rows = int(copies[rows.are(TRAIN)].sum())
    card: Card = {
        **counts,
        "by_source": by_source,
        "train_rows": train_rows,
        "repeats": train_rows - counts["train"],
        "accepted": counts["train"] + counts["heldout"],
        "heldout_in_train": findings.heldout_in_train,
        "rejects_by_reason": {kind: found.rows for kind, found in sorted(rejects.kinds.items())},
        "row_format": {name: source.name for name, source in rules.formats.items()},
        "samples": card_figures.samples(spool, np.flatnonzero(rows.are(TRAIN)), rows.digest),
        "columns": columns.result(),
        "quality": quality(rows, spool, findings, settings),
        "split": split,
        "notes": [*column_notes, *notes],
        **figures.result(),
    }
    write_json(out / "card.json", card)
    _say(counts, rejects, progress)
    return counts


def _survey(rows_path: Path, context: Context) -> Survey:
    """A first look at all rows."""
    survey = Survey(Counter(), {})
    for found in _over_blocks(partial(block_converter.surveyor, rows_path), rows_path, context.threads):
        survey.add(found)
        context.progress.line(f"{survey.rows.total():,} rows seen")
    return survey


def _rules(readings: Readings, survey: Survey, settings: FormatSettings) -> ConversionRules:
    """How the rows are to be read, as the settings and a look at their columns tell."""
    nothing: ColumnSets = Counter()
    columns = {name: {c for columns in survey.column_sets.get(name, ()) for c in columns} for name in readings}
    formats = {
        name: source_format(
            name,
            asked["row_format"],
            asked["columns"],
            survey.column_sets.get(name, nothing),
            protected=asked["split"] == "test",
            fields=row_fields(name, asked, columns[name], asked["split"] == "test"),
        )
        for name, asked in readings.items()
    }
    value_column = settings.group_by or settings.stratify_by
    if value_column and not any(value_column in there for there in columns.values()):
        which = "group_by" if settings.group_by else "stratify_by"
        there = sorted(set().union(*columns.values()))
        raise UserError(
            f"data.heldout.{which} names the column '{value_column}', which no row has. The columns there: "
            f"{', '.join(there[:30])}"
        )
    categorical = {name: _maybe_categorical(there, formats[name]) for name, there in columns.items()}
    sign = settings.near_duplicates != "off"
    return ConversionRules(formats, settings.system_prompt, value_column, categorical, sign)


def _say_formats(rules: ConversionRules, survey: Survey, progress: Progress) -> list[str]:
    """Say of each source what its rows are and which of their columns are read; what the card should repeat of that."""
    notes: list[str] = []
    nothing: ColumnSets = Counter()
    for name, source in rules.formats.items():
        column_sets = survey.column_sets.get(name, nothing)
        progress.say(f"{name}: {(source.name or 'no known row format').replace('_', ' ')}")
        found = row_notes.column_notes(source, column_sets, [rules.value_column or ""])
        notes += [f"{name}: {note}" for note in found]
        for note in found:
            progress.say(f"{name}: {note}")
    return notes


def _maybe_categorical(columns: set[str], source: SourceFormat) -> list[str]:
    """The columns that are looked at for categories: those that the row format doesn't read."""
    own = source.own_columns()
    return [name for name in sorted(columns) if name not in own and block_converter.is_unicode(name)][:MOST_COLUMNS]


def _over_blocks(
    make: Callable[[], Callable[[tuple[int, int]], Result]], rows_path: Path, threads: int
) -> Iterator[Result]:
    """The results over all blocks of rows.jsonl, in order."""
    workers = parallel.worker_count(rows_path.stat().st_size, ENOUGH, threads)
    return parallel.map_batches(make, block_converter.blocks(rows_path), workers)


def _convert(
    rows_path: Path, total: int, rules: ConversionRules, spool: Spool, rejects_path: Path, context: Context
) -> tuple[AcceptedRows, Rejects, card_figures.CategoricalColumns, list[str]]:
    """Convert all rows: conversations into the spool, rejects into their file, the rest into arrays."""
    rejects, columns = Rejects(), card_figures.CategoricalColumns()
    notes: Notes = Counter()
    # The one large array is filled in place: to join parts would take its memory twice.
    signatures = np.empty((total if rules.sign else 0, minhash.PERMUTATIONS), dtype=np.uint8)
    blocks: list[block_converter.ConvertedBlock] = []
    accepted = 0
    with rejects_path.open("wb") as rejects_file:
        make = partial(block_converter.converter, rows_path, rules)
        for block in _over_blocks(make, rows_path, context.threads):
            count = len(block.row)
            spool.append(block.part, count)
            if block.signatures is not None:
                signatures[accepted : accepted + count] = block.signatures
            accepted += count
            rejects_file.write(block.rejects)
            rejects.add(block.kinds, block.rejected)
            rejects.undesired.update(block.undesired)
            notes.update(block.notes)
            columns.add(block.categories)
            # What stays of a block is its small arrays.
            blocks.append(
                block._replace(part=b"", rejects=b"", signatures=None, categories={}, kinds={}, notes=Counter())
            )
            rejected = rejects.by_source.total()
            seen = accepted + rejected + rejects.undesired.total()
            context.progress.line(f"{seen:,} of {total:,} rows read, {rejected:,} rejected")
    spool.finish()
    assert accepted + rejects.by_source.total() + rejects.undesired.total() == total
    values = [block.value for block in blocks if block.value is not None]
    system = _joined([block.system for block in blocks], np.uint64)
    prompt, with_system = heldout_split.asked(_joined([block.prompt for block in blocks], np.uint64), system)
    lines = np.concatenate([np.zeros((0, passages.LINES), np.uint64), *(block.lines for block in blocks)])
    rows = AcceptedRows(
        sources=list(rules.formats),
        source=_joined([block.source for block in blocks], np.int32),
        row=_joined([block.row for block in blocks], np.int64),
        split=_joined([block.split for block in blocks], np.int8),
        digest=_joined([block.digest for block in blocks], np.uint64),
        prompt=prompt,
        value=_joined(values, np.uint64) if rules.value_column else None,
        signatures=signatures[:accepted],
        with_system=with_system,
        passage=passages.passage_of_each(lines, system, prompt),
    )
    noted = [f"{source}: {note} ({count:,} rows)" for (source, note), count in notes.most_common(MOST_NOTES)]
    for note in noted:
        context.progress.say(note)
    return rows, rejects, columns, noted


Scalar = TypeVar("Scalar", bound=np.generic)


def _joined(parts: list[npt.NDArray[Scalar]], dtype: type[Scalar]) -> npt.NDArray[Scalar]:
    return np.concatenate([np.zeros(0, dtype), *parts])


def _refuse_unusable(total: int, rows: AcceptedRows, rejects: Rejects, limit: float) -> None:
    """Raise UserError where no row is left but of test sets, or more than the share `limit` is rejected."""
    if rows.are(TEST).all():
        undesired = rejects.undesired.total()
        why = f"; {undesired:,} rows say of their reply that it is not to be learnt" if undesired else ""
        raise UserError(f"no row can be used{why}{rejects.because()}")
    rejected = rejects.by_source.total()
    if rejected > limit * total:
        raise UserError(
            f"{rejected:,} of {total:,} rows ({rejected / total:.1%}) can't be used, more than format.max_rejected "
            f"allows ({limit:.1%}). Mend the rows, say what they are by `row_format`, `columns` or `convert` of the "
            f"source, or raise format.max_rejected{rejects.because()}"
        )


def _weigh(rows: AcceptedRows, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """How often each row is used, (n,); a training row that is not used becomes LEFT_OUT. weights: by source."""
    train = rows.are(TRAIN)
    copies = np.ones(len(train), dtype=np.int64)
    if (weights != 1).any():
        copies[train] = heldout_split.copies_of(rows.digest[train], weights[rows.source[train]])
        rows.split[train & (copies == 0)] = LEFT_OUT
    return copies


def _count(rows: AcceptedRows, rejects: Rejects, survey: Survey) -> dict[str, Counts]:
    """The card's counts by source. Every row that was read is in exactly one class."""
    by_source: dict[str, Counts] = {}
    for name, found in zip(rows.sources, rows.count_by_source(), strict=True):
        rows_in, rejected, undesired = survey.rows[name], rejects.by_source[name], rejects.undesired[name]
        assert sum(found.values()) + rejected + undesired == rows_in, (name, found)
        by_source[name] = {
            "rows_in": rows_in,
            "train": found["train"],
            "heldout": found["heldout"],
            "tests": found["tests"],
            "duplicates": found["duplicates"],
            "near_duplicates": found["near_duplicates"],
            "leaked": found["leaked"],
            "left_out": found["left_out"],
            "undesired": undesired,
            "rejected": rejected,
        }
    return by_source


def _total(by_source: dict[str, Counts]) -> Counts:
    """The counts of all sources together."""
    total: Counts = {
        "rows_in": 0, "train": 0, "heldout": 0, "tests": 0, "duplicates": 0, "near_duplicates": 0, "leaked": 0,
        "left_out": 0, "undesired": 0, "rejected": 0,
    }  # fmt: skip
    for counts in by_source.values():
        for key in total:
            total[key] += counts[key]
    return total


def _refuse_empty(counts: Counts, share: float | None, rejects: Rejects) -> None:
    """Raise UserError where nothing is left to train on or nothing is held out."""
    dropped = (
        f"{counts['duplicates']:,} duplicates, {counts['leaked']:,} also held out, {counts['rejected']:,} rejected"
    )
    for key in ("near_duplicates", "left_out", "undesired"):
        if counts[key]:
            dropped += f", {counts[key]:,} {key.replace('_', ' ')}"
    if not counts["train"]:
        held = f"{counts['heldout']:,} held out"
        raise UserError(f"no row is left to train on: {held}, {dropped}{rejects.because()}")
    if not counts["heldout"]:
        hint = ""
        if share is not None:
            hint = f"; data.heldout.share {share} of few rows can come to none, data.heldout.size is exact"
        raise UserError(f"no row is held out: {counts['train']:,} to train on, {dropped}{hint}{rejects.because()}")


def _say(counts: Counts, rejects: Rejects, progress: Progress) -> None:
    """Tell people what became of the rows, and what they should know of it."""
    progress.say(", ".join(f"{counts[key]:,} {key.replace('_', ' ')}" for key in COUNTS if counts[key]))
    if rejects.kinds:
        progress.say(f"warning: rows can't be used, each is in this stage's rejects.jsonl{rejects.because()}")
    if counts["heldout"] < FEW_HELDOUT:
        progress.say(
            f"warning: {counts['heldout']} held out may be too few for a verdict, {FEW_HELDOUT} tell more: "
            "data.heldout takes a size or a share"
        )
