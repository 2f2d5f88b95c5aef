"""What becomes of conversations of every kind under a chat template, checked against transformers' own rendering.

`python tests/template_matrix.py FOLDER` does it for each `*.jinja` of a folder, such as real models' templates: what is
right, refused and why, and wrong; it ends with 1 if anything is wrong. `python tests/template_matrix.py --write` makes
the table in docs/models.md anew, of the families of `family_templates.py`.
"""

import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

from transformers import PreTrainedTokenizerFast

import family_templates
from adder.core.labels import IGNORE_INDEX
from adder.formatting.conversation import Message
from adder.tokenization.chat_template import DATE, ChatTemplate, UnusableRow, special_tokens
from adder.tokenization.labels import Example, Labeller
from tiny import tiny_tokenizer

CONTROL = re.compile(
    r"<\|[^'\"{}\s|]*?\|>|<｜[^｜'\"]*｜>|<[a-z_]*_(?:of_)?turn>|<\|turn>|<turn\|>|<end_of_utterance>|<\|?tool_\w+\|?>"
    r"|<\|?channel\|?>|\[gMASK\]|<sop>|\[/?[A-Z][A-Z_]+\]|</?s>|<bos>|<eos>|<end_of_turn>|<\|[A-Z]+_[A-Z_]+\|>|\[\|[a-z_]+\|\]|<step>"
    r"|<seed:[be]os>|<SPECIAL_\d+>|\]~[!b]\[?\]?|\[e~\[|</?assistant>|<(?:beginning|end)_of_sentence>"
)
NOT_CONTROL = {"<tool_call>", "<tool_response>", "<tool_code>", "<tool_name>"}  # ordinary words of their vocabularies
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_kestrel",
            "description": "Describes plumage",
            "parameters": {
                "type": "object",
                "properties": {
                    "meadow": {"type": "string", "description": "Where hedgerows grow"},
                    "count": {"type": "integer", "description": "How many thistles"},
                },
                "required": ["meadow"],
            },
        },
    }
]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def reply(content: str, *meadows: str, reasoning: str | None = None) -> Message:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if meadows:
        message["tool_calls"] = [
            {
                "type": "function", "id": f"call{number:05}",
                "function": {"name": "find_kestrel", "arguments": {"meadow": meadow, "count": 2}},
            }
            for number, meadow in enumerate(meadows, 1)
        ]  # fmt: skip
    return cast("Message", message)


def result(content: str, number: int = 1) -> Message:
    return {"role": "tool", "content": content, "tool_call_id": f"call{number:05}", "name": "find_kestrel"}


