"""What the model sees: loss, white space and control tokens of each example."""

import pytest

from adder.core.files import read_json
from adder.report.sections import tokens_section
from page_parser import Page


def test_token_examples_show_loss_white_space_and_control_tokens(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    page = Page(text[text.index('<section id="loss"') : text.index('<section id="lengths"')])
    tokenize = read_json(next((finished.parent / "stages" / "tokenize").iterdir()) / "tokenize.json")
    examples = tokens_section.token_examples(tokenize)
    assert [(one.id, one.total, one.left_out) for one in examples] == [
        ("tickets:1", 57, 0), ("support-chats:7", 56, 0), ("notes:3", 2019, 719),
    ]  # fmt: skip
    first = {token.text: token for token in examples[0].tokens}
    assert first["<|im_end|>"].special and first["·JSON"] and first["··"] and first["↵\n↵\n"]
    assert not first["·JSON"].on and first["_status"].on and not first["_status"].special
    assert {token.text for token in examples[1].tokens if token.special} >= {"<think>", "</tool_call>"}
    # As many marked tokens on the page as carry loss, and one in the sentence that explains the mark.
    marked = [attrs for tag, attrs in page.tags if tag == "span" and "on" in (attrs.get("class") or "").split()]
    assert len(marked) == 1 + sum(one.labelled for one in examples)
    assert "… 719 tokens …" in page.words and "·w899" in page.words and "·w900" not in page.words


@pytest.mark.parametrize(
    ("text", "shown"),
    [(" a\n", "·a↵\n"), ("\t\r", "⇥␍"), ("\u200b", "[ZWSP]"), ("<|im_end|>", "<|im_end|>")],
)
def test_white_space_in_tokens_is_seen(text, shown):
    assert tokens_section.visible(text) == shown


@pytest.mark.parametrize(
    ("text", "special"),
    [("<|im_start|>", True), ("</s>", True), ("[INST]", True), ("<｜end▁of▁sentence｜>", True), ("<0x0A>", True),
     ("a < b > c", False), ("[1]", False), ("{", False)],
)  # fmt: skip
def test_control_tokens_are_told_by_their_look(text, special):
    assert bool(tokens_section.SPECIAL.fullmatch(text)) is special
