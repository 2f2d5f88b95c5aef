"""Where in a rendered conversation each reply stands, found from the chat template itself."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from adder.formatting.conversation import Message, ToolCall
from adder.tokenization.chat_template import ChatTemplate, Span, UnusableRow, special_tokens
from adder.tokenization.stage import LossOn

Tools = list[dict[str, Any]]

NO_END = "the chat template writes no end-of-turn token after a reply: the model couldn't learn to stop"


@dataclass(frozen=True)
class Rendered:
    """A conversation's text and the character spans of its replies, in order."""

    text: str
    spans: list[Span]  # replies to train on
    masked: list[Span]  # replies marked train: false, where everything else carries loss
    unlearnt: list[Span] = field(default_factory=list[Span])  # parts of replies that carry no loss


class AssistantSpanFinder:
    """Finds the replies of a conversation in the text that the template makes of it.

    What a reply's span covers: everything from the end of the generation prompt, that is, all that the model has to
    write by itself, through the end-of-turn token: its reasoning and tool calls as the template writes them, and
    whatever else the template puts there, such as an empty "<think></think>". Of an earlier turn it covers what the
    template still writes of it: some drop its reasoning.

    `loss_on` as in the settings: "assistant", "last" or "all".
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, loss_on: LossOn = "assistant") -> None:
        self.template = ChatTemplate(tokenizer)
        self.loss_on = loss_on
        self.special_ids = special_tokens(tokenizer)
        self.tokens = tuple(sorted(self.special_ids, key=len, reverse=True))
        self.special = re.compile("|".join(map(re.escape, self.tokens)) or "(?!)")
        self._beginnings = {token[:2] for token in self.tokens}
        self.special_run = re.compile(rf"\s*((?:{self.special.pattern})+)")
        self._ending: list[str] | None = None  # the special tokens after a conversation's last reply
        self.turn_ends: dict[str, bool] = {}  # tokens behind tool calls, and whether they end the turn

    def find(self, messages: list[Message], tools: Tools | None = None) -> Rendered:
        """Render a conversation and find the replies to train on.

        Raises UnusableRow, with a reason that a person can act on, for a conversation that the template refuses or of
        which it leaves something out, that has no reply to train on, that holds text which would be read as a control
        token, or whose replies can't be found for sure.
        """
        self._refuse_control_tokens(messages, tools)
        wanted, masked = self.choose_turns(messages)
        turns = sorted(wanted + masked)
        if self.template.marks_generation:
            text, spans = self._marked_spans(messages, tools, turns)
        else:
            text = self.template.render(messages, tools=tools)
            found = _Conversation(self, messages, tools, text)
            spans = {turn: found.span(turn) for turn in turns}
        ordered = [spans[turn] for turn in turns]
        if any(before[1] > after[0] for before, after in itertools.pairwise(ordered)):
            raise UnusableRow("the chat template doesn't write the turns in their order")
        self._check_inputs(messages, tools, text)
        unlearnt = [part for turn in wanted for part in _unlearnt(messages[turn], text, spans[turn])]
        return Rendered(text, [spans[turn] for turn in wanted], [spans[turn] for turn in masked], unlearnt)

    def choose_turns(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Numbers of the messages to train on, and of those to leave out of a loss on all."""
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise UnusableRow("no assistant turn")
        if any(not messages[turn]["content"].strip() and not messages[turn].get("tool_calls") for turn in turns):
            raise UnusableRow("empty reply")
        if self.loss_on == "last":
            turns = turns[-1:]
        wanted = [turn for turn in turns if messages[turn].get("train", True)]
        if not wanted:
            which = "its last reply is" if self.loss_on == "last" else "all its replies are"
            raise UnusableRow(f"nothing to train on: {which} marked train: false")
        return wanted, [turn for turn in turns if turn not in wanted] if self.loss_on == "all" else []

    def _refuse_control_tokens(self, messages: list[Message], tools: Tools | None) -> None:
        # A typed "<|im_end|>" would end the turn. Generation reads it that way as well, so there is no right encoding.
        for number, message in enumerate(messages, 1):
            self._refuse_in(message["content"], f"message {number} ({message['role']})")
            for key in ("reasoning_content", "tool_calls", "name"):
                for text in _strings(message.get(key)):
                    self._refuse_in(text, f"message {number} ({message['role']})")
        for text in _strings(tools or []):
            self._refuse_in(text, "the list of tools")

    def _refuse_in(self, text: str, who: str) -> None:
        if any(beginning in text for beginning in self._beginnings):
            found = self.special.search(text)
            if found:
                raise UnusableRow(
                    f"{who} holds {found[0]}, which the tokenizer reads as a control token",
                    "a text holds what the tokenizer reads as a control token",
                )

    def _check_inputs(self, messages: list[Message], tools: Tools | None, text: str) -> None:
        """Raise UnusableRow if the template leaves out a message that isn't a reply, or the tools."""
        for number, message in enumerate(messages):
            content = message["content"].strip()
            if message["role"] == "assistant" or content in text:
                continue
            changed: Message = {**message, "content": "X" + content}
            other = [*messages[:number], changed, *messages[number + 1 :]]
            if self.template.render(other, tools=tools) == text:
                raise UnusableRow(
                    f"the chat template leaves out message {number + 1} ({message['role']})",
                    f"the chat template leaves out a {message['role']} message",
                )
        if tools and any(_name(tool) not in text for tool in tools):
            raise UnusableRow("the chat template has no place for the list of tools")

    def through_last_special(self, text: str) -> int:
        """Length of the text through its last special token, 0 without one."""
        return max((match.end() for match in self.special.finditer(text)), default=0)

    def turn_end(self, found: "_Conversation", turn: int, end: int) -> int:
        """Where the end-of-turn token(s) after the reply that ends at `end` stop.

        The next turn may begin with a control token right behind (Llama 3: "<|eot_id|><|start_header_id|>"). What
        belongs to this turn is what stands there as well when the conversation ends with the reply.
        """
        text = found.text
        run = self.special_run.match(text, end)
        if not run:
            raise UnusableRow(NO_END)
        if not text[run.end() :].strip():
            return run.end()
        if self._ending is None:
            after = found.through(turn).around(turn)[1]
            ending = self.special_run.match(after)
            self._ending = self.special.findall(ending[1]) if ending else []
        kept = run.start(1)
        for position, token in enumerate(self.special.findall(run[1])):
            if position > 0 and self._ending[position : position + 1] != [token]:
                break
            kept += len(token)
        return kept

    def _marked_spans(
        self, messages: list[Message], tools: Tools | None, turns: list[int]
    ) -> tuple[str, dict[int, Span]]:
        """Spans of a template's own {% generation %} blocks, without the generation prompt, through the end of turn."""
        text, blocks = self.template.render_blocks(messages, tools)
        found = _Conversation(self, messages, tools, text)
        replies = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        blocks = [(start, end) for start, end in _joined(blocks) if text[start:end].strip()]
        if len(blocks) != len(replies):
            reason = "leave out a reply" if len(blocks) < len(replies) else "aren't one for each reply"
            raise UnusableRow(f"the chat template's generation blocks {reason}")
        spans = {}
        for turn, (start, end) in zip(replies, blocks, strict=True):
            if turn not in turns:
                continue
            start += self._prompt_in_block(found, turn, start, end)
            end = start + len(text[start:end].rstrip())
            if not text.endswith(self.tokens, start, end) and self.special_run.match(text, end):
                end = self.turn_end(found, replies[-1], end)
            found.check(turn, text[start:end], "the chat template's generation blocks leave out")
            if not text.endswith(self.tokens, start, end):
                raise UnusableRow(NO_END)
            if messages[turn].get("tool_calls"):
                found.check_call_end(turn, text[start:end])
            spans[turn] = start, end
        return text, spans

    def _prompt_in_block(self, found: "_Conversation", turn: int, start: int, end: int) -> int:
        """Characters of the generation prompt at the start of a block.

        Qwen 2.5's training template in TRL opens the block before the newline that ends the prompt, DeepSeek's before
        the token that opens the turn.
        """
        prompt, text = found.prompt(turn), found.text
        if prompt is None:
            return 0
        if text.startswith(prompt):
            return len(prompt) - start if start < len(prompt) < end else 0
        if turn == len(found.messages) - 1:
            raise found.other_prompt(prompt, text)
        header = found.header(turn)
        return self.through_last_special(header[: _common_prefix(header, text[start:end])])


