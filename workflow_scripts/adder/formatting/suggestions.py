"""What to write into a source's settings for rows of an unknown form, told from one of them.

A proposal, to be looked at: names tell little, so nothing is read by it until a person has written it down.
"""

import re
from collections.abc import Mapping
from typing import Any

from adder.data.field_template import folded
from adder.formatting.column_names import COMPANION, asked_columns, line_for, reply_columns, values_line
from adder.formatting.messages import BLANK, ROLES
from adder.formatting.task_columns import CONTEXTS, LABEL, OPTION_NAME, OPTIONS, text_size
from adder.formatting.transcripts import is_transcript

Row = Mapping[str, Any]

# Names of what is learnt in data of many tasks, the likeliest first: the word must stand somewhere in the name.
REPLY_WORDS = (
    *(
        "answer",
        "preferred",
        "response",
        "completion",
        "reply",
        "output",
        "solution",
        "target",
        "tgt",
        "gold",
        "summary",
    ),
    *("highlights", "abstract", "translation", "sql", "label", "labels", "sentiment", "intent", "category", "class"),
    *("emotion", "entities", "tags", "spans", "corrected", "correction", "rewrite", "paraphrase", "code", "cop"),
    *("query", "headline", "verdict", "correct"),
)
SEVERAL = ("completion", "generation", "candidate", "response", "reply", "output", "answer")  # of which one is chosen
DISLIKED = ("rejected", "non", "negative", "bad", "wrong", "incorrect", "worse")  # words of replies not to be learnt
WHO = ("speaker", "from", "role", "author", "sender", "who", "name", "participant", "side", "agent")
WHAT = ("utterance", "text", "content", "message", "value", "body", "line", "sentence", "turn", "said")
ASK_WORDS = ("question", "prompt", "instruction", "query", "ask", "request", "utterance", "goal", "input", "ctx")
CONTEXT_WORDS = ("context", "passage", "document", "article", "table", "schema", "support", "premise")
LEAVES = ("text", "value", "content", "human_readable", "answer")  # keys that hold the text of an object
MOST_PARTS = 3  # columns of a prompt where none is known for what is asked
LANGUAGE = re.compile(r"[a-z]{2,3}([_-][A-Za-z]{2,4})?")
NUMBERED = re.compile(r".*_?(\d|[ab])")  # replies of one kind, one a column
PAIR_WITH_SOURCE = ("target", "targets")  # beside it `source` is a text, and no site that a row is from


def lines_for(row: Row) -> str:
    """The lines of settings by which a row may be read as it is meant, "" where none can be told; or what it is that no
    line reads.
    """
    if (why := _whole_or_piece(row)) is not None:
        return why
    if (spoken := _spoken(row)) is not None:
        return spoken
    if (translated := _translation(row)) is not None:
        return _shown(*translated)
    if several := _several_replies(row):
        return f"{several}: `convert:` must choose of them, and yield {{prompt, completion}}"
    fields = _fields(row)
    reply = _reply_of(fields)
    if reply is None:
        return ""
    asked = {name: field for name, field in fields.items() if name != reply and folded(name) not in OPTIONS}
    question = _named(asked, asked_columns(asked), ASK_WORDS)
    lists = [name for name in asked if isinstance(row[name], list) and _is_option(name)]
    if question is not None and len(lists) == 1:
        names = {"question": question, "choices": lists[0], "answer": reply}
        return f"`{line_for(names)}`{_values(row, reply)}"
    named = isinstance(row[reply], int) or LABEL.fullmatch(str(row[reply]).strip()) is not None
    options = [name for name in asked if named and isinstance(row[name], str) and _is_option(name)]
    prompt = _asked(row, asked, question, [] if len(options) < 2 else options)
    prompt += [f"{{{name}}}" for name in fields if folded(name) in OPTIONS]
    if len(options) > 1:
        signs = "123456789" if str(row[reply]).isdigit() and not isinstance(row[reply], int) else "ABCDEFGHI"
        prompt.append("\\n".join(f"{sign}. {{{name}}}" for sign, name in zip(signs, options, strict=False)))
    return _shown("\\n\\n".join(prompt), f"{{{fields[reply]}}}") + _values(row, reply) if prompt else ""


def _several_replies(row: Row) -> str:
    """What holds several replies, in words, "" where nothing does."""
    for name, value in row.items():
        lists = [one for one in value.values() if isinstance(one, list)] if isinstance(value, dict) else [value]
        if _has_word(name, SEVERAL) and any(isinstance(one, list) and len(one) > 1 for one in lists):
            return f"{name} has several replies"
    numbered = [name for name in row if NUMBERED.fullmatch(folded(name)) and _has_word(name, SEVERAL)]
    return f"{' and '.join(numbered[:3])} are several replies" if len(numbered) > 1 else ""


def _spoken(row: Row) -> str | None:
    """The lines for a list of turns whose keys have other names; None where there is none."""
    for name, value in row.items():
        if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
            continue
        who = next((key for key in value[0] if folded(str(key)) in WHO), None)
        what = next((key for key in value[0] if folded(str(key)) in WHAT and key != who), None)
        if who is None or what is None or not all(isinstance(one.get(who), str | int) for one in value):
            continue
        speakers = dict.fromkeys(str(one[who]) for one in value)
        unknown = [speaker for speaker in speakers if speaker.strip().lower() not in ROLES]
        roles = f", and `roles: {{user: …, assistant: …}}` says who {' and '.join(unknown[:4])} are" if unknown else ""
        keys = f"`columns: {{messages: {name}}}` and `message_keys: {{role: {who}, content: {what}}}`"
        return f"{keys} read the turns{roles}"
    return None


