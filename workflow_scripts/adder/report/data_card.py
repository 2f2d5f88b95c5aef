"""The data card of a run, in the hub's format (YAML front matter, Markdown): what the model was trained on.

Whatever comes from data is escaped: a cell can't end its table, a sample can't end its fence, HTML stays text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from adder.formatting.records import Card
from adder.packing.records import LengthsRecord
from adder.report.facts import RunFacts
from adder.report.formatting import clip, sentence
from adder.report.sections.data_section import Bar, counted, fates, findings, origin_of, source_rows
from adder.tokenization.records import TokenizeRecord

LONGEST_SAMPLE = 2000  # characters of a message, of which the card shows no more
PERCENTILES = ("min", "p50", "mean", "p90", "p99", "max")
# What Markdown or HTML would read as more than text.
SIGNS = re.compile(r"([\\`*_\[\]|#~$!])")
LICENSE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
LARGEST = "n>1M"


def dataset_card(title: str, facts: RunFacts) -> str:
    """The card as Markdown; `facts` as `facts.load` returns them."""
    card, tokenize, lengths = facts.format, facts.tokenize, facts.lengths
    sections = [
        f"# The data of {text(title)}",
        f"{card['train']:,} conversations to train on and {card['heldout']:,} held out to judge the model by, made "
        f"with Adder from {card['rows_in']:,} rows. {text(sentence(card['split']))}",
        "## Sources",
        *_sources(facts),
        "## What became of the rows",
        table(("Rows", "", ""), [(name, f"{count:,}", text(note)) for name, count, note in fates(facts)], (1,)),
        *_rejected(card),
        *_notes(card),
        "## Quality",
        *[f"**{found.title}.** {text(found.summary)} {text(found.method)}".strip() for found in findings(card)],
        "## What is in it",
        *_contents(card),
        "## Lengths",
        f"Tokens a training conversation with the template ({_template(tokenize)}), and characters of prompts and "
        "replies:",
        _lengths(card, lengths),
        f"Sequences have {lengths['max_seq_length']['value']:,} tokens; {text(lengths['truncation']['sentence'])}.",
        "## Samples",
        *[block for number, one in enumerate(card["samples"], 1) for block in _sample(number, one)],
    ]
    head = yaml.safe_dump(front_matter(title, facts), sort_keys=True, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n\n".join(sections) + "\n"


def front_matter(title: str, facts: RunFacts) -> dict[str, Any]:
    """What the hub reads of the card: licence, size, task, tags."""
    rows = facts.format["train"] + facts.format["heldout"]
    head: dict[str, Any] = {
        "pretty_name": title,
        "size_categories": [next((name for limit, name in SIZES if rows < limit), LARGEST)],
        "tags": ["adder", "conversational"],
        "task_categories": ["text-generation"],
    }
    stated = sorted({str(source["license"]).lower() for source in facts.data if source.get("license")})
    if stated:
        known = [name if LICENSE_NAME.fullmatch(name) else "other" for name in stated]
        head["license"] = known[0] if len(known) == 1 else sorted(set(known))
    return head


def text(value: object) -> str:
    """A value as Markdown that shows just it, on one line."""
    line = " ".join(str(value).split())
    escaped = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return SIGNS.sub(r"\\\1", escaped)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A Markdown table of cells that are Markdown already; the columns `numbers` stand to the right."""
    rule = ["---:" if column in numbers else "---" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def fenced(content: str, language: str = "") -> str:
    """A code block that nothing in it can end: its fence is longer than any row of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{content}\n{fence}"


def _sources(facts: RunFacts) -> list[str]:
    rows = [
        (
            text(shown["name"]),
            text(origin_of(source)) or text(shown["kind"]),
            text(shown["license"] or "not stated"),
            f"{shown['rows']:,}",
            f"{shown['unreadable']:,}",
            text(shown["format"]),
            text(shown["split"]),
            f"{shown['weight']:g}",
        )
        for shown, source in zip(source_rows(facts), facts.data, strict=True)
    ]
    head = ("Source", "From", "Licence", "Rows", "Unreadable", "Row format", "Split", "Weight")
    pinned = [
        (text(source["name"]), kind, text(digest))
        for source in facts.data
        for kind, digest in (("commit", source.get("revision")), ("SHA-256", source.get("sha256")))
        if digest
    ]
    noticed = [(text(source["name"]), text(note)) for source in facts.data for note in source.get("notes", [])]
    found = [table(head, rows, (3, 4, 7))]
    if noticed:
        found.append(table(("Source", "Noticed while reading"), noticed))
    return [*found, table(("Source", "", "Digest"), pinned)] if pinned else found


def _notes(card: Card) -> list[str]:
    return ["How they were read:", "\n".join(f"- {text(note)}" for note in card["notes"])] if card["notes"] else []


def _rejected(card: Card) -> list[str]:
    reasons = sorted(card["rejects_by_reason"].items(), key=lambda pair: (-pair[1], pair[0]))
    return [table(("Rejected because", "Rows"), [(text(r), f"{n:,}") for r, n in reasons], (1,))] if reasons else []


def _contents(card: Card) -> list[str]:
    def listed(bars: Sequence[Bar]) -> str:
        return ", ".join(f"{text(bar.name)} ({bar.count:,})" for bar in bars)

    return ["\n".join(f"- {text(one.title)}: {listed(one.bars)}" for one in counted(card))]


def _lengths(card: Card, lengths: LengthsRecord) -> str:
    found: tuple[tuple[str, Mapping[str, Any]], ...] = (
        ("Tokens", lengths["tokens"]),
        ("Prompt, characters", card["characters"]["prompt"]),
        ("Reply, characters", card["characters"]["reply"]),
    )
    rows = [(name, *(f"{values.get(p, 0):,.0f}" for p in PERCENTILES)) for name, values in found if values["count"]]
    return table(("", *PERCENTILES), rows, range(1, len(PERCENTILES) + 1))


def _template(tokenize: TokenizeRecord) -> str:
    name = tokenize["template"]
    return {"own": "the model's own", "file": "from a file"}.get(name, name)


def _sample(number: int, messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sample as a heading and a fenced block a message."""
    blocks = [f"### Sample {number}"]
    for message in messages:
        unlearnt = " (carries no loss)" if message.get("train") is False else ""
        blocks.append(f"**{text(message['role'])}**{unlearnt}")
        if message.get("reasoning_content"):
            blocks += ["Reasoning:", fenced(clip(message["reasoning_content"], LONGEST_SAMPLE))]
        if message["content"]:
            blocks.append(fenced(clip(message["content"], LONGEST_SAMPLE)))
        if message.get("tool_calls"):
            calls = json.dumps([call["function"] for call in message["tool_calls"]], ensure_ascii=False, indent=2)
            blocks.append(fenced(clip(calls, LONGEST_SAMPLE), "json"))
    return blocks
