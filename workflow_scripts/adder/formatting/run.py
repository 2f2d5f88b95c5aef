"""Stage "format": raw rows to conversations, split into training and held-out, with every row accounted for.

Rows are read in blocks by workers and their conversations wait in a temporary file; in memory stay only hashes and
numbers, about 40 bytes a row (and 200 more where near-duplicates are looked for). Arrays decide which rows are trained
on; then the conversations pass through once more into the two Parquet files.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from adder.core import hardware, parallel
from adder.core.errors import UserError
from adder.core.files import read_json, write_json, write_jsonl
from adder.core.progress import Progress
from adder.formatting import block_converter, card_figures, deduplication, minhash
from adder.formatting import heldout_split as split
from adder.formatting.block_converter import HELDOUT, TEST, TRAIN, UNDECIDED, Plan, Survey
from adder.formatting.row_formats import reading_of
from adder.formatting.spool import Spool

SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # "source:row"; "source:row#2" where a weight repeats a row
        ("source", pa.string()),
        ("conversation", pa.string()),  # JSON: {"messages", "tools"?} or {"text"}
        ("digest", pa.int64()),  # of the content; samples are drawn by it
    ]
)
# What becomes of an accepted row, beside TRAIN, HELDOUT and TEST.
DUPLICATE, NEAR_DUPLICATE, LEAKED, LEFT_OUT = range(UNDECIDED + 1, UNDECIDED + 5)
CLASSES = {
    "train": TRAIN,
    "heldout": HELDOUT,
    "tests": TEST,
    "duplicates": DUPLICATE,
    "near_duplicates": NEAR_DUPLICATE,
    "leaked": LEAKED,
    "left_out": LEFT_OUT,
}
COUNTS = ("rows_in", *CLASSES, "rejected")
FEW_HELDOUT = 30  # an interval over fewer rows is too wide to tell anything but the plainest difference
ENOUGH = 4 << 20  # bytes of rows that are worth a worker
GROUP_ROWS, GROUP_BYTES = 8192, 32 << 20  # of a row group of Parquet, the unit in which the next stage reads
MOST_COLUMNS = 20  # columns of one source that are looked at for telling values
SAME, OVERLAP = "same prompt", "8-word overlap"  # how a training row leaked
SHOWN = 200  # characters of a rejected row in a message


@dataclass
class Rows:
    """The accepted rows as arrays; `split` becomes each row's class (CLASSES)."""

    sources: list[str]
    source: np.ndarray
    row: np.ndarray
    split: np.ndarray
    digest: np.ndarray
    prompt: np.ndarray
    value: np.ndarray | None
    signatures: np.ndarray | None

    def id(self, index: int) -> str:
        return f"{self.sources[self.source[index]]}:{self.row[index]}"


@dataclass
class Rejects:
    """What rejects.jsonl holds, in numbers: by kind [how many, the first], and by source."""

    kinds: dict[str, list]
    by_source: Counter

    def because(self) -> str:
        """The most frequent reasons, each with its first row; "" if there are none."""
        kinds = sorted(self.kinds.items(), key=lambda item: -item[1][0])[:3]
        lines = [
            f"\n  {count:,} rows: {first['reason']} (first: {first['source']}, row {first['row']}: "
            f"{str(first['data'])[:SHOWN]})"
            for _, (count, first) in kinds
        ]
        return "".join([". Rejected:", *lines]) if lines else ""


@dataclass
class Findings:
    """Rows found and what each matches: duplicates (dropped), leaked prompts and near-duplicates with their share."""

    duplicates: tuple[np.ndarray, np.ndarray]
    leaks: tuple[np.ndarray, np.ndarray]
    overlap: tuple[np.ndarray, np.ndarray, np.ndarray]
    near: tuple[np.ndarray, np.ndarray, np.ndarray]


