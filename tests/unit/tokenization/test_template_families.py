"""Chat templates of real families: each conversation comes out right, or is refused with a reason."""

from pathlib import Path

import pytest

import family_templates
import template_matrix
from adder.tokenization.labels import Labeller
from chat_families import label, label_all, labelled_text
from conversation_cases import CONVERSATIONS, reply, segments, user
from template_matrix import CASES, TOOLS, check_template, tokenizer_for, trl_templates

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize("name", trl_templates())
def test_nothing_of_the_real_templates_that_trl_ships_is_wrong(name):
    outcomes = check_template(tokenizer_for(trl_templates()[name].read_text()))
    assert {case: one.reason for case, one in outcomes.items() if one.verdict == "wrong"} == {}
    plain = {case: one.reason for case, one in outcomes.items() if case in CASES["plain"]}
    assert all(outcomes[case].verdict == "right" for case in plain) or name.startswith("llava_next"), plain


@pytest.mark.parametrize("name", family_templates.OWN)
def test_each_familys_habit_comes_out_right(name):
    outcomes = check_template(tokenizer_for(family_templates.OWN[name]))
    assert {case: one.reason for case, one in outcomes.items() if one.verdict == "wrong"} == {}
    for case in CASES["plain"] | CASES["system"]:
        assert outcomes[case].verdict == "right", outcomes[case]


def test_the_table_in_the_docs_is_what_the_templates_make():
    table = template_matrix.family_table()
    text = (REPOSITORY / "docs" / "models.md").read_text()
    assert table in text, "run `python tests/template_matrix.py --write`"


def test_a_wrong_mask_is_seen_by_the_check(monkeypatch):
    """The matrix itself can fail: with a loss on everything, nothing of it is right."""
    monkeypatch.setattr(template_matrix, "Labeller", lambda tokenizer: Labeller(tokenizer, "all", fast_path=False))
    with pytest.raises(AssertionError):
        check_template(tokenizer_for(family_templates.HERMES))


def test_the_whole_table_of_contents_is_looked_for_not_names_that_occur_elsewhere():
    tokenizer = tokenizer_for(family_templates.DROPS_TOOLS)
    called = CONVERSATIONS["tool"]  # the tool's name stands in its call
    tools = [{"type": "function", "function": {**TOOLS[0]["function"], "name": "get_weather"}}]
    assert "no place for the list of tools" in label(Labeller(tokenizer), called, tools)
    system = tokenizer_for(family_templates.DROPS_SYSTEM)
    said = [{"role": "system", "content": "Hello"}, user("Hello"), reply("Hello")]
    assert "leaves out a message (system)" in label(Labeller(system), said)


def test_results_that_a_template_reads_as_a_list_are_given_as_one():
    tokenizer = tokenizer_for(family_templates.COMMAND_A)
    ids, _, _ = label(Labeller(tokenizer), CASES["tools"]["tool"], TOOLS)
    assert '{"0": "12 mm fell"}' in tokenizer.decode(ids) or '"text": "12 mm fell"' in tokenizer.decode(ids)


def test_an_opener_behind_every_conversation_is_not_learnt():
    tokenizer = tokenizer_for(family_templates.OPENS_ALWAYS, ["<|user|>", "<|assistant|>"])
    (one,) = label_all(Labeller(tokenizer), [user("a?"), reply("A.")])
    assert labelled_text(tokenizer, one.labels) == "A.<|end|>"


def test_reasoning_that_the_prompt_opens_is_written_by_the_model_from_there():
    tokenizer = tokenizer_for(trl_templates()["qwen3_5_think"].read_text())
    ids, labels, _ = label(Labeller(tokenizer), CONVERSATIONS["reasoning"])
    assert segments(tokenizer, labels, ids)[-1][1] == "Look again.\n</think>\n\nYes é🎉<|im_end|>"


def test_what_stands_before_a_literal_mark_of_reasoning_is_kept():
    messages = CASES["plain"]["literal_think"]
    for name in ("deepseek_r1_distill", "deepseekv3", "qwen3", "glm4moe"):
        tokenizer = tokenizer_for(trl_templates()[name].read_text())
        assert "Write </think> at its end." in labelled_text(tokenizer, label(Labeller(tokenizer), messages)[1]), name
