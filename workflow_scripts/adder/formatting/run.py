"""Stage "format": raw rows to conversations, split into training and held-out, with every row accounted for.

Rows are read in blocks by workers and their conversations wait in a file; in memory stay only hashes and numbers, about
40 bytes a row (and 200 more where near-duplicates are looked for). Arrays decide which rows are trained on; then the
conversations pass through once more into the two Parquet files. Blocks that an earlier run has read are taken from it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, TypeVar

import numpy as np
import numpy.typing as npt

from adder.core import parallel, record_blocks, row_blocks
from adder.core.errors import UserError
from adder.core.files import read_json, write_json
from adder.core.kept_blocks import INDEX, PAYLOAD, BlockIndex, EarlierBlocks
from adder.core.progress import Progress
from adder.core.record_blocks import RecordBlock
from adder.core.stage_spec import Context
from adder.data.records import Reading
from adder.formatting import block_converter, card_figures, heldout_split, passages, row_notes
from adder.formatting.accepted_rows import CLASSES, LEFT_OUT, AcceptedRows
from adder.formatting.block_converter import (
    HELDOUT,
    SPLITS,
    TEST,
    TRAIN,
    UNDECIDED,
    ConversionRules,
    ConvertedBlock,
    RejectKind,
    Rest,
    Survey,
)
from adder.formatting.conversation_file import ConversationFile, write_conversations
from adder.formatting.findings import decide, quality, write_findings
from adder.formatting.records import Card, Counts, Reject
from adder.formatting.row_fields import row_fields
from adder.formatting.row_formats import ColumnSets, SourceFormat, source_format
from adder.formatting.row_notes import Notes
from adder.formatting.similarity import minhash
from adder.formatting.spool import Spool
from adder.formatting.stage import FormatSettings

COUNTS = ("rows_in", *CLASSES, "rejected")
FEW_HELDOUT = 30  # an interval over fewer rows is too wide to tell anything but the plainest difference
ENOUGH = 4 << 20  # bytes of rows that are worth a worker
LIBRARIES = ("orjson", "numpy", "pyarrow", "rensa")  # with which rows are read
MOST_COLUMNS = 20  # columns of one source that are looked at for categories
MOST_NOTES = 30  # that are said of the rows
SHOWN = 200  # characters of a rejected row in a message

Readings = dict[str, Reading]
Batch = TypeVar("Batch")
Result = TypeVar("Result")


@dataclass(frozen=True)
class FormatInputs:
    """Folders of the stages that are read."""

    data: Path


class SurveyedBlock(NamedTuple):
    """A block of rows.jsonl, and what a first look at it found."""

    block: RecordBlock
    survey: Survey


class Told(TypedDict):
    """What is kept of a block beside its part of the spool and its rejects. column_sets: [columns, rows]."""

    column_sets: list[tuple[list[str], int]]
    accepted: int
    rest: Rest


@dataclass
class Rejects:
    """How many rows rejects.jsonl holds, by kind of reason and by source; and, by source, how many are undesired."""

    kinds: dict[str, RejectKind] = field(default_factory=dict)
    by_source: Counter[str] = field(default_factory=Counter)
    undesired: Counter[str] = field(default_factory=Counter)

    def add(self, block: RecordBlock, rest: Rest) -> None:
        """Take those of one block."""
        self.by_source[block.source] += rest["rejected"]
        self.undesired[block.source] += rest["undesired"]
        for kind, (rows, first) in rest["kinds"].items():
            placed: Reject = {**first, "row": first["row"] + block.first_row}
            known = self.kinds.get(kind, RejectKind(0, placed))
            self.kinds[kind] = known._replace(rows=known.rows + rows)

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
    earlier = EarlierBlocks(context.earlier, block_converter.__name__, *LIBRARIES) if context.earlier else None
    blocks = _survey(rows_path, earlier, context)
    survey = Survey(Counter(), {})
    for block in blocks:
        survey.add(block.survey)
    rules = _rules(readings, survey, settings)
    column_notes = _say_formats(rules, survey, progress)
    spool = Spool(out / PAYLOAD, keep=earlier is not None)
    meanings = _meanings(rules, readings, earlier.made_by) if earlier else {}
    converted = _converted(rows_path, blocks, rules, earlier, meanings, context)
    if earlier:
        converted = _indexed(out / INDEX, earlier.made_by, blocks, meanings, converted)
    rows, rejects, columns, notes = _gather(blocks, converted, rules, spool, meanings, out / "rejects.jsonl", context)
    _refuse_unusable(survey.rows.total(), rows, rejects, settings.max_rejected)

    own_sources = not rows.are(UNDECIDED).any()
    findings = decide(rows, spool, settings, context)
    for note in findings.notes():
        context.progress.say(f"warning: {note}")
    copies = _weigh(rows, np.array([readings[name]["weight"] for name in rows.sources]))
    by_source = _count(rows, rejects, survey)
    counts = _total(by_source)
    _refuse_empty(counts, settings.share, rejects)

    group = None
    if settings.group_by and rows.value is not None:
        group = heldout_split.groups_of(rows.prompt, rows.value)
    elif findings.by_passage:
        group = heldout_split.groups_of(rows.prompt, rows.passage)
    train = ConversationFile(out / "train.parquet", copies * rows.are(TRAIN))
    heldout = ConversationFile(out / "heldout.parquet", rows.are(HELDOUT).astype(np.int64), group)
    write_conversations([train, heldout], spool, rows, progress)
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
        "notes": [*column_notes, *notes, *findings.notes()],
        **train.figures.result(),
    }
    write_json(out / "card.json", card)
    _say(counts, rejects, progress)
    return counts


def _survey(rows_path: Path, earlier: EarlierBlocks | None, context: Context) -> list[SurveyedBlock]:
    """A first look at all rows, in blocks."""
    size = rows_path.stat().st_size
    workers = parallel.worker_count(size, ENOUGH, context.threads)
    scanned: list[record_blocks.Scanned] = []
    rows = 0
    for found in parallel.map_batches(
        partial(record_blocks.scanner, rows_path), block_converter.blocks(rows_path), workers
    ):
        scanned.append(found)
        rows += len(found.numbers)
        context.progress.line(f"{rows:,} rows seen")
    blocks = record_blocks.in_blocks(scanned, size)
    known = [_known_survey(block, earlier) for block in blocks]
    new = [(block.start, block.end) for block, survey in zip(blocks, known, strict=True) if survey is None]
    made = _over(partial(block_converter.surveyor, rows_path), new, _bytes_of(new), context)
    return [SurveyedBlock(block, survey or next(made)) for block, survey in zip(blocks, known, strict=True)]


def _known_survey(block: RecordBlock, earlier: EarlierBlocks | None) -> Survey | None:
    told: Told | None = earlier.told(block.key) if earlier else None
    if told is None:
        return None
    column_sets: ColumnSets = Counter({tuple(columns): rows for columns, rows in told["column_sets"]})
    return Survey(Counter({block.source: block.rows}), {block.source: column_sets} if column_sets else {})


def _bytes_of(ranges: list[tuple[int, int]]) -> int:
    return sum(end - start for start, end in ranges)


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
            values=asked.get("values"),
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
            progress.note(f"{name}: {note}")
    return notes


def _maybe_categorical(columns: set[str], source: SourceFormat) -> list[str]:
    """The columns that are looked at for categories: those that the row format doesn't read."""
    own = source.own_columns()
    return [name for name in sorted(columns) if name not in own and block_converter.is_unicode(name)][:MOST_COLUMNS]


