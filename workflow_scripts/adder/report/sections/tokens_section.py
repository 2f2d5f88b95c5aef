"""The report's view of what the model sees: training examples token by token."""

import re
from typing import NamedTuple

from adder.report.page_section import PageSection, RunReport, View
from adder.tokenization.records import TokenizeRecord

SHOWN_TOKENS = (900, 400)  # tokens shown of a longer example: from its beginning and from its end
# How tokenizers write what is no text: <|im_end|>, </s>, <bos>, [INST], <｜User｜>.
SPECIAL = re.compile(r"<[|｜/]?[\w|｜▁:-]+[|｜]?>|\[/?[A-Z_]{3,}\]")
# Characters that would not be seen: their names stand in for them.
INVISIBLE = {"\t": "⇥", "\r": "␍", "\u00a0": "⍽", "\u200b": "[ZWSP]", "\u200d": "[ZWJ]", "\ufeff": "[BOM]"}


class ShownToken(NamedTuple):
    """A token's text, whether it carries loss, and whether it is a control token."""

    text: str
    on: bool
    special: bool


class ShownExample(NamedTuple):
    """An example: its size, and the tokens that are shown. cut: the place of the gap among these, None without one."""

    id: str
    source: str
    total: int
    labelled: int
    tokens: list[ShownToken]
    left_out: int
    cut: int | None


def view(run: RunReport) -> View:
    """The examples, and what the tokenizer did to all."""
    return {"examples": token_examples(run.facts.tokenize), "record": run.facts.tokenize}


def token_examples(tokenize: TokenizeRecord) -> list[ShownExample]:
    """The examples token by token; of a long one the middle is left out."""
    shown = []
    for one in tokenize["examples"]:
        tokens = [
            ShownToken(visible(text), bool(loss), bool(SPECIAL.fullmatch(text.strip())))
            for text, loss in zip(one["tokens"], one["loss"], strict=True)
        ]
        if tokens:  # a line break at the very end would show as an empty line
            tokens[-1] = tokens[-1]._replace(text=tokens[-1].text.removesuffix("\n"))
        left_out, cut = len(tokens) - sum(SHOWN_TOKENS), None
        if left_out > 0:
            cut = SHOWN_TOKENS[0]
            tokens = tokens[: SHOWN_TOKENS[0]] + tokens[-SHOWN_TOKENS[1] :]
        total, labelled = len(one["tokens"]), sum(one["loss"])
        shown.append(ShownExample(one["id"], one["source"], total, labelled, tokens, max(0, left_out), cut))
    return shown


def visible(text: str) -> str:
    """A token's text with its white space seen: a dot for a space, an arrow before a line break that is kept."""
    for character, name in INVISIBLE.items():
        text = text.replace(character, name)
    return text.replace("\n", "↵\n").replace(" ", "·")


SECTION = PageSection(name="tokens", anchor="loss", title="Tokens", view=view)
