"""Stage "format": raw rows to conversations, split into training and held-out, with every row accounted for."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from adder.conversations import Rejected, recognise_source, to_messages
from adder.errors import UserError
from adder.files import read_jsonl, write_json, write_jsonl, write_table
from adder.progress import Progress

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ]
)
FEW_HELDOUT = 30  # an interval over fewer rows is too wide to tell anything but the plainest difference
COUNTS = ("rows_in", "train", "heldout", "duplicates", "leaked", "rejected")
SAMPLES = 3
PROGRESS_EVERY = 1000  # rows


@dataclass
class Conversation:
    """One accepted row. `digest` tells exact duplicates, `prompt` (normalised, hashed) tells leaks and the split."""

    source: str
    row: int
    split: str | None
    messages: list[dict]
    digest: bytes
    prompt: bytes

    @property
    def id(self) -> str:
        return f"{self.source}:{self.row}"


def run(settings: dict, inputs: dict[str, Path], out: Path, progress: Progress) -> dict:
    """Write train.parquet, heldout.parquet, rejects.jsonl, duplicates.jsonl, leaked.jsonl and card.json.

    settings: system_prompt, drop_duplicates, heldout {share, size} (used where the rows have no held-out sources).
    Every row ends in exactly one of train, heldout, duplicates, leaked, rejected. The card's `leaked` counts training
    rows dropped because a held-out row asks the same, `heldout_in_train` the held-out rows that had such a twin.
    Returns the card's counts. Raises UserError where nothing is left to train on or to hold out, or more is to be held
    out than there is.
    """
    rows_path = inputs["data"] / "rows.jsonl"
    row_format = _row_formats(rows_path)
    rows_in, conversations, rejects = _read(rows_path, row_format, settings.get("system_prompt"), progress)
    if not conversations:
        raise UserError(f"no row can be used{_because(rejects)}")

    duplicates: list[dict] = []
    if settings.get("drop_duplicates", True):
        conversations, duplicates = drop_duplicates(conversations)
    if any(conversation.split is None for conversation in conversations):
        assign_split(conversations, settings["heldout"])
    heldout_in_train = count_heldout_in_train(conversations)
    conversations, leaked = drop_leaked(conversations)
    train = [conversation for conversation in conversations if conversation.split == "train"]
    heldout = [conversation for conversation in conversations if conversation.split == "heldout"]
    _refuse_empty(train, heldout, duplicates, leaked, rejects, settings["heldout"])

    card = _card(row_format, train, heldout, duplicates, leaked, rejects)
    assert card["rows_in"] == len(conversations) + len(duplicates) + len(leaked) + len(rejects) == rows_in
    card["heldout_in_train"] = heldout_in_train
    _write_conversations(out / "train.parquet", train)
    _write_conversations(out / "heldout.parquet", heldout)
    write_jsonl(out / "rejects.jsonl", ({k: v for k, v in row.items() if k != "kind"} for row in rejects))
    write_jsonl(out / "duplicates.jsonl", duplicates)
    write_jsonl(out / "leaked.jsonl", leaked)
    write_json(out / "card.json", card)
    summary = {key: card[key] for key in COUNTS}
    progress.say(", ".join(f"{count:,} {key.replace('_', ' ')}" for key, count in summary.items()))
    if len(heldout) < FEW_HELDOUT:
        progress.say(f"warning: {len(heldout)} held out is too few for a verdict: data.heldout takes a size or a share")
    return summary


def drop_duplicates(conversations: list[Conversation]) -> tuple[list[Conversation], list[dict]]:
    """Keep the first of equal conversations on each side of the split; list the others with the one they repeat."""
    first: dict[tuple, Conversation] = {}
    kept, dropped = [], []
    for conversation in conversations:
        earlier = first.setdefault((conversation.split, conversation.digest), conversation)
        if earlier is conversation:
            kept.append(conversation)
        else:
            dropped.append(_dropped(conversation, earlier))
    return kept, dropped


def assign_split(conversations: list[Conversation], heldout: dict) -> None:
    """Set each conversation's split from the hash of its normalised prompt, so that other rows don't matter.

    heldout: {share} holds out prompts whose hash, read as a number in [0, 1), is below the share: where a row goes
    depends on nothing but its prompt. {size} holds out the N conversations with the lowest hashes: a new row displaces
    one of them at most. Prompts that differ in case or spacing only are one prompt.
    """
    share, size = heldout.get("share"), heldout.get("size")
    if (share is None) == (size is None):
        raise UserError("data.heldout needs one of share, size and sources")
    if size is not None and size >= len(conversations):
        raise UserError(
            f"data.heldout.size is {size:,}, but there are only {len(conversations):,} usable rows and some must be "
            "left to train on"
        )
    if share is not None:
        limit = int(share * 2**64)
        held = {id(c) for c in conversations if int.from_bytes(c.prompt[:8], "big") < limit}
    else:
        held = {id(c) for c in sorted(conversations, key=lambda c: (c.prompt, c.digest))[:size]}
    for conversation in conversations:
        conversation.split = "heldout" if id(conversation) in held else "train"


def count_heldout_in_train(conversations: list[Conversation]) -> int:
    """How many held-out rows have a prompt that also stands in training."""
    asked = {conversation.prompt for conversation in conversations if conversation.split == "train"}
    return sum(conversation.split == "heldout" and conversation.prompt in asked for conversation in conversations)


def drop_leaked(conversations: list[Conversation]) -> tuple[list[Conversation], list[dict]]:
    """Drop training rows whose prompt, without case and with single spaces, is also a held-out row's; list both."""
    held: dict[bytes, Conversation] = {}
    for conversation in conversations:
        if conversation.split == "heldout":
            held.setdefault(conversation.prompt, conversation)
    kept, dropped = [], []
    for conversation in conversations:
        match = held.get(conversation.prompt) if conversation.split == "train" else None
        if match is None:
            kept.append(conversation)
        else:
            dropped.append(_dropped(conversation, match))
    return kept, dropped