def _over(
    make: Callable[[], Callable[[Batch], Result]], batches: list[Batch], size: int, context: Context
) -> Iterator[Result]:
    """The results over some blocks of rows.jsonl, of `size` bytes together, in order."""
    return parallel.map_batches(make, batches, parallel.worker_count(size, ENOUGH, context.threads))


def _meanings(rules: ConversionRules, readings: Readings, made_by: str) -> dict[str, str]:
    """For each source a digest of all that decides, beside its rows, what is made of a block of its."""
    return {
        name: row_blocks.meaning(
            made_by,
            {key: value for key, value in readings[name].items() if key != "weight"},
            {**form._asdict(), "row_format": form.name, "fields": asdict(form.fields) if form.fields else None},
            rules.system_prompt,
            rules.value_column,
            rules.categorical[name],
            rules.sign,
        )
        for name, form in rules.formats.items()
    }


def _converted(
    rows_path: Path,
    blocks: list[SurveyedBlock],
    rules: ConversionRules,
    earlier: EarlierBlocks | None,
    meanings: dict[str, str],
    context: Context,
) -> Iterator[ConvertedBlock]:
    """What is made of each block: what an earlier run did, or made now."""

    def is_new(block: RecordBlock) -> bool:
        return earlier is None or not earlier.has(block.key, meanings[block.source])

    new = [block for block, _ in blocks if is_new(block)]
    size = _bytes_of([(block.start, block.end) for block in new])
    fresh = _over(partial(block_converter.converter, rows_path, rules), new, size, context)
    for block, _ in blocks:
        if earlier is None or is_new(block):
            yield next(fresh)
        else:
            (part, rejects), told = earlier.get(block.key, meanings[block.source])
            yield ConvertedBlock(part, told["accepted"], rejects, told["rest"])


