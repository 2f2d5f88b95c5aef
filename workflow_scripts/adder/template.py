"""A model's chat template: conversations to text, and where in that text each reply stands."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from os.path import commonprefix
from pathlib import Path

import jinja2

# Private in transformers, but what apply_chat_template itself renders with: the public function can't be given a clock.
from transformers.utils.chat_template_utils import _compile_jinja_template, _render_with_assistant_indices

from adder.errors import UserError

Message = dict[str, str]
Span = tuple[int, int]

# Templates that write today's date (Llama 3.x and others) get this one, the date that Llama's own template falls back
# to: a stage's output must not depend on the day it ran.
DATE = datetime(2024, 7, 26)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

NO_END = "the chat template writes no end-of-turn token after a reply: the model couldn't learn to stop"


class UnusableRow(Exception):
    """A conversation that the template can't render, or whose replies can't be found in what it renders."""


def choose_template(tokenizer, chat_template: str | None) -> str:
    """Give `tokenizer` the template to use and return where it came from: "file", "own" or "chatml".

    A model without a template gets ChatML if its vocabulary has the two tokens that ChatML needs.
    Raises UserError for an unreadable file and for a model that neither has a template nor can express ChatML.
    """
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"tokenize.chat_template: can't read {chat_template}: {error}") from None
        return "file"
    if tokenizer.chat_template:
        tokenizer.chat_template = tokenizer.get_chat_template()  # of several named ones, the default
        return "own"
    needed = {"<|im_start|>", "<|im_end|>"}
    missing = sorted(needed - set(tokenizer.added_tokens_encoder))
    if missing:
        raise UserError(
            f"the model's tokenizer has no chat template, and none of the known ones fits it: ChatML needs the tokens "
            f"{', '.join(missing)}. Set tokenize.chat_template to a Jinja file with the template of this model"
        )
    writes_bos = tokenizer.bos_token not in {None, *needed} and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    tokenizer.chat_template = ("{{ bos_token }}" if writes_bos else "") + CHATML
    return "chatml"


def special_tokens(tokenizer) -> dict[str, int]:
    """Text -> id of every token that the tokenizer treats as a control token wherever its text appears."""
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {text: index for text, index in {**added, **dict(named)}.items() if text}


class ChatTemplate:
    """Renders conversations as `tokenizer.apply_chat_template` does, and finds the replies in the text.

    What a reply's span covers: everything from the end of the generation prompt, that is, all that the model has to
    write by itself, through the end-of-turn token. Most templates put only the reply's text there. Some put
    more, such as an empty "<think></think>", and then the model must learn to write that as well.
    """

    def __init__(self, tokenizer):
        try:
            self._compiled = _compile_jinja_template(tokenizer.get_chat_template())
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template isn't valid Jinja: line {error.lineno}: {error.message}") from None
        self.marks_generation = bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", tokenizer.get_chat_template()))
        self._variables = {**tokenizer.special_tokens_map, "strftime_now": DATE.strftime}
        self._tokens = tuple(sorted(special_tokens(tokenizer), key=len, reverse=True))
        self._first_characters = {token[0] for token in self._tokens}
        self._special = re.compile("|".join(map(re.escape, self._tokens)) or "(?!)")
        self._special_run = re.compile(rf"\s*((?:{self._special.pattern})+)")
        self._ending: list[str] | None = None  # the special tokens after a conversation's last reply

    def render(self, messages: list[Message], prompt: bool = False) -> str:
        """Text of the conversation; with `prompt`, as the model sees it when the next reply is its own to write.

        Raises UnusableRow when the template refuses the conversation.
        """
        with _refusals():
            return self._compiled.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **self._variables
            )

    def find_replies(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """Render a conversation; return its text and the character spans that carry loss, in order.

        Raises UnusableRow, with a reason that a person can act on, for a conversation that the template refuses, that
        has no reply, that holds text which would be read as a control token, or whose replies can't be found for sure.
        """
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise UnusableRow("no assistant turn")
        self._refuse_control_tokens(messages)
        for turn in turns:
            if not messages[turn]["content"].strip():
                raise UnusableRow("empty reply")
        if self.marks_generation:
            text, spans = self._marked_spans(messages, turns)
        else:
            text = self.render(messages)
            spans = [self._reply_span(messages, turn, text) for turn in turns]
        if any(before[1] > after[0] for before, after in zip(spans, spans[1:], strict=False)):
            raise UnusableRow("the chat template doesn't write the turns in their order")
        return text, spans

    def _refuse_control_tokens(self, messages: list[Message]) -> None:
        # A typed "<|im_end|>" would end the turn. Generation reads it that way as well, so there is no right encoding.
        for number, message in enumerate(messages, 1):
            content = message["content"]
            if any(character in content for character in self._first_characters):
                found = self._special.search(content)
                if found:
                    who = f"message {number} ({message['role']})"
                    raise UnusableRow(f"{who} holds {found[0]}, which the tokenizer reads as a control token")

    def _reply_span(self, messages: list[Message], turn: int, text: str) -> Span:
        """Span of one reply, by the prompt that generation would see and by the reply's own text."""
        content = messages[turn]["content"]
        prompt = self._prompt(messages, turn)
        if prompt is not None and text.startswith(prompt):
            for reply in (content, content.strip()):
                end = len(prompt) + len(reply)
                if text.startswith(reply, len(prompt)) and self._special_run.match(text, end):
                    return len(prompt), self._turn_end(messages, turn, text, end)
        before, after = self._around_reply(messages, turn)
        if not text.endswith(after):
            raise UnusableRow("the chat template writes other turns differently depending on a reply's text")
        end = len(text) - len(after)
        if prompt is not None and text.startswith(prompt):
            start = len(prompt)
        elif turn == len(messages) - 1 and prompt is not None:
            raise UnusableRow(_other_prompt(prompt, text))
        elif text.startswith(before):
            # An earlier turn whose context the template has rewritten since, such as Mistral's system prompt.
            start = len(before) - self._written_before(messages, turn, prompt, before)
        else:
            raise UnusableRow("can't tell where the chat template starts a reply")
        # A template may drop a reply's reasoning and trim its answer, but the answer must be there.
        if content.split("</think>")[-1].strip() not in text[start:end]:
            raise UnusableRow("the chat template rewrites a reply's text")
        return start, self._turn_end(messages, turn, text, end)

    def _prompt(self, messages: list[Message], turn: int) -> str | None:
        try:
            return self.render(messages[:turn], prompt=True)
        except UnusableRow:
            return None  # such as a template that needs a user turn first, given a conversation that the model opens

    def _around_reply(self, messages: list[Message], turn: int) -> tuple[str, str]:
        """Text before and after a reply, found by rendering the conversation with a marker in the reply's place."""
        marker = "REPLY0REPLY"
        while any(marker in message["content"] for message in messages):
            marker = marker.replace("0", "00")
        marked = [*messages[:turn], {**messages[turn], "content": marker}, *messages[turn + 1 :]]
        pieces = self.render(marked).split(marker)
        if len(pieces) != 2:
            raise UnusableRow(f"the chat template writes a reply {len(pieces) - 1} times")
        return pieces[0], pieces[1]

    def _written_before(self, messages: list[Message], turn: int, prompt: str | None, before: str) -> int:
        """Characters at the end of `before` that the model writes between its prompt and the reply's text."""
        if prompt is None:
            return 0
        alone = self._around_reply(messages[: turn + 1], turn)[0]
        extra = alone[len(prompt) :] if alone.startswith(prompt) else ""
        return len(extra) if before.endswith(extra) else 0

    def _turn_end(self, messages: list[Message], turn: int, text: str, end: int) -> int:
        """Where the end-of-turn token(s) after the reply that ends at `end` stop.

        The next turn may begin with a control token right behind (Llama 3: "<|eot_id|><|start_header_id|>"). What
        belongs to this turn is what stands there as well when the conversation ends with the reply.
        """
        run = self._special_run.match(text, end)
        if not run:
            raise UnusableRow(NO_END)
        if not text[run.end() :].strip():
            return run.end()
        if self._ending is None:
            after = self._around_reply(messages[: turn + 1], turn)[1]
            ending = self._special_run.match(after)
            self._ending = self._special.findall(ending[1]) if ending else []
        kept = run.start(1)
        for position, token in enumerate(self._special.findall(run[1])):
            if position > 0 and self._ending[position : position + 1] != [token]:
                break
            kept += len(token)
        return kept

    def _marked_spans(self, messages: list[Message], turns: list[int]) -> tuple[str, list[Span]]:
        """Spans of a template's own {% generation %} blocks, without the generation prompt, through the end of turn."""
        with _refusals():
            text, blocks = _render_with_assistant_indices(
                self._compiled, messages, None, None, False, **self._variables
            )
        prompts = [self._prompt(messages, turn) for turn in turns]
        if turns[-1] == len(messages) - 1 and prompts[-1] is not None and not text.startswith(prompts[-1]):
            raise UnusableRow(_other_prompt(prompts[-1], text))
        prompt_ends = [len(prompt) for prompt in prompts if prompt is not None and text.startswith(prompt)]
        spans = []
        for start, end in _joined(blocks):
            # Qwen 2.5's training template opens the block before the newline that ends the generation prompt.
            start = max([start, *(p for p in prompt_ends if start < p < end)])
            end = start + len(text[start:end].rstrip())
            if start >= end:
                continue
            if not text.endswith(self._tokens, start, end) and self._special_run.match(text, end):
                end = self._turn_end(messages, turns[-1], text, end)
            spans.append((start, end))
        self._check_marked(text, spans, [messages[turn]["content"] for turn in turns])
        return text, spans

    def _check_marked(self, text: str, spans: list[Span], replies: list[str]) -> None:
        marked = "".join(text[start:end] for start, end in spans)
        position = 0
        for reply in replies:
            answer = reply.split("</think>")[-1].strip()
            position = marked.find(answer, position)
            if position < 0:
                raise UnusableRow("the chat template's generation blocks leave out a reply")
            position += len(answer)
        if not text.endswith(self._tokens, *spans[-1]):
            raise UnusableRow(NO_END)


def _joined(blocks: list[Span]) -> list[Span]:
    """Blocks with those that touch made one: a template may mark a reply and its end-of-turn token separately."""
    joined: list[Span] = []
    for start, end in blocks:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


def _other_prompt(prompt: str, text: str) -> str:
    extra = prompt[len(commonprefix([prompt, text])) :]
    return (
        f"the chat template's generation prompt writes {extra!r}, which a finished reply lacks: the model would be "
        "trained on another prompt than it is given"
    )


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn whatever a template raises on a conversation into UnusableRow."""
    try:
        yield
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise UnusableRow(f"the chat template refuses this conversation: {error}") from None
