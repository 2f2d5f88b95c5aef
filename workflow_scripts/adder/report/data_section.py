"""The report's view of the data: where rows came from and went, what is in them, and what the model sees of them."""

import json
import re
from collections.abc import Sequence

from adder.report import plots
from adder.report.formatting import clip, percent, sentence, short

LONGEST_SAMPLE = 3000  # characters of a message, of which the page shows no more
LONGEST_EXAMPLE = 700  # characters of a dropped row
SHOWN_TOKENS = (900, 400)  # tokens shown of a longer example: from its beginning and from its end
SHOWN_TURNS = 8  # bars; conversations of more turns are counted together
USES = {"train": "training", "heldout": "held out", "test": "test set", None: "training and held out"}
# How tokenizers write what is no text: <|im_end|>, </s>, <bos>, [INST], <｜User｜>.
SPECIAL = re.compile(r"<[|｜/]?[\w|｜▁:-]+[|｜]?>|\[/?[A-Z_]{3,}\]")
# Characters that would not be seen: their names stand in for them.
INVISIBLE = {"\t": "⇥", "\r": "␍", "\u00a0": "⍽", "\u200b": "[ZWSP]", "\u200d": "[ZWJ]", "\ufeff": "[BOM]"}


def data_section(facts: dict) -> dict:
    """Where the rows came from, where they went and why, and what is in them."""
    card, tokenize = facts["format"], facts["tokenize"]
    reasons = sorted(card["rejects_by_reason"].items(), key=lambda pair: (-pair[1], pair[0]))
    return {
        "plot": plots.flow(card["rows_in"], flow_parts(card), "Rows in, and what became of them"),
        "card": card,
        "split": ticked(sentence(card["split"])),
        "fates": fates(facts),
        "sources": source_rows(facts),
        "reasons": bars(reasons),
        "rejects": [row | {"data": _one_line(row.get("data"))} for row in facts["rejects"]],
        "untokenized": bars(list((tokenize.get("rejected_by_reason") or {}).items())),
        "findings": findings(card),
        "characters": [(side, found) for side in ("prompt", "reply") if (found := card["characters"][side])["count"]],
        "counted": counted(card),
        "samples": [sample(one) for one in card["samples"]],
    }


def ticked(text: str) -> list[tuple[bool, str]]:
    """The text in pieces, each with whether it stood between backticks, to be set as code."""
    return [(number % 2 == 1, piece) for number, piece in enumerate(text.split("`")) if piece]


def flow_parts(card: dict) -> list[dict]:
    """The parts of the flow plot: always training and held-out rows, of the others those that there are."""
    parts = [
        ("training", "train", "tuned", True),
        ("held out", "heldout", "heldout", True),
        ("test sets", "tests", "heldout", False),
        ("duplicates", "duplicates", "plain", False),
        ("near-duplicates", "near_duplicates", "plain", False),
        ("leaked", "leaked", "plain", False),
        ("left out", "left_out", "plain", False),
        ("rejected", "rejected", "past", False),
    ]
    return [
        {"name": name, "count": card[key], "kind": kind} for name, key, kind, always in parts if always or card[key]
    ]


def fates(facts: dict) -> list[tuple[str, int, str]]:
    """What became of the rows, as (name, rows, what that means); classes of no rows are left out but for the main."""
    card, tokenize, lengths = facts["format"], facts["tokenize"], facts["lengths"]
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
        ("Rejected", card["rejected"], "can't be used, for the reasons below" if card["rejected"] else ""),
        ("Not tokenized", tokenize["rejected_count"], "the template or the vocabulary can't hold them"),
        ("Too long", lengths["dropped"], f"longer than {lengths['max_seq_length']['value']:,} tokens; dropped"),
    ]
    return [row for row in rows if row[1] or row[0] in ("Rows in", "Training", "Held out", "Rejected")]


def _tokens(counts: dict | None) -> str:
    return f"{counts['tokens']:,} tokens, {counts['labelled']:,} of them carry loss" if counts else ""


def source_rows(facts: dict) -> list[dict]:
    """One row a source file: what it is, where it came from, what stands in it."""
    formats = facts["format"]["row_format"]
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
        for source in facts["data"]
    ]


def origin_of(source: dict) -> str:
    """Where a source's rows came from: a path, a URL, or a hub id with the file; "" for the built-in generator."""
    return str(source.get("path") or "")


def version_of(source: dict) -> str:
    """What pins a source: the hub's commit, else the file's digest, each shortened; "" if nothing does."""
    if source.get("revision"):
        return f"commit {source['revision'][:7]}"
    return f"sha256 {short(source['sha256'])}" if source.get("sha256") else ""


