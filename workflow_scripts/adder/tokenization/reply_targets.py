"""A reply as generation sees it: the prompt that it is given, and what the model has to write behind it."""

import contextlib
import itertools
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from adder.formatting.conversation import Message, ToolCall
from adder.tokenization.chat_template import ChatTemplate, Span, UnusableRow
from adder.tokenization.control_tokens import ControlTokens
from adder.tokenization.message_texts import (
    common_prefix,
    is_written,
    joined,
    reasoning_and_answer,
    strings,
    unused_marker,
    with_content,
)

Tools = list[dict[str, Any]]

NO_END = "the chat template writes no end-of-turn token after a reply: the model couldn't learn to stop"
NO_PROMPT = "the chat template gives no prompt for a reply: the model would never be asked for it"
OTHER_PROMPT = "the chat template's generation prompt isn't what stands before a finished reply"
DROPPED_REASONING = "leaves out a reply's reasoning"
MARKERS = ("REPLY0REPLY", "NEXT0NEXT")
FILLED = 256  # characters at a prompt's end among which is the control token that opens the reply's turn
# The marks around a block of reasoning: <think>, [THINK], <seed:think>, Hy3's <think:…>, Gemma 4's channel, Command's
# <|START_THINKING|> and others of its kind, and their ends.
OPENING = (
    r"(?:[<\[◁](?:\w+:)?think(?:ing)?(?::\w+)?[>\]▷]|<\|channel>thought"
    r"|<\|(?:start|begin)_(?:of_)?th(?:ink|inking|ought)\|>)"
)
CLOSING = r"(?:[<\[◁]/(?:\w+:)?think(?:ing)?(?::\w+)?[>\]▷]|<channel\|>|<\|end_(?:of_)?th(?:ink|inking|ought)\|>)"
OPENED = re.compile(rf"{OPENING}\s*\Z", re.IGNORECASE)
CLOSED = re.compile(rf"{CLOSING}\s*\Z", re.IGNORECASE)
MARKS = re.compile(rf"\s*({OPENING}|{CLOSING})", re.IGNORECASE)
EMPTY_BLOCK = re.compile(rf"\s*{OPENING}?(\s*{CLOSING}\s*)", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """One reply as generation sees it. `prompt`, `reply` and `rest` in a row are a conversation that ends with it."""

    prompt: str
    reply: str  # through its end-of-turn token
    rest: str  # what the template writes behind that
    composed: bool = False  # whether the template itself doesn't write the reply so behind this prompt

    @property
    def text(self) -> str:
        """The conversation that ends with the reply."""
        return self.prompt + self.reply + self.rest

    @property
    def span(self) -> Span:
        """Where the reply stands in a text that begins with prompt and reply."""
        return len(self.prompt), len(self.prompt) + len(self.reply)

    def is_in(self, text: str) -> bool:
        """Whether a text begins with prompt and reply."""
        return text.startswith(self.prompt) and text.startswith(self.reply, len(self.prompt))


@dataclass(frozen=True)
class TurnEnd:
    """How a turn ends: what the template writes behind a reply's own text, the same for all replies of a kind.

    tail: what it writes in a conversation that ends there. start, end: of the end-of-turn token in it. added: what
    ends the turn where nothing in the tail does, since the next turn's beginning does (GLM).
    """

    tail: str
    start: int
    end: int
    added: str = ""

    def cut(self, whole: str) -> tuple[str, str]:
        """A finished conversation through its last end-of-turn token, and what stands behind."""
        if not whole.endswith(self.tail[self.start :]):
            raise UnusableRow("the chat template ends a turn differently depending on a reply's text")
        kept = len(whole) - (len(self.tail) - self.end)
        return (whole[:kept] + self.added, "") if self.added else (whole[:kept], whole[kept:])


class ReplyTargets:
    """Finds the target of a reply by rendering the conversation up to it in several ways.

    The prompt is what the template makes of the messages before it with add_generation_prompt. The reply is what the
    finished conversation has behind that. Some templates write a finished conversation otherwise than its prompt: the
    system prompt is missing (Mistral), a block of reasoning that the prompt opens is not there (DeepSeek R1), a tool's
    result ends otherwise (Hermes). The reply is then taken from the finished conversation and put behind the prompt.

    `eos_ids`: what the model's generation stops on, where it is known.
    """

    def __init__(self, template: ChatTemplate, control: ControlTokens, eos_ids: Collection[int] = ()) -> None:
        self.template, self.control, self.eos_ids = template, control, eos_ids
        self._ends: dict[tuple[object, ...], TurnEnd] = {}
        self._closes_call: dict[str, bool] = {}

    def target(self, messages: list[Message], tools: Tools | None) -> Target:
        """The target of the last of the messages. Raises UnusableRow where there is none, or it isn't sure."""
        message = messages[-1]
        try:
            prompt = self.template.render(messages[:-1], prompt=True, tools=tools)
        except UnusableRow:
            raise UnusableRow(NO_PROMPT) from None
        before = messages[-2] if len(messages) > 1 else None
        if before and before["role"] == "assistant" and prompt.endswith(before["content"].strip() or "\0"):
            raise UnusableRow(NO_PROMPT)  # such as Hy3's, which then goes on with the reply before
        written, rest = self._turn_end(messages, tools).cut(self.template.render(messages, tools=tools))
        if written.startswith(prompt):
            reply, composed = written[len(prompt) :], False
            if self.template.of(tools).marks_generation:
                self._check_blocks(messages, tools, len(prompt), len(written))
        else:
            reply, composed = self._behind_prompt(messages, tools, prompt, written), True
        lacking = missing(message, reply)
        if lacking and (OPENED.search(prompt) or "</think>" in self.template.of(tools).source):
            reply, composed = self._compose(messages, tools, prompt), True
            lacking = missing(message, reply)
        if lacking:
            raise UnusableRow(f"the chat template {lacking}")
        return Target(prompt, reply, rest, composed)

    # Where a turn ends

    def _turn_end(self, messages: list[Message], tools: Tools | None) -> TurnEnd:
        """How the last message's turn ends: with what stands there whether or not the conversation goes on."""
        key = tuple(map(_kind, messages)), bool(tools)
        if key not in self._ends:
            self._ends[key] = self._find_turn_end(messages, tools)
        return self._ends[key]

    def _find_turn_end(self, messages: list[Message], tools: Tools | None) -> TurnEnd:
        marker, message = unused_marker(MARKERS[0], messages), messages[-1]
        calls = bool(message.get("tool_calls"))
        marked = [*messages[:-1], with_content(message, marker)]
        text = self.template.render(marked, tools=tools)
        if marker not in text:
            raise UnusableRow(f"the chat template leaves out a {'tool call' if calls else 'reply'}")
        if not calls and text.count(marker) > 1:
            raise UnusableRow(f"the chat template writes a reply {text.count(marker)} times")
        tail, onward = text.rpartition(marker)[2], self._onward(marked, tools, marker)
        shared = tail if onward is None else tail[: common_prefix(tail, onward)]
        own, floor = self.control.spans(tail), 0
        tokens = [span for span in own if span[1] <= len(shared)]
        if calls and tokens and self._only_closes_call(messages, tools, tail[slice(*tokens[-1])]):
            floor, tokens = tokens[-1][1], []
        if not tokens:  # such as a token after the last turn only
            tokens = [span for span in own if span[0] >= floor]
            tokens = tokens[: 1 if onward is not None else None]
        if tokens:
            last = tokens[-1] if calls else _first_run(tokens)
            # Generation stops on the first of its own: behind that a template may open the next turn (Command R7B).
            stops = (span for span in tokens if self.control.ids[tail[slice(*span)]] in self.eos_ids)
            return TurnEnd(tail, *min(last, next(stops, last)))
        start = max(len(shared), floor)
        opener = next((span for span in self.control.spans(onward or "") if span[0] >= start), None)
        if onward is None or opener is None or onward[start : opener[0]].strip():
            raise UnusableRow(NO_END)
        token = onward[slice(*opener)]
        own = self.control.pattern.findall(self.template.render(messages[:-1], prompt=True, tools=tools))
        if self.control.ids[token] not in self.eos_ids and own[-1:] == [token]:
            raise UnusableRow(NO_END)  # it begins the model's own turns as well
        return TurnEnd(tail, start, start, onward[start : opener[1]])

    def _onward(self, marked: list[Message], tools: Tools | None, marker: str) -> str | None:
        """What stands behind the last message's text when the conversation goes on; None if it can't."""
        ways: list[list[Message]] = [[{"role": "user", "content": MARKERS[1]}]]
        if marked[-1].get("tool_calls"):
            ways.insert(0, [_result(call) for call in marked[-1].get("tool_calls", [])])
        for following in ways:
            try:
                text = self.template.render([*marked, *following], tools=tools)
            except UnusableRow:
                continue
            if marker in text:
                return text.rpartition(marker)[2]
        return None

    def _only_closes_call(self, messages: list[Message], tools: Tools | None, token: str) -> bool:
        """Whether a control token ends a call and not the turn: one more call adds one more of it."""
        if token not in self._closes_call:
            message = messages[-1]
            calls = message.get("tool_calls", [])
            repeated: Message = {**message, "tool_calls": [*calls, calls[-1]]}
            try:
                more = self.template.render([*messages[:-1], repeated], tools=tools).count(token)
            except UnusableRow:
                more = 0  # a template that allows one call only
            self._closes_call[token] = more > self.template.render(messages, tools=tools).count(token)
        return self._closes_call[token]

    # Prompts that the finished conversation doesn't begin with

    def _behind_prompt(self, messages: list[Message], tools: Tools | None, prompt: str, written: str) -> str:
        """The reply of a finished conversation (`written`, through its end) that doesn't begin with the prompt."""
        with contextlib.suppress(UnusableRow):
            filled, reply = self._split_at_reply(messages, tools, prompt, written)
            if not filled.strip():
                return reply
        return self._compose(messages, tools, prompt)

    def _split_at_reply(
        self, messages: list[Message], tools: Tools | None, prompt: str, written: str
    ) -> tuple[str, str]:
        """The reply of a finished conversation (`written`, through its end) that doesn't begin with the prompt.

        Returns what the prompt has behind the place where the finished conversation has the reply, and the reply.
        """
        head = self._head(messages, tools, written)
        place = self._align(prompt, head, self._last_said(messages, tools, head)) if head is not None else None
        if head is None or place is None:
            raise self._other_prompt(prompt, written)
        said = [message["content"].strip() for message in messages[:-1]]
        if any(text in head[place[1] :] for text in (*said[-1:], *(text for text in said if len(text) > 3)) if text):
            raise self._other_prompt(prompt, written)
        return prompt[place[0] :], written[place[1] :]

    def _head(self, messages: list[Message], tools: Tools | None, written: str) -> str | None:
        """What a finished conversation (`written`) has before anything of its last reply; None if that isn't sure."""
        texts = []
        for marker in (unused_marker(name, messages) for name in MARKERS):
            changed = with_content(messages[-1], marker)
            if "reasoning_content" in changed:
                changed["reasoning_content"] = marker
            texts.append(self.template.render([*messages[:-1], changed], tools=tools))
        head = texts[0][: common_prefix(*texts)]
        shared = common_prefix(head, written)  # less where a call without arguments is begun otherwise
        return None if self.control.spans(head[shared:]) else head[:shared]

    def _last_said(self, messages: list[Message], tools: Tools | None, head: str) -> int:
        """Where in the head (see _head) the message before the reply begins to be written; 0 where that isn't seen.

        What stands before that is an earlier turn's, however much it looks like the prompt's end.
        """
        if len(messages) < 2 or not messages[-2]["content"].strip():
            return 0
        other: Message = {**messages[-2], "content": unused_marker(MARKERS[1], messages)}
        try:
            text = self.template.render([*messages[:-2], other, messages[-1]], tools=tools)
        except UnusableRow:
            return 0
        shared = common_prefix(head, text)
        return shared if shared < len(head) else 0

    def _align(self, prompt: str, head: str, floor: int) -> Span | None:
        """Where prompt and head (see _head) have the same ending, with a control token in it: lengths of both.

        Of the prompt as little as possible is cut off, and the head's part ends behind `floor`.
        """
        first = max(0, len(prompt) - FILLED)
        tokens = [(start + first, end + first) for start, end in self.control.spans(prompt[first:])]
        marks = {match.start(group) + first for match in MARKS.finditer(prompt[first:]) for group in (0, 1)}
        marks |= {end for _, end in tokens}
        for cut in (len(prompt), *sorted(marks, reverse=True)):
            token = next((token for token in reversed(tokens) if token[1] <= cut), None)
            if token is None:
                return None
            at = head.rfind(prompt[token[0] : cut])
            end = at + cut - token[0]
            if at >= 0 and end > floor and prompt[slice(*token)] not in head[end:]:
                return cut, end
        return None

    def _other_prompt(self, prompt: str, text: str) -> UnusableRow:
        """The reason to refuse a reply before which the text isn't the generation prompt."""
        before = self.control.spans(prompt[: common_prefix(prompt, text)])
        start = before[-1][1] if before else 0
        return UnusableRow(
            f"the chat template's generation prompt goes on with {prompt[start : start + 40]!r}, where the finished "
            f"conversation has {text[start : start + 40]!r}: the model would be trained on another prompt than it is "
            "given",
            OTHER_PROMPT,
        )

    # Replies of which a template drops something

    def _compose(self, messages: list[Message], tools: Tools | None, prompt: str) -> str:
        """The reply with all that the message says, in the frame that the template writes around another text.

        A block of reasoning that the prompt opens is closed, with the message's reasoning in it or nothing; else the
        reasoning stands in front of the answer as <think>...</think>.
        """
        reasoning, answer = reasoning_and_answer(messages[-1])
        plain: Message = {**messages[-1]}
        plain.pop("reasoning_content", None)
        marker = unused_marker(MARKERS[0], messages)
        plain["content"] = marker if answer else ""
        marked = [*messages[:-1], plain]
        filled, frame = "", self._turn_end(marked, tools).cut(self.template.render(marked, tools=tools))[0]
        if frame.startswith(prompt):
            frame = frame[len(prompt) :]
        else:
            filled, frame = self._split_at_reply(marked, tools, prompt, frame)
        opened, block = OPENED.search(prompt), EMPTY_BLOCK.match(frame)
        if filled.strip() and not opened and not CLOSED.search(filled):
            raise self._other_prompt(prompt, prompt.removesuffix(filled) + frame)
        if reasoning and CLOSED.search(prompt):
            raise UnusableRow(
                f"the chat template's generation prompt ends in {prompt[-20:]!r}, so no reasoning can follow, but the "
                "reply has some; tokenize.template_variables may change that",
                OTHER_PROMPT,
            )
        if filled.strip() or reasoning:
            frame = frame[block.end() :] if block else frame
            closing = block[1] if block else _closing(opened[0] if opened else "")
            if opened:
                frame = reasoning + closing + frame
            elif reasoning:
                frame = f"<think>\n{reasoning}{closing}{frame}"
        return frame.replace(marker, answer, 1)

    # A template's own {% generation %} blocks

    def _check_blocks(self, messages: list[Message], tools: Tools | None, start: int, end: int) -> None:
        """Raise UnusableRow if the blocks leave out the last reply, `start` to `end` of the text, or some of it.

        All that the model must write is learnt, wherever in it a block begins or ends: some leave out the end of turn.
        """
        text, blocks = self.template.render_blocks(messages, tools)
        inside = [
            block for block in joined(blocks) if start < block[1] and block[0] < end and text[slice(*block)].strip()
        ]
        if not inside:
            raise UnusableRow("the chat template's generation blocks leave out a reply")
        if any(text[one[1] : other[0]].strip() for one, other in itertools.pairwise(inside)):
            raise UnusableRow("the chat template's generation blocks leave out some of a reply")


def missing(message: Message, reply: str) -> str:
    """What of a message the text of its reply lacks, as the end of a sentence; empty if nothing."""
    content = message["content"].strip()
    if message.get("reasoning_content", "").strip() not in _without_last(content, reply):
        return DROPPED_REASONING
    if content not in reply:
        inner, answer = reasoning_and_answer(message)
        if message.get("tool_calls") and not inner:
            return "leaves out the text beside a tool call"
        if not inner or answer not in reply:
            return "rewrites a reply's text"
        if inner not in reply or answer not in reply[reply.index(inner) + len(inner) :]:
            return DROPPED_REASONING
    calls = message.get("tool_calls", [])
    names = [call["function"]["name"] for call in calls]
    if any(reply.count(name) < names.count(name) for name in names):
        return "leaves out a tool call"
    if not all(is_written(text, reply) for call in calls for text in strings(call["function"]["arguments"])):
        return "rewrites the arguments of a tool call"
    return ""


def _without_last(content: str, text: str) -> str:
    """A text without the last place where it has a content: what else is looked for may stand in that as well."""
    before, _, behind = text.rpartition(content) if content else (text, "", "")
    return before + behind


def _kind(message: Message) -> tuple[object, ...]:
    """What of a message decides how a turn ends: not its texts."""
    calls = len(message.get("tool_calls", []))
    return message["role"], calls, bool(message.get("reasoning_content")), bool(message["content"].strip())


def _result(call: ToolCall) -> Message:
    result: Message = {"role": "tool", "content": MARKERS[1], "name": call["function"]["name"]}
    if "id" in call:
        result["tool_call_id"] = call["id"]
    return result


def _first_run(tokens: list[Span]) -> Span:
    """The last token of those that stand next to one another, from the first on."""
    last = tokens[0]
    for token in tokens[1:]:
        if token[0] != last[1]:
            break
        last = token
    return last


def _closing(opening: str) -> str:
    """What ends a block of reasoning, to the answer: of <think>, </think> between line feeds."""
    mark = opening.strip() or "<think>"
    if mark.startswith("<|channel"):
        return "\n<channel|>\n\n"
    if mark.startswith("<|"):
        return re.sub(r"start|begin", lambda word: "END" if word[0].isupper() else "end", mark, flags=re.IGNORECASE)
    return f"\n{mark[:1]}/{mark[1:]}\n\n"
