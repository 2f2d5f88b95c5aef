"""Conversations to token ids and labels: loss on what the model has to write, its end-of-turn token included."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from adder.errors import UserError
from adder.files import read_json, write_json
from adder.progress import Progress
from adder.quantiles import summarise
from adder.template import ChatTemplate, Message, Span, UnusableRow, choose_template, special_tokens

IGNORED = -100  # label of a token that carries no loss, as torch's cross entropy has it
BATCH = 1000  # conversations handed to the tokenizer at a time: enough for its threads, little memory
SCHEMA = pa.schema([("id", pa.string()), ("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
TAIL_KEPT = 256  # characters: longer prompt ends are one conversation's own text, and remembering them helps nobody
EXAMPLE_TOKENS = 600

Labelled = tuple[np.ndarray, np.ndarray, list[int]]


def run(settings: dict, inputs: dict[str, Path], out: Path, progress: Progress) -> dict:
    """Tokenise train.parquet and heldout.parquet of the format stage with the model's chat template.

    Writes `train.parquet` and `heldout.parquet` (id, input_ids, labels), `tokenizer/` and `tokenize.json`.
    Raises UserError when the tokenizer or template can't be used, or when no training conversation can.
    """
    model = inputs["model"] / "model"
    tokenizer = load_tokenizer(model)
    source = choose_template(tokenizer, settings["chat_template"])
    labeller = Labeller(tokenizer)
    splits = {}
    for split in ("train", "heldout"):
        splits[split] = _tokenize_split(labeller, inputs["format"] / f"{split}.parquet", out, split, progress)
    if not splits["train"]["examples"]:
        raise UserError(
            f"no training conversation could be tokenised; {_most_frequent(splits['train']['rejected'])}. If that is "
            "the template's fault, set tokenize.chat_template to a Jinja file that suits the model and the data"
        )
    stop = _end_of_turn(labeller, *splits["train"]["first"], _eos_ids(model))
    if tokenizer.pad_token is None:
        # Labels mask padding by position, never by id, so any token of the vocabulary will do: no resizing needed.
        tokenizer.pad_token = tokenizer.eos_token or stop["token"]
    tokenizer.save_pretrained(out / "tokenizer")
    bos = _bos(tokenizer, splits["train"]["first"][0])
    details = {
        "template": source,
        "generation_blocks": labeller.template.marks_generation,
        "end_of_turn": stop,
        "bos": bos,
        "pad": {"token": tokenizer.pad_token, "id": tokenizer.pad_token_id},
        "counts": {
            name: {key: split[key] for key in ("examples", "tokens", "labelled", "cut")}
            for name, split in splits.items()
        },
        "reply_tokens": {name: summarise(split["replies"]) for name, split in splits.items()},
        "example": _example(tokenizer, *splits["train"]["first"]),
        "rejected": [row for split in splits.values() for row in split["rejected"]],
        "warnings": _warnings(tokenizer, stop, bos, _eos_ids(model)),
    }
    write_json(out / "tokenize.json", details)
    for warning in details["warnings"]:
        progress.say(f"warning: {warning}")
    if details["rejected"]:
        progress.say(f"{len(details['rejected'])} conversations left out; {_most_frequent(details['rejected'])}")
    return {"counts": details["counts"], "rejected": len(details["rejected"]), "end_of_turn": stop["token"]}


def load_tokenizer(folder: Path):
    """Load the fast tokenizer of a model directory, ready to encode whole texts. Raises UserError if it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"can't load the model's tokenizer from {folder}: {error}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: needs a fast tokenizer (tokenizer.json), found {type(tokenizer).__name__}")
    # A tokenizer.json may carry the truncation and padding of whoever saved it; nothing may be cut silently.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


