"""The report's view of the data: where rows came from and went, what is in them, and what the model sees of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from adder.core.length_summary import LengthSummary
from adder.data.records import SourceRecord
from adder.formatting.conversation import ToolCall
from adder.formatting.records import Card, ExampleRow, NearDuplicateFindings, OverlapFindings
from adder.report import plots
from adder.report.facts import RunFacts
from adder.report.formatting import clip, percent, sentence, short
from adder.report.page_section import PageSection, RunReport, View
from adder.tokenization.records import SplitCounts

LONGEST_SAMPLE = 3000  # characters of a message, of which the page shows no more
LONGEST_EXAMPLE = 700  # characters of a dropped row
SHOWN_TURNS = 8  # bars; conversations of more turns are counted together
USES = {"train": "training", "heldout": "held out", "test": "test set", None: "training and held out"}


@dataclass(frozen=True)
class Bar:
    """A bar of a chart; `width` is the percentage of the largest count."""

    name: str
    count: int
    width: float


class Chart(NamedTuple):
    """A small bar chart of what the rows hold."""

    title: str
    note: str
    bars: list[Bar]


class SourceRow(TypedDict):
    """A source file in the table: what it is, where it came from, what stands in it."""

    name: str
    kind: str
    origin: str
    split: str
    version: str
    digest: str
    license: str | None
    rows: int
    unreadable: int
    format: str
    weight: float
    encoding: str


class Quoted(NamedTuple):
    """A row as it is shown: what became of it, its id, its text."""

    label: str
    id: str
    text: str


class Pair(NamedTuple):
    """A row that was found, what it is like, and how much."""

    left: Quoted
    right: Quoted | None
    note: str


class Finding(NamedTuple):
    """What was found of duplicates, near-duplicates or overlap: how much, how, and examples."""

    title: str
    summary: str
    method: str
    pairs: list[Pair]


class Turn(NamedTuple):
    """A message as it is shown; the kinds of its parts: text, reasoning, call."""

    role: str
    unlearnt: bool
    parts: list[tuple[str, str]]


def view(run: RunReport) -> View:
    """Where the rows came from, where they went and why, and what is in them."""
    facts = run.facts
    card, tokenize = facts.format, facts.tokenize
    reasons = sorted(card["rejects_by_reason"].items(), key=lambda pair: (-pair[1], pair[0]))
    return {
        "plot": plots.flow(card["rows_in"], flow_parts(card), "Rows in, and what became of them"),
        "card": card,
        "split": ticked(sentence(card["split"])),
        "notes": [ticked(note) for note in card["notes"]],
        "fates": fates(facts),
        "sources": source_rows(facts),
        "reasons": bars(reasons),
        "rejects": [{**row, "data": _one_line(row["data"])} for row in facts.rejects],
        "untokenized": bars(list(tokenize["rejected_by_reason"].items())),
        "findings": findings(card),
        "characters": characters(card),
        "counted": counted(card),
        "samples": [sample(one) for one in card["samples"]],
    }


def characters(card: Card) -> list[tuple[str, LengthSummary]]:
    """Lengths of prompts and of replies, of those that there are."""
    return [(side, found) for side in ("prompt", "reply") if (found := card["characters"][side])["count"]]


def ticked(text: str) -> list[tuple[bool, str]]:
    """The text in pieces, each with whether it stood between backticks, to be set as code."""
    return [(number % 2 == 1, piece) for number, piece in enumerate(text.split("`")) if piece]


def flow_parts(card: Card) -> list[plots.Part]:
    """The parts of the flow plot: always training and held-out rows, of the others those that there are."""
    parts = [
        plots.Part("training", card["train"], "tuned"),
        plots.Part("held out", card["heldout"], "heldout"),
        plots.Part("test sets", card["tests"], "heldout"),
        plots.Part("duplicates", card["duplicates"], "plain"),
        plots.Part("near-duplicates", card["near_duplicates"], "plain"),
        plots.Part("leaked", card["leaked"], "plain"),
        plots.Part("left out", card["left_out"], "plain"),
        plots.Part("undesired", card["undesired"], "plain"),
        plots.Part("rejected", card["rejected"], "past"),
    ]
    return [part for number, part in enumerate(parts) if number < 2 or part.count]


def fates(facts: RunFacts) -> list[tuple[str, int, str]]:
    """What became of the rows, as (name, rows, what that means); classes of no rows are left out but for the main."""
    card, tokenize, lengths = facts.format, facts.tokenize, facts.lengths
    leaked = "ask what a held-out or test row asks; dropped from training"
    if card["heldout_in_train"]:
        leaked += f" ({card['heldout_in_train']:,} held-out rows had a twin there)"
    rows = [
        ("Rows in", card["rows_in"], ""),
        ("Training", card["train"], _tokens(tokenize["counts"].get("train"))),
        ("Copies", card["repeats"], f"of training rows, by their weights: {card['train_rows']:,} rows an epoch"),
        ("Held out", card["heldout"], _tokens(tokenize["counts"].get("heldout"))),
        ("Test sets", card["tests"], "only kept out of training"),
        ("Duplicates", card["duplicates"], "repeat an earlier row; dropped"),
        ("Near-duplicates", card["near_duplicates"], "nearly repeat an earlier row; dropped"),
        ("Leaked", card["leaked"], leaked),
        ("Left out", card["left_out"], "by weights below 1"),
        ("Undesired", card["undesired"], "say of their own reply that it is not to be learnt"),
        ("Rejected", card["rejected"], "can't be used, for the reasons below" if card["rejected"] else ""),
        ("Not tokenized", tokenize["rejected_count"], "the template or the vocabulary can't hold them"),
        ("Too long", lengths["dropped"], f"longer than {lengths['max_seq_length']['value']:,} tokens; dropped"),
    ]
    return [row for row in rows if row[1] or row[0] in ("Rows in", "Training", "Held out", "Rejected")]


def _tokens(counts: SplitCounts | None) -> str:
    return f"{counts['tokens']:,} tokens, {counts['labelled']:,} of them carry loss" if counts else ""


def source_rows(facts: RunFacts) -> list[SourceRow]:
    """One row a source file: what it is, where it came from, what stands in it."""
    formats = facts.format["row_format"]
    return [
        {
            "name": source["name"],
            "kind": source["kind"],
            "origin": origin if (origin := origin_of(source)) != source["name"] else "",
            "split": USES[source["split"]],
            "version": version_of(source),
            "digest": source.get("sha256") or source.get("revision") or "",
            "license": source.get("license"),
            "rows": source["rows"],
            "unreadable": source.get("unreadable") or 0,
            "format": (formats.get(source["name"]) or "not recognised").replace("_", " "),
            "weight": source.get("weight") or 1,
            "encoding": encoding if (encoding := source.get("encoding") or "utf-8").lower() != "utf-8" else "",
        }
        for source in facts.data
    ]


def origin_of(source: SourceRecord) -> str:
    """Where a source's rows came from: a path, a URL, or a hub id with the file; "" for the built-in generator."""
    return str(source.get("path") or "")