def run(settings: dict, inputs: dict[str, Path], out: Path, progress: Progress) -> dict:
    """Write train.parquet and heldout.parquet (SCHEMA), what was dropped and why (*.jsonl), and card.json.

    Where `group_by` chose the held-out rows, heldout.parquet has a column more, `group` (16 hex digits), which tells
    rows that are alike to the evaluation.

    settings: the section Format, and heldout {share, size, group_by, stratify_by}, which is used where the rows have no
    held-out sources. Every row ends in exactly one of CLASSES or is rejected; `tests` are rows of protected test sets,
    which are in no file. The card's `leaked` counts training rows dropped because a held-out or test row asks the same,
    `heldout_in_train` the held-out rows that had such a twin (repeated rows included). Returns the card's counts.
    Raises UserError where nothing is left to train on or to hold out, more is to be held out than there is, more than
    settings.max_rejected can't be used, or a column that is named is nowhere.
    """
    rows_path = inputs["data"] / "rows.jsonl"
    reading = read_json(inputs["data"] / "reading.json")
    survey, plan = _look(rows_path, reading, settings, progress)
    spool = Spool(out / "spool")
    rows, rejects, columns = _convert(rows_path, survey, plan, spool, out / "rejects.jsonl", progress)
    _refuse_unusable(survey.rows.total(), rows, rejects, settings["max_rejected"])

    own_sources = not (rows.split == UNDECIDED).any()
    heldout_in_train, findings = _decide(rows, spool, settings, progress)
    copies = _weigh(rows, np.array([reading[name].get("weight", 1.0) for name in rows.sources]))
    counts = _count(rows, rejects, survey)
    _refuse_empty(counts, settings["heldout"], rejects)

    figures = _write_split(out / "train.parquet", spool, rows, copies * (rows.split == TRAIN), progress)
    group = split.groups_of(rows.prompt, rows.value) if settings["heldout"].get("group_by") else None
    _write_split(out / "heldout.parquet", spool, rows, (rows.split == HELDOUT).astype(np.int64), progress, group)
    _write_findings(out, rows, findings)
    train_rows = int(copies[rows.split == TRAIN].sum())
    card = {
        **counts,
        "train_rows": train_rows,
        "repeats": train_rows - counts["train"],
        "accepted": counts["train"] + counts["heldout"],
        "heldout_in_train": heldout_in_train,
        "rejects_by_reason": {kind: count for kind, (count, _) in sorted(rejects.kinds.items())},
        "row_format": {name: found.row_format for name, found in plan.readings.items()},
        "samples": card_figures.samples(spool, np.flatnonzero(rows.split == TRAIN), rows.digest),
        "columns": columns.result(),
        "quality": _quality(rows, spool, findings, settings),
        "split": split.describe(settings["heldout"], counts["heldout"], counts["train"], own_sources),
        **figures.result(),
    }
    write_json(out / "card.json", card)
    summary = {key: card[key] for key in COUNTS}
    progress.say(", ".join(f"{summary[key]:,} {key.replace('_', ' ')}" for key in COUNTS if summary[key]))
    if rejects.kinds:
        progress.say(f"warning: rows can't be used, each is in this stage's rejects.jsonl{rejects.because()}")
    if counts["heldout"] < FEW_HELDOUT:
        few = counts["heldout"]
        progress.say(
            f"warning: {few} held out may be too few for a verdict, {FEW_HELDOUT} tell more: data.heldout takes a size "
            "or a share"
        )
    return summary


def _look(rows_path: Path, reading: dict, settings: dict, progress: Progress) -> tuple[Survey, Plan]:
    """A first look at all rows, and how they are to be read."""
    survey = Survey(Counter(), {})
    for found in _over_blocks(partial(block_converter.surveyor, rows_path), rows_path):
        survey.add(found)
        progress.line(f"{survey.rows.total():,} rows seen")
    nothing: Counter = Counter()
    readings = {name: reading_of(name, asked, survey.column_sets.get(name, nothing)) for name, asked in reading.items()}
    by_source = {name: Counter(c for columns in survey.column_sets.get(name, ()) for c in columns) for name in reading}
    heldout = settings["heldout"]
    value_column = heldout.get("group_by") or heldout.get("stratify_by")
    if value_column and not any(value_column in columns for columns in by_source.values()):
        which = "group_by" if heldout.get("group_by") else "stratify_by"
        there = sorted(set().union(*by_source.values()))
        raise UserError(
            f"data.heldout.{which} names the column '{value_column}', which no row has. The columns there: "
            f"{', '.join(there[:30])}"
        )
    telling = {
        name: [c for c in sorted(columns) if c not in readings[name].own_columns() and block_converter.is_unicode(c)][
            :MOST_COLUMNS
        ]
        for name, columns in by_source.items()
    }
    for name, found in readings.items():
        progress.say(f"{name}: {(found.row_format or 'no known row format').replace('_', ' ')}")
    sign = settings["near_duplicates"] != "off"
    return survey, Plan(readings, settings["system_prompt"], value_column, telling, sign)