class Labeller:
    """Turns conversations into ids and labels.

    The template writes every control token, BOS included, so text is encoded without adding any: as apply_chat_template
    does. A conversation is encoded whole, and a token carries loss if it starts inside a reply's span. This holds only
    while the tokens before a reply are exactly the ones that generation will be given. A token that straddles the
    border (template "Assistant: ", reply "Yes", token " Yes") breaks it; so can a tokenizer that looks ahead. The text
    is then cut at that border, and its pieces are encoded each by itself. (In a conversation of several turns the cut
    stays in the later turns' history, where generation would be given the joined token: the reply as it was written.)
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.template = ChatTemplate(tokenizer)
        self.special_ids = frozenset(special_tokens(tokenizer).values())
        self._atoms = frozenset(tokenizer.added_tokens_decoder)  # matched before all else: what follows is independent
        self._tails: dict[str, list[int]] = {}
        self._newline = self.backend.encode("\n", add_special_tokens=False).ids
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._lone_bos = bos if bos != eos else None
        self._writable: set[str] = set()  # characters already found to have tokens
        self.cut = 0  # conversations encoded in pieces so far

    def label(self, conversations: list[list[Message]]) -> list[Labelled | str]:
        """For each conversation, (ids int32 (n,), labels int32 (n,), tokens of each reply), or why it can't be used.

        The tokens of a reply are counted with its end-of-turn token. Labels aren't shifted.
        """
        found: list[tuple[str, list[Span]] | str] = []
        for messages in conversations:
            try:
                found.append(self.template.find_replies(messages))
            except UnusableRow as reason:
                found.append(str(reason))
        texts = [item[0] for item in found if not isinstance(item, str)]
        encodings = iter(self.backend.encode_batch(texts, add_special_tokens=False))
        results: list[Labelled | str] = []
        for item in found:
            try:
                results.append(item if isinstance(item, str) else self._label_one(*item, next(encodings)))
            except UnusableRow as reason:
                results.append(str(reason))
        return results

    def _label_one(self, text: str, spans: list[Span], encoding) -> Labelled:
        ids, offsets = encoding.ids, encoding.offsets
        cuts = [start for start, _ in spans if not self._is_border(text, start, ids, offsets)]
        if cuts:
            self.cut += 1
            ids, offsets = self._encode_pieces(text, cuts)
        labels = np.full(len(ids), IGNORED, dtype=np.int32)
        replies = []
        for start, end in spans:
            first, last = bisect_left(offsets, (start,)), bisect_left(offsets, (end,))
            self._check_reply(ids[first:last], text[start:end], exact=start in cuts)
            labels[first:last] = ids[first:last]
            replies.append(last - first)
        if self._lone_bos is not None and ids[:2] == [self._lone_bos] * 2:
            raise UnusableRow("the chat template writes the beginning-of-text token twice")
        return np.asarray(ids, dtype=np.int32), labels, replies

    def _is_border(self, text: str, at: int, ids: list[int], offsets: list[Span]) -> bool:
        """Whether the tokens before `at` are those of text[:at] alone.

        Text behind an added token is encoded independently of what stands before it, so comparing from the last added
        token on is enough; for most templates that tail ("assistant\\n") is the same in every conversation.
        """
        border = bisect_left(offsets, (at,))
        if not border:
            return True
        if offsets[border - 1][1] > at:
            return False
        first = border - 1
        while first and ids[first] not in self._atoms:
            first -= 1
        tail = text[offsets[first][0] if first else 0 : at]
        expected = self._tails.get(tail)
        if expected is None:
            expected = self.backend.encode(tail, add_special_tokens=False).ids
            if len(tail) <= TAIL_KEPT:
                self._tails[tail] = expected
        return ids[first:border] == expected

    def _encode_pieces(self, text: str, cuts: list[int]) -> tuple[list[int], list[Span]]:
        ids: list[int] = []
        offsets: list[Span] = []
        for start, end in pairwise([0, *cuts, len(text)]):
            # SentencePiece-like tokenizers put a space before a text's first word. The words here aren't the first, so
            # a newline goes in front and is taken off again (where it stays a token of its own).
            encoding = self.backend.encode("\n" + text[start:end], add_special_tokens=False)
            skip, shift = len(self._newline), start - 1
            if start == 0 or encoding.ids[:skip] != self._newline:
                encoding = self.backend.encode(text[start:end], add_special_tokens=False)
                skip, shift = 0, start
            ids += encoding.ids[skip:]
            offsets += [(a + shift, b + shift) for a, b in encoding.offsets[skip:]]
        return ids, offsets

    def _check_reply(self, ids: list[int], reply: str, exact: bool) -> None:
        if not ids or ids[-1] not in self.special_ids:
            raise UnusableRow("the end-of-turn token after a reply isn't one token of the vocabulary")
        lost = sorted(char for char in set(reply) - self._writable if not self._can_write(char))
        if lost:
            shown = ", ".join(f"{char!r} (U+{ord(char):04X})" for char in lost[:3])
            raise UnusableRow(f"a reply holds characters that the tokenizer has no tokens for: {shown}")
        if exact:
            decoded = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            if decoded != reply:
                raise UnusableRow("a reply's first token can't be told from the prompt's last one")

    def _can_write(self, char: str) -> bool:
        # Byte-level vocabularies may lack rare bytes (SmolLM2's lacks 0xF1): the tokenizer drops those silently.
        ids = self.backend.encode("x" + char, add_special_tokens=False).ids
        decoded = self.backend.decode(ids, skip_special_tokens=False)
        known = self.tokenizer.unk_token_id is None or self.tokenizer.unk_token_id not in ids
        if known and decoded != "x" and ("\ufffd" not in decoded or char == "\ufffd"):
            self._writable.add(char)
            return True
        return False


def _tokenize_split(labeller: Labeller, source: Path, out: Path, split: str, progress: Progress) -> dict:
    """Write one split's table; return its counts, reply lengths, rejected rows and first example."""
    total = pq.read_metadata(source).num_rows
    done = examples = tokens = labelled = 0
    cut_before = labeller.cut
    replies: list[int] = []
    rejected: list[dict] = []
    first = None
    with pq.ParquetWriter(out / f"{split}.parquet", SCHEMA, compression="zstd") as writer:
        for ids, conversations in _batches(source):
            kept_ids, rows = [], []
            for row_id, result in zip(ids, labeller.label(conversations), strict=True):
                if isinstance(result, str):
                    rejected.append({"id": row_id, "split": split, "reason": result})
                    continue
                kept_ids.append(row_id)
                rows.append(result)
                replies += result[2]
            if rows:
                first = first or rows[0][:2]
                table = _table(kept_ids, rows)
                writer.write_table(table)
                examples += len(rows)
                tokens += sum(len(row[0]) for row in rows)
                labelled += sum(sum(row[2]) for row in rows)
            done += len(ids)
            progress.line(f"{split}: {done:,} of {total:,} conversations")
    return {
        "examples": examples, "tokens": tokens, "labelled": labelled, "cut": labeller.cut - cut_before,
        "replies": np.asarray(replies, dtype=np.int32), "rejected": rejected, "first": first,
    }  # fmt: skip


