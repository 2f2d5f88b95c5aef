"""Conversations to token ids and labels, a batch at a time.

Most conversations of a data set have one layout and take the fast path of `fast_path.py`; the others, and whatever that
isn't sure of, take the slow path here. Both give the same ids and labels.
"""

from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from adder.core.labels import IGNORE_INDEX
from adder.formatting.conversation import Conversation
from adder.tokenization.assistant_spans import AssistantSpanFinder, Rendered
from adder.tokenization.chat_template import Span, UnusableRow, adds_bos
from adder.tokenization.fast_path import FastPath
from adder.tokenization.stage import LossOn

Integers = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.int32]

TAIL_KEPT = 256  # characters: longer prompt ends are one conversation's own text, and remembering them helps nobody
NO_TOKENS = "a reply holds characters that the tokenizer has no tokens for"


@dataclass(frozen=True)
class Example:
    """One conversation's tokens."""

    ids: Tokens  # (n,)
    labels: Tokens  # (n,), not shifted
    replies: list[int]  # tokens of each reply that is trained on, its end-of-turn token included


@dataclass(frozen=True)
class Batch:
    """The tokens of several examples in one row: one a conversation, or several of one that was split."""

    rows: Integers  # (n,), which conversations these are of, ascending
    ids: Tokens  # (tokens,)
    labels: Tokens  # (tokens,), not shifted
    lengths: Integers  # (n,), tokens of each
    ends: Integers  # (n,), where the last reply that is trained on ends; a plain text's own end
    counts: Integers  # (n,), replies of each that are trained on
    replies: Integers  # tokens of each reply, its end-of-turn token included

    def part(self, first: int, last: int) -> "Batch":
        """Some of the conversations."""
        tokens = slice(self.lengths[:first].sum(), self.lengths[:last].sum())
        replies = slice(self.counts[:first].sum(), self.counts[:last].sum())
        rows = slice(first, last)
        return Batch(
            self.rows[rows], self.ids[tokens], self.labels[tokens], self.lengths[rows], self.ends[rows],
            self.counts[rows], self.replies[replies],
        )  # fmt: skip


