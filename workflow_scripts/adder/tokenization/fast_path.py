"""The fast path to a conversation's labels, for templates that write contents between fixed texts, as nearly all do.

Conversations of one layout (the same roles in the same order) are then the same fixed pieces around other contents. The
pieces and the replies' places in them are learnt from the first conversation of a layout, on the slow path (see
`layouts.py`). Each further one is rendered once and compared with its contents put between the pieces: if the texts are
equal, so are the replies' places, and no generation prompt has to be rendered. In the ids, control tokens are
landmarks: as the contents hold none, the k-th one of the text is the k-th one of the ids, and a reply begins so many
tokens behind one and ends with another. No offsets are needed, which makes the tokenizer itself quicker; and what
stands before the first question, such as tools, is encoded once for all conversations that begin with it.

Whatever differs from that by a single character or token is left to the slow path, `AssistantSpanFinder`.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import orjson
from transformers import PreTrainedTokenizerFast

from adder.formatting.conversation import Conversation, Message
from adder.tokenization.assistant_spans import AssistantSpanFinder, Rendered
from adder.tokenization.chat_template import Span, UnusableRow
from adder.tokenization.layouts import (
    Key,
    Layout,
    LayoutLearner,
    Tokens,
    Tools,
    begins_visibly,
    filled,
    key_of,
    match,
    texts_of,
)
from adder.tokenization.message_texts import is_written, strings
from adder.tokenization.reply_targets import missing

Integers = npt.NDArray[np.int64]

ATTEMPTS = 3  # conversations of a layout to learn from before it is left to the slow path for good
MARK = re.compile("think|channel", re.IGNORECASE)  # of a block of reasoning
MOST_LAYOUTS = 10_000
SHORT = 8  # messages and tools: longer layouts may never come again, and are learnt when they do
MOST_HEADS = 1000  # beginnings of conversations whose tokens are kept
MOST_TOOLS = 10_000  # lists of tools of which it is known whether they hold control tokens


@dataclass
class Spliced:
    """A conversation, or a beginning of it that is an example of its own, put together from its layout's pieces."""

    head_ids: list[int]  # tokens of what stands before the text
    text: str
    layout: Layout
    replies: str  # contents of the replies, to look for characters that have no tokens
    left_out: int = 0  # how many replies of the conversation carry no loss because it isn't split


