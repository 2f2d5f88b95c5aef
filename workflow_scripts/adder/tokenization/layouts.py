"""What conversations of one layout (the same roles in the same order) have in common, learnt from the first of them.

A layout's text is fixed pieces with contents between them. Where a conversation has tools or calls, it has gaps as
well: what a template makes of these is found in each conversation's own text, between the pieces.
"""

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from adder.formatting.conversation import Conversation, Message, ToolCall
from adder.tokenization.assistant_spans import AssistantSpanFinder, Rendered
from adder.tokenization.chat_template import Span, UnusableRow
from adder.tokenization.message_texts import common_prefix

Tokens = npt.NDArray[np.int32]
Tools = list[dict[str, Any]]
Key = tuple[str | None, ...]  # of each message, then the number of tools; None makes a conversation unfit
Trim = Callable[[str], str]

PAD = " \n"  # white space around a marker shows whether the template trims contents
JSON_PAD = " \\n"  # the same, written as JSON
VARYING = {"tool_calls", "tool_call_id", "name"}  # what else a message may have written


@dataclass(frozen=True)
class Reply:
    """Where a reply stands among the control tokens of the text."""

    opener: int  # number of the control token before it
    tail: Tokens  # int32, ids between that one and the reply: the end of the generation prompt
    closer: int  # number of the control token that ends it


@dataclass(frozen=True)
class Pieces:
    """A text of fixed pieces, at even places, and contents between them."""

    parts: list[str]
    order: list[int]  # which content (see texts_of) goes to which odd place

    def filled(self, contents: list[str]) -> str:
        """The text with these contents."""
        if not self.order:
            return self.parts[0]
        parts = self.parts.copy()
        parts[1::2] = [contents[number] for number in self.order]
        return "".join(parts)


@dataclass(frozen=True)
class Run:
    """The pieces between two gaps. A gap holds no control token; `lead` stands between it and the next one."""

    lead: Pieces
    token: str  # which `main` begins with; "" for the first run
    main: Pieces


@dataclass(frozen=True)
class Call:
    """A message with tool calls: the gaps that it stands in, the first and the last one."""

    message: int
    first: int
    last: int
    trained: bool


@dataclass(frozen=True)
class Mark:
    """A place in a text: at the end of these pieces of a run."""

    run: int
    pieces: Pieces

    def at(self, contents: list[str], gaps: list[Span]) -> int:
        """Where it is in a text with these contents and gaps."""
        return (gaps[self.run - 1][1] if self.run else 0) + len(self.pieces.filled(contents))


@dataclass(frozen=True)
class Composed:
    """A reply that the template itself doesn't write so behind its prompt (see reply_targets.Target)."""

    written: list[Run]  # what the template does write of the conversation
    trims: list[Trim]
    tail: list[Run]  # the reply and what stands behind it; its gaps hold what the last ones of `written` do
    fixed: str  # all that is fixed


@dataclass(frozen=True, eq=False)
class Layout:
    """What the conversations of one layout have in common."""

    runs: list[Run]
    trims: list[Trim] | None  # what the template does to each content
    size: int  # how many messages it is made of
    added: str  # what ends the text, and the template doesn't write there
    control_ids: Tokens  # int32, the control tokens of the text
    spans: list[tuple[Mark, Mark]]  # where the replies stand in the text
    turns: tuple[int, ...]  # the messages that they are
    replies: list[Reply]  # where they stand in the tokens; fewer if that can't be told without offsets
    trained: list[int]  # contents of the replies
    answers: list[int]  # contents of all replies without calls, those that aren't trained on included
    unwritten: list[int]  # contents that the template leaves out, as it does reasoning of what is past
    visible: list[int]  # contents that must begin visibly (see begins_visibly)
    visible_gaps: list[int]  # gaps that must
    calls: list[Call]
    head: Mark  # the control token before which the text may be cut
    composed: Composed | None  # where the runs aren't what the template writes


def begins_visibly(text: str) -> bool:
    """Whether a text's first character joins with no ASCII character before it and isn't white space or a mark."""
    return "!" <= text[:1] <= "~" or (text != "" and unicodedata.category(text[0])[0] in "LNPS")


