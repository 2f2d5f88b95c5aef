"""Conversations to token ids and labels: loss on what the model has to write, its end-of-turn token included."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from adder.core import model_config, parallel
from adder.core.errors import UserError
from adder.core.files import read_json, write_json
from adder.core.labels import IGNORE_INDEX
from adder.core.length_summary import summarise
from adder.core.stage_spec import Context
from adder.tokenization import block_tokenizer, tokenizer_files
from adder.tokenization.block_tokenizer import (
    BlockFile,
    EarlierTokens,
    Piece,
    Scanner,
    Table,
    TokenizedBlock,
    Worker,
    load_tokenizer,
)
from adder.tokenization.chat_template import adds_bos, choose_template, set_variables
from adder.tokenization.labels import Batch, Labeller
from adder.tokenization.records import (
    BosToken,
    RejectedConversation,
    ReplyEnd,
    SplitCounts,
    Token,
    TokenizedExample,
    TokenizeRecord,
)
from adder.tokenization.remedies import remedy
from adder.tokenization.stage import TokenizeSettings
from adder.tokenization.token_table import SCHEMA

ENOUGH = 4096  # rows that are worth another worker: starting one takes as long as a few hundred
SCANNED_ENOUGH = 100_000  # rows that are worth another worker where they are just looked at
LISTED = 1000  # rejected rows that tokenize.json lists; all are counted
EXAMPLES = 3
EXAMPLE_TOKENS = 600
FALLBACKS = {  # what the template of a model without one of its own is, in words
    "chatml": "ChatML, whose tokens its vocabulary has",
    "plain": "the plain one (### User: … ### Assistant: …)",
}


class Shown(NamedTuple):
    """A row to show, or to learn the end-of-turn token from."""

    id: str
    source: str
    ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    end: int  # where its last reply ends
    has_reply: bool


@dataclass(frozen=True)
class Split:
    """What became of the conversations of one split."""

    conversations: int  # that can be used
    counts: SplitCounts
    replies: npt.NDArray[np.int32]  # tokens of each reply
    ends: Counter[int]  # last tokens of replies
    reasons: Counter[str]  # why conversations were left out, and how many
    rejected: list[RejectedConversation]  # the first LISTED of them
    shown: list[Shown]
    folds_reasoning: bool  # see ChatTemplate
    unwritten: set[str]  # see PromptContents.unwritten_of_tools
    largest: int  # id of a token


@dataclass(frozen=True)
class TokenizeInputs:
    """Folders of the stages that are read."""

    format: Path
    model: Path


class TokenizeSummary(TypedDict):
    """A few figures for the stage's record."""

    counts: dict[str, SplitCounts]
    rejected: int
    end_of_turn: str


def run(settings: TokenizeSettings, inputs: TokenizeInputs, out: Path, context: Context) -> TokenizeSummary:
    """Tokenise train.parquet and heldout.parquet of the format stage with the model's chat template.

    Writes `train.arrow` and `heldout.arrow` (token_table.SCHEMA), `tokenizer/` and `tokenize.json` (TokenizeRecord).
    Raises UserError when the tokenizer or template can't be used, or when no training conversation can, or more than
    settings.max_rejected of a split's can't.
    """
    model = inputs.model / "model"
    tokenizer = load_tokenizer(model)
    source = choose_template(tokenizer, settings.chat_template)
    set_variables(tokenizer, settings.template_variables)
    labeller = Labeller(tokenizer, settings.loss_on, eos_ids=model_config.eos_ids(model))
    meaning, earlier = "", None
    if context.earlier:
        meaning = block_tokenizer.meaning(context.earlier, model, tokenizer, settings.loss_on)
        earlier = EarlierTokens(context.earlier, meaning)
    train, heldout = (
        _tokenize_split(labeller, inputs.format / f"{name}.parquet", out / f"{name}.arrow", earlier, meaning, context)
        for name in ("train", "heldout")
    )
    _refuse_unknown_tokens(model, tokenizer, max(train.largest, heldout.largest))
    if not train.counts["examples"]:
        raise UserError(f"no training conversation could be tokenised; {_most_frequent(train.reasons)}")
    _refuse_unusable(train, "training", settings.max_rejected)
    _refuse_unusable(heldout, "held-out", settings.max_rejected)
    reply = next((row for row in train.shown if row.has_reply), train.shown[0])
    stop = _end_of_turn(labeller, reply, model_config.eos_ids(model))
    if tokenizer.pad_token is None:
        # Labels mask padding by position, never by id, so any token of the vocabulary will do: no resizing needed.
        tokenizer.pad_token = tokenizer.eos_token or stop["token"]
    tokenizer_files.save(tokenizer, model, out / "tokenizer")
    reasons = train.reasons + heldout.reasons
    record: TokenizeRecord = {
        "template": source,
        "template_variables": dict(settings.template_variables),
        "loss_on": settings.loss_on,
        "generation_blocks": labeller.finder.template.marks_generation,
        "end_of_turn": stop,
        "reply_ends": [
            cast("ReplyEnd", {"token": tokenizer.convert_ids_to_tokens(index), "id": index, "replies": count})
            for index, count in train.ends.most_common()
        ],
        "bos": _bos(tokenizer, reply.ids),
        "pad": cast("Token", {"token": tokenizer.pad_token, "id": tokenizer.pad_token_id}),
        "counts": {"train": train.counts, "heldout": heldout.counts},
        "reply_tokens": {"train": summarise(train.replies), "heldout": summarise(heldout.replies)},
        "examples": [_example(tokenizer, row) for row in _choose_examples(train.shown)],
        "rejected": [*train.rejected, *heldout.rejected][:LISTED],
        "rejected_count": reasons.total(),
        "rejected_by_reason": dict(reasons.most_common()),
        "warnings": [],
    }
    record["warnings"] = _warnings(
        tokenizer, record, settings.chat_template, model_config.eos_ids(model), train.folds_reasoning, train.unwritten
    )
    write_json(out / "tokenize.json", record)
    for warning in record["warnings"]:
        context.progress.say(f"warning: {warning}")
    if reasons:
        context.progress.say(f"warning: {reasons.total():,} conversations left out; {_most_frequent(reasons)}")
    return {"counts": record["counts"], "rejected": record["rejected_count"], "end_of_turn": stop["token"]}