def _over_blocks(make, rows_path: Path) -> Iterator:
    """The results over all blocks of rows.jsonl, in order."""
    workers = parallel.worker_count(rows_path.stat().st_size, ENOUGH, hardware.threads())
    return parallel.map_batches(make, block_converter.blocks(rows_path), workers)


def _convert(
    rows_path: Path, survey: Survey, plan: Plan, spool: Spool, rejects_path: Path, progress: Progress
) -> tuple[Rows, Rejects, card_figures.Columns]:
    """Convert all rows: conversations into the spool, rejects into their file, the rest into arrays."""
    total = survey.rows.total()
    rejects, columns = Rejects({}, Counter()), card_figures.Columns()
    arrays: dict[str, list] = {name: [] for name in ("source", "row", "split", "digest", "prompt", "value")}
    # The one large array is filled in place: to join parts would take its memory twice.
    signatures = np.empty((total if plan.sign else 0, minhash.PERMUTATIONS), dtype=np.uint8)
    accepted = 0
    with rejects_path.open("wb") as rejects_file:
        for block in _over_blocks(partial(block_converter.converter, rows_path, plan), rows_path):
            count = len(block.row)
            spool.append(block.part, count)
            for name, parts in arrays.items():
                parts.append(getattr(block, name))
            if plan.sign:
                signatures[accepted : accepted + count] = block.signatures
            accepted += count
            rejects_file.write(block.rejects)
            rejects.by_source.update(block.rejected)
            for kind, (number, first) in block.kinds.items():
                rejects.kinds.setdefault(kind, [0, first])[0] += number
            columns.add(block.telling)
            rejected = rejects.by_source.total()
            progress.line(f"{accepted + rejected:,} of {total:,} rows read, {rejected:,} rejected")
    spool.finish()
    assert accepted + rejects.by_source.total() == total
    if not plan.value_column:
        del arrays["value"]
    joined = {name: np.concatenate(parts) if parts else np.zeros(0, np.int64) for name, parts in arrays.items()}
    rows = Rows(list(plan.readings), value=joined.pop("value", None), signatures=signatures[:accepted], **joined)
    return rows, rejects, columns


def _refuse_unusable(total: int, rows: Rows, rejects: Rejects, limit: float) -> None:
    if not (rows.split != TEST).any():
        raise UserError(f"no row can be used{rejects.because()}")
    rejected = rejects.by_source.total()
    if rejected > limit * total:
        raise UserError(
            f"{rejected:,} of {total:,} rows ({rejected / total:.1%}) can't be used, more than format.max_rejected "
            f"allows ({limit:.1%}). Mend the rows, say what they are by `row_format`, `columns` or `convert` of the "
            f"source, or raise format.max_rejected{rejects.because()}"
        )


def _decide(rows: Rows, spool: Spool, settings: dict, progress: Progress) -> tuple[int, Findings]:
    """Set each row's class; how many held-out rows were asked in training too, and all that was found."""
    none = np.zeros(0, dtype=np.int64)
    duplicates = deduplication.find_duplicates(rows.split, rows.digest) if settings["drop_duplicates"] else (none, none)
    sides = rows.split.copy()
    rows.split[duplicates[0]] = DUPLICATE
    undecided = np.flatnonzero(rows.split == UNDECIDED)
    if len(undecided):
        value = None if rows.value is None else rows.value[undecided]
        held = split.choose_heldout(settings["heldout"], rows.prompt[undecided], rows.digest[undecided], value)
        rows.split[undecided] = sides[undecided] = np.where(held, HELDOUT, TRAIN)
    asked = np.isin(rows.prompt[sides == HELDOUT], rows.prompt[sides == TRAIN])

    leaks = deduplication.find_leaks(rows.split, rows.prompt)
    rows.split[leaks[0]] = LEAKED
    overlap = (none, none, none)
    if settings["overlap"] != "off":
        overlap = deduplication.find_overlap(spool, rows.split, settings["overlap_share"], progress)
        if settings["overlap"] == "drop":
            rows.split[overlap[0]] = LEAKED
    near = (none, none, none)
    if settings["near_duplicates"] != "off":
        progress.line("looking for near-duplicates")
        train = np.flatnonzero(rows.split == TRAIN)
        near = deduplication.find_near_duplicates(rows.signatures, train, settings["near_duplicate_similarity"])
        if settings["near_duplicates"] == "drop":
            rows.split[near[0]] = NEAR_DUPLICATE
    rows.signatures = None
    return int(asked.sum()), Findings(duplicates, leaks, overlap, near)