def version_of(source: SourceRecord) -> str:
    """What pins a source: the hub's commit, else the file's digest, each shortened; "" if nothing does."""
    if revision := source["revision"]:
        return f"commit {revision[:7]}"
    return f"sha256 {short(source['sha256'])}" if source["sha256"] else ""


def findings(card: Card) -> list[Finding]:
    """What was found of duplicates, near-duplicates and overlap: how, how much, and examples side by side."""
    quality = card["quality"]
    near, overlap = quality["near_duplicates"], quality["overlap"]
    duplicates = [
        Pair(_quoted("dropped", one), None, f"repeats {one['matches']}, which stays")
        for one in quality["duplicates"]["examples"]
    ]
    nearly = [
        Pair(
            _quoted("dropped" if near["action"] == "drop" else "stays", pair["a"]),
            _quoted("kept", pair["b"]),
            f"{percent(pair['similarity'], 0)} of the 3-word sequences are shared",
        )
        for pair in near["examples"]
    ]
    drops = overlap["action"] == "drop"  # equal prompts are dropped whatever the action
    overlapping = [
        Pair(
            _quoted("dropped" if drops or pair["how"] == "same prompt" else "stays", pair["train"]),
            _quoted("held out", pair["heldout"]),
            pair["how"] if pair["share"] == 1 else f"{pair['how']}: {percent(pair['share'], 0)} of the held-out words",
        )
        for pair in overlap["examples"]
    ]
    return [
        Finding(
            "Duplicates",
            f"{card['duplicates']:,} rows dropped.",
            "Rows whose conversations are equal but for case, spacing and width; the first of them stays.",
            duplicates,
        ),
        _finding("Near-duplicates", near, "Not looked for.", nearly),
        _finding(
            "Overlap with held-out and test prompts",
            overlap,
            f"Only equal prompts were looked for. {_found(overlap)}",
            overlapping,
        ),
    ]