def _refuse_unknown_tokens(model: Path, tokenizer: PreTrainedTokenizerFast, largest: int) -> None:
    """Raise UserError where the data have a token beyond the model's embedding (`largest`: id)."""
    file = model / "config.json"
    config = read_json(file) if file.exists() else {}
    rows = config.get("text_config", config).get("vocab_size")
    if isinstance(rows, int) and largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"{model}: its tokenizer writes {token!r} as token {largest:,}, and its embedding has rows for {rows:,} "
            "tokens; take the tokenizer that belongs to the model, or a model whose embedding was resized to it"
        )


def _refuse_unusable(split: Split, which: str, limit: float) -> None:
    """Raise UserError where more than the share `limit` of a split's conversations can't be used."""
    rejected = split.reasons.total()
    total = rejected + split.conversations
    if rejected > limit * total:
        raise UserError(
            f"{rejected:,} of {total:,} {which} conversations ({rejected / total:.1%}) can't be used with this model's "
            f"chat template and tokenizer, more than tokenize.max_rejected allows ({limit:.1%}); most often, "
            f"{_most_frequent(split.reasons)}; or raise tokenize.max_rejected"
        )


def _tokenize_split(
    labeller: Labeller, source: Path, target: Path, earlier: EarlierTokens | None, meaning: str, context: Context
) -> Split:
    """Write one split's tokens, of `source` (Parquet) into `target` (Arrow IPC file of SCHEMA), a record batch a block.

    meaning: what the blocks are kept under for later runs, "" where they aren't.
    """
    table, name = Table(source, ["id", "source", "digest"]), source.stem
    counts: SplitCounts = {"examples": 0, "split": 0, "unmatched": 0, "tokens": 0, "labelled": 0, "cut": 0}
    reasons: Counter[str] = Counter()
    ends: Counter[int] = Counter()
    replies, folds_reasoning = [np.zeros(0, np.int32)], False
    unwritten: set[str] = set()
    largest = -1
    rejected: list[RejectedConversation] = []
    shown: list[Shown] = []
    pieces = _blocks(source, context)
    kept = BlockFile(target.with_suffix(".blocks.arrow"), meaning) if meaning else None
    with pa.ipc.new_file(target, SCHEMA) as writer:
        for piece, block in zip(pieces, _tokenized(labeller, source, pieces, earlier, context), strict=True):
            rows, batch = table.rows(piece.start, piece.stop), block.batch
            names = rows.column("id")
            reasons.update(one.kind for one in block.rejected)
            found: list[RejectedConversation] = [
                {"id": names[one.row].as_py(), "split": name, "reason": one.reason}
                for one in block.rejected[: LISTED - len(rejected)]
            ]
            rejected += found
            counts["cut"] += block.cut
            counts["split"] += block.split
            counts["unmatched"] += block.unmatched
            unwritten |= set(block.unwritten)
            folds_reasoning |= block.folds_reasoning
            if len(batch.rows):
                writer.write_batch(_record_batch(rows, block))
                counts["examples"] += len(batch.rows)
                counts["tokens"] += len(batch.ids)
                largest = max(largest, int(batch.ids.max(initial=-1)))
                counts["labelled"] += int(block.labelled.sum())
                replies.append(batch.replies.astype(np.int32))
                ends.update(_last_tokens(batch))
                shown = _choose_examples(shown + _first_of_sources(rows, batch))
            if kept:
                kept.add(piece.key, block)
            context.progress.line(f"{name}: {piece.stop:,} of {len(table):,} conversations")
    if kept:
        kept.close()
    usable = len(table) - reasons.total()
    return Split(
        usable, counts, np.concatenate(replies), ends, reasons, rejected, shown, folds_reasoning, unwritten, largest
    )