def _weigh(rows: Rows, weights: np.ndarray) -> np.ndarray:
    """How often each row is used, int64 (rows,); a training row that is not used becomes LEFT_OUT."""
    train = rows.split == TRAIN
    copies = np.ones(len(train), dtype=np.int64)
    if (weights != 1).any():
        copies[train] = split.copies_of(rows.digest[train], weights[rows.source[train]])
        rows.split[train & (copies == 0)] = LEFT_OUT
    return copies


def _count(rows: Rows, rejects: Rejects, survey: Survey) -> dict:
    """The card's COUNTS, as a whole and by source. Every row that was read is in exactly one class."""
    width = LEFT_OUT + 1
    table = np.bincount(rows.source * width + rows.split, minlength=len(rows.sources) * width).reshape(-1, width)
    by_source = {}
    for name, counted in zip(rows.sources, table.tolist(), strict=True):
        counts = {"rows_in": survey.rows[name], **{key: counted[place] for key, place in CLASSES.items()}}
        counts["rejected"] = rejects.by_source[name]
        assert sum(counts.values()) == 2 * counts["rows_in"], (name, counts)
        by_source[name] = counts
    return {**{key: sum(c[key] for c in by_source.values()) for key in COUNTS}, "by_source": by_source}


def _refuse_empty(counts: dict, heldout: dict, rejects: Rejects) -> None:
    dropped = (
        f"{counts['duplicates']:,} duplicates, {counts['leaked']:,} also held out, {counts['rejected']:,} rejected"
    )
    for key in ("near_duplicates", "left_out"):
        if counts[key]:
            dropped += f", {counts[key]:,} {key.replace('_', ' ')}"
    if not counts["train"]:
        held = f"{counts['heldout']:,} held out"
        raise UserError(f"no row is left to train on: {held}, {dropped}{rejects.because()}")
    if not counts["heldout"]:
        hint = ""
        if heldout.get("share") is not None:
            hint = f"; data.heldout.share {heldout['share']} of few rows can come to none, data.heldout.size is exact"
        raise UserError(f"no row is held out: {counts['train']:,} to train on, {dropped}{hint}{rejects.because()}")


def _write_split(
    path: Path, spool: Spool, rows: Rows, copies: np.ndarray, progress: Progress, group: np.ndarray | None = None
) -> card_figures.TrainFigures:
    """Write each row as often as `copies` (rows,) says, in order; figures over the rows, each counted once.

    `group`: uint64 (rows,), written as a column of its own.
    """
    figures, waiting, size = card_figures.TrainFigures(), [], 0
    schema = SCHEMA if group is None else SCHEMA.append(pa.field("group", pa.string()))
    names = pa.array(rows.sources, type=pa.string())
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=["source"]) as writer:
        for part in spool.parts():
            place = spool.slice(part)
            wanted = copies[place]
            chosen = np.flatnonzero(wanted)
            if not len(chosen):
                continue
            columns = spool.read(part)
            columns = columns if len(chosen) == len(columns) else columns.take(pa.array(chosen))
            figures.add(columns)
            chosen += place.start
            table = _table(columns.column("conversation"), rows, chosen, copies[chosen], names)
            if group is not None:
                own = np.repeat(group[chosen], copies[chosen]).tolist()
                table = table.append_column(schema.field("group"), pa.array([f"{one:016x}" for one in own]))
            waiting.append(table)
            size += waiting[-1].nbytes
            if size >= GROUP_BYTES or sum(map(len, waiting)) >= GROUP_ROWS:
                writer.write_table(pa.concat_tables(waiting), row_group_size=GROUP_ROWS)
                waiting, size = [], 0
            progress.line(f"{path.name}: {place.stop:,} of {len(copies):,} rows")
        if waiting:
            writer.write_table(pa.concat_tables(waiting), row_group_size=GROUP_ROWS)
    return figures