class _Conversation:
    """One rendered conversation, and what comparing it with renderings of variants of it tells."""

    def __init__(self, finder: AssistantSpanFinder, messages: list[Message], tools: Tools | None, text: str) -> None:
        self.finder, self.messages, self.tools, self.text = finder, messages, tools, text

    def through(self, turn: int) -> "_Conversation":
        """The conversation as it is when it ends with this turn."""
        return self if turn == len(self.messages) - 1 else self._variant(self.messages[: turn + 1])

    def _variant(self, messages: list[Message]) -> "_Conversation":
        return _Conversation(self.finder, messages, self.tools, self.finder.template.render(messages, tools=self.tools))

    def prompt(self, turn: int) -> str | None:
        """What the model is given when it has to write this turn."""
        try:
            return self.finder.template.render(self.messages[:turn], prompt=True, tools=self.tools)
        except UnusableRow:
            return None  # such as a template that needs a user turn first, given a conversation that the model opens

    def header(self, turn: int) -> str:
        """What the generation prompt adds to the conversation before it."""
        prompt = self.prompt(turn) or ""
        history = self.finder.template.render(self.messages[:turn], tools=self.tools)
        return prompt[len(history) :] if prompt.startswith(history) else ""

    def span(self, turn: int) -> Span:
        """Span of one reply, by the prompt that generation would see and by the reply's own text."""
        message, text = self.messages[turn], self.text
        content, prompt = message["content"], self.prompt(turn)
        own = prompt if prompt is not None and text.startswith(prompt) else None
        if own is None and turn == len(self.messages) - 1 and prompt is not None:
            self.around(turn)  # may know better why: text written twice, or not at all
            raise self.other_prompt(prompt, text)
        if own is not None and len(message) - ("train" in message) - ("unlearnt" in message) == 2:
            for reply in (content, content.strip()):
                end = len(own) + len(reply)
                if text.startswith(reply, len(own)) and self.finder.special_run.match(text, end):
                    return len(own), self.finder.turn_end(self, turn, end)
        before, after = self.around(turn)
        if not text.endswith(after):
            raise UnusableRow("the chat template writes other turns differently depending on a reply's text")
        start = self._start(turn, prompt, before) if own is None else len(own)
        end = len(text) - len(after)
        self.check(turn, text[start:end], "the chat template leaves out")
        if message.get("tool_calls"):
            end += self._call_end(turn, after)
            self.check_call_end(turn, text[start:end])
            return start, end
        return start, self.finder.turn_end(self, turn, end)

    def other_prompt(self, prompt: str, text: str) -> UnusableRow:
        """The reason to refuse a reply before which the text isn't the generation prompt."""
        start = self.finder.through_last_special(prompt[: _common_prefix(prompt, text)])
        reason = (
            f"the chat template's generation prompt goes on with {prompt[start : start + 40]!r}, where the finished "
            f"conversation has {text[start : start + 40]!r}: the model would be trained on another prompt than it is "
            "given"
        )
        if "<think>" in prompt[start:]:
            reason += ". Replies with reasoning may fit, or a template that doesn't open the reasoning in the prompt"
        return UnusableRow(reason, "the chat template's generation prompt isn't what stands before a finished reply")

    def around(self, turn: int) -> tuple[str, str]:
        """Text before and after a reply's content or tool calls, found by rendering others in their place."""
        message = self.messages[turn]
        marker = "REPLY0REPLY"
        while any(marker in text for text in _strings(self.messages)):
            marker = marker.replace("0", "00")
        other: Message = {**message, "content": marker}
        called = message.get("tool_calls")
        if called:
            calls = [_other_call(call, marker) for call in called]
            other = {**message, "tool_calls": calls, "content": marker if message["content"].strip() else ""}
        rendered = self._variant([*self.messages[:turn], other, *self.messages[turn + 1 :]]).text
        if called:
            if marker not in rendered:
                raise UnusableRow("the chat template leaves out a tool call")
            before = _common_prefix(self.text, rendered)
            return self.text[:before], self.text[before:][_uncommon(self.text[before:], rendered[before:]) :]
        pieces = rendered.split(marker)
        if len(pieces) != 2:
            raise UnusableRow(f"the chat template writes a reply {len(pieces) - 1} times")
        return pieces[0], pieces[1]

    def _start(self, turn: int, prompt: str | None, before: str) -> int:
        """Start of an earlier reply whose context the template has rewritten since, such as Mistral's system prompt.

        `before` ends where the reply's own text begins; between the prompt and that, the model writes what it writes
        when the conversation ends with this turn.
        """
        if not self.text.startswith(before):
            raise UnusableRow("can't tell where the chat template starts a reply")
        extra = None
        if prompt is not None:
            alone = self.through(turn).around(turn)[0]
            extra = alone[len(prompt) :] if alone.startswith(prompt) else None
            if extra is None and self.messages[turn].get("tool_calls"):
                raise self.other_prompt(prompt, alone)
        if extra is not None and before.endswith(extra):
            return len(before) - len(extra)
        if not self.messages[turn].get("tool_calls"):
            return len(before)  # what stood between was dropped: reasoning
        header = self.header(turn)
        header = header.removesuffix("\n").removesuffix("<think>") if "<think>" in header else header
        start = before.rfind(header) + len(header)
        if header and extra is not None and start >= len(header) and extra.endswith(before[start:]):
            return start
        raise UnusableRow("can't tell where the chat template starts a reply")

    def _call_end(self, turn: int, after: str) -> int:
        """Characters from the end of a turn's last tool call through its end-of-turn token.

        The call may be followed by control tokens that close it and don't end the turn. What ends the turn stands
        there both when the conversation goes on and when it doesn't.
        """
        shared = after
        if turn < len(self.messages) - 1:
            alone = self.through(turn).around(turn)[1]
            shared = after[: _common_prefix(after, alone)]
        else:
            call = self.messages[turn].get("tool_calls", [])[-1]
            result: Message = {"role": "tool", "content": "0", "name": call["function"]["name"]}
            if "id" in call:
                result["tool_call_id"] = call["id"]
            try:
                onward = self._variant([*self.messages, result]).around(turn)[1]
            except UnusableRow:
                onward = after
            shared = after[: _common_prefix(after, onward)]
            shared = shared if self.finder.special.search(shared) else after
        end = self.finder.through_last_special(shared)
        if not end:
            raise UnusableRow(NO_END)
        return end

    def check_call_end(self, turn: int, written: str) -> None:
        """Raise UnusableRow if what ends a turn with tool calls merely ends a call: one more call adds one more."""
        closer, ends = self.finder.special.findall(written)[-1], self.finder.turn_ends
        if closer not in ends:
            message = self.messages[turn]
            calls = message.get("tool_calls", [])
            repeated: Message = {**message, "tool_calls": [*calls, calls[-1]]}
            try:
                more = self._variant([*self.messages[:turn], repeated]).text
            except UnusableRow:
                more = ""  # a template that allows one call only
            ends[closer] = more.count(closer) <= self.through(turn).text.count(closer)
        if not ends[closer]:
            raise UnusableRow(NO_END)

    def check(self, turn: int, written: str, complaint: str) -> None:
        """Raise UnusableRow if the text of a reply lacks something of it.

        A template may trim an answer, and may drop the reasoning before it in an earlier turn.
        """
        message, last = self.messages[turn], turn == len(self.messages) - 1
        answer = message["content"].split("</think>")[-1].strip()
        if answer not in written:
            if message.get("tool_calls"):
                raise UnusableRow(f"{complaint} the text beside a tool call")
            if "generation blocks" in complaint:
                raise UnusableRow(f"{complaint} a reply")
            raise UnusableRow("the chat template rewrites a reply's text")
        names = [call["function"]["name"] for call in message.get("tool_calls", [])]
        if any(written.count(name) < names.count(name) for name in names):
            raise UnusableRow(f"{complaint} a tool call")
        reasoning = message.get("reasoning_content", "").strip()
        if reasoning not in written and (last or reasoning not in self.through(turn).text):
            raise UnusableRow(f"{complaint} a reply's reasoning")