def _finding(title: str, part: NearDuplicateFindings | OverlapFindings, off: str, pairs: list[Pair]) -> Finding:
    """A finding; `off` stands for it where it was not looked for."""
    if part["action"] == "off":
        return Finding(title, off, "", pairs)
    return Finding(title, _found(part), part["method"], pairs)


def _found(part: NearDuplicateFindings | OverlapFindings) -> str:
    return f"{part['found']:,} rows found, {part['dropped']:,} of them dropped." if part["found"] else "None found."


def _quoted(label: str, row: ExampleRow) -> Quoted:
    return Quoted(label, row["id"], clip(row["text"], LONGEST_EXAMPLE))


def counted(card: Card) -> list[Chart]:
    """Small bar charts of what the rows hold."""
    turns = sorted(((int(turn), count) for turn, count in card["turns"].items()))
    few, many = turns[:SHOWN_TURNS], turns[SHOWN_TURNS:]
    labelled = [(str(turn), count) for turn, count in few]
    if many:
        labelled.append((f"{many[0][0]} or more", sum(count for _, count in many)))
    charts: list[tuple[str, str, Sequence[Sequence[Any]]]] = [
        ("Replies a conversation", "training conversations", labelled),
        ("Roles", "messages", sorted(card["roles"].items(), key=lambda pair: -pair[1])),
        ("First word of prompts", "training rows", card["first_words"]["prompt"]),
        ("First word of replies", "training rows", card["first_words"]["reply"]),
    ]
    charts += [(f"Column {name}", "rows", values) for name, values in card["columns"].items()]
    return [Chart(title, note, bars(rows)) for title, note, rows in charts if rows]


def bars(rows: Sequence[Sequence[Any]]) -> list[Bar]:
    """(label, count) pairs as the bars of a chart."""
    most = max((count for _, count in rows), default=1) or 1
    return [Bar(value_text(value), count, round(100 * count / most, 1)) for value, count in rows]


def value_text(value: object) -> str:
    """A column's value as its source has it: true and false as in JSON."""
    return "(empty)" if value == "" else str(value).lower() if isinstance(value, bool) else str(value)


def sample(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """A conversation as turns; a plain text is one message of the role "text"."""
    turns = []
    for message in messages:
        parts = [("reasoning", message.get("reasoning_content")), ("text", message["content"])]
        parts += [("call", call_text(call)) for call in message.get("tool_calls") or []]
        shown = [(kind, clip(text, LONGEST_SAMPLE)) for kind, text in parts if text]
        turns.append(Turn(message["role"], message.get("train") is False, shown))
    return turns


def call_text(call: ToolCall) -> str:
    """A tool call as one would write it: get_weather({"city": "Oslo"})."""
    function = call["function"]
    return f"{function['name']}({json.dumps(function['arguments'], ensure_ascii=False)})"


def _one_line(data: object) -> str:
    return data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)


SECTION = PageSection(name="data", anchor="data", title="Data", view=view)
