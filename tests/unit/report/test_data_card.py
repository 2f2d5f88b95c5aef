"""The data card: what it says, and that nothing from data breaks out of it."""

import re

import yaml

from adder.report import data_card
from report_fixture import HOSTILE
from report_pages import make


def blocks_of(markdown: str) -> tuple[list[str], list[str]]:
    """The lines outside of fenced blocks, and the blocks' contents, read as CommonMark does."""
    outside, blocks, fence = [], [], None
    for line in markdown.split("\n"):
        ticks = re.match(r"`{3,}", line)
        if fence is None and ticks:
            fence, content = ticks.group(), []
        elif fence is not None and re.fullmatch(rf"`{{{len(fence)},}}\s*", line):
            blocks.append("\n".join(content))
            fence = None
        elif fence is None:
            outside.append(line)
        else:
            content.append(line)
    assert fence is None
    return outside, blocks


def test_card_says_where_the_data_came_from_and_what_is_in_it(finished):
    card = (finished / "card.md").read_text(encoding="utf-8")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "license": ["apache-2.0", "cc0-1.0", "mit"], "pretty_name": "default", "size_categories": ["1K<n<10K"],
        "tags": ["adder", "conversational"], "task_categories": ["text-generation"],
    }  # fmt: skip
    for words in (
        "980 conversations to train on and 200 held out", "| notes | data/notes.jsonl | not stated | 80 | 2 | text |",
        "| notes | cells are separated by semicolons |", "- tickets: nothing reads the columns mood (980 rows)",
        "| support-chats | commit | 3f1c3f1c", "| Near-duplicates | 9 |", "| content is empty | 1 |",
        "MinHash with 128 permutations", "arXiv:2411.15124", "- Column urgent: false (900), true (180)",
        "- First word of prompts: hi (410)", "| Reply, characters | 3 |", "Sequences have 256 tokens; 3 examples",
    ):  # fmt: skip
        assert words in body, words
    _, blocks = blocks_of(body)
    assert "Refunds take five working days.\nFour ticks: ````" in blocks
    assert any(block.endswith("```text\nSTATUS: on its way\n```") for block in blocks)


def test_nothing_from_data_breaks_out_of_the_card(tmp_path):
    card = (make(tmp_path, hostile=True, heldout=30) / "card.md").read_text(encoding="utf-8")
    _, head, body = card.split("---\n", 2)
    assert HOSTILE in yaml.safe_load(head)["pretty_name"]
    outside, blocks = blocks_of(body)
    assert not [line for line in outside if "<" in line]
    assert sum("<script>" in block for block in blocks) >= 4
    tables = [line for line in outside if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    assert widths and set(widths) <= {3, 4, 8, 9}
    assert data_card.text("a|b\n`c` *d* [e](f) <g> #h") == r"a\|b \`c\` \*d\* \[e\](f) &lt;g&gt; \#h"