def _unlearnt(message: Message, text: str, span: Span) -> list[Span]:
    """Where in the text the parts of a reply stand that carry no loss; with its last part its end of turn is one."""
    parts = message.get("unlearnt")
    if not parts:
        return []
    content = message["content"].strip()
    start = text.find(content, *span)
    if start < 0 or text.find(content, start + 1, span[1]) >= 0:
        raise UnusableRow("can't tell where the chat template writes the parts of a reply that aren't to be learnt")
    offset = start - message["content"].index(content)
    found = [(begin + offset, end + offset) for begin, end in parts]
    if found[-1][1] == start + len(content) and not message.get("tool_calls"):
        found[-1] = found[-1][0], span[1]
    return found


def _other_call(call: ToolCall, marker: str) -> ToolCall:
    """The call with other arguments, to see where they are written."""
    # The name stays: some templates write it beside the call's result as well.
    return {**call, "function": {**call["function"], "arguments": {marker: marker}}}


def _name(tool: dict[str, Any]) -> str:
    return str(tool.get("function", tool).get("name", ""))


def _strings(value: Any) -> Iterator[str]:
    """Every text within a value made of dictionaries and lists, their keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _common_prefix(one: str, other: str) -> int:
    """Length of the longest common beginning, by bisection: conversations are long."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _uncommon(one: str, other: str) -> int:
    """Length of `one` without the longest common ending."""
    return len(one) - _common_prefix(one[::-1], other[::-1])


def _joined(blocks: list[Span]) -> list[Span]:
    """Blocks with those that touch made one: a template may mark a reply and its end-of-turn token separately."""
    joined: list[Span] = []
    for start, end in blocks:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined
