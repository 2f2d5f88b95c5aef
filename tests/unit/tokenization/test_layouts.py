"""What conversations of one layout have in common."""

import pytest

from adder.tokenization.labels import Labeller
from adder.tokenization.layouts import Layout, LayoutLearner, Pieces, Run, filled, key_of, match, texts_of
from chat_families import TOOLS, call, conversation, result
from conversation_cases import reply, user
from template_matrix import tokenizer_for, trl_templates

EMPTY = Pieces([""], [])
RUNS = [
    Run(EMPTY, "", Pieces(["<a>", "", ": "], [0])),
    Run(Pieces([" or ", "", "."], [1]), "<b>", Pieces(["<b>", "", ""], [0])),
]


def test_a_text_of_pieces_and_contents_shows_its_gap():
    text = "<a>x: five <c> or y.<b>x"
    assert filled(RUNS, ["x", "y"], ["other", "five <c>"]) == text
    assert [text[slice(*gap)] for gap in match(RUNS, text, ["x", "y"]) or []] == ["five <c>"]
    assert match(RUNS, "<a>x:  or y.<b>x", ["x", "y"]) == [(6, 6)]


@pytest.mark.parametrize("place", range(len("<a>x: ")))
def test_a_changed_character_is_no_match(place):
    text = "<a>x: five or y.<b>x"
    assert match(RUNS, text[:place] + "?" + text[place + 1 :], ["x", "y"]) is None
    assert match(RUNS, text[: -place - 1] + "?" + text[len(text) - place :], ["x", "y"]) is None
    assert match(RUNS, text + "?", ["x", "y"]) is None and match(RUNS[:1], text, ["x", "y"]) is None


def test_a_layout_is_told_by_all_that_may_change_how_a_template_writes():
    last = [
        reply("a"), reply("a", train=False), reply("a", reasoning_content="b"), reply("a", "Paris"),
        reply("", "Paris"), reply("a", "Paris", "Rome"), result("a"), {"role": "tool", "content": "a"}, user("a"),
    ]  # fmt: skip
    keys = [key_of({"messages": [user("q"), one]}) for one in last]
    keys += [key_of({"messages": [user("q"), last[0]], "tools": TOOLS * count}) for count in (1, 2)]
    assert len(set(keys)) == len(keys) and not any(None in key for key in keys)
    assert keys[0] == key_of({"messages": [user("other"), reply("é", train=True)], "tools": []})


@pytest.mark.parametrize("more", [{"unlearnt": [(0, 1)]}, {"reasoning_content": ""}, {"tool_calls": []}, {"x": 1}])
def test_a_message_with_anything_else_has_no_layout(more):
    assert None in key_of({"messages": [user("q"), {**reply("a"), **more}]})


def learn(name: str, messages, tools=None) -> Layout | None:
    tokenizer = tokenizer_for(trl_templates()[name].read_text())
    finder = Labeller(tokenizer).finder
    return LayoutLearner(finder, tokenizer).learn(messages, tools, finder.find(messages, tools)[-1])


def test_tools_calls_and_what_a_call_says_stand_in_gaps():
    messages = [user("Rain?"), reply("Let me see.", "Paris"), result("12 mm"), reply("Yes.")]
    layout = learn("qwen2_5", messages, TOOLS)
    assert layout is not None and texts_of(messages) == ["Rain?", "12 mm", "Yes."]
    text = Labeller(tokenizer_for(trl_templates()["qwen2_5"].read_text())).finder.find(messages, TOOLS)[0].text
    tools, calls = [text[slice(*gap)] for gap in match(layout.runs, text, texts_of(messages)) or []]
    assert "get_weather" in tools and "Rain?" not in tools
    assert calls.startswith("Let me see.") and '"Paris"' in calls and "12 mm" not in calls
    assert [(one.message, one.first, one.last, one.trained) for one in layout.calls] == [(1, 1, 1, True)]


def test_a_prompt_that_opens_what_a_finished_conversation_lacks_has_a_layout():
    layout = learn("deepseek_r1_distill", conversation("Where?", "Here."))
    assert layout is not None and layout.composed is not None
    assert filled(layout.composed.tail, ["Where?", "Here."], []).startswith("\n</think>\n\nHere.")


def test_a_template_that_writes_a_content_twice_has_no_layout():
    tokenizer = tokenizer_for(trl_templates()["qwen2_5"].read_text())
    twice = "{%- for m in messages %}{%- if m.role == 'user' %}{{- m.content }}{%- endif %}{%- endfor %}"
    tokenizer.chat_template = twice + trl_templates()["qwen2_5"].read_text()
    finder = Labeller(tokenizer).finder
    messages = conversation("Where?", "Here.")
    assert LayoutLearner(finder, tokenizer).learn(messages, None, finder.find(messages)[0]) is None


def test_ids_and_names_are_of_the_layout_only_where_the_template_lets_them_vary():
    messages = [user("Rain?"), reply("", "Paris"), result("12 mm"), reply("Yes.")]
    other = [user("Snow?"), {**reply(""), "tool_calls": [call("Rome", name="find")]}, result("0"), reply("No.")]
    assert key_of({"messages": messages}) == key_of({"messages": other})