# By column of the table in docs/models.md; no text occurs twice, but in "repeated".
CASES: dict[str, dict[str, list[Message]]] = {
    "plain": {
        "single": [user("Where is amber?"), reply("Beside basalt, say geologists.")],
        "unicode": [user("Ünïcode crème?"), reply("Naïve é🎉 مرحبا\n\n- one\n- two")],
        "literal_think": [user("How does cobalt end?"), reply("Write </think> at its end.")],
        "trailing_user": [user("Where is amber?"), reply("Beside basalt."), user("And dolomite?")],
    },
    "system": {
        "system": [system("Be terse, flint."), user("Where is amber?"), reply("Beside basalt.")],
        "system_several": [
            system("Be terse, flint."), user("Where is amber?"), reply("Beside basalt."), user("Sure, garnet?"),
            reply("Certainly, halite."),
        ],
    },
    "tools": {
        "tool": [user("Rain today?"), reply("", "Paris"), result("12 mm fell"), reply("Yes, umbrella.")],
        "tool_json": [user("Rain today?"), reply("", "Paris"), result('{"mm": [12, "wet"]}'), reply("Yes, umbrella.")],
        "tool_last": [
            user("Rain today?"), reply("", "Paris"), result("12 mm fell"), reply("Yes, umbrella."), user("And south?"),
            reply("", "Rome"),
        ],
        "two_calls": [
            user("Rain today?"), reply("", "Paris", "Rome"), result("12 mm fell"), result("dry dust", 2),
            reply("Only north."),
        ],
        "text_and_call": [
            user("Rain today?"), reply("Let me look.", "Paris"), result("12 mm fell"), reply("Yes, umbrella."),
        ],
        "tool_system": [
            system("Be terse, flint."), user("Rain today?"), reply("", "Paris"), result("12 mm fell"),
            reply("Yes, umbrella."),
        ],
        "no_call": [user("Where is amber?"), reply("Beside basalt.")],
    },
    "reasoning": {
        "reasoning": [user("Where is amber?"), reply("Beside basalt.", reasoning="Amber floats; hmm.")],
        "inline": [user("Where is amber?"), reply("<think>\nAmber floats; hmm.\n</think>\n\nBeside basalt.")],
        "inline_tight": [user("Where is amber?"), reply("<think>Amber floats; hmm.</think>Beside basalt.")],
        "reasoning_tool": [
            user("Rain today?"), reply("", "Paris", reasoning="I must ask, quartz."), result("12 mm fell"),
            reply("Yes, umbrella.", reasoning="So it does, onyx."),
        ],
    },
    "several turns": {
        "several": [
            user("Where is amber?"), reply("Beside basalt."), user("Sure, garnet?"), reply("Certainly, halite."),
            user("And jasper?"), reply("Kyanite é🎉 instead."),
        ],
        "several_reasoning": [
            user("Where is amber?"), reply("Beside basalt.", reasoning="Amber floats; hmm."), user("Sure, garnet?"),
            reply("Certainly, halite.", reasoning="Look again, onyx."),
        ],
        "several_inline": [
            user("Where is amber?"), reply("<think>\nAmber floats.\n</think>\n\nBeside basalt."), user("Sure, garnet?"),
            reply("<think>\nLook, onyx.\n</think>\n\nCertainly, halite."),
        ],
        "some_reasoning": [
            user("Where is amber?"), reply("Beside basalt.", reasoning="Amber floats; hmm."), user("Sure, garnet?"),
            reply("Certainly, halite."),
        ],
        "assistant_first": [reply("Welcome, traveller."), user("Where is amber?"), reply("Beside basalt.")],
        "two_replies": [user("Where is amber?"), reply("Beside basalt."), reply("Or dolomite.")],
        "two_questions": [user("Where is amber?"), user("And garnet?"), reply("Beside basalt.")],
        "repeated": [user("yes"), reply("no"), user("no"), reply("yes")],
    },
}  # fmt: skip
WITH_TOOLS = {
    "tool",
    "tool_json",
    "tool_last",
    "two_calls",
    "text_and_call",
    "tool_system",
    "no_call",
    "reasoning_tool",
}


@dataclass(frozen=True)
class Outcome:
    """What became of one conversation: "right", "refused" or "wrong", with the reason; how many examples it made."""

    verdict: str
    reason: str = ""
    examples: int = 1


