"""The fast path to a conversation's labels, for templates that write contents between fixed texts, as nearly all do.

Conversations of one layout (the same roles in the same order) are then the same fixed pieces around other contents. The
pieces and the replies' places in them are learnt from the first conversation of a layout, on the slow path. Each
further one is rendered once and compared with its contents put between the pieces: if the texts are equal, so are the
replies' places, and no generation prompt has to be rendered. In the ids, control tokens are landmarks: as the contents
hold none, the k-th one of the text is the k-th one of the ids, and a reply begins so many tokens behind one and ends
with another. No offsets are needed, which makes the tokenizer itself quicker.

Whatever differs from that by a single character or token is left to the slow path, `AssistantSpanFinder`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from adder.formatting.conversation import Conversation, Message
from adder.tokenization.assistant_spans import AssistantSpanFinder, Rendered
from adder.tokenization.chat_template import Span, UnusableRow

Integers = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.int32]
Key = tuple[str | None, ...]  # roles; None makes a conversation unfit
Trim = Callable[[str], str]

ATTEMPTS = 3  # conversations of a layout to learn from before it is left to the slow path for good
PAD = " \n"  # white space around a marker shows whether the template trims contents


@dataclass(frozen=True)
class Reply:
    """Where a reply stands among the control tokens of the text."""

    opener: int  # number of the control token before it
    tail: Tokens  # int32, ids between that one and the reply: the end of the generation prompt
    closer: int  # number of the control token that ends it


@dataclass(frozen=True, eq=False)
class Layout:
    """What the conversations of one layout have in common."""

    head: str  # the text before the last control token of the first piece, such as a system turn of the template's own
    head_ids: list[int]
    parts: list[str]  # fixed pieces at even places; contents go to the odd ones
    order: list[int]  # which text (see _texts) goes to which odd place
    trims: list[Trim] | None  # what the template does to each text
    size: int  # how many messages it is made of
    added: str  # what ends the last part, and the template doesn't write there
    control_ids: Tokens  # int32, the control tokens of the text
    replies: list[Reply]
    trained: list[int]  # texts of the replies
    answers: list[int]  # texts of all replies, those that aren't trained on included
    visible: list[int]  # texts that must begin with a visible ASCII character


@dataclass(frozen=True)
class Spliced:
    """A conversation, or a beginning of it that is an example of its own, put together from its layout's pieces."""

    text: str  # without the head
    layout: Layout
    replies: str  # contents of the replies, to look for characters that have no tokens


