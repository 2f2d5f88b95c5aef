"""What becomes of each accepted row: held out, a duplicate, leaked, a near-duplicate; and what was found, to show."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adder.core.errors import UserError
from adder.core.files import write_jsonl
from adder.core.stage_spec import Context
from adder.formatting import card_figures, deduplication
from adder.formatting.accepted_rows import DUPLICATE, LEAKED, NEAR_DUPLICATE, AcceptedRows
from adder.formatting.block_converter import HELDOUT, TRAIN, UNDECIDED
from adder.formatting.deduplication import Matches, PartialMatches
from adder.formatting.heldout_overlap import overlap_method
from adder.formatting.heldout_split import by_passages, choose_heldout
from adder.formatting.minhash import near_duplicate_method
from adder.formatting.records import Duplicate, ExampleRow, Leak, NearDuplicate, Quality
from adder.formatting.spool import Spool
from adder.formatting.stage import FormatSettings

SAME, OVERLAP = "same prompt", "8-word overlap"  # how a training row leaked
FEW_LEAKS = 5  # rows that may be dropped of whatever few there are

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Findings:
    """Rows found and what each matches.

    heldout_in_train: held-out rows that training rows asked too, as the data came. duplicates are dropped. leaks: the
    same prompt as a held-out or test row's, dropped; overlap: a similar one; near: near-duplicates in training.
    by_passage: whether rows of one passage were kept together.
    """

    heldout_in_train: int
    duplicates: Matches
    leaks: Matches
    overlap: PartialMatches
    near: PartialMatches
    by_passage: bool


def decide(rows: AcceptedRows, spool: Spool, settings: FormatSettings, context: Context) -> Findings:
    """Set each row's class, but for weights, and tell what was found. The rows' signatures are gone afterwards."""
    duplicates = Matches(*_none())
    if settings.drop_duplicates:
        duplicates = deduplication.find_duplicates(rows.split, rows.digest)
    sides = rows.split.copy()
    rows.split[duplicates.rows] = DUPLICATE
    undecided, by_passage = np.flatnonzero(rows.are(UNDECIDED)), False
    if len(undecided):
        value = None if rows.value is None else rows.value[undecided]
        prompt, about = rows.prompt[undecided], rows.passage[undecided]
        held = by_passages(settings, prompt, about)
        by_passage = held is not None
        if held is None:
            held = choose_heldout(settings, prompt, rows.digest[undecided], value)
        rows.split[undecided] = sides[undecided] = np.where(held, HELDOUT, TRAIN)
    asked = np.isin(rows.prompt[sides == HELDOUT], rows.prompt[sides == TRAIN])

    leaks = deduplication.find_leaks(rows.split, rows.prompt)
    rows.split[leaks.rows] = LEAKED
    overlap = near = PartialMatches(*_none(), np.zeros(0))
    if settings.overlap != "off":
        overlap = deduplication.find_overlap(spool, rows.split, settings.overlap_share, context, rows.with_system)
        if settings.overlap == "drop":
            rows.split[overlap.rows] = LEAKED
    _refuse_many_leaks(rows, leaks, overlap, settings)
    if settings.near_duplicates != "off":
        context.progress.line("looking for near-duplicates")
        train = np.flatnonzero(rows.are(TRAIN))
        near = deduplication.find_near_duplicates(rows.signatures, train, settings.near_duplicate_similarity)
        if settings.near_duplicates == "drop":
            rows.split[near.rows] = NEAR_DUPLICATE
    rows.signatures = rows.signatures[:0].copy()  # by far the largest of the arrays
    return Findings(int(asked.sum()), duplicates, leaks, overlap, near, by_passage)


def _refuse_many_leaks(rows: AcceptedRows, leaks: Matches, overlap: PartialMatches, settings: FormatSettings) -> None:
    """Raise UserError where more training rows than settings.max_leaked would be dropped, saying which rule took them.

    Few rows are dropped whatever their share.
    """
    dropped = int(rows.are(LEAKED).sum())
    total = dropped + int(rows.are(TRAIN).sum())
    if dropped <= max(FEW_LEAKS, settings.max_leaked * total):
        return
    rules = {SAME: leaks, OVERLAP: overlap if settings.overlap == "drop" else PartialMatches(*_none(), np.zeros(0))}
    found = [f"{len(one.rows):,} by {name}" for name, one in rules.items() if len(one.rows)]
    first = next(one for one in rules.values() if len(one.rows))
    one, other = int(first.rows[0]), int(first.matches[0])
    raise UserError(
        f"{dropped:,} of {total:,} training rows ({dropped / total:.1%}) ask what held-out or test rows ask: "
        f"{' and '.join(found)} (first: {rows.id(one)} and {rows.id(other)}). To drop so many is more than "
        f"format.max_leaked allows ({settings.max_leaked:.1%}). Where rows share a text that they are about, "
        "data.heldout.group_by with its column keeps them on one side; format.overlap: report keeps rows that only "
        "overlap; a higher format.max_leaked drops them"
    )


def write_findings(out: Path, rows: AcceptedRows, findings: Findings) -> None:
    """duplicates.jsonl, near_duplicates.jsonl, leaked.jsonl: one line a row, with the row that it matches."""

    def lines(found: Matches | PartialMatches) -> Iterator[tuple[int, Duplicate]]:
        for index, match in zip(found.rows.tolist(), found.matches.tolist(), strict=True):
            source = rows.sources[rows.source[index]]
            yield index, {"source": source, "row": int(rows.row[index]), "matches": rows.id(match)}

    def near_duplicates() -> Iterator[NearDuplicate]:
        for (index, line), similarity in zip(lines(findings.near), findings.near.shares.tolist(), strict=True):
            dropped = bool(rows.split[index] == NEAR_DUPLICATE)
            yield {**line, "similarity": round(similarity, 4), "dropped": dropped}

    def same() -> Iterator[Leak]:
        for _, line in lines(findings.leaks):
            yield {**line, "how": SAME, "share": 1.0, "dropped": True}

    def overlapping() -> Iterator[Leak]:
        for (index, line), share in zip(lines(findings.overlap), findings.overlap.shares.tolist(), strict=True):
            dropped = bool(rows.split[index] == LEAKED)
            yield {**line, "how": OVERLAP, "share": round(share, 4), "dropped": dropped}

    write_jsonl(out / "duplicates.jsonl", (line for _, line in lines(findings.duplicates)))
    write_jsonl(out / "near_duplicates.jsonl", near_duplicates())
    write_jsonl(out / "leaked.jsonl", chain(same(), overlapping()))


def quality(rows: AcceptedRows, spool: Spool, findings: Findings, settings: FormatSettings) -> Quality:
    """What was looked for, how, what was found, and a few examples side by side."""
    near, overlap = findings.near, findings.overlap
    # Overlap first: that two prompts are the same needs no example to be believed.
    leaked = np.concatenate([overlap.rows, findings.leaks.rows])
    matches = np.concatenate([overlap.matches, findings.leaks.matches])
    shares = np.concatenate([overlap.shares, np.ones(len(findings.leaks.rows))]).tolist()
    hows = [OVERLAP] * len(overlap.rows) + [SAME] * len(findings.leaks.rows)
    alike = _pairs(rows, spool, near.rows, near.matches)
    return {
        "duplicates": {
            "examples": [{**row, "matches": match["id"]} for row, match in _pairs(rows, spool, *findings.duplicates)],
        },
        "near_duplicates": {
            "action": settings.near_duplicates,
            "method": near_duplicate_method(settings.near_duplicate_similarity),
            "similarity": settings.near_duplicate_similarity,
            "found": len(near.rows),
            "dropped": int((rows.split[near.rows] == NEAR_DUPLICATE).sum()),
            "examples": [
                {"a": a, "b": b, "similarity": round(similarity, 4)}
                for (a, b), similarity in zip(alike, near.shares.tolist(), strict=False)
            ],
        },
        "overlap": {
            "action": settings.overlap,
            "method": overlap_method(settings.overlap_share),
            "share": settings.overlap_share,
            "found": len(leaked),
            "dropped": int((rows.split[leaked] == LEAKED).sum()),
            "examples": [
                {"train": a, "heldout": b, "share": round(share, 4), "how": how}
                for (a, b), share, how in zip(_pairs(rows, spool, leaked, matches), shares, hows, strict=False)
            ],
        },
    }


def _none() -> tuple[Integers, Integers]:
    return np.zeros(0, np.int64), np.zeros(0, np.int64)


def _pairs(rows: AcceptedRows, spool: Spool, found: Integers, matches: Integers) -> list[tuple[ExampleRow, ExampleRow]]:
    """The first few rows found, each beside the row that it matches."""
    count = min(len(found), card_figures.EXAMPLES)
    shown = np.concatenate([found[:count], matches[:count]])
    texts = card_figures.example_texts(spool, shown)
    examples: list[ExampleRow] = [
        {"id": rows.id(index), "text": text} for index, text in zip(shown.tolist(), texts, strict=True)
    ]
    return list(zip(examples[:count], examples[count:], strict=True))