def _blocks(source: Path, context: Context) -> list[Piece]:
    """The rows of a Parquet file in blocks."""
    metadata = pq.read_metadata(source)
    workers = parallel.worker_count(metadata.num_rows, SCANNED_ENOUGH, context.threads)
    groups = range(metadata.num_row_groups)
    found = block_tokenizer.pieces(list(parallel.map_batches(lambda: Scanner(source), groups, workers)))
    return [piece._replace(key=f"{source.stem}:{piece.key}") for piece in found]


def _tokenized(
    labeller: Labeller, source: Path, pieces: list[Piece], earlier: EarlierTokens | None, context: Context
) -> Iterator[TokenizedBlock]:
    """What is made of each block: what an earlier run did, or made now."""
    new = [piece for piece in pieces if earlier is None or piece.key not in earlier]
    workers = parallel.worker_count(sum(piece.stop - piece.start for piece in new), ENOUGH, context.threads)
    # Held-out conversations stay one row each.
    fresh = parallel.map_batches(lambda: Worker(labeller, source, source.stem == "train"), new, workers)
    for piece in pieces:
        yield next(fresh) if earlier is None or piece.key not in earlier else earlier[piece.key]


def _record_batch(rows: pa.Table, block: TokenizedBlock) -> pa.RecordBatch:
    """A block as rows of SCHEMA; `rows`: those of the Parquet file that it was made of."""
    batch = block.batch
    borders = pa.array(np.concatenate([[0], np.cumsum(batch.lengths)]), pa.int32())
    kept = rows if np.array_equal(batch.rows, np.arange(rows.num_rows)) else rows.take(pa.array(batch.rows))
    lists = [pa.ListArray.from_arrays(borders, values) for values in (batch.ids, batch.labels)]
    columns = [
        _names(kept.column("id").combine_chunks(), batch.rows), *lists, pa.array(batch.lengths, pa.int32()),
        pa.array(block.labelled, pa.int32()), kept.column("digest").combine_chunks(),
    ]  # fmt: skip
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _names(names: pa.Array, rows: npt.NDArray[np.int64]) -> pa.Array:
    """Names of examples: of a conversation that was split, further ones get a number behind its name."""
    again = np.flatnonzero(rows[1:] == rows[:-1]) + 1
    if not len(again):
        return names
    made = names.to_pylist()
    firsts = np.searchsorted(rows, rows)  # where the conversation's own example stands
    for place in again.tolist():
        made[place] = f"{made[place]}#{place - int(firsts[place]) + 1}"
    return pa.array(made, pa.string())


def _last_tokens(batch: Batch) -> list[int]:
    """The last token of each reply; of a loss on all, of each conversation's last reply."""
    labelled = np.flatnonzero(batch.labels != IGNORE_INDEX)
    places = np.cumsum(batch.replies) - 1
    if len(places) and places[-1] == len(labelled) - 1:
        return batch.ids[labelled[places]].tolist()
    starts = np.cumsum(batch.lengths) - batch.lengths
    return batch.ids[(starts + batch.ends - 1)[batch.counts > 0]].tolist()


def _first_of_sources(rows: pa.Table, batch: Batch) -> list[Shown]:
    """The first usable row of each source, the first with a reply, and the first few of all."""
    sources = rows.column("source").combine_chunks().take(pa.array(batch.rows)).dictionary_encode()
    _, firsts = np.unique(np.asarray(sources.indices), return_index=True)
    replying = np.flatnonzero(batch.counts)[:1]
    numbers = sorted({*firsts.tolist(), *replying.tolist(), *range(min(EXAMPLES, len(sources)))})
    found = []
    for number in numbers:
        one = batch.part(number, number + 1)
        name = rows.column("id")[int(one.rows[0])].as_py()
        found.append(Shown(name, sources[number].as_py(), one.ids, one.labels, int(one.ends[0]), bool(one.counts[0])))
    return found


