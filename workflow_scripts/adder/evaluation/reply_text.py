"""A reply's token ids as text, and the answer in it, without reasoning: alike for the model's replies and references.

Families write reasoning in their own ways: <think>...</think>, [THINK], channels whose marks are control tokens. How,
is learnt from the chat template, by a reply of our own.
"""

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from adder.formatting.conversation import Message
from adder.tokenization.assistant_spans import AssistantSpanFinder
from adder.tokenization.chat_template import UnusableRow
from adder.tokenization.control_tokens import ControlTokens

USER, ANSWER, REASONING = "PROBE1", "PROBE2", "PROBE3"


@dataclass(frozen=True)
class ReasoningMarks:
    """What a reply has before its reasoning and between that and its answer; and before an answer without any."""

    opening: str
    closing: str
    no_reasoning: str


THINK = ReasoningMarks("<think>", "</think>", "")


class ReplyReader:
    """Reads the replies of one model: by its tokenizer and the chat template in it, if there is one."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.control = ControlTokens(tokenizer)
        own = _learn_marks(AssistantSpanFinder(tokenizer)) if tokenizer.chat_template else None
        self.marks = own or THINK

    def text(self, ids: Iterable[int], stop_ids: Collection[int] = ()) -> str:
        """All that a reply says, up to the first of `stop_ids`: its reasoning too, and control tokens within it."""
        kept = list(itertools.takewhile(lambda index: index not in stop_ids, ids))
        return str(self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def answer(self, text: str) -> str:
        """What is compared of a reply (see `text`): what stands behind its reasoning, without control tokens."""
        marks = self._found_in(text)
        rest = text.partition(marks.closing)[2] if marks else text.strip().removeprefix(self.marks.no_reasoning)
        return self._without_control(rest).strip()

    def shown(self, text: str) -> str:
        """A reply as people read it: as it is, but with <think>...</think> for marks that are control tokens."""
        marks = self._found_in(text) or self.marks
        if not self.control.spans(marks.opening + marks.closing + marks.no_reasoning):
            return self._without_control(text)
        answer = self.answer(text)
        if marks.closing not in text:
            return answer
        reasoning = text.partition(marks.closing)[0].strip().removeprefix(marks.opening)
        return f"<think>\n{self._without_control(reasoning).strip()}\n</think>\n\n{answer}"

    def _found_in(self, text: str) -> ReasoningMarks | None:
        """The marks around a reply's reasoning: the template's, or the usual ones."""
        for marks in (self.marks, THINK):
            if marks.closing in text and text.lstrip().startswith(marks.opening):
                return marks
        return None

    def _without_control(self, text: str) -> str:
        return self.control.pattern.sub("", text)


def _learn_marks(finder: AssistantSpanFinder) -> ReasoningMarks | None:
    """How the template writes reasoning; None where it has no way of its own."""
    user: Message = {"role": "user", "content": USER}
    plain: Message = {"role": "assistant", "content": ANSWER}
    thinking: Message = {"role": "assistant", "content": ANSWER, "reasoning_content": REASONING}
    before = ""
    for reply in (plain, thinking):
        try:
            (rendered,) = finder.find([user, reply])
        except UnusableRow:
            continue
        ((start, end),) = rendered.spans
        written = rendered.text[start:end]
        if reply is plain:
            before = written.partition(ANSWER)[0].strip()
            continue
        opening, _, rest = written.partition(REASONING)
        closing = rest.partition(ANSWER)[0].strip()
        if closing:
            return ReasoningMarks(opening.strip(), closing, before)
    return ReasoningMarks(THINK.opening, THINK.closing, before) if before else None
