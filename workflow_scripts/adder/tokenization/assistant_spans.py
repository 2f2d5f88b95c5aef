"""Where in a rendered conversation each reply stands, found from the chat template itself."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerFast

from adder.formatting.conversation import Message
from adder.tokenization.chat_template import ChatTemplate, Span, UnusableRow
from adder.tokenization.control_tokens import ControlTokens
from adder.tokenization.message_texts import strings
from adder.tokenization.prompt_contents import PromptContents
from adder.tokenization.reply_targets import NO_PROMPT, ReplyTargets
from adder.tokenization.stage import LossOn

Tools = list[dict[str, Any]]


@dataclass(frozen=True)
class Rendered:
    """A text and the character spans of replies in it, in order."""

    text: str
    spans: list[Span]  # replies to train on
    masked: list[Span]  # replies marked train: false, where everything else carries loss
    whole: bool = True  # whether it is the conversation itself, and not a beginning of it for an earlier reply
    composed: bool = False  # whether the template alone would have written it otherwise
    unlearnt: list[Span] = field(default_factory=list[Span])  # parts of replies that carry no loss
    messages: int = 0  # how many of the conversation's it is made of
    turns: tuple[int, ...] = ()  # the messages that `spans` are of


class AssistantSpanFinder:
    """Finds the replies of a conversation, each behind the very prompt that generation would give.

    A reply's span covers all that the model has to write by itself, from the end of the generation prompt through the
    end-of-turn token: its reasoning and tool calls as the template writes them, and whatever else the template puts
    there, such as an empty "<think></think>".

    Most templates write earlier turns as they were: all replies then stand in one text. Others rewrite what is past:
    they drop the reasoning of earlier replies (Qwen3), or move the system prompt (Mistral). An earlier reply that
    doesn't stand in the conversation as the model would have to write it gets a text of its own: the conversation up to
    it.

    `loss_on` as in the settings: "assistant", "last" or "all". `eos_ids`: what generation stops on, if it is known.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, loss_on: LossOn = "assistant", eos_ids: Collection[int] = ()
    ) -> None:
        self.template = ChatTemplate(tokenizer)
        self.loss_on = loss_on
        self.control = ControlTokens(tokenizer)
        self.targets = ReplyTargets(self.template, self.control, eos_ids)
        self.contents = PromptContents(self.template)
        self.unprompted = 0  # replies that begin a conversation, which carry no loss

    def find(self, messages: list[Message], tools: Tools | None = None) -> list[Rendered]:
        """Render a conversation and find the replies to train on: the conversation first, then what stands alone.

        Raises UnusableRow, with a reason that a person can act on, for a conversation that the template refuses or of
        which it leaves something out, that has no reply to train on, that holds text which would be read as a control
        token, or whose replies can't be found for sure.
        """
        self.refuse_control_tokens(messages, tools)
        wanted, masked = self.choose_turns(messages)
        text = self.template.render(messages, tools=tools)
        if wanted[0] == 0:  # a conversation's first message answers no prompt: it is context
            wanted = wanted[1:]
            self.unprompted += 1
        if not wanted:
            raise UnusableRow(NO_PROMPT)
        targets = {turn: self.targets.target(messages[: turn + 1], tools) for turn in wanted}
        found: list[Rendered] = []
        left, size = wanted, len(messages)
        while left:
            last = targets[left[-1]]
            if found or not last.is_in(text):
                text, size = last.text, left[-1] + 1
            here = [turn for turn in left if targets[turn].is_in(text)]
            self.contents.check(messages[: here[-1]], tools, targets[here[-1]].prompt)
            composed = any(targets[turn].composed for turn in here)
            spans = {turn: targets[turn].span for turn in here}
            unlearnt = [part for turn in here for part in _unlearnt(messages[turn], text, spans[turn])]
            found.append(Rendered(text, list(spans.values()), [], not found, composed, unlearnt, size, tuple(here)))
            left = [turn for turn in left if turn not in here]
        if self.loss_on == "all":
            elsewhere = [turn for turn in wanted if not targets[turn].is_in(found[0].text)]
            found[0] = self._mask(messages, masked, elsewhere, found[0])
        return found

    def _mask(self, messages: list[Message], masked: list[int], elsewhere: list[int], whole: Rendered) -> Rendered:
        """The conversation of which all carries loss but these replies, and parts of those that stand elsewhere."""
        away = [self._locate(messages[turn], whole.text) for turn in masked]
        parts = [
            part
            for turn in elsewhere
            if messages[turn].get("unlearnt")
            for part in _unlearnt(messages[turn], whole.text, self._locate(messages[turn], whole.text))
        ]
        return replace(whole, masked=away, unlearnt=[*whole.unlearnt, *parts])

    def _locate(self, message: Message, text: str) -> Span:
        """Where a reply's content stands in a text, through the control token behind it."""
        content = message["content"].strip()
        start = text.find(content)
        if not content or start < 0 or content in text[start + 1 :]:
            raise UnusableRow("can't tell where the chat template writes a reply that isn't to be learnt")
        end = start + len(content)
        token = self.control.pattern.search(text, end)
        return start, token.end() if token and not text[end : token.start()].strip() else end

    def choose_turns(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
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

    def refuse_control_tokens(self, messages: list[Message], tools: Tools | None) -> None:
        """Raise UnusableRow where a text of a conversation holds a control token."""
        # A typed "<|im_end|>" would end the turn. Generation reads it that way as well, so there is no right encoding.
        for number, message in enumerate(messages, 1):
            self.control.refuse_in(message["content"], f"message {number} ({message['role']})")
            for key in ("reasoning_content", "tool_calls", "name"):
                for text in strings(message.get(key)):
                    self.control.refuse_in(text, f"message {number} ({message['role']})")
        for text in strings(tools or []):
            self.control.refuse_in(text, "the list of tools")


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