def digest_messages(messages: list[dict]) -> bytes:
    """Digest of the exact messages; equal for equal conversations only."""
    return _digest([[message["role"], message["content"]] for message in messages])


def digest_prompt(messages: list[dict]) -> bytes:
    """Digest of what is asked: all before the last reply, no system message, without case and with single spaces."""
    return _digest(
        [
            [message["role"], " ".join(message["content"].casefold().split())]
            for message in messages[:-1]
            if message["role"] != "system"
        ]
    )


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value, ensure_ascii=False).encode("utf-8"), digest_size=16).digest()


def _row_formats(rows_path: Path) -> dict[str, str | None]:
    """The row format of each source, from the columns of its rows."""
    columns: dict[str, Counter] = {}
    for record in read_jsonl(rows_path):
        seen = columns.setdefault(record["source"], Counter())
        if "error" not in record:
            seen[tuple(sorted(record["data"]))] += 1
    return {source: recognise_source(seen) for source, seen in columns.items()}


def _read(
    rows_path: Path, row_format: dict[str, str | None], system_prompt: str | None, progress: Progress
) -> tuple[int, list[Conversation], list[dict]]:
    """The number of rows read, the conversations among them, and the rejects with their reasons."""
    count, conversations, rejects = 0, [], []
    for count, record in enumerate(read_jsonl(rows_path), 1):
        source, row = record["source"], record["row"]
        try:
            if "error" in record:
                raise Rejected("unreadable row", record["error"])
            messages = to_messages(record["data"], row_format[source], system_prompt)
        except Rejected as error:
            data = _showable(record.get("data", record.get("raw")))
            rejects.append({"source": source, "row": row, "kind": error.kind, "reason": str(error), "data": data})
        else:
            digest, prompt = digest_messages(messages), digest_prompt(messages)
            conversations.append(Conversation(source, row, record["split"], messages, digest, prompt))
        if count % PROGRESS_EVERY == 0:
            progress.line(f"{count:,} rows read, {len(rejects):,} rejected")
    return count, conversations, rejects


def _refuse_empty(train: list, heldout: list, duplicates: list, leaked: list, rejects: list, split: dict) -> None:
    dropped = f"{len(duplicates):,} duplicates, {len(leaked):,} also held out, {len(rejects):,} rejected"
    if not train:
        raise UserError(f"no row is left to train on: {len(heldout):,} held out, {dropped}{_because(rejects)}")
    if not heldout:
        hint = ""
        if split.get("share") is not None:
            hint = f"; data.heldout.share {split['share']} of few rows can come to none, data.heldout.size is exact"
        raise UserError(f"no row is held out: {len(train):,} to train on, {dropped}{hint}{_because(rejects)}")


def _because(rejects: list[dict]) -> str:
    """The most frequent reasons for rejection, each with its first row; "" if there are none."""
    kinds = Counter(row["kind"] for row in rejects).most_common(3)
    firsts = {kind: next(row for row in rejects if row["kind"] == kind) for kind, _ in kinds}
    lines = [
        f"\n  {count:,} rows: {firsts[kind]['reason']} (first: {firsts[kind]['source']}, row {firsts[kind]['row']})"
        for kind, count in kinds
    ]
    return "".join([". Rejected:", *lines]) if lines else ""


def _card(
    row_format: dict, train: list[Conversation], heldout: list[Conversation], duplicates: list, leaked: list, rejects
) -> dict:
    by_source = {source: dict.fromkeys((*COUNTS,), 0) for source in row_format}
    for name, group in (("train", train), ("heldout", heldout)):
        for conversation in group:
            by_source[conversation.source][name] += 1
    for name, rows in (("duplicates", duplicates), ("leaked", leaked), ("rejected", rejects)):
        for row in rows:
            by_source[row["source"]][name] += 1
    for counts in by_source.values():
        counts["rows_in"] = sum(counts.values())
    total = {name: sum(counts[name] for counts in by_source.values()) for name in COUNTS}
    by_digest = sorted(train, key=lambda conversation: conversation.digest)
    return {
        **total,
        "accepted": total["train"] + total["heldout"],
        "rejects_by_reason": dict(Counter(row["kind"] for row in rejects)),
        "row_format": row_format,
        "samples": [conversation.messages for conversation in by_digest[:SAMPLES]],
        "by_source": by_source,
    }


def _write_conversations(path: Path, conversations: list[Conversation]) -> None:
    columns = {"id": [c.id for c in conversations], "messages": [c.messages for c in conversations]}
    write_table(path, pa.table(columns, schema=SCHEMA))


def _dropped(conversation: Conversation, match: Conversation) -> dict:
    return {"source": conversation.source, "row": conversation.row, "matches": match.id}


def _showable(data: Any) -> Any:
    """The row itself, or its escaped JSON where UTF-8 can't hold it."""
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(data)
    return data
