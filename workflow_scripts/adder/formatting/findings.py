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
from adder.formatting import card_figures
from adder.formatting.accepted_rows import DUPLICATE, LEAKED, NEAR_DUPLICATE, AcceptedRows
from adder.formatting.block_converter import HELDOUT, TRAIN, UNDECIDED
from adder.formatting.heldout_split import by_passages, choose_heldout
from adder.formatting.records import Duplicate, ExampleRow, Leak, NearDuplicate, Quality
from adder.formatting.replies import ANSWERED
from adder.formatting.similarity import deduplication
from adder.formatting.similarity.deduplication import Matches, PartialMatches
from adder.formatting.similarity.heldout_overlap import NGRAM, overlap_method
from adder.formatting.similarity.heldout_twins import twin_method
from adder.formatting.similarity.minhash import near_duplicate_method
from adder.formatting.spool import Spool
from adder.formatting.stage import FormatSettings

SAME, OVERLAP, TWIN = "same prompt", "8-word overlap", "nearly the same row"  # how a training row leaked
FEW_ROWS, NEARLY_ALL = 5, 0.95  # of training rows, from which on a reply in its own prompt is worth a word
FEW_LEAKS = 5  # rows that may be dropped of whatever few there are

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Findings:
    """Rows found and what each matches.

    heldout_in_train: held-out rows that training rows asked too, as the data came. duplicates are dropped. leaks: the
    same prompt as a held-out or test row's, dropped; overlap: a similar one; twins: nearly such a row; near:
    near-duplicates in training. by_passage: whether rows of one passage were kept together. answered: how many of the
    `asked` training rows have their own reply in their prompt.
    """

    heldout_in_train: int
    duplicates: Matches
    leaks: Matches
    overlap: PartialMatches
    twins: PartialMatches
    near: PartialMatches
    by_passage: bool
    answered: int
    asked: int

    def notes(self) -> list[str]:
        """What a person should know of the rows before they are trained on."""
        if self.asked < FEW_ROWS or self.answered < NEARLY_ALL * self.asked:
            return []
        return [
            f"in {self.answered:,} of {self.asked:,} training rows the reply stands in its own prompt: unless it is to "
            "be picked out of there (an extract, a choice), the model learns to copy, and the scores flatter it"
        ]


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
    overlap = twins = near = PartialMatches(*_none(), np.zeros(0))
    train = rows.are(TRAIN)
    asks, answered = int(train.sum()), int((rows.reply[train] & ANSWERED).sum())
    if settings.overlap != "off":
        signed = (rows.signatures, settings.near_duplicate_similarity) if settings.near_duplicates != "off" else None
        overlap, twins = deduplication.find_overlap(
            spool, rows.split, settings.overlap_share, context, rows.with_system, rows.reply, signed
        )
        if settings.overlap == "drop":
            rows.split[overlap.rows] = rows.split[twins.rows] = LEAKED
    _refuse_many_leaks(rows, leaks, overlap, twins, settings)
    if settings.near_duplicates != "off":
        context.progress.line("looking for near-duplicates")
        train = np.flatnonzero(rows.are(TRAIN))
        near = deduplication.find_near_duplicates(rows.signatures, train, settings.near_duplicate_similarity)
        if settings.near_duplicates == "drop":
            rows.split[near.rows] = NEAR_DUPLICATE
    rows.signatures = rows.signatures[:0].copy()  # by far the largest of the arrays
    return Findings(int(asked.sum()), duplicates, leaks, overlap, twins, near, by_passage, answered, asks)


def _refuse_many_leaks(
    rows: AcceptedRows, leaks: Matches, overlap: PartialMatches, twins: PartialMatches, settings: FormatSettings
) -> None:
    """Raise UserError where more training rows than settings.max_leaked would be dropped, saying which rule took them.

    Few rows are dropped whatever their share.
    """
    dropped = int(rows.are(LEAKED).sum())
    total = dropped + int(rows.are(TRAIN).sum())
    if dropped <= max(FEW_LEAKS, settings.max_leaked * total):
        return
    rules: dict[str, Matches | PartialMatches] = {SAME: leaks}
    if settings.overlap == "drop":
        rules |= {OVERLAP: overlap, TWIN: twins}
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

    def overlapping(found: PartialMatches, how: str) -> Iterator[Leak]:
        for (index, line), share in zip(lines(found), found.shares.tolist(), strict=True):
            dropped = bool(rows.split[index] == LEAKED)
            yield {**line, "how": how, "share": round(share, 4), "dropped": dropped}

    write_jsonl(out / "duplicates.jsonl", (line for _, line in lines(findings.duplicates)))
    write_jsonl(out / "near_duplicates.jsonl", near_duplicates())
    alike = chain(overlapping(findings.overlap, OVERLAP), overlapping(findings.twins, TWIN))
    write_jsonl(out / "leaked.jsonl", chain(same(), alike))


def quality(rows: AcceptedRows, spool: Spool, findings: Findings, settings: FormatSettings) -> Quality:
    """What was looked for, how, what was found, and a few examples side by side."""
    near, overlap, twins = findings.near, findings.overlap, findings.twins
    # That two prompts are the same needs no example to be believed: those come last.
    leaked = np.concatenate([twins.rows, overlap.rows, findings.leaks.rows])
    matches = np.concatenate([twins.matches, overlap.matches, findings.leaks.matches])
    shares = np.concatenate([twins.shares, overlap.shares, np.ones(len(findings.leaks.rows))]).tolist()
    hows = [TWIN] * len(twins.rows) + [OVERLAP] * len(overlap.rows) + [SAME] * len(findings.leaks.rows)
    signed = None if settings.near_duplicates == "off" else settings.near_duplicate_similarity
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
            "method": f"{overlap_method(settings.overlap_share)} {twin_method(signed)}",
            "looked_for": _looked_for(settings),
            "share": settings.overlap_share,
            "found": len(leaked),
            "dropped": int((rows.split[leaked] == LEAKED).sum()),
            "examples": [
                {"train": a, "heldout": b, "share": round(share, 4), "how": how}
                for (a, b), share, how in zip(_pairs(rows, spool, leaked, matches), shares, hows, strict=False)
            ],
        },
    }


def _looked_for(settings: FormatSettings) -> list[str]:
    """What a training row was looked for to have of a held-out one, as the report names it."""
    found = ["the prompt"]
    if settings.overlap != "off":
        found += [
            f"over {100 * settings.overlap_share:g} % of the prompt's own words in {NGRAM}-word sequences",
            "a rare reply to nearly the prompt or to a part of it",
        ]
    if settings.overlap != "off" and settings.near_duplicates != "off":
        alike = 100 * settings.near_duplicate_similarity
        found.append(f"{alike:g} % of the row's 3-word sequences, its own words among them")
    return found


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