def _indexed(
    path: Path,
    made_by: str,
    blocks: list[SurveyedBlock],
    meanings: dict[str, str],
    converted: Iterable[ConvertedBlock],
) -> Iterator[ConvertedBlock]:
    """Pass on what is made of each block; when all are through, write the index by which later runs find it."""
    index = BlockIndex(made_by)
    for (block, survey), made in zip(blocks, converted, strict=True):
        column_sets: ColumnSets = survey.column_sets.get(block.source, Counter())
        found = [(list(columns), rows) for columns, rows in column_sets.items()]
        told: Told = {"column_sets": found, "accepted": made.accepted, "rest": made.rest}
        index.add(block.key, meanings[block.source], [len(made.part), len(made.rejects)], told)
        yield made
    index.write(path)


def _gather(
    blocks: list[SurveyedBlock],
    converted: Iterable[ConvertedBlock],
    rules: ConversionRules,
    spool: Spool,
    meanings: dict[str, str],
    rejects_path: Path,
    context: Context,
) -> tuple[AcceptedRows, Rejects, card_figures.CategoricalColumns, list[str]]:
    """Take what is made of all blocks: conversations into the spool, rejects into their file, the rest into arrays."""
    rejects, columns = Rejects(), card_figures.CategoricalColumns()
    notes: Notes = Counter()
    total = sum(block.rows for block, _ in blocks)
    accepted = seen = 0
    with rejects_path.open("wb") as rejects_file:
        for (block, _), made in zip(blocks, converted, strict=True):
            spool.append(made.part, made.accepted, made.rejects, block.key + meanings.get(block.source, ""))
            accepted += made.accepted
            rejects_file.write(block_converter.place_rejects(made.rejects, block.first_row))
            rejects.add(block, made.rest)
            notes.update({(block.source, note): rows for note, rows in made.rest["notes"]})
            columns.add({name: None if found is None else Counter(dict(found)) for name, found in _categories(made)})
            seen += block.rows
            context.progress.line(f"{seen:,} of {total:,} rows read, {rejects.by_source.total():,} rejected")
    spool.finish()
    assert accepted + rejects.by_source.total() + rejects.undesired.total() == total
    noted = [f"{source}: {note} ({count:,} rows)" for (source, note), count in notes.most_common(MOST_NOTES)]
    for note in noted:
        context.progress.note(note)
    return _accepted_rows([block for block, _ in blocks], rules, spool, accepted), rejects, columns, noted


def _categories(made: ConvertedBlock) -> Iterable[tuple[str, list[tuple[Any, int]] | None]]:
    return made.rest["categories"].items()


def _accepted_rows(blocks: list[RecordBlock], rules: ConversionRules, spool: Spool, accepted: int) -> AcceptedRows:
    """What is known of the accepted rows, from the parts of the spool, one for each block."""
    sources = list(rules.formats)
    # Filled in place: to join parts would take their memory twice.
    rows = AcceptedRows(
        sources=sources,
        source=np.empty(accepted, np.int32),
        row=np.empty(accepted, np.int64),
        split=np.empty(accepted, np.int8),
        digest=np.empty(accepted, np.uint64),
        prompt=np.empty(accepted, np.uint64),
        passage=np.empty(0, np.uint64),
        reply=np.empty(accepted, np.uint64),
        value=np.empty(accepted, np.uint64) if rules.value_column else None,
        signatures=np.empty((accepted if rules.sign else 0, minhash.PERMUTATIONS), np.uint8),
    )
    system = np.empty(accepted, np.uint64)
    lines = np.empty((accepted, passages.LINES), np.uint64)
    for part, block in enumerate(blocks):
        own = spool.slice(part)
        if own.start == own.stop:
            continue
        found = spool.columns(part)
        rows.source[own] = sources.index(block.source)
        rows.row[own] = found["row"] + block.first_row
        rows.split[own] = SPLITS[block.split]
        rows.digest[own], rows.prompt[own], system[own] = found["digest"], found["prompt"], found["system"]
        rows.reply[own] = found["reply"]
        lines[own] = found["lines"].view(np.uint64)
        if rows.value is not None:
            rows.value[own] = found["value"]
        if rules.sign:
            rows.signatures[own] = found["signature"]
    rows.prompt, rows.with_system = heldout_split.asked(rows.prompt, system)
    rows.passage = passages.passage_of_each(lines, system, rows.prompt)
    return rows


def _refuse_unusable(total: int, rows: AcceptedRows, rejects: Rejects, limit: float) -> None:
    """Raise UserError where no row is left but of test sets, or more than the share `limit` is rejected."""
    if not total:
        raise UserError(f"the sources have no rows ({', '.join(rows.sources) or 'there is none'})")
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