def _table(conversation: pa.Array, rows: Rows, chosen: np.ndarray, copies: np.ndarray, names: pa.Array) -> pa.Table:
    """The table of some rows, each repeated; repeats of a row differ in id and digest."""
    repeated = np.repeat(np.arange(len(chosen)), copies)
    number = np.arange(len(repeated)) - np.repeat(np.cumsum(copies) - copies, copies)
    index = chosen[repeated]
    digest = rows.digest[index]
    source = names.take(pa.array(rows.source[index]))
    identity = pc.binary_join_element_wise(source, pc.cast(pa.array(rows.row[index]), pa.string()), ":")
    if len(repeated) > len(chosen):
        conversation = conversation.take(pa.array(repeated))
        suffixes = pa.array(["", *(f"#{n}" for n in range(2, int(copies.max()) + 1))])
        identity = pc.binary_join_element_wise(identity, suffixes.take(pa.array(number)), "")
        digest = np.where(number == 0, digest, split.scramble(digest ^ split.scramble(number.astype(np.uint64), 3), 4))
    arrays = [identity, source, conversation.cast(pa.string()), pa.array(digest.view(np.int64))]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _write_findings(out: Path, rows: Rows, findings: Findings) -> None:
    """duplicates.jsonl, near_duplicates.jsonl, leaked.jsonl: one line a row, with the row that it matches."""

    def lines(found: tuple[np.ndarray, ...]) -> Iterator[tuple[int, dict]]:
        for index, match in zip(map(int, found[0]), map(int, found[1]), strict=True):
            source = rows.sources[rows.source[index]]
            yield index, {"source": source, "row": int(rows.row[index]), "matches": rows.id(match)}

    write_jsonl(out / "duplicates.jsonl", (line for _, line in lines(findings.duplicates)))
    near = zip(lines(findings.near), map(float, findings.near[2]), strict=True)
    write_jsonl(
        out / "near_duplicates.jsonl",
        (
            {**line, "similarity": round(similarity, 4), "dropped": bool(rows.split[index] == NEAR_DUPLICATE)}
            for (index, line), similarity in near
        ),
    )
    overlap = zip(lines(findings.overlap), map(float, findings.overlap[2]), strict=True)
    same = ({**line, "how": SAME, "share": 1.0, "dropped": True} for _, line in lines(findings.leaks))
    overlapping = (
        {**line, "how": OVERLAP, "share": round(share, 4), "dropped": bool(rows.split[index] == LEAKED)}
        for (index, line), share in overlap
    )
    write_jsonl(out / "leaked.jsonl", chain(same, overlapping))


def _quality(rows: Rows, spool: Spool, findings: Findings, settings: dict) -> dict:
    """What was looked for, how, what was found, and a few examples side by side."""

    def shown(*indices: np.ndarray) -> list[list[dict]]:
        """For each example the rows of it as {id, text}."""
        flat = np.concatenate([found[: card_figures.EXAMPLES] for found in indices]).astype(np.int64)
        texts = card_figures.example_texts(spool, flat)
        each = [{"id": rows.id(index), "text": text} for index, text in zip(flat.tolist(), texts, strict=True)]
        count = len(each) // len(indices)
        return [each[place::count] for place in range(count)] if count else []

    duplicates, near = findings.duplicates, findings.near
    # Overlap first: that two prompts are the same needs no example to be believed.
    leaks = [np.concatenate(pair) for pair in zip(findings.overlap[:2], findings.leaks, strict=True)]
    shares = np.concatenate([findings.overlap[2], np.ones(len(findings.leaks[0]))]).tolist()
    hows = [OVERLAP] * len(findings.overlap[0]) + [SAME] * len(findings.leaks[0])
    similarity, share = settings["near_duplicate_similarity"], settings["overlap_share"]
    return {
        "duplicates": {
            "examples": [{**a, "matches": b["id"]} for a, b in shown(*duplicates)],
        },
        "near_duplicates": {
            "action": settings["near_duplicates"],
            "method": minhash.near_duplicate_method(similarity),
            "similarity": similarity,
            "found": len(near[0]),
            "dropped": int((rows.split[near[0]] == NEAR_DUPLICATE).sum()),
            "examples": [
                {"a": a, "b": b, "similarity": round(alike, 4)}
                for (a, b), alike in zip(shown(near[0], near[1]), near[2].tolist(), strict=False)
            ],
        },
        "overlap": {
            "action": settings["overlap"],
            "method": minhash.overlap_method(share),
            "share": share,
            "found": len(leaks[0]),
            "dropped": int((rows.split[leaks[0]] == LEAKED).sum()),
            "examples": [
                {"train": a, "heldout": b, "share": round(value, 4), "how": how}
                for (a, b), value, how in zip(shown(*leaks), shares, hows, strict=False)
            ],
        },
    }
