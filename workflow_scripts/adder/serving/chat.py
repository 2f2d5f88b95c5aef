"""A conversation with a run's models at the terminal: `adder chat`.

Prompts are rendered and replies read as the evaluation does it, so what is said here is what was measured: greedy, with
the template and the system prompt of the training.
"""

import json
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO, cast

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar

from adder.core import hardware, model_config, precision
from adder.core.display.text import printable
from adder.core.errors import UserError
from adder.evaluation.model_loading import context_length, eos_ids, load_model
from adder.evaluation.reply_text import ReplyReader
from adder.formatting.conversation import Message
from adder.serving.run_models import RunModels
from adder.tokenization.chat_template import ChatTemplate, UnusableRow

Which = Literal["tuned", "base", "both"]
HELP = """\
/system TEXT   another system prompt, and a new conversation; /system alone: none
/tools FILE    tools that the model may call: a JSON list in OpenAI's form, and a new conversation
/prompt        what the model is given, with every control token
/reset         a new conversation
/quit          the end (or Ctrl-D); Ctrl-C ends a reply"""


@dataclass(frozen=True)
class Settings:
    """How replies are written: temperature 0 is greedy; at most `max_new_tokens` tokens each."""

    temperature: float = 0.0
    max_new_tokens: int = 1024


@dataclass
class Speaker:
    """One model and its own side of the conversation: `messages` has what was said, its replies included."""

    name: str
    model: PreTrainedModel
    messages: list[Message] = field(default_factory=list)


class PrintedReply(BaseStreamer):
    """Prints a reply's text as its tokens come, in whole characters, and keeps their ids."""

    def __init__(self, reader: ReplyReader, stop_ids: Collection[int], out: TextIO) -> None:
        self.reader, self.stop_ids, self.out = reader, stop_ids, out
        self.ids: list[int] = []
        self._printed = 0
        self._prompt_came = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt's ids, int64 (1, n), first, then each new token's, int64 (1,)."""
        if not self._prompt_came:
            self._prompt_came = True
            return
        self.ids += value.tolist()
        self._print(self.text.rstrip("\ufffd"))  # bytes of a character that isn't whole yet

    def end(self) -> None:
        """Print what is left."""
        self._print(self.text)

    @property
    def text(self) -> str:
        """The reply so far, with the control tokens in it."""
        return self.reader.text(self.ids, self.stop_ids)

    def _print(self, text: str) -> None:
        self.out.write(printable(text[self._printed :]))
        self.out.flush()
        self._printed = max(self._printed, len(text))


class Chat:
    """A conversation with one model or two, who are asked the same."""

    def __init__(
        self,
        speakers: list[Speaker],
        tokenizer: PreTrainedTokenizerFast,
        stop_ids: Collection[int],
        system_prompt: str | None,
        settings: Settings,
        out: TextIO,
    ) -> None:
        self.speakers, self.tokenizer, self.stop_ids = speakers, tokenizer, frozenset(stop_ids)
        self.settings, self.out = settings, out
        self.reader = ReplyReader(tokenizer)
        self.template = ChatTemplate(tokenizer)
        self.system_prompt = system_prompt
        self.tools: list[Mapping[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation."""
        for speaker in self.speakers:
            speaker.messages = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []

    def take(self, line: str) -> bool:
        """Do what a line asks for: a command, or a message to reply to. Returns whether there may be another.

        Raises UserError for what can't be done; the conversation is as it was before then.
        """
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return False
        known: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._tell(HELP),
            "/reset": lambda _: self.reset(),
            "/system": self._set_system,
            "/tools": self._set_tools,
            "/prompt": lambda _: self._show_prompts(),
        }
        if command in known:
            known[command](rest.strip())
        elif command.startswith("/") and command[1:].isalpha():
            raise UserError(f"{command}: no such command; there are {', '.join(known)}, /quit")
        elif line.strip():
            self._ask(line)
        return True

    def _ask(self, line: str) -> None:
        for speaker in self.speakers:
            asked: list[Message] = [*speaker.messages, {"role": "user", "content": line}]
            ids = self._prompt_ids(asked)
            if len(self.speakers) > 1:
                self._tell(f"{speaker.name}:")
            reply = self._reply(speaker.model, ids)
            speaker.messages = [*asked, self._message(reply)]

    def _prompt_ids(self, messages: list[Message]) -> torch.Tensor:
        """int64 (1, n)."""
        text = self._prompt(messages)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        context = context_length(self.speakers[0].model)
        if len(ids) >= context:
            raise UserError(
                f"the conversation has {len(ids):,} tokens, and the model takes {context:,}; /reset begins anew"
            )
        return torch.tensor([ids])

    def _prompt(self, messages: list[Message]) -> str:
        try:
            return self.template.render(messages, prompt=True, tools=self.tools or None)
        except UnusableRow as reason:
            raise UserError(f"the model's chat template can't take that: {reason}") from None

    def _reply(self, model: PreTrainedModel, prompt: torch.Tensor) -> PrintedReply:
        room = min(self.settings.max_new_tokens, context_length(model) - prompt.shape[1])
        heat = self.settings.temperature
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": heat, "top_k": 0} if heat else {"do_sample": False}
        )
        config = GenerationConfig(
            eos_token_id=sorted(self.stop_ids),
            pad_token_id=self.tokenizer.pad_token_id,
            max_new_tokens=room,
            **sampling,
        )
        # The base's own generation_config (a repetition penalty, say) is left out, as in the evaluation.
        model.generation_config = GenerationConfig()
        printed = PrintedReply(self.reader, self.stop_ids, self.out)
        prompt = prompt.to(model.device)
        note = ""
        try:
            generate = cast(Callable[..., Any], model.generate)
            generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config, streamer=printed)
            if not self.stop_ids & {*printed.ids}:
                note = f" [cut at {room:,} tokens]"
        except KeyboardInterrupt:
            note = " [stopped]"
        self._tell(note)
        return printed

    def _message(self, reply: PrintedReply) -> Message:
        """A reply as the next prompts have it: without what the template writes anew, its reasoning apart."""
        text = reply.text
        answer = self.reader.answer(text)
        marks = self.reader.marks
        before = text.partition(marks.closing)[0].strip() if marks.closing in text else ""
        reasoning = before.removeprefix(marks.opening).strip()
        message: Message = {"role": "assistant", "content": answer}
        if reasoning:
            message["reasoning_content"] = reasoning
        return message

    def _set_system(self, text: str) -> None:
        self.system_prompt = text or None
        self.reset()

    def _set_tools(self, path: str) -> None:
        self.tools = read_tools(Path(path)) if path else []
        self.reset()

    def _show_prompts(self) -> None:
        for speaker in self.speakers:
            if len(self.speakers) > 1:
                self._tell(f"{speaker.name}:")
            self._tell(printable(self._prompt([*speaker.messages, {"role": "user", "content": "…"}])))

    def _tell(self, text: str) -> None:
        print(text, file=self.out, flush=True)