class FastPath:
    """The layouts met so far, and conversations by them."""

    def __init__(self, finder: AssistantSpanFinder, tokenizer: PreTrainedTokenizerFast) -> None:
        self.finder = finder
        self.backend = tokenizer.backend_tokenizer
        self.added = tokenizer.added_tokens_decoder
        self.unknown, self.bos = tokenizer.unk_token_id, tokenizer.bos_token_id
        self.ids = finder.control.ids
        self.is_control = np.zeros(1 + max([self.backend.get_vocab_size(), *self.ids.values()]), dtype=bool)
        self.is_control[list(self.ids.values())] = True
        self.usable = finder.template.takes_text and self._normalises_locally() and self._finds_control_tokens()
        self._layouts: dict[Key, list[Layout] | int] = {}  # of each example; a number: failed attempts to learn them

    def splice(self, conversation: Conversation, split: bool = True) -> list[Spliced] | None:
        """A conversation's examples put together from their pieces, or None where only the slow path will do.

        split: as of Labeller.label_batch.
        """
        if not self.usable or len(conversation) != 1 or "messages" not in conversation:
            return None
        messages = conversation["messages"]
        if not messages or messages[0]["role"] == "assistant":
            return None  # the slow path counts replies that answer no prompt
        key = tuple([message["role"] if len(message) == 2 else _marked_role(message) for message in messages])
        layouts = self._layouts.get(key, 0)
        if isinstance(layouts, int):
            layouts = self._try_to_learn(key, messages, layouts)
            if layouts is None:
                return None
        found = [self._splice(messages, layout) for layout in (layouts if split else layouts[:1])]
        whole = [one for one in found if one is not None]
        return whole if len(whole) == len(found) else None

    def left_out(self, conversation: Conversation) -> int:
        """How many replies of a conversation that was spliced carry no loss where it isn't split."""
        messages = conversation.get("messages", [])
        layouts = self._layouts[tuple([m["role"] if len(m) == 2 else _marked_role(m) for m in messages])]
        return 0 if isinstance(layouts, int) else sum(len(layout.replies) for layout in layouts[1:])

    def _splice(self, messages: list[Message], layout: Layout) -> Spliced | None:
        messages = messages[: layout.size]
        contents = _texts(messages)
        if layout.trims:
            contents = [trim(content) for trim, content in zip(layout.trims, contents, strict=True)]
        parts = layout.parts.copy()
        parts[1::2] = [contents[number] for number in layout.order]
        text = "".join(parts)
        template = self.finder.template
        try:
            if template.render_taken([template.taken(message) for message in messages]) + layout.added != text:
                return None
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError):
            return None
        for number in layout.visible:
            if not "!" <= contents[number][:1] <= "~":
                return None
        for number in layout.answers:
            if not contents[number].strip():
                return None
        return Spliced(text[len(layout.head) :], layout, "".join([contents[number] for number in layout.trained]))

    def locate(
        self, ids: Tokens, lengths: Integers, layouts: list[Layout]
    ) -> tuple[npt.NDArray[np.bool_], Integers, Integers, Integers]:
        """Find the replies in the ids (int32) of many conversations, given as one row and the length of each.

        Returns which conversations are sure (bool (n,)), how many replies each has (int64 (n,)), and start and end of
        all those replies (int64), counted from the start of their conversation.
        """
        borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        places = np.flatnonzero(self.is_control[ids])
        firsts = np.searchsorted(places, borders)
        found = np.diff(firsts)
        sure = np.zeros(len(layouts), dtype=bool)
        counts = np.array([len(layout.replies) for layout in layouts], dtype=np.int64)
        at = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        starts, ends = np.zeros((2, at[-1]), dtype=np.int64)
        groups: dict[int, list[int]] = {}
        for number, layout in enumerate(layouts):
            groups.setdefault(id(layout), []).append(number)
        for members in groups.values():
            layout = layouts[members[0]]
            rows = np.array(members)
            rows = rows[found[rows] == len(layout.control_ids)]
            controls = places[firsts[rows][:, None] + np.arange(len(layout.control_ids))]
            right = (ids[controls] == layout.control_ids).all(axis=1)
            for number, reply in enumerate(layout.replies):
                start, end = controls[:, reply.opener] + 1 + len(reply.tail), controls[:, reply.closer]
                right &= start <= end
                tail = np.minimum(start[:, None] - np.arange(len(reply.tail), 0, -1), len(ids) - 1)
                right &= (ids[tail] == reply.tail).all(axis=1)
                starts[at[rows] + number] = start - borders[rows]
                ends[at[rows] + number] = end + 1 - borders[rows]
            sure[rows] = right
        kept = np.repeat(sure, counts)
        return sure, counts[sure], starts[kept], ends[kept]

    def _try_to_learn(self, key: Key, messages: list[Message], failed: int) -> list[Layout] | None:
        if failed >= ATTEMPTS or None in key:
            return None
        try:
            found = self.finder.find(messages)
            learnt = [self._learn(messages[: one.messages], one) for one in found]
        except UnusableRow:
            return None
        layouts = [layout for layout in learnt if layout is not None]
        unread = found[0].messages < len(messages)  # the slow path looks at what no example holds, too
        if unread or len(layouts) < len(found) or (len(found) > 1 and self.finder.loss_on == "all"):
            self._layouts[key] = failed + 1
            return None
        self._layouts[key] = layouts
        return layouts

    def _learn(self, messages: list[Message], rendered: Rendered) -> Layout | None:
        """The layout of a conversation whose replies the slow path has found; None if it has none that is simple."""
        pieces, order, trims = self._pieces(messages)
        if pieces is None or rendered.masked or rendered.composed:
            return None
        contents = [trim(content) for trim, content in zip(trims, _texts(messages), strict=True)]
        parts = [""] * (2 * len(pieces) - 1)
        parts[::2], parts[1::2] = pieces, [contents[number] for number in order]
        written = "".join(parts)
        if not rendered.text.startswith(written):
            return None
        added = rendered.text[len(written) :]
        parts[-1] += added
        fixed: list[Span] = []
        position = 0
        for piece, part in enumerate(parts):
            if piece % 2 == 0:
                fixed.append((position, position + len(part)))
            position += len(part)
        controls = [
            (start + match.start(), start + match.end(), self.ids[match[0]])
            for start, end in fixed
            for match in self.finder.control.pattern.finditer(rendered.text[start:end])
        ]
        if [index for _, _, index in controls[:2]] == [self.bos] * 2:
            return None  # written twice, which the slow path refuses
        replies, visible = [], []
        for span in rendered.spans:
            found = self._place(rendered.text, span, fixed, controls)
            if found is None:
                return None
            reply, piece = found
            replies.append(reply)
            if piece is not None:
                visible.append(order[piece])
        places = _places(messages)
        trained = [place for turn in rendered.turns for place in places[turn]]
        if not {*trained} <= {*order}:
            return None
        answers = [
            place
            for message, own in zip(messages, places, strict=True)
            for place in own
            if message["role"] == "assistant"
        ]
        first = max((start for start, end, _ in controls if end <= fixed[0][1]), default=0)
        head, head_ids = self._head(rendered.text, first)
        control_ids = np.array([index for _, _, index in controls], dtype=np.int32)
        plain = all(trim is str for trim in trims)
        return Layout(
            head,
            head_ids,
            parts,
            order,
            None if plain else trims,
            len(messages),
            added,
            control_ids,
            replies,
            trained,
            answers,
            visible,
        )

    def _pieces(self, messages: list[Message]) -> tuple[list[str] | None, list[int], list[Trim]]:
        """Fixed pieces of a conversation's text, the order of its texts between them, and how each is trimmed."""
        places = _places(messages)
        markers = [f"CONTENT{number}CONTENT" for number in range(sum(map(len, places)))]
        padded = [PAD + marker + PAD[::-1] for marker in markers]
        marked: list[Message] = []
        for message, own in zip(messages, places, strict=True):
            changed: Message = {**message, "content": padded[own[-1]]}
            if len(own) > 1:
                changed["reasoning_content"] = padded[own[0]]
            marked.append(changed)
        text = self.finder.template.render(marked)
        dropped = {own[0] for own in places if len(own) > 1}  # reasoning of what is past may be
        counts = [text.count(marker) for marker in markers]
        if any(count > 1 or (count == 0 and number not in dropped) for number, count in enumerate(counts)):
            return None, [], []
        written = [number for number, count in enumerate(counts) if count]
        order = sorted(written, key=lambda number: text.index(markers[number]))
        trims: list[Trim] = [str] * len(markers)
        pieces = []
        for number in order:
            piece, text = text.split(markers[number])
            left, right = piece.endswith(PAD), text.startswith(PAD[::-1])
            trims[number] = {(1, 1): str, (0, 0): str.strip, (0, 1): str.lstrip, (1, 0): str.rstrip}[left, right]
            pieces.append(piece.removesuffix(PAD) if left else piece)
            text = text.removeprefix(PAD[::-1]) if right else text
        return [*pieces, text], order, trims

    def _head(self, text: str, end: int) -> tuple[str, list[int]]:
        """What need not be encoded again: a text is encoded the same whatever stands before its control token."""
        head, rest, whole = (
            self.backend.encode(part, add_special_tokens=False).ids for part in (text[:end], text[end:], text)
        )
        return (text[:end], head) if head + rest == whole else ("", [])

    def _place(
        self, text: str, span: Span, fixed: list[Span], controls: list[tuple[int, int, int]]
    ) -> tuple[Reply, int | None] | None:
        """A reply's place among the control tokens, and the odd place whose content must begin visibly, if any."""
        start, end = span
        opener = sum(control[1] <= start for control in controls) - 1
        closer = sum(control[1] <= end for control in controls) - 1
        if opener < 0 or closer <= opener or controls[closer][1] != end:
            return None
        opens, opened, index = controls[opener]
        piece = next((number for number, (a, b) in enumerate(fixed) if a <= opens and start <= b), None)
        if piece is None:
            return None  # a content stands between: its tokens would have to be known
        ids = self.backend.encode(text[opens:start], add_special_tokens=False).ids
        if ids[:1] != [index] or self.unknown in ids:
            return None
        reply = Reply(opener, np.array(ids[1:], dtype=np.int32), closer)
        # The first character must neither join with the prompt's last ones nor be swallowed by the token before.
        token = self.added.get(index)
        if opened == start and token is not None and not token.rstrip:
            return reply, None
        if start < fixed[piece][1]:  # the same in all conversations; `locate` looks at the tokens before it
            return (reply, None) if len(reply.tail) or "!" <= text[start] <= "~" else None
        return reply, piece

    def _normalises_locally(self) -> bool:
        """Whether a prompt's end is normalised alike whatever visible ASCII character follows it."""
        normalizer = self.backend.normalizer
        return normalizer is None or _is_local(json.loads(normalizer.__getstate__()))

    def _finds_control_tokens(self) -> bool:
        """Whether each control token is found wherever its text stands, and no two can overlap."""
        for token, index in self.ids.items():
            if self.backend.encode(f"a{token}a", add_special_tokens=False).ids.count(index) != 1:
                return False
        beginnings = {token[:size] for token in self.ids for size in range(1, len(token))}
        return not any(token[size:] in beginnings for token in self.ids for size in range(1, len(token)))