def tokenizer_for(
    source: str, more: Sequence[str] = (), base: PreTrainedTokenizerFast | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer, the tiny one if none is given, with the control tokens that a template names."""
    tokenizer = base or tiny_tokenizer()
    tokenizer.chat_template = source
    words = NOT_CONTROL | family_templates.WORDS.get(source, set())
    names = {*CONTROL.findall(source), *more} - {"<|im_end|>", "<|im_start|>", "<|endoftext|>", *words}
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(name for name in names if len(name) > 2)})
    tokenizer.bos_token = "<|endoftext|>"
    if "eos_token" in source:
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|eos|>"]})
        tokenizer.eos_token = "<|eos|>"
    return tokenizer


def check_template(tokenizer: PreTrainedTokenizerFast) -> dict[str, Outcome]:
    """The outcome of each conversation of CASES."""

    class Clock:
        now = staticmethod(lambda: DATE)

    labeller, found = Labeller(tokenizer), {}
    with mock.patch("transformers.utils.chat_template_utils.datetime", Clock):
        for cases in CASES.values():
            for name, messages in cases.items():
                found[name] = _outcome(tokenizer, labeller, messages, TOOLS if name in WITH_TOOLS else None)
    return found


def _outcome(
    tokenizer: Any, labeller: Labeller, messages: list[Message], tools: list[dict[str, Any]] | None
) -> Outcome:
    conversation: Any = {"messages": messages, "tools": tools} if tools else {"messages": messages}
    made = labeller.label([conversation])[0]
    if isinstance(made, UnusableRow):
        return Outcome("refused", str(made))
    wrong = _what_is_wrong(tokenizer, labeller, messages, tools, made)
    return Outcome("wrong" if wrong else "right", wrong, len(made))


def _what_is_wrong(
    tokenizer: Any,
    labeller: Labeller,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    examples: list[Example],
) -> str:
    """A sentence on the first thing that isn't as it must be; empty if all is."""
    template = ChatTemplate(tokenizer).of(tools)
    taken = [template.taken(message) for message in messages]

    def written(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(taken[:count], tools=tools, tokenize=False, add_generation_prompt=prompt)

    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    prompts: dict[int, str] = {}
    for turn in turns:
        try:
            prompts[turn] = written(turn, prompt=True)
        except Exception:
            continue
    learnt: Counter[int] = Counter()
    for example in examples:
        for start, end in runs(example.labels.tolist(), example.replies):
            before = tokenizer.decode(example.ids[:start])
            text = tokenizer.decode(example.ids[start:end])
            turn = next((turn for turn in turns if prompts.get(turn) == before), None)
            if turn is None:
                return f"{text[:60]!r} stands behind a prompt that generation doesn't give: …{before[-60:]!r}"
            if tokenizer(prompts[turn], add_special_tokens=False).input_ids != example.ids[:start].tolist():
                return f"the tokens before {text[:40]!r} aren't those of its prompt"
            learnt[turn] += 1
            wrong = _wrong_reply(tokenizer, messages, turn, text) or _wrong_prompt(messages, turn, before, tools)
            if wrong:
                return wrong
            if not _is_as_finished(text, prompts[turn], written(turn + 1, prompt=False), messages[turn]):
                return f"{text[:80]!r} isn't what a finished conversation has there"
    if set(learnt) != set(prompts) or max(learnt.values()) > 1:
        return f"replies {dict(learnt)} are learnt, of {turns}"
    return ""


def runs(labels: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of each reply of these lengths: one may stand right behind another."""
    found, at = [], 0
    for length in lengths:
        at = next(place for place in range(at, len(labels)) if labels[place] != IGNORE_INDEX)
        found.append((at, at + length))
        at += length
    assert sum(lengths) == sum(label != IGNORE_INDEX for label in labels)
    return found


def pieces(message: Mapping[str, Any]) -> list[str]:
    """The texts of a reply that must be learnt."""
    content = message["content"]
    inline = re.fullmatch(r"<think>(.*)</think>(.*)", content, re.DOTALL)
    parts = [message.get("reasoning_content", ""), *(inline.groups() if inline else [content])]
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return [part.strip() for part in parts if part.strip()] + [call["arguments"]["meadow"] for call in calls]


def _wrong_reply(tokenizer: Any, messages: list[Message], turn: int, text: str) -> str:
    message = messages[turn]
    for piece in pieces(message):
        if piece not in text:
            return f"{piece!r} of reply {turn} isn't learnt: {text!r}"
    calls = message.get("tool_calls", [])
    if text.count("find_kestrel") < len(calls):
        return f"a call's name isn't learnt: {text!r}"
    own = str(message)
    for number, other in enumerate(messages):
        for piece in pieces(other):
            if number != turn and piece in text and piece not in own:
                return f"{piece!r} of message {number} is learnt in reply {turn}: {text!r}"
    if not text.endswith(tuple(special_tokens(tokenizer))):
        return f"reply {turn} ends in no control token: {text!r}"
    return ""


def _wrong_prompt(messages: list[Message], turn: int, prompt: str, tools: list[dict[str, Any]] | None) -> str:
    for number, message in enumerate(messages[:turn]):
        plain = message["content"].strip()
        if message["role"] != "assistant" and plain not in prompt and plain.replace('"', '\\"') not in prompt:
            return f"message {number} isn't in the prompt of reply {turn}"
    if tools and not all(text in prompt for text in ("find_kestrel", "meadow")):
        return f"the tools aren't in the prompt of reply {turn}"
    if tools and "Describes plumage" not in prompt:
        return f"the tools' descriptions aren't in the prompt of reply {turn}"
    return ""


def _is_as_finished(text: str, prompt: str, finished: str, message: Message) -> bool:
    """Whether a reply is what the template writes of it, or at least ends with that."""
    if finished.startswith(prompt):
        own = finished[len(prompt) :].strip()
        if own.startswith(text.strip()) or text.startswith(own):
            return True
    # What a template would drop stands in full, in front of what it does write of the reply.
    whole = message["content"].strip()
    answer = whole if whole in text else pieces(message)[-1]
    ending = CONTROL.sub("", text[text.rindex(answer) + len(answer) :]).strip()
    return ending in CONTROL.sub("", finished)


def trl_templates() -> dict[str, Path]:
    """The templates that TRL ships, by the names of their files."""
    package = importlib.util.find_spec("trl")
    assert package is not None and package.origin is not None
    return {path.stem: path for path in sorted((Path(package.origin).parent / "chat_templates").glob("*.jinja"))}


def family_table() -> str:
    """Families by what conversations hold, in Markdown."""
    shipped = trl_templates()
    sources = {name: shipped[file].read_text(encoding="utf-8") for name, file in family_templates.SHIPPED.items()}
    rows = [f"| family | {' | '.join(CASES)} |", "|---" * (len(CASES) + 1) + "|"]
    for name, source in sorted({**sources, **family_templates.OWN}.items(), key=lambda item: item[0].lower()):
        outcomes = check_template(tokenizer_for(source))
        cells = [_cell({case: outcomes[case] for case in cases}) for cases in CASES.values()]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(outcomes: Mapping[str, Outcome]) -> str:
    """A cell of the table: right; right but for some; refused and why."""
    wrong = [name for name, outcome in outcomes.items() if outcome.verdict == "wrong"]
    if wrong:
        return f"WRONG: {', '.join(wrong)}"
    refused: dict[str, list[str]] = {}
    for name, outcome in outcomes.items():
        if outcome.verdict == "refused":
            refused.setdefault(_short(outcome.reason), []).append(name.replace("_", " "))
    if not refused:
        split = any(outcome.examples > 1 for outcome in outcomes.values())
        return "right, split" if split else "right"
    if sum(map(len, refused.values())) == len(outcomes):
        return "refused: " + "; ".join(refused)
    return "right; refused: " + "; ".join(f"{reason} ({', '.join(names)})" for reason, names in refused.items())


def _short(reason: str) -> str:
    reason = reason.removeprefix("the chat template refuses this conversation: ")
    reason = reason.removeprefix("the chat template's ").removeprefix("the chat template ")
    for begin, short in SHORT.items():
        if reason.startswith(begin):
            return short
    return reason.partition("; tokenize.")[0].replace("|", "\\|").strip()


SHORT = {
    "Conversation roles must alternate": "roles must alternate",
    "After the optional system message": "roles must alternate",
    "generation prompt goes on": "another prompt than generation's",
    "generation prompt ends": "its prompt closes the reasoning",
    "writes no end-of-turn token": "no end of turn",
    "This model only supports single": "one call a reply",
    "leaves out or rewrites message": "leaves out a message",
}


def write_table(path: Path) -> None:
    """Put the table between its two marks in a file."""
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{family_table()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


BEGIN = "<!-- template families: begin (made by `python tests/template_matrix.py --write`) -->"
END = "<!-- template families: end -->"


def main(folder: Path) -> int:
    """Check every template of a folder; return 1 if anything is wrong."""
    totals: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for path in sorted(folder.glob("*.jinja")):
        try:
            outcomes = check_template(tokenizer_for(path.read_text(encoding="utf-8")))
        except Exception as error:
            print(f"{path.stem}: {type(error).__name__}: {str(error)[:200]}")
            totals["unusable"] += 1
            continue
        totals.update(outcome.verdict for outcome in outcomes.values())
        odd = {name: outcome for name, outcome in outcomes.items() if outcome.verdict != "right"}
        split = [f"{name} ({outcome.examples})" for name, outcome in outcomes.items() if outcome.examples > 1]
        print(f"{path.stem}: {len(outcomes) - len(odd)} right" + (f", split: {', '.join(split)}" if split else ""))
        by_reason: dict[tuple[str, str], list[str]] = {}
        for name, outcome in odd.items():
            by_reason.setdefault((outcome.verdict, outcome.reason[:230]), []).append(name)
            reasons[f"{outcome.verdict}: {outcome.reason[:90]}"] += 1
        for (verdict, reason), names in by_reason.items():
            print(f"    {verdict.upper() if verdict == 'wrong' else verdict} {', '.join(names)}: {reason}")
    print(f"\n{dict(totals)}")
    for reason, count in reasons.most_common(40):
        print(f"{count:5} {reason}")
    return int(totals["wrong"] > 0)


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        write_table(Path(__file__).parents[1] / "docs" / "models.md")
    else:
        sys.exit(main(Path(sys.argv[1])))