def read_tools(path: Path) -> list[Mapping[str, Any]]:
    """A list of tools in OpenAI's form. Raises UserError for a file that has none."""
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read as JSON: {error}") from None
    if not isinstance(tools, list) or not all(
        isinstance(tool, dict) and isinstance(tool.get("function"), dict) and tool["function"].get("name")
        for tool in tools
    ):
        raise UserError(f'{path}: has to be a list of {{"type": "function", "function": {{"name": …}}}}')
    return tools


def open_chat(models: RunModels, which: Which, settings: Settings, out: TextIO) -> Chat:
    """Load what is to be talked to. Raises UserError where the base isn't known, or no chat template is."""
    if which != "tuned" and models.base is None:
        raise UserError(
            f"{models.tuned}: what it was made from isn't known here; talk to the base by its own directory"
        )
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(models.tuned, local_files_only=True)
    if not tokenizer.chat_template:
        raise UserError(f"{models.tuned}: has no chat template, so it was not made for conversations")
    disable_progress_bar()
    device = hardware.device("auto")
    dtype = precision.compute_dtype(device).value
    folders = {"tuned": models.tuned, "base": models.base}
    names = ["base", "tuned"] if which == "both" else [which]
    speakers, stop_ids = [], {*model_config.eos_ids(models.tuned)}
    for name in names:
        print(f"Loading the {name} model on {device} in {dtype} …", file=sys.stderr, flush=True)
        model = load_model(cast(Path, folders[name]), dtype, device)
        stop_ids |= eos_ids(model, tokenizer)
        speakers.append(Speaker(name, model))
    return Chat(speakers, tokenizer, stop_ids, models.system_prompt, settings, out)


def talk(chat: Chat, ask: Callable[[], str], interactive: bool) -> None:
    """Take lines until there are none. What can't be done is said, and where nobody is there to mend it, raised."""
    while True:
        try:
            line = ask()
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=chat.out)
            return
        try:
            if not chat.take(line):
                return
        except UserError as error:
            if not interactive:
                raise
            print(error, file=sys.stderr, flush=True)