def match(runs: list[Run], text: str, contents: list[str]) -> list[Span] | None:
    """The gaps of a text that is made of these runs and contents; None if it isn't."""
    first = runs[0].main.filled(contents)
    if len(runs) == 1:
        return [] if text == first else None
    if not text.startswith(first):
        return None
    position, gaps = len(first), list[Span]()
    for run in runs[1:]:
        lead, main = run.lead.filled(contents), run.main.filled(contents)
        token = text.find(run.token, position)
        end = token - len(lead)
        if end < position or not text.startswith(lead, end) or not text.startswith(main, token):
            return None
        gaps.append((position, end))
        position = token + len(main)
    return gaps if position == len(text) else None


def filled(runs: list[Run], contents: list[str], gaps: list[str]) -> str:
    """The text of runs with these contents, and as many of the gaps' texts, the last ones, as it has gaps."""
    parts = [runs[0].main.filled(contents)]
    for run, gap in zip(runs[1:], gaps[len(gaps) - len(runs) + 1 :], strict=True):
        parts += [gap, run.lead.filled(contents), run.main.filled(contents)]
    return "".join(parts)


def key_of(conversation: Conversation) -> Key:
    """What tells a conversation's layout."""
    messages = conversation.get("messages", [])
    names = [message["role"] if len(message) == 2 else _marked_role(message) for message in messages]
    return *names, f"{len(conversation.get('tools') or [])} tools"


def _marked_role(message: Message) -> str | None:
    """Role of a message that isn't trained on, or holds reasoning or calls; None for one with anything else."""
    name = message["role"]
    for key, value in message.items():
        if key == "train":
            name += "" if value else " untrained"
        elif key == "reasoning_content" and value:
            name += " thinking"
        elif key == "tool_calls" and value and name.startswith("assistant"):
            name += f" {len(cast('list[ToolCall]', value))} calls{' and text' if message['content'].strip() else ''}"
        elif key in ("tool_call_id", "name") and name.startswith("tool"):
            name += f" {key}"
        elif key not in ("role", "content"):
            return None
    return name


def texts_of(messages: list[Message]) -> list[str]:
    """The contents that stand between pieces: of each message its reasoning, if it has some, and its text."""
    texts: list[str] = []
    for message in messages:
        if len(message) > 2:
            if "tool_calls" in message:
                continue
            if "reasoning_content" in message:
                texts.append(message["reasoning_content"])
        texts.append(message["content"])
    return texts


def _places(messages: list[Message]) -> list[list[int]]:
    """Numbers of each message's contents among texts_of."""
    places, done = list[list[int]](), 0
    for message in messages:
        size = len(texts_of([message]))
        places.append(list(range(done, done + size)))
        done += size
    return places


@dataclass(frozen=True)
class _Form:
    """A text made of markers: its runs, what was done to each content, and what stands in its gaps."""

    runs: list[Run]
    trims: list[Trim]
    gaps: list[str]


@dataclass(frozen=True)
class _Hole:
    """A place in a text where conversations of its layout differ: a content, or a gap."""

    start: int
    content: int | None  # of texts_of
    gap: int | None