class FastPath:
    """The layouts met so far, and conversations by them."""

    def __init__(self, finder: AssistantSpanFinder, tokenizer: PreTrainedTokenizerFast) -> None:
        self.finder = finder
        self.backend = tokenizer.backend_tokenizer
        self.ids = finder.control.ids
        self.is_control = np.zeros(1 + max([self.backend.get_vocab_size(), *self.ids.values()]), dtype=bool)
        self.is_control[list(self.ids.values())] = True
        self.usable = self._normalises_locally() and self._finds_control_tokens()
        self._learner = LayoutLearner(finder, tokenizer)
        self._layouts: dict[Key, list[Layout] | int] = {}  # of each example; a number: failed attempts to learn them
        self._heads: dict[str, list[int]] = {}  # of beginnings, met twice; none where it can't be encoded by itself
        self._met: set[str] = set()
        self._tools: dict[bytes, bool] = {}  # whether they hold no control token

    def splice(self, conversation: Conversation, split: bool = True) -> list[Spliced] | None:
        """A conversation's examples put together from their pieces, or None where more is to be looked at.

        split: as of Labeller.label_batch.
        """
        layouts = self._layouts_of(conversation) if self.usable else None
        if layouts is None or any(len(layout.replies) < len(layout.spans) for layout in layouts):
            return None
        found = [self._splice(conversation, layout) for layout in layouts]
        whole = [one for one in found if one is not None]
        if len(whole) < len(found):
            return None
        if split:
            return whole
        whole[0].left_out = sum(len(layout.replies) for layout in layouts[1:])
        return whole[:1]

    def find(self, conversation: Conversation) -> list[Rendered] | None:
        """What AssistantSpanFinder.find would give, or None where it is to be asked.

        For replies whose tokens can't be told without offsets: they begin with white space or a
        mark, or behind no control token. Raises UnusableRow for texts that hold control tokens.
        """
        found = list[Rendered]()
        layouts = self._layouts_of(conversation) or ()
        if layouts:
            self.finder.refuse_control_tokens(conversation.get("messages", []), conversation.get("tools"))
        for layout in layouts:
            written = self._written(conversation, layout)
            if written is None:
                return None
            text, contents, gaps, _ = written
            if len(self.finder.control.spans(text + layout.added)) != len(layout.control_ids):
                return None
            spans = [(start.at(contents, gaps), end.at(contents, gaps)) for start, end in layout.spans]
            composed, whole = layout.composed is not None, not found
            found.append(Rendered(text + layout.added, spans, [], whole, composed, [], layout.size, layout.turns))
        return found or None

    def _layouts_of(self, conversation: Conversation) -> list[Layout] | None:
        """The layouts of a conversation's examples, learnt if need be; None if it has none."""
        messages, tools = conversation.get("messages", []), conversation.get("tools")
        if not messages or messages[0]["role"] == "assistant":
            return None  # the slow path counts replies that answer no prompt
        if tools and not self._are_plain(tools):
            return None
        key = key_of(conversation)
        layouts = self._layouts.get(key, 0)
        return self._try_to_learn(key, messages, tools, layouts) if isinstance(layouts, int) else layouts

    def _splice(self, conversation: Conversation, layout: Layout) -> Spliced | None:
        written = self._written(conversation, layout)
        if written is None:
            return None
        text, contents, gaps, said = written
        if not all(begins_visibly(contents[number]) for number in layout.visible):
            return None
        if not all(begins_visibly(text[slice(*gaps[number])]) for number in layout.visible_gaps):
            return None
        cut = layout.head.at(contents, gaps)
        head = self._head_ids(text, cut)
        text += layout.added
        replies = [contents[number] for number in layout.trained]
        return Spliced(head, text[cut:] if head else text, layout, "".join(replies + said))

    def _written(
        self, conversation: Conversation, layout: Layout
    ) -> tuple[str, list[str], list[Span], list[str]] | None:
        """A conversation's text, its contents, gaps, and replies with calls; None where the layout isn't its own."""
        messages, tools = conversation.get("messages", [])[: layout.size], conversation.get("tools")
        contents = texts_of(messages)
        if layout.trims:
            contents = [trim(content) for trim, content in zip(layout.trims, contents, strict=True)]
        try:
            text = self._write(messages, tools, layout, contents)
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError):
            return None
        gaps = match(layout.runs, text, contents)
        if gaps is None or not all(contents[number].strip() for number in layout.answers):
            return None
        said = self._look_at_the_rest(messages, tools, layout, text, gaps) if gaps or layout.unwritten else []
        return None if said is None else (text, contents, gaps, said)

    def _write(self, messages: list[Message], tools: Tools | None, layout: Layout, contents: list[str]) -> str:
        """The conversation's text; raises whatever the template does, and ValueError where it isn't sure."""
        template, composed = self.finder.template.of(tools), layout.composed
        taken = [template.taken(message) for message in messages]
        text = template.render_taken(taken, tools=tools)
        if composed is None:
            return text
        own = [trim(content) for trim, content in zip(composed.trims, texts_of(messages), strict=True)]
        gaps = match(composed.written, text, own)
        if gaps is None:
            raise ValueError
        # What ReplyTargets looks for in texts.
        if any(MARK.search(content) or content.strip() in composed.fixed for content in own):
            raise ValueError
        tail = filled(composed.tail, contents, [text[slice(*gap)] for gap in gaps])
        return template.render_taken(taken[:-1], True, tools) + tail

    def _look_at_the_rest(
        self, messages: list[Message], tools: Tools | None, layout: Layout, text: str, gaps: list[Span]
    ) -> list[str] | None:
        """The replies with calls, where all that isn't between pieces is as the slow path would have it; else None."""
        is_control = self.finder.control.is_in
        own = texts_of(messages)
        if any(is_control(own[number]) for number in layout.unwritten):
            return None
        if any(is_control(message.get("name", "")) for message in messages if len(message) > 2):
            return None
        replies = list[str]()
        for call in layout.calls:
            message, said = messages[call.message], text[gaps[call.first][0] : gaps[call.last][1]]
            parts = message.get("tool_calls"), message["content"], message.get("reasoning_content")
            if any(is_control(part) for one in parts for part in strings(one)):
                return None
            if not is_written(message["content"].split("</think>")[-1], said):
                return None
            if call.trained:
                if missing(message, said):
                    return None
                replies.append(said)
        try:
            self.finder.contents.check_layout(messages[: layout.turns[-1]], tools)
        except UnusableRow:
            return None
        return replies

    def _are_plain(self, tools: Tools) -> bool:
        """Whether no text of the tools holds a control token."""
        try:
            key = orjson.dumps(tools)
        except TypeError:  # whole numbers of more than 64 bits
            return False
        if key not in self._tools:
            if len(self._tools) > MOST_TOOLS:
                self._tools.clear()
            self._tools[key] = not any(map(self.finder.control.is_in, strings(tools)))
        return self._tools[key]

    def _head_ids(self, text: str, cut: int) -> list[int]:
        """The tokens of the text before `cut`, which need not be encoded again; none if it wasn't met before."""
        head = text[:cut]
        if head in self._heads or not cut:
            return self._heads.get(head, [])
        if head not in self._met:
            if len(self._met) >= MOST_HEADS:
                self._met.clear()
            self._met.add(head)
            return []
        if len(self._heads) >= MOST_HEADS:
            self._heads.clear()
        first, rest, whole = (
            self.backend.encode(part, add_special_tokens=False).ids for part in (head, text[cut:], text)
        )
        self._heads[head] = first if first + rest == whole else []
        return self._heads[head]

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

    def _try_to_learn(self, key: Key, messages: list[Message], tools: Tools | None, failed: int) -> list[Layout] | None:
        if failed >= ATTEMPTS or None in key:
            return None
        if len(self._layouts) >= MOST_LAYOUTS:
            self._layouts.clear()
        if len(key) > SHORT and key not in self._layouts:
            self._layouts[key] = 0
            return None
        try:
            found = self.finder.find(messages, tools)
            learnt = [self._learner.learn(messages[: one.messages], tools, one) for one in found]
        except UnusableRow:
            return None
        layouts = [layout for layout in learnt if layout is not None]
        unread = found[0].messages < len(messages)  # the slow path looks at what no example holds, too
        if unread or len(layouts) < len(found) or (len(found) > 1 and self.finder.loss_on == "all"):
            self._layouts[key] = failed + 1
            return None
        self._layouts[key] = layouts
        return layouts

    def _normalises_locally(self) -> bool:
        """Whether a prompt's end in ASCII is normalised alike whatever visible character follows it."""
        normalizer = self.backend.normalizer
        return normalizer is None or _is_local(json.loads(normalizer.__getstate__()))

    def _finds_control_tokens(self) -> bool:
        """Whether each control token is found wherever its text stands, and no two can overlap."""
        for token, index in self.ids.items():
            if self.backend.encode(f"a{token}a", add_special_tokens=False).ids.count(index) != 1:
                return False
        beginnings = {token[:size] for token in self.ids for size in range(1, len(token))}
        return not any(token[size:] in beginnings for token in self.ids for size in range(1, len(token)))


def _is_local(normalizer: dict[str, Any]) -> bool:
    """Whether a normalizer can be shown to look at no neighbours: NFC leaves visible ASCII and what precedes it be."""
    if normalizer["type"] == "Sequence":
        return all(map(_is_local, normalizer["normalizers"]))
    if normalizer["type"] == "Replace":
        return normalizer["pattern"] == {"String": " "}
    return normalizer["type"] in {"NFC", "Prepend"}