def _reply_of(fields: Mapping[str, str]) -> str | None:
    """The column that may hold the reply. One that asks is none, but where another one does."""
    known = reply_columns(fields)
    asks = asked_columns(fields)
    others = {name: one for name, one in fields.items() if asks != [name] and not _has_word(name, DISLIKED)}
    return _named(others, known, REPLY_WORDS)


def _asked(row: Row, fields: Mapping[str, str], question: str | None, options: list[str]) -> list[str]:
    """What is asked, in braces: contexts and the question, or else the texts that are about as long as the longest."""
    rest = [name for name in fields if name not in (question, *options)]
    if question is not None:
        before = [name for name in rest if _has_word(name, (*CONTEXT_WORDS, *CONTEXTS))]
        return [f"{{{fields[name]}}}" for name in (*before, question)]
    rest = [name for name in rest if not _has_word(name, REPLY_WORDS)]
    rest = [name for name in rest if isinstance(row[name], str)] or rest
    longest = max((text_size(row[name]) for name in rest), default=0)
    return [f"{{{fields[name]}}}" for name in rest if 4 * text_size(row[name]) >= longest][:MOST_PARTS]


def lines_beside(row: Row, prompt: str) -> str:
    """The lines for a row whose prompt is the messages in a place that is known, and whose reply stands elsewhere."""
    fields = _fields(row)
    reply = _reply_of(fields)
    if reply is not None and isinstance(row[reply], dict):
        reply = fields[reply]
    others = [name for name, value in row.items() if _has_word(name, DISLIKED) and isinstance(value, list | dict | str)]
    if reply is not None and len(others) == 1:
        names = {"prompt": prompt, "chosen": reply, "rejected": others[0]}
        return f"`row_format: preference` with `{line_for(names)}`"
    return f"`columns: {{prompt: {prompt}, completion: {reply or '…'}}}`"


def _whole_or_piece(row: Row) -> str | None:
    """What to say of a row that is one message of a conversation, a tree of them, or a conversation in one text."""
    for name, value in row.items():
        if isinstance(value, str) and is_transcript(value):
            return f"{name} is a conversation written out: `convert:` must cut it into turns, and yield {{messages}}"
    for name in ("prompt", "root", "message"):
        if isinstance(row.get(name), dict) and isinstance(row[name].get("replies"), list):
            return f"{name} is a tree of messages: `convert:` must choose of the replies, and yield {{messages}}"
    role = next((row[name] for name in ("role", "from", "speaker") if isinstance(row.get(name), str)), "")
    if role.strip().lower() in ROLES and any(isinstance(row.get(name), str) for name in ("text", "content", "value")):
        return "each row is one message: `convert:` must put those of a conversation together, and yield {messages}"
    return None


def _fields(row: Row) -> dict[str, str]:
    """By column, where its text stands, as a template names it; without what describes a row and what is empty."""
    source = not row.keys().isdisjoint(PAIR_WITH_SOURCE)
    found: dict[str, str] = {}
    for name, value in row.items():
        described = COMPANION.fullmatch(folded(name)) is not None and not (source and folded(name) in ("source", "src"))
        if described or value in BLANK or any(brace in name for brace in "{}"):
            continue
        found[name] = name + _within(value)
    return found


def _within(value: Any) -> str:
    """The dots behind a column's name that lead to the text in its value."""
    if isinstance(value, dict):
        key = next((key for key in LEAVES if key in value), None)
        return "" if key is None else f".{key}{_within(value[key])}"
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return ".0"
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and (inner := _within(value[0])):
        return f".0{inner}"
    return ""


def _named(fields: Mapping[str, str], known: list[str], words: tuple[str, ...]) -> str | None:
    """The column that is known for its part, else the one whose name is or has the likeliest word; None without any."""
    if known:
        return known[0]
    exact = (name for word in words for name in fields if folded(name) == word)
    within = (name for word in words for name in fields if _has_word(name, (word,)))
    return next(exact, None) or next(within, None)


def _has_word(name: str, words: tuple[str, ...]) -> bool:
    own = re.split(r"[_.]", folded(name))
    return not {*own, *(word.removesuffix("s") for word in own)}.isdisjoint(words)


def _is_option(name: str) -> bool:
    return OPTION_NAME.fullmatch(folded(name)) is not None or re.fullmatch(r"sol(ution)?_?\d", folded(name)) is not None


def _translation(row: Row) -> tuple[str, str] | None:
    """Prompt and reply where two languages stand side by side, in columns or within one."""
    for name, value in (*row.items(), ("", dict(row))):
        texts = value if isinstance(value, dict) else {}
        names = [key for key in texts if LANGUAGE.fullmatch(str(key)) and isinstance(texts[key], str)]
        if len(names) == len(texts) == 2:
            one, other = (f"{name}.{key}" if name else key for key in names)
            return f"{{{one}}}", f"{{{other}}}"
    return None


def _values(row: Row, reply: str) -> str:
    if isinstance(row[reply], bool) or not isinstance(row[reply], int):
        return ""
    return f", and `{values_line(reply, '{0: …, 1: …}')}` where its numbers stand for words"


def _shown(prompt: str, completion: str) -> str:
    return f'`prompt: "{prompt}"` and `completion: "{completion}"`'