class Labeller:
    """Turns conversations into ids and labels.

    The template writes every control token, BOS included, so text is encoded without adding any: as apply_chat_template
    does. A conversation is encoded whole, and a token carries loss if it starts inside a reply's span. This holds only
    while the tokens before a reply are exactly the ones that generation will be given. A token that straddles the
    border (template "Assistant: ", reply "Yes", token " Yes") breaks it; so can a tokenizer that looks ahead. The text
    is then cut at that border, and its pieces are encoded each by itself. In the history of later turns generation
    would be given the joined token, so each reply is an example of its own then.

    A plain text ({"text"}) is encoded as the tokenizer encodes texts, ends in its end-of-text token, and carries loss
    on all of it. It may hold control tokens: such texts were written with some template already.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        loss_on: LossOn = "assistant",
        fast_path: bool = True,
        eos_ids: Collection[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.loss_on = loss_on
        self.finder = AssistantSpanFinder(tokenizer, loss_on, eos_ids)
        self.special_ids = frozenset(self.finder.control.ids.values())
        self.fast_path = FastPath(self.finder, tokenizer) if fast_path else None
        self.cut = 0  # examples encoded in pieces so far
        self.split = 0  # conversations that became several examples
        self._unmatched = 0  # replies that carry no loss because conversations aren't to be split
        # Matched before all else, so that what follows is independent of what stands before.
        self._added_ids = frozenset(tokenizer.added_tokens_decoder)
        self._tails: dict[str, list[int]] = {}
        self._newline = self.backend.encode("\n", add_special_tokens=False).ids
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._lone_bos = bos if bos != eos else None
        self._text_bos = bos if adds_bos(tokenizer) else None
        self._known: set[str] = set()  # characters already found to have tokens
        self._known_ascii = b""

    @property
    def unmatched(self) -> int:
        """Replies so far that carry no loss though they are to be learnt: generation would have another prompt."""
        return self._unmatched + self.finder.unprompted

    def label(self, conversations: list[Conversation]) -> list[list[Example] | UnusableRow]:
        """For each conversation ({"messages", "tools"} or {"text"}), its examples, or why it can't be used."""
        batch, rejected = self.label_batch(conversations)
        found: dict[int, list[Example]] = {}
        for number, row in enumerate(batch.rows.tolist()):
            one = batch.part(number, number + 1)
            found.setdefault(row, []).append(Example(one.ids, one.labels, one.replies.tolist()))
        return [rejected[row] if row in rejected else found[row] for row in range(len(conversations))]

    def label_batch(
        self, conversations: list[Conversation], split: bool = True
    ) -> tuple[Batch, dict[int, UnusableRow]]:
        """The tokens of all conversations that can be used, and why the others can't, by number.

        split: whether an earlier reply that doesn't stand in its conversation as generation would have it becomes an
        example of its own (see AssistantSpanFinder), behind the conversation's; else it carries no loss.
        """
        fast = self.take_fast_path(conversations, split)
        taken = set(fast.rows.tolist())
        if len(taken) == len(conversations):
            return fast, {}
        remaining = [row for row in range(len(conversations)) if row not in taken]
        slow, rejected = self._take_slow_path(conversations, remaining, split)
        if not len(fast.rows):
            return slow, rejected
        parts, done = [], 0
        for number, place in enumerate(np.searchsorted(fast.rows, slow.rows).tolist()):
            parts += [fast.part(done, place), slow.part(number, number + 1)]
            done = place
        return _joined([*parts, fast.part(done, len(fast.rows))]), rejected

    def take_fast_path(self, conversations: list[Conversation], split: bool = True) -> Batch:
        """The tokens of those conversations whose layout is known and of which nothing is in doubt."""
        if self.fast_path is None:
            return _joined([])
        tried = [(row, self.fast_path.splice(conversation, split)) for row, conversation in enumerate(conversations)]
        found = [(row, spliced) for row, examples in tried for spliced in examples or ()]
        lost = self._characters_lost("".join([spliced.replies for _, spliced in found]))
        if lost:
            unsure = {row for row, spliced in found if not lost.isdisjoint(spliced.replies)}
            found = [(row, spliced) for row, spliced in found if row not in unsure]
        if not found:
            return _joined([])
        encodings = self.backend.encode_batch_fast([spliced.text for _, spliced in found], add_special_tokens=False)
        pairs = zip(found, encodings, strict=True)
        ids, lengths = _flat([spliced.head_ids + encoding.ids for (_, spliced), encoding in pairs])
        left_out = np.array([spliced.left_out for _, spliced in found])
        sure, counts, starts, ends = self.fast_path.locate(ids, lengths, [spliced.layout for _, spliced in found])
        rows = np.array([row for row, _ in found], dtype=np.int64)
        if not sure.all():
            whole = ~np.isin(rows, rows[~sure])  # of a conversation all examples or none
            kept = np.repeat(whole[sure], counts)
            starts, ends, counts = starts[kept], ends[kept], counts[whole[sure]]
            ids = ids[np.repeat(whole, lengths)]
            rows, lengths, left_out = rows[whole], lengths[whole], left_out[whole]
        self.split += int((np.bincount(rows) > 1).sum()) if len(rows) else 0
        self._unmatched += int(left_out.sum())
        if self.loss_on == "all":
            labels = ids
        else:
            at = np.repeat(np.cumsum(lengths) - lengths, counts)
            change = np.zeros(len(ids) + 1, dtype=np.int8)
            np.add.at(change, at + starts, 1)
            np.add.at(change, at + ends, -1)
            labels = np.where(np.cumsum(change[:-1], dtype=np.int8), ids, np.int32(IGNORE_INDEX))
        last = np.cumsum(counts) - 1
        return Batch(rows, ids, labels, lengths, ends[last], counts, ends - starts)

    def _take_slow_path(
        self, conversations: list[Conversation], rows: list[int], split: bool
    ) -> tuple[Batch, dict[int, UnusableRow]]:
        rendered: list[tuple[int, Rendered]] = []
        examples: dict[int, list[Batch]] = {}
        rejected: dict[int, UnusableRow] = {}
        for row in rows:
            conversation = conversations[row]
            text = conversation.get("text")
            try:
                if text is not None:
                    examples[row] = [self._label_text(row, text)]
                    continue
                found = self.fast_path.find(conversation) if self.fast_path is not None else None
                if found is None:
                    found = self.finder.find(conversation.get("messages", []), conversation.get("tools"))
                rendered += [(row, one) for one in (found if split else found[:1])]
                self._unmatched += 0 if split else sum(len(one.spans) for one in found[1:])
            except UnusableRow as reason:
                rejected[row] = reason
        encodings = self.backend.encode_batch([one.text for _, one in rendered], add_special_tokens=False)
        for (row, one), encoding in zip(rendered, encodings, strict=True):
            try:
                examples.setdefault(row, []).extend(self._label_one(row, one, encoding, split))
            except UnusableRow as reason:
                rejected[row] = reason
        kept = [examples[row] for row in sorted(examples) if row not in rejected]
        self.split += sum(len(parts) > 1 for parts in kept)
        return _joined([part for parts in kept for part in parts]), rejected

    def _label_text(self, row: int, text: str) -> Batch:
        if not text.strip():
            raise UnusableRow("empty text")
        self._refuse_characters_lost(text, "the text holds characters that the tokenizer has no tokens for")
        ids = self.backend.encode_batch_fast([text], add_special_tokens=True)[0].ids
        if self._text_bos is not None and ids[:2] == [self._text_bos] * 2:
            del ids[0]  # the text brought its own
        end = self._text_end()
        if ids[-1] != end:
            ids.append(end)
        array = np.array(ids, dtype=np.int32)
        return _one(row, array, array, len(ids), [])

    def _text_end(self) -> int:
        """Id of the token that ends a plain text: end of text, or else what ends a reply."""
        end = self.tokenizer.eos_token_id
        if isinstance(end, int):
            return end
        rendered = self.finder.find([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])[0]
        return self.finder.control.ids[self.finder.control.pattern.findall(rendered.text)[-1]]

    def _label_one(self, row: int, rendered: Rendered, encoding: Encoding, split: bool) -> list[Batch]:
        text, spans = rendered.text, rendered.spans
        ids, offsets = encoding.ids, encoding.offsets
        both = [*spans, *rendered.masked]
        cuts = sorted(start for start, _ in both if not self._is_border(text, start, ids, offsets))
        if cuts and len(spans) > 1 and self.loss_on != "all":
            # A cut is right for its own reply only: in the history of later ones generation has the joined token.
            ends = [len(text), *(end for _, end in spans[-2::-1])]
            alone = [
                replace(rendered, text=text[:end], spans=[span]) for end, span in zip(ends, spans[::-1], strict=True)
            ]
            encodings = self.backend.encode_batch([one.text for one in alone], add_special_tokens=False)
            pairs = list(zip(alone, encodings, strict=True))
            self._unmatched += 0 if split else len(pairs) - 1
            return [
                batch for one, own in pairs[: None if split else 1] for batch in self._label_one(row, one, own, split)
            ]
        if cuts:
            self.cut += 1
            ids, offsets = self._encode_pieces(text, cuts)
        array = np.array(ids, dtype=np.int32)
        everything = self.loss_on == "all" and rendered.whole
        labels = array.copy() if everything else np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
        replies = []
        last = 0
        for start, end in spans:
            first, last = bisect_left(offsets, (start,)), bisect_left(offsets, (end,))
            self._check_reply(ids[first:last], text[start:end], exact=start in cuts)
            labels[first:last] = array[first:last]
            replies.append(last - first)
        for start, end in rendered.masked:
            labels[bisect_left(offsets, (start,)) : bisect_left(offsets, (end,))] = IGNORE_INDEX
        for start, end in rendered.unlearnt:
            labels[_overlapping(offsets, start, end)] = IGNORE_INDEX
        if rendered.unlearnt and (labels[1:] == IGNORE_INDEX).all():
            raise UnusableRow("nothing to train on: no token lies in what a reply's spans say is to be learnt")
        if self._lone_bos is not None and ids[:2] == [self._lone_bos] * 2:
            raise UnusableRow("the chat template writes the beginning-of-text token twice")
        return [_one(row, array, labels, last, replies)]

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
        while first and ids[first] not in self._added_ids:
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
        self._refuse_characters_lost(reply, NO_TOKENS)
        if exact:
            decoded = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            if decoded != reply:
                raise UnusableRow("a reply's first token can't be told from the prompt's last one")

    def _refuse_characters_lost(self, text: str, kind: str) -> None:
        lost = sorted(self._characters_lost(text))
        if lost:
            shown = ", ".join(f"{char!r} (U+{ord(char):04X})" for char in lost[:3])
            raise UnusableRow(f"{kind}: {shown}", kind)

    def _characters_lost(self, text: str) -> set[str]:
        """Characters of the text that the tokenizer would drop or replace."""
        if not self._known_ascii:
            self._known_ascii = bytes(code for code in range(128) if self._has_tokens(chr(code)))
        rest = text.encode().translate(None, self._known_ascii)
        return {char for char in set(rest.decode()) - self._known if not self._has_tokens(char)}

    def _has_tokens(self, char: str) -> bool:
        # Byte-level vocabularies may lack rare bytes (SmolLM2's lacks 0xF1): the tokenizer drops those silently.
        ids = self.backend.encode("x" + char, add_special_tokens=False).ids
        decoded = self.backend.decode(ids, skip_special_tokens=False)
        known = self.tokenizer.unk_token_id is None or self.tokenizer.unk_token_id not in ids
        if known and decoded != "x" and ("\ufffd" not in decoded or char == "\ufffd"):
            self._known.add(char)
            return True
        return False


def _overlapping(offsets: list[Span], start: int, end: int) -> slice:
    """The tokens that hold any of the characters from `start` to `end`."""
    first = bisect_left(offsets, (start,))
    while first and offsets[first - 1][1] > start:
        first -= 1
    return slice(first, bisect_left(offsets, (end,)))


def _flat(lists: list[list[int]]) -> tuple[Tokens, Integers]:
    """Ids of all lists in one row (int32), and the length of each."""
    lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
    return np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=lengths.sum()), lengths


def _one(row: int, ids: Tokens, labels: Tokens, end: int, replies: list[int]) -> Batch:
    """The batch of one conversation."""

    def integers(*values: int) -> Integers:
        return np.array(values, dtype=np.int64)

    return Batch(
        integers(row), ids, labels, integers(len(ids)), integers(end), integers(len(replies)), integers(*replies)
    )


def _joined(parts: list[Batch]) -> Batch:
    """The batches as one."""
    empty = _one(0, np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32), 0, []).part(0, 0)
    names = [field.name for field in fields(Batch)]
    return Batch(*(np.concatenate([getattr(part, name) for part in [empty, *parts]]) for name in names))