class LayoutLearner:
    """Makes layouts of conversations whose replies the slow path has found."""

    def __init__(self, finder: AssistantSpanFinder, tokenizer: PreTrainedTokenizerFast) -> None:
        self.finder = finder
        self.control = finder.control
        self.backend = tokenizer.backend_tokenizer
        self.added = tokenizer.added_tokens_decoder
        self.unknown = tokenizer.unk_token_id
        self.twice = 2 * str(tokenizer.bos_token or "\0")

    def learn(self, messages: list[Message], tools: Tools | None, rendered: Rendered) -> Layout | None:
        """The layout of messages and of the text that was made of them; None if it has none that is simple."""
        if rendered.masked or (rendered.composed and rendered.turns[-1] < len(messages) - 1):
            return None
        places, text = _places(messages), rendered.text
        try:
            form, composed = self._form(messages, tools, places, rendered.composed)
            written = text if composed else self.finder.template.render(messages, tools=tools)
            calls = [_call(number, form, rendered.turns) for number in _calling(messages)]
        except (UnusableRow, _NotSimpleError):
            return None
        runs, trims = form.runs, form.trims
        contents = [trim(one) for trim, one in zip(trims, texts_of(messages), strict=True)]
        gaps = match(runs, written, contents)
        if gaps is None or not text.startswith(written):
            return None
        controls = [(*span, self.control.ids[text[slice(*span)]]) for span in self.control.spans(text)]
        if text.startswith(self.twice):
            return None  # which the slow path refuses
        holes = _holes(runs, contents, gaps)
        found = [self._place(text, span, holes, controls) for span in rendered.spans]
        placed = [one for one in found if one is not None]
        trained = [place for turn in rendered.turns for place in places[turn]]
        order = {number for run in runs for part in (run.lead, run.main) for number in part.order}
        spans = [
            (_mark(runs, contents, gaps, start), _mark(runs, contents, gaps, end, text))
            for start, end in rendered.spans
        ]
        marked = [(start, end) for start, end in spans if start is not None and end is not None]
        if len(marked) < len(spans) or not {*trained} <= order:
            return None
        of_replies = [own for message, own in zip(messages, places, strict=True) if message["role"] == "assistant"]
        edges = [hole for _, hole in placed if hole is not None]
        return Layout(
            runs=runs,
            trims=None if all(trim is str for trim in trims) else trims,
            size=len(messages),
            added=text[len(written) :],
            control_ids=np.array([index for _, _, index in controls], dtype=np.int32),
            spans=marked,
            turns=rendered.turns,
            replies=[reply for reply, _ in placed],
            trained=trained,
            answers=[place for own in of_replies for place in own],
            unwritten=sorted({*range(len(contents))} - order),
            visible=[hole.content for hole in edges if hole.content is not None],
            visible_gaps=[hole.gap for hole in edges if hole.gap is not None],
            calls=calls,
            head=self._head(messages, places, runs),
            composed=composed,
        )

    def _form(
        self, messages: list[Message], tools: Tools | None, places: list[list[int]], composed: bool
    ) -> tuple["_Form", Composed | None]:
        """What is fixed in a conversation's text, and what the template does to each content.

        Everything else, such as calls and tools, is put there in two ways: where the two texts differ there is a gap.
        """
        markers = [f"CONTENT{number}CONTENT" for number in range(sum(map(len, places)))]
        varies = bool(tools) or any(len(message) > 2 and {*message} & VARYING for message in messages)
        ways = [
            (_marked(messages, places, markers, way), _marked_tools(len(tools), way) if tools else None)
            for way in (("a", "b") if varies else ("a", "a"))
        ]
        dropped = {own[0] for own in places if len(own) > 1}  # reasoning of what is past may be
        texts = [self.finder.template.render(one, tools=given) for one, given in ways]
        written = self._of_two(texts, markers, dropped)
        if not composed:
            return written, None
        targets = [self.finder.targets.target(one, given) for one, given in ways]
        form = self._of_two([target.text for target in targets], markers, set())
        one, other = (target.reply + target.rest for target in targets)
        numbers = {marker: number for number, marker in enumerate(markers) if marker in one}
        tail = self._runs(self._compare(one, other)[0], numbers, [*form.trims])
        runs = [part for run in (*written.runs, *form.runs) for part in (run.lead, run.main)]
        fixed = "\0".join(part for pieces in runs for part in pieces.parts[::2])
        return form, Composed(written.runs, written.trims, tail, fixed)

    def _of_two(self, texts: list[str], markers: list[str], dropped: set[int]) -> "_Form":
        """The form of two texts."""
        runs, gaps = self._compare(*texts)
        written = "".join(part for run in runs for part in run)
        counts = [written.count(marker) for marker in markers]
        if any(count > 1 or (count == 0 and number not in dropped) for number, count in enumerate(counts)):
            raise _NotSimpleError
        numbers = {marker: number for number, (marker, count) in enumerate(zip(markers, counts, strict=True)) if count}
        trims: list[Trim] = [str] * len(markers)
        return _Form(self._runs(runs, numbers, trims), trims, [texts[0][slice(*gap)] for gap in gaps])

    def _runs(self, texts: list[tuple[str, str, str]], numbers: dict[str, int], trims: list[Trim]) -> list[Run]:
        """Runs of texts with markers; `trims` gets what was done to the white space around them."""
        return [Run(_pieces(lead, numbers, trims), token, _pieces(main, numbers, trims)) for lead, token, main in texts]

    def _compare(self, one: str, other: str) -> tuple[list[tuple[str, str, str]], list[Span]]:
        """The runs (text before the control token, the token, all from it on) of two texts, and the gaps in `one`."""
        spans, others = ([(0, 0), *self.control.spans(text), (len(text),) * 2] for text in (one, other))
        if [one[slice(*span)] for span in spans] != [other[slice(*span)] for span in others]:
            raise _NotSimpleError
        runs, gaps = [["", "", ""]], list[Span]()
        for number in range(len(spans) - 1):
            runs[-1][2] += one[slice(*spans[number])]
            start, end = spans[number][1], spans[number + 1][0]
            mine, theirs = one[start:end], other[others[number][1] : others[number + 1][0]]
            if mine == theirs:
                runs[-1][2] += mine
                continue
            before = common_prefix(mine, theirs)
            behind = common_prefix(mine[before:][::-1], theirs[before:][::-1])
            token = one[slice(*spans[number + 1])]
            if not token:
                raise _NotSimpleError  # nothing shows where the text ends
            runs[-1][2] += mine[:before]
            runs.append([mine[len(mine) - behind :], token, ""])
            gaps.append((start + before, end - behind))
        return [(lead, token, main) for lead, token, main in runs], gaps

    def _head(self, messages: list[Message], places: list[list[int]], runs: list[Run]) -> Mark:
        """Where the text may be cut: before the control token that comes before anything but system prompts and tools.

        A text is encoded the same whatever stands before its control token.
        """
        first = next((own[0] for one, own in zip(messages, places, strict=True) if own and one["role"] != "system"), -1)
        for number, run in enumerate(runs):
            pieces = _joined(run.lead, run.main)
            if first in pieces.order:
                place = 2 * pieces.order.index(first)
                tokens = self.control.spans(pieces.parts[place])
                if tokens:
                    last = pieces.parts[place][: tokens[-1][0]]
                    return Mark(number, Pieces([*pieces.parts[:place], last], pieces.order[: place // 2]))
        return Mark(0, Pieces([""], []))

    def _place(
        self, text: str, span: Span, holes: list[_Hole], controls: list[tuple[int, int, int]]
    ) -> tuple[Reply, _Hole | None] | None:
        """A reply's place among the control tokens, and what must begin visibly, if anything."""
        start, end = span
        opener = sum(control[1] <= start for control in controls) - 1
        closer = sum(control[1] <= end for control in controls) - 1
        if opener < 0 or closer <= opener or controls[closer][1] != end:
            return None
        opens, opened, index = controls[opener]
        if any(opened <= hole.start < start for hole in holes) or not text[opened:start].isascii():
            return None  # its tokens would have to be known
        ids = self.backend.encode(text[opens:start], add_special_tokens=False).ids
        if ids[:1] != [index] or self.unknown in ids:
            return None
        reply = Reply(opener, np.array(ids[1:], dtype=np.int32), closer)
        # The first character must neither join with the prompt's last ones nor be swallowed by the token before.
        token = self.added.get(index)
        if opened == start and token is not None and not token.rstrip:
            return reply, None
        hole = next((hole for hole in holes if hole.start == start), None)
        if hole is None:  # the same in all conversations; FastPath.locate looks at the tokens before it
            return (reply, None) if len(reply.tail) or begins_visibly(text[start]) else None
        return reply, hole


class _NotSimpleError(Exception):
    """A conversation's text isn't fixed pieces with contents between them."""


def _holes(runs: list[Run], contents: list[str], gaps: list[Span]) -> list[_Hole]:
    """Where contents and gaps stand, in order."""
    holes, position = list[_Hole](), 0
    for number, run in enumerate(runs):
        if number:
            holes.append(_Hole(gaps[number - 1][0], None, number - 1))
            position = gaps[number - 1][1]
        for pieces in (run.lead, run.main):
            for place, part in enumerate(pieces.parts):
                if place % 2:
                    content = pieces.order[place // 2]
                    holes.append(_Hole(position, content, None))
                    position += len(contents[content])
                else:
                    position += len(part)
    return holes


def _mark(runs: list[Run], contents: list[str], gaps: list[Span], at: int, text: str = "") -> Mark | None:
    """A place in a text of these runs, right behind something fixed; None if it isn't.

    text: the whole of it, where more stands behind the last run.
    """
    for number, run in enumerate(runs):
        position = gaps[number - 1][1] if number else 0
        pieces = _joined(run.lead, run.main)
        for place, part in enumerate(pieces.parts):
            end = position + len(part if place % 2 == 0 else contents[pieces.order[place // 2]])
            if text and number == len(runs) - 1 and place == len(pieces.parts) - 1:
                part, end = text[position:], len(text)
            if place % 2 == 0 and position < at <= end:
                return Mark(number, Pieces([*pieces.parts[:place], part[: at - position]], pieces.order[: place // 2]))
            position = end
    return None


def _joined(one: Pieces, other: Pieces) -> Pieces:
    return Pieces([*one.parts[:-1], one.parts[-1] + other.parts[0], *other.parts[1:]], [*one.order, *other.order])


def _pieces(text: str, numbers: dict[str, int], trims: list[Trim]) -> Pieces:
    """A text with markers as pieces; `trims` gets what was done to the white space around them."""
    found = sorted((text.index(marker), marker) for marker in numbers if marker in text)
    parts: list[str] = []
    for _, marker in found:
        piece, text = text.split(marker)
        left, right = piece.endswith(PAD), text.startswith(PAD[::-1])
        if piece.endswith(JSON_PAD) and text.startswith("\\n "):
            trims[numbers[marker]] = _as_json
            piece, text = piece.removesuffix(JSON_PAD), text.removeprefix("\\n ")
        else:
            ways = {(1, 1): str, (0, 0): str.strip, (0, 1): str.lstrip, (1, 0): str.rstrip}
            trims[numbers[marker]] = ways[left, right]
            piece, text = piece.removesuffix(PAD) if left else piece, text.removeprefix(PAD[::-1]) if right else text
        parts += [piece, ""]
    return Pieces([*parts, text], [numbers[marker] for _, marker in found])


def _as_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


# Conversations with everything in a way of ours


def _marked(messages: list[Message], places: list[list[int]], markers: list[str], way: str) -> list[Message]:
    """The messages with markers for their contents, and all else in one way or another."""
    calls = dict[str, ToolCall]()  # by id
    marked = list[Message]()
    for number, (message, own) in enumerate(zip(messages, places, strict=True)):
        changed: Message = {**message}
        if "tool_calls" in message:
            made = [_marked_call(call, f"{number}x{place}", way) for place, call in enumerate(message["tool_calls"])]
            calls |= {call.get("id", ""): other for call, other in zip(message["tool_calls"], made, strict=True)}
            changed["tool_calls"] = made
            changed["content"] = f"{way}{number}said{way}" if message["content"].strip() else ""
            if "reasoning_content" in message:
                changed["reasoning_content"] = f"{way}{number}thought{way}"
        else:
            changed["content"] = PAD + markers[own[-1]] + PAD[::-1]
            if len(own) > 1:
                changed["reasoning_content"] = PAD + markers[own[0]] + PAD[::-1]
        call = calls.get(message.get("tool_call_id", ""))
        if "tool_call_id" in message:
            changed["tool_call_id"] = call.get("id", "") if call else _marked_id(f"{number}y", way)
        if "name" in message:
            changed["name"] = call["function"]["name"] if call else f"{way}{number}name{way}"
        marked.append(changed)
    return marked


def _marked_call(call: ToolCall, number: str, way: str) -> ToolCall:
    arguments = {f"{way}{number}key{way}": f"{way}{number}value{way}"} if way == "a" else {}
    made: ToolCall = {**call, "function": {"name": f"{way}{number}function{way}", "arguments": arguments}}
    if "id" in call:
        made["id"] = _marked_id(number, way)
    return made


def _marked_id(number: str, way: str) -> str:
    return f"{way}{number}".ljust(8, "0") + way  # nine letters and digits, as Mistral's templates want them


def _marked_tools(count: int, way: str) -> Tools:
    """So many definitions; of the two ways neither begins or ends as the other."""
    made = Tools()
    for number in range(count):
        name, text = f"{way}{number}tool{way}", f"{way}{number}text{way}"
        if way == "a":
            argument = {f"{way}{number}argument{way}": {"type": "string", "description": text}}
            parameters = {"type": "object", "properties": argument, "required": [*argument]}
            function = {"name": name, "description": text, "parameters": parameters}
            made.append({"type": "function", "function": function})
        else:
            parameters = {"required": list[str](), "properties": dict[str, str](), "type": "object"}
            function = {"parameters": parameters, "description": text, "name": name}
            made.append({"function": function, "type": "function"})
    return made


def _calling(messages: list[Message]) -> list[int]:
    return [number for number, message in enumerate(messages) if "tool_calls" in message]


def _call(number: int, form: _Form, turns: tuple[int, ...]) -> Call:
    """Which gaps of a text, made of messages marked in way "a", a message with calls stands in."""
    marks = f"a{number}x", f"a{number}said", f"a{number}thought"
    found = [place for place, gap in enumerate(form.gaps) if any(mark in gap for mark in marks)]
    # Names and ids may stand in the calls' results as well.
    arguments = [place for place in found if re.search(f"a{number}x[0-9]+key", form.gaps[place])]
    if not arguments:
        raise _NotSimpleError
    return Call(number, found[0], arguments[-1], number in turns)
