"""A model's chat template: which one, and conversations to text in the form that it takes them."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any, cast

import jinja2
import jinja2.meta
from jinja2.runtime import Context
from transformers import PreTrainedTokenizerFast

# Private in transformers, but what apply_chat_template itself renders with: the public function can't be given a clock.
from transformers.utils.chat_template_utils import _compile_jinja_template

from adder.core.errors import UserError

# A message of formatting.conversation, or one in the form that a template takes.
Message = Mapping[str, Any]
Messages = Sequence[Message]
Tools = Sequence[Mapping[str, Any]]
Span = tuple[int, int]  # first character, and the one behind the last

# Templates that write today's date (Llama 3.x and others) get this one, the date that Llama's own template falls back
# to: a stage's output must not depend on the day it ran.
DATE = datetime(2024, 7, 26)

NAMED = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' "
        "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}"
        "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\n### Assistant:\n' }}{% endif %}"
    ),
}
# What every caller gives a template, or transformers does.
RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token"}
    | {"raise_exception", "strftime_now"}
)
CHATML_TOKENS = ("<|im_end|>", "<|im_start|>")

# Contents beside a call, where there is no text.
NO_CONTENT: tuple[object, ...] = ("", None, [{"type": "text", "text": ""}])
# Names under which templates look for a reply's reasoning: Qwen's, gpt-oss's, and one of Gemma 4's two.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class UnusableRow(Exception):
    """A conversation that the template can't render, or whose replies can't be found in what it renders.

    `kind` is the reason without what is particular to the row, for counting.
    """

    def __init__(self, reason: str, kind: str | None = None) -> None:
        super().__init__(reason)
        self.kind = kind or reason


def choose_template(tokenizer: PreTrainedTokenizerFast, chat_template: str | None) -> str:
    """Give `tokenizer` the template to use and return where it came from: "own", "file", or the name of one of NAMED.

    `chat_template` is a name of NAMED or a file. A model without a template of its own gets ChatML if its vocabulary
    has the two tokens of it, else the plain one: either way the embeddings stay as they are.
    Raises UserError for an unreadable file and for a vocabulary that can't express the template.
    """
    if chat_template is not None and chat_template not in NAMED:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"tokenize.chat_template: can't read {chat_template}: {error}") from None
        return "file"
    if chat_template is None and tokenizer.chat_template:
        named = cast("str | dict[str, str]", tokenizer.chat_template)
        if isinstance(named, dict) and "default" not in named:
            raise UserError(
                f"the model has several chat templates ({', '.join(sorted(named))}) and none is the default; set "
                "tokenize.chat_template to a Jinja file with the one to use"
            )
        return "own"
    missing = [token for token in CHATML_TOKENS if token not in tokenizer.added_tokens_encoder]
    name = chat_template or ("plain" if missing else "chatml")
    if name == "chatml" and missing:
        raise UserError(
            f"tokenize.chat_template: chatml needs the tokens {', '.join(missing)}, which this vocabulary lacks; "
            "take plain, or a Jinja file with a template that suits the model"
        )
    if name == "plain" and tokenizer.eos_token is None:
        raise UserError(
            "the model's tokenizer has no chat template and no end-of-text token to end a reply with; set "
            "tokenize.chat_template to a Jinja file with the template of this model"
        )
    writes_bos = tokenizer.bos_token not in {None, *CHATML_TOKENS} and adds_bos(tokenizer)
    tokenizer.chat_template = ("{{ bos_token }}" if writes_bos else "") + NAMED[name]
    return name


def set_variables(tokenizer: PreTrainedTokenizerFast, variables: Mapping[str, object]) -> None:
    """Make `variables` the defaults of the chat template, in the template itself.

    So whatever renders it sees the same ones: training, evaluation, lm-eval, and whoever serves the merged model. A
    caller's own value still counts. Raises UserError for a name that the template doesn't read.
    """
    if not variables:
        return
    named = cast("str | dict[str, str]", tokenizer.chat_template)
    sources = named if isinstance(named, dict) else {"default": named}
    known = set[str]().union(*map(_variables, sources.values()))
    for name in variables:
        if name not in known:
            raise UserError(
                f"tokenize.template_variables: the chat template reads no variable {name!r}; it reads "
                f"{', '.join(sorted(known)) or 'none'}"
            )
    defaults = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_jinja_literal(value)} %}}{{%- endif %}}"
        for name, value in sorted(variables.items())
    )
    # A newline right behind a block is left out, and spaces before a block that begins a line: not so behind `}}`.
    made = {name: defaults + "{{ '' }}" + re.sub(r"\A[ \t]+(?=\{[%#])", "", source) for name, source in sources.items()}
    tokenizer.chat_template = cast("str", made if isinstance(named, dict) else made["default"])


def _variables(source: str) -> set[str]:
    """Variables that a template reads and that a caller may set."""
    tree = _compiled(source).environment.parse(source)
    return jinja2.meta.find_undeclared_variables(tree) - RESERVED


def _jinja_literal(value: object) -> str:
    """A value of YAML as an expression of Jinja."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_jinja_literal(k)}: {_jinja_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_jinja_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _compiled(source: str) -> jinja2.Template:
    try:
        return _compile_jinja_template(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template isn't valid Jinja: line {error.lineno}: {error.message}") from None


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer puts its beginning-of-text token before a plain text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Text -> id of every token that the tokenizer treats as a control token wherever its text appears."""
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {text: index for text, index in {**added, **dict(named)}.items() if text}


class ChatTemplate:
    """Renders conversations as `tokenizer.apply_chat_template` does.

    A message is {"role", "content"} and maybe what else a Message of formatting.conversation has. Templates
    differ in the form in which they take some of that, so each form is tried once on a conversation of our own, and the
    first whose text comes out is used: contents as text or as a list of parts (vision models), a call's arguments as an
    object or as JSON text, no content beside a call as "" or None, a call's result as text or in a list, reasoning
    under one of REASONING_KEYS. Where a template knows none of these keys, reasoning is written before the answer as
    <think>...</think>.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, with_tools: bool = False) -> None:
        self.source = tokenizer.get_chat_template(tools=[] if with_tools else None)
        self._tool_use: ChatTemplate | None = None
        if not with_tools and isinstance(tokenizer.chat_template, dict) and "tool_use" in tokenizer.chat_template:
            self._tool_use = ChatTemplate(tokenizer, with_tools=True)
        self.compiled = _compiled(self.source)
        self.marks_generation = bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.source))
        variables = {**tokenizer.special_tokens_map, "strftime_now": DATE.strftime}
        # One context for all conversations: making one takes longer than rendering a short conversation.
        self._context = self.compiled.new_context({**variables, "documents": None})
        self._parts = False
        # Arguments as JSON text?, a call's content when there is none, a result as a list of what.
        self._call_form: tuple[bool, object, str] | None = None
        self._reasoning_keys: dict[bool, str] = {}  # beside a call or not: "" for none, written into the content
        self._parts = not self._writes([_user(), _reply("PROBE2")], "PROBE1", "PROBE2") and self._takes_parts()

    def of(self, tools: Tools | None) -> "ChatTemplate":
        """The template for conversations with these tools: of several named ones transformers then takes tool_use."""
        return self._tool_use if tools and self._tool_use is not None else self

    @property
    def takes_text(self) -> bool:
        """Whether contents are given as they are."""
        return not self._parts

    @property
    def folds_reasoning(self) -> bool:
        """Whether reasoning was met that the template has no key for."""
        own = "" in self._reasoning_keys.values()
        return own or (self._tool_use is not None and self._tool_use.folds_reasoning)

    def forget_reasoning(self) -> None:
        """Have `folds_reasoning` tell of what is met from here on."""
        self._reasoning_keys.clear()
        if self._tool_use is not None:
            self._tool_use.forget_reasoning()

    def render(self, messages: Messages, prompt: bool = False, tools: Tools | None = None) -> str:
        """Text of the conversation; with `prompt`, as the model sees it when the next reply is its own to write.

        Raises UnusableRow when the template refuses the conversation.
        """
        template = self.of(tools)
        with _refusals():
            return template.render_taken([template.taken(message) for message in messages], prompt, tools)

    def render_taken(self, messages: Messages, prompt: bool = False, tools: Tools | None = None) -> str:
        """The same for messages that are already in the form the template takes; raises whatever the template does."""
        return "".join(self.compiled.root_render_func(self._fresh_context(messages, prompt, tools)))

    def render_blocks(self, messages: Messages, tools: Tools | None = None) -> tuple[str, list[Span]]:
        """Text of the conversation and the character spans of the template's {% generation %} blocks."""
        if self.of(tools) is not self:
            return self.of(tools).render_blocks(messages, tools)
        parts: list[str] = []
        blocks: list[Span] = []
        taken = [self.taken(message) for message in messages]
        # Of the extension that transformers compiles templates with.
        tracker = self.compiled.environment.activate_tracker  # pyright: ignore[reportAttributeAccessIssue]
        with _refusals(), tracker(parts, blocks):
            context = self._fresh_context(taken, False, tools)
            for part in self.compiled.root_render_func(context):
                parts.append(part)  # noqa: PERF402 (the tracker counts what is there so far)
        return "".join(parts), blocks

    def _fresh_context(self, messages: Messages, prompt: bool, tools: Tools | None) -> Context:
        self._context.vars.clear()
        self._context.exported_vars.clear()
        self._context.parent.update(messages=messages, tools=tools or None, add_generation_prompt=prompt)
        return self._context

    def taken(self, message: Message) -> Message:
        """The message in the form that the template takes."""
        if len(message) == 2 and not self._parts:  # role and content
            return message
        taken = {key: value for key, value in message.items() if key not in ("train", "unlearnt", "reasoning_content")}
        reasoning = message.get("reasoning_content")
        if reasoning:
            beside_call = bool(message.get("tool_calls"))
            if beside_call not in self._reasoning_keys:
                self._find_reasoning_key(beside_call)
            key = self._reasoning_keys[beside_call]
            if key:
                taken[key] = reasoning
            else:
                parts = [f"<think>\n{reasoning}\n</think>", message["content"]]
                taken["content"] = "\n\n".join(part for part in parts if part)
        if message.get("tool_calls"):
            if self._call_form is None:
                self._call_form = self._find_call_form()
            as_text, empty, _ = self._call_form
            if as_text:
                taken["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
            if not taken["content"]:
                taken["content"] = empty
        result = ""
        if message["role"] == "tool":
            if self._call_form is None:
                self._call_form = self._find_call_form()
            result = self._call_form[2]
        if self._parts or result == "parts":
            taken["content"] = [{"type": "text", "text": taken["content"] or ""}]
        elif result == "texts":
            taken["content"] = [taken["content"]]
        return taken

    def _writes(self, messages: Messages, *texts: str) -> bool:
        """Whether the template renders a conversation with all of `texts` in it."""
        try:
            written = self.render(messages)
        except UnusableRow:
            return False
        return all(text in written for text in texts)

    def _takes_parts(self) -> bool:
        self._parts = True
        return self._writes([_user(), _reply("PROBE2")], "PROBE1", "PROBE2")

    def _find_call_form(self) -> tuple[bool, object, str]:
        result = {"role": "tool", "content": "PROBE4", "tool_call_id": "probe0001", "name": "PROBENAME"}
        for results, as_text, empty in product(("", "parts", "texts"), (False, True), NO_CONTENT):
            self._call_form = as_text, empty, results
            if self._writes([_user(), _call(), result, _reply("PROBE2")], "PROBENAME", "PROBEVALUE", "PROBE4"):
                return self._call_form
        for as_text, empty in product((False, True), NO_CONTENT):  # a template that doesn't know results
            self._call_form = as_text, empty, ""
            if self._writes([_user(), _call()], "PROBENAME", "PROBEVALUE"):
                return self._call_form
        return False, "", ""

    def _find_reasoning_key(self, beside_call: bool) -> None:
        reply = _call() if beside_call else _reply("PROBE2")
        for key in (*REASONING_KEYS, ""):
            self._reasoning_keys[beside_call] = key
            if self._writes([_user(), {**reply, "reasoning_content": "PROBE3"}], "PROBE3"):
                return
        self._reasoning_keys[beside_call] = REASONING_KEYS[0]


def _user() -> Message:
    return {"role": "user", "content": "PROBE1"}


def _reply(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _call() -> Message:
    function = {"name": "PROBENAME", "arguments": {"PROBEKEY": "PROBEVALUE"}}
    return {**_reply(""), "tool_calls": [{"type": "function", "id": "probe0001", "function": function}]}


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with its arguments as JSON text."""
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn whatever a template raises on a conversation into UnusableRow."""
    try:
        yield
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise UnusableRow(f"the chat template refuses this conversation: {error}") from None