def _marked_role(message: Message) -> str | None:
    """Role of a message that isn't trained on or that holds reasoning; None for one with anything else."""
    if len(message) == 3 and message.get("train") is False:
        return f"{message['role']} untrained"
    return f"{message['role']} thinking" if len(message) == 3 and message.get("reasoning_content") else None


def _texts(messages: list[Message]) -> list[str]:
    """All texts of messages: of each its reasoning, if it has some, and its content."""
    texts = []
    for message in messages:
        if "reasoning_content" in message:
            texts.append(message["reasoning_content"])
        texts.append(message["content"])
    return texts


def _places(messages: list[Message]) -> list[list[int]]:
    """Numbers of each message's texts among _texts."""
    places, done = [], 0
    for message in messages:
        size = 2 if "reasoning_content" in message else 1
        places.append(list(range(done, done + size)))
        done += size
    return places


def _is_local(normalizer: dict[str, Any]) -> bool:
    """Whether a normalizer can be shown to look at no neighbours: NFC leaves visible ASCII and what precedes it be."""
    if normalizer["type"] == "Sequence":
        return all(map(_is_local, normalizer["normalizers"]))
    if normalizer["type"] == "Replace":
        return normalizer["pattern"] == {"String": " "}
    return normalizer["type"] in {"NFC", "Prepend"}