def _choose_examples(rows: list[Shown]) -> list[Shown]:
    """At most EXAMPLES rows in their order: the first of each source before the second of any, conversations first."""
    seen: Counter[str] = Counter()
    ranked: list[tuple[int, int, Shown]] = []
    for place, row in enumerate(sorted(rows, key=lambda row: not row.has_reply)):
        ranked.append((seen[row.source], place, row))
        seen[row.source] += 1
    return [row for _, _, row in sorted(ranked, key=lambda item: item[:2])[:EXAMPLES]]


def _end_of_turn(labeller: Labeller, row: Shown, eos_ids: list[int]) -> Token:
    """Token to stop on: of the control tokens that end an example's last reply, the first that the model stops on."""
    ending: list[int] = []
    for index in row.ids[: row.end][::-1].tolist():
        if index not in labeller.special_ids:
            break
        ending.insert(0, index)
    stop = next((index for index in ending if index in eos_ids), ending[-1])
    return cast("Token", {"token": labeller.tokenizer.convert_ids_to_tokens(stop), "id": stop})


def _bos(tokenizer: PreTrainedTokenizerFast, ids: npt.NDArray[np.int32]) -> BosToken:
    """The beginning-of-text token, and whether an example's `ids` begin with it."""
    token, index = cast("str | None", tokenizer.bos_token), cast("int | None", tokenizer.bos_token_id)
    return {"token": token, "id": index, "written": index is not None and int(ids[0]) == index}


def _warnings(
    tokenizer: PreTrainedTokenizerFast,
    record: TokenizeRecord,
    asked: str | None,
    eos_ids: list[int],
    folds_reasoning: bool,
    unwritten: set[str],
) -> list[str]:
    """What a person should know of the template. `asked`: the one that the settings name, if they do."""
    found = []
    source, stop, bos = record["template"], record["end_of_turn"], record["bos"]
    if source in FALLBACKS and asked is None:
        found.append(
            f"the model has no chat template, so it gets {FALLBACKS[source]}; tokenize.chat_template names another"
        )
    if folds_reasoning:
        found.append("the chat template has no place for reasoning, so it stands in the reply, as <think>…</think>")
    found += [
        f"replies end in {end['token']} (id {end['id']}), but the model's generation stops on {eos_ids}: the merged "
        "model's generation_config lists it as well"
        for end in [stop, *(end for end in record["reply_ends"] if end["id"] != stop["id"])]
        if end["id"] not in eos_ids
    ]
    found += _of_splitting(record["counts"]["train"], record["counts"]["heldout"])
    if unwritten:
        found.append(f"the chat template writes tools without their {' and '.join(sorted(unwritten))}")
    if adds_bos(tokenizer) and not bos["written"]:
        found.append(
            f"the tokenizer begins texts with {bos['token']}, but the chat template doesn't write it: conversations "
            "are trained, and prompted, without it"
        )
    return found


def _of_splitting(train: SplitCounts, heldout: SplitCounts) -> list[str]:
    """What became of earlier replies that the template writes otherwise than the model has to."""
    found = []
    if train["split"]:
        found.append(
            f"{train['split']:,} conversations became several examples ({train['examples']:,} in all): the template "
            "rewrites what is past, so each reply is trained behind the prompt that generation gives; "
            "tokenize.loss_on: last trains on last replies only"
        )
    for name, counts in (("training", train), ("held-out", heldout)):
        if counts["unmatched"]:
            found.append(
                f"{counts['unmatched']:,} {name} replies carry no loss: generation would have another prompt, or none, "
                "than stands before them"
            )
    return found


def _most_frequent(reasons: Counter[str]) -> str:
    if not reasons:
        return "there is none"
    (reason, count), *_ = reasons.most_common(1)
    return f"{count:,} of them: {reason}. What helps: {remedy(reason)}"


def _example(tokenizer: PreTrainedTokenizerFast, row: Shown) -> TokenizedExample:
    """One example token by token, as the report colours it; cut after EXAMPLE_TOKENS tokens."""
    return {
        "id": row.id,
        "source": row.source,
        "tokens": [
            cast("str", tokenizer.decode([index], clean_up_tokenization_spaces=False))
            for index in row.ids[:EXAMPLE_TOKENS].tolist()
        ],
        "loss": [int(label != IGNORE_INDEX) for label in row.labels[:EXAMPLE_TOKENS]],
    }