def findings(card: dict) -> list[dict]:
    """What was found of duplicates, near-duplicates and overlap: how, how much, and examples side by side."""
    quality = card["quality"]
    near, overlap = quality["near_duplicates"], quality["overlap"]
    found = [
        {
            "title": "Duplicates",
            "summary": f"{card['duplicates']:,} rows dropped.",
            "method": "Rows whose conversations are equal but for case and spacing; the first of them stays.",
            "pairs": [
                {
                    "left": ("dropped", one["id"], clip(one["text"], LONGEST_EXAMPLE)),
                    "right": None,
                    "note": f"repeats {one['matches']}, which stays",
                }
                for one in quality["duplicates"]["examples"]
            ],
        }
    ]
    parts = (
        ("Near-duplicates", near, "a", "b", "kept"),
        ("Overlap with held-out and test prompts", overlap, "train", "heldout", "held out"),
    )
    for title, part, one, other, label in parts:
        summary = (
            f"{part['found']:,} rows found, {part['dropped']:,} of them dropped." if part["found"] else "None found."
        )
        off = part["action"] == "off"
        if off:
            summary = f"Only equal prompts were looked for. {summary}" if part is overlap else "Not looked for."
        found.append({
            "title": title,
            "summary": summary,
            "method": "" if off else part["method"],
            "pairs": [
                {
                    "left": (_fate(pair, part), pair[one]["id"], clip(pair[one]["text"], LONGEST_EXAMPLE)),
                    "right": (label, pair[other]["id"], clip(pair[other]["text"], LONGEST_EXAMPLE)),
                    "note": _likeness(pair),
                }
                for pair in part["examples"]
            ],
        })  # fmt: skip
    return found


def _fate(pair: dict, part: dict) -> str:
    """What became of the row that was found: equal prompts are dropped whatever the action."""
    return "dropped" if part["action"] == "drop" or pair.get("how") == "same prompt" else "stays"


def _likeness(pair: dict) -> str:
    if "similarity" in pair:
        return f"{percent(pair['similarity'], 0)} of the 3-word sequences are shared"
    return pair["how"] if pair["share"] == 1 else f"{pair['how']}: {percent(pair['share'], 0)} of the held-out words"


def counted(card: dict) -> list[dict]:
    """Small bar charts of what the rows hold: {title, note, bars}."""
    turns = sorted(((int(turn), count) for turn, count in card["turns"].items()))
    few, many = turns[:SHOWN_TURNS], turns[SHOWN_TURNS:]
    labelled = [(str(turn), count) for turn, count in few]
    if many:
        labelled.append((f"{many[0][0]} or more", sum(count for _, count in many)))
    charts = [
        ("Replies a conversation", "training conversations", labelled),
        ("Roles", "messages", sorted(card["roles"].items(), key=lambda pair: -pair[1])),
        ("First word of prompts", "training rows", card["first_words"]["prompt"]),
        ("First word of replies", "training rows", card["first_words"]["reply"]),
    ]
    charts += [(f"Column {name}", "rows", values) for name, values in card["columns"].items()]
    return [{"title": title, "note": note, "bars": bars(rows)} for title, note, rows in charts if rows]


def bars(rows: Sequence[Sequence]) -> list[dict]:
    """(label, count) pairs as the rows of a bar chart; `width` is the percentage of the largest count."""
    most = max((count for _, count in rows), default=1) or 1
    return [{"name": value_text(value), "count": count, "width": round(100 * count / most, 1)} for value, count in rows]


def value_text(value: object) -> str:
    """A column's value as its source has it: true and false as in JSON."""
    return "(empty)" if value == "" else str(value).lower() if isinstance(value, bool) else str(value)


def sample(messages: list[dict]) -> list[dict]:
    """A conversation as turns {role, unlearnt, parts: [(kind, text)]}; kinds: text, reasoning, call.

    A plain text is one message of the role "text".
    """
    turns = []
    for message in messages:
        parts = [("reasoning", message.get("reasoning_content")), ("text", message["content"])]
        parts += [("call", call_text(call)) for call in message.get("tool_calls") or []]
        shown = [(kind, clip(text, LONGEST_SAMPLE)) for kind, text in parts if text]
        turns.append({"role": message["role"], "unlearnt": message.get("train") is False, "parts": shown})
    return turns


def call_text(call: dict) -> str:
    """A tool call as one would write it: get_weather({"city": "Oslo"})."""
    function = call["function"]
    return f"{function['name']}({json.dumps(function['arguments'], ensure_ascii=False)})"


def token_examples(tokenize: dict) -> list[dict]:
    """The examples token by token: {id, source, total, labelled, tokens: [{text, on, special}], left_out}.

    Of a long example the middle is left out; `cut` is the place of the gap among the shown tokens, or None.
    """
    shown = []
    for one in tokenize["examples"]:
        tokens = [
            {"text": visible(text), "on": bool(loss), "special": bool(SPECIAL.fullmatch(text.strip()))}
            for text, loss in zip(one["tokens"], one["loss"], strict=True)
        ]
        if tokens:  # a line break at the very end would show as an empty line
            tokens[-1]["text"] = tokens[-1]["text"].removesuffix("\n")
        left_out, cut = len(tokens) - sum(SHOWN_TOKENS), None
        if left_out > 0:
            cut = SHOWN_TOKENS[0]
            tokens = tokens[: SHOWN_TOKENS[0]] + tokens[-SHOWN_TOKENS[1] :]
        shown.append({
            "id": one["id"], "source": one["source"], "total": len(one["tokens"]), "labelled": sum(one["loss"]),
            "tokens": tokens, "left_out": max(0, left_out), "cut": cut,
        })  # fmt: skip
    return shown


def visible(text: str) -> str:
    """A token's text with its white space seen: a dot for a space, an arrow before a line break that is kept."""
    for character, name in INVISIBLE.items():
        text = text.replace(character, name)
    return text.replace("\n", "↵\n").replace(" ", "·")


def _one_line(data: object) -> str:
    return data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