def _batches(source: Path) -> Iterator[tuple[list[str], list[list[Message]]]]:
    with pq.ParquetFile(source) as file:
        for batch in file.iter_batches(BATCH, columns=["id", "messages"]):
            yield batch.column("id").to_pylist(), batch.column("messages").to_pylist()


def _table(ids: list[str], rows: list[Labelled]) -> pa.Table:
    borders = np.cumsum([0, *(len(row[0]) for row in rows)], dtype=np.int32)
    columns = [
        pa.ListArray.from_arrays(borders, np.concatenate([row[position] for row in rows])) for position in (0, 1)
    ]
    return pa.table([pa.array(ids, pa.string()), *columns], schema=SCHEMA)


def _eos_ids(model: Path) -> list[int]:
    """Ids on which the model's generation stops: of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        if (model / name).exists():
            found = read_json(model / name).get("eos_token_id")
            if found is not None:
                return found if isinstance(found, list) else [found]
    return []


def _end_of_turn(labeller: Labeller, ids: np.ndarray, labels: np.ndarray, eos_ids: list[int]) -> dict:
    """Token to stop on: of the control tokens that end an example's last reply, the first that the model stops on."""
    ending: list[int] = []
    for index in ids[labels != IGNORED][::-1].tolist():
        if index not in labeller.special_ids:
            break
        ending.insert(0, index)
    stop = next((index for index in ending if index in eos_ids), ending[-1])
    return {"token": labeller.tokenizer.convert_ids_to_tokens(stop), "id": stop}


def _bos(tokenizer, ids: np.ndarray) -> dict:
    written = tokenizer.bos_token_id is not None and int(ids[0]) == tokenizer.bos_token_id
    return {"token": tokenizer.bos_token, "id": tokenizer.bos_token_id, "written": written}


def _warnings(tokenizer, stop: dict, bos: dict, eos_ids: list[int]) -> list[str]:
    found = []
    if stop["id"] not in eos_ids:
        found.append(
            f"replies end in {stop['token']} (id {stop['id']}), but the model's generation stops on {eos_ids}: "
            "the merged model's generation_config must list it"
        )
    adds_bos = bos["id"] is not None and tokenizer("a").input_ids[:1] == [bos["id"]]
    if adds_bos and not bos["written"]:
        found.append(
            f"the tokenizer begins texts with {bos['token']}, but the chat template doesn't write it: conversations "
            "are trained, and prompted, without it"
        )
    return found


def _most_frequent(rejected: list[dict]) -> str:
    if not rejected:
        return "there is none"
    (reason, count), *_ = Counter(row["reason"] for row in rejected).most_common(1)
    return f"{count} of them: {reason}"


def _example(tokenizer, ids: np.ndarray, labels: np.ndarray) -> dict:
    """One example token by token, as the report colours it; cut after EXAMPLE_TOKENS tokens."""
    shown = ids[:EXAMPLE_TOKENS].tolist()
    return {
        "tokens": [tokenizer.decode([index], clean_up_tokenization_spaces=False) for index in shown],
        "loss": [int(label != IGNORED) for label in labels[:EXAMPLE_TOKENS]],
    }
