"""Chat templates of real families: each conversation comes out right, or is refused with the reason listed here."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adder.tokenization.chat_template import UnusableRow
from adder.tokenization.labels import Labeller
from chat_families import (
    CHATGLM,
    EOS_LAST,
    FAMILIES,
    MISTRAL_TOOLS,
    SPACED,
    TOOLS,
    Family,
    call,
    conversation,
    label,
    labelled_text,
    lacking_bytes,
    prompt_ids,
    result,
    rstrip_tokenizer,
    sentencepiece_like_tokenizer,
    stopped_clock,  # noqa: F401
)  # fmt: skip
from conversation_cases import TEXT
from tiny import tiny_tokenizer


def reply(content, *cities, **more):
    """A reply, with a tool call for each of the cities."""
    calls = [call(city, number=number) for number, city in enumerate(cities, 1)]
    return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {}), **more}


def user(content):
    return {"role": "user", "content": content}


CONVERSATIONS = {
    "single": conversation("Where is it?", "Here, I think."),
    "several": conversation("Where is it?", "Here, I think.", "Sure?", "Yes é🎉"),
    "system": conversation("Where is it?", "Here, I think.", "Sure?", "Yes é🎉", system="Be brief."),
    "reasoning": [
        user("Where is it?"), reply("Here, I think.", reasoning_content="I saw it."),
        user("Sure?"), reply("Yes é🎉", reasoning_content="Look again."),
    ],
    "tool": [user("Rain?"), reply("", "Paris"), result("12 mm"), reply("Yes, there.")],
    "tool_last": [
        user("Rain?"), reply("", "Paris"), result("12 mm"), reply("Yes, there."), user("And there?"), reply("", "Rome"),
    ],
    "tool_reasoning": [
        user("Rain?"), reply("", "Paris", reasoning_content="I must ask."), result("12 mm"),
        reply("Yes, there.", reasoning_content="So it does."),
    ],
    "two_calls": [user("Rain?"), reply("", "Paris", "Rome"), result("12 mm"), result("dry", number=2), reply("Paris.")],
    "text_and_call": [user("Rain?"), reply("Let me see.", "Paris"), result("12 mm"), reply("Yes, there.")],
}  # fmt: skip
TOOL = {"tool", "tool_last", "tool_reasoning", "two_calls", "text_and_call"}
REASONING = {"reasoning", "tool_reasoning"}
EVERY = set(CONVERSATIONS)
NO_END = "no end-of-turn token"
OTHER_PROMPT = "another prompt than it is given"
# Templates that TRL ships without a word on tools in them.
NO_TOOLS = r"(idefics3|lfm2|llama3|phi3(_5)?|qwen2_5_vl|smolvlm)(_training)?$"

# What can't be done with the templates that TRL ships: the reason that a person must see, templates, conversations.
REFUSED: list[tuple[str, str, set[str]]] = [
    ("roles must alternate", r"cohere|gemma3?(_training)?$", TOOL),
    ("System role not supported", r"gemma(_training)?$", {"system"}),
    ("Only user and assistant roles", "llava_next", TOOL),
    ("leave(s|) out a tool call", NO_TOOLS, TOOL),
    ("only supports single tool-calls", "llama3_[12]$", {"two_calls"}),
    ("leaves out the text beside a tool call", "llama3_[12]$", {"text_and_call"}),
    ("leaves out a reply's reasoning", "llama3_[12]$", {"tool_reasoning"}),  # nothing is written beside a call
    ("leaves? out the text beside a tool call", "gptoss|muse_glimmer", {"text_and_call"}),
    ("leaves? out a tool call", "gptoss", {"two_calls"}),
    (OTHER_PROMPT, "gptoss", {"tool_reasoning"}),  # an answer is written without the reasoning before its call
    # A turn ends where the next one begins, with the next role's token.
    (NO_END, "glm4moe$", EVERY),
    (NO_END, "llava_next", EVERY - TOOL),
    # The text beside a call goes behind the call's result.
    (NO_END, r"(diffusion_gemma|gemma4(_v[345])?)$", {"text_and_call"}),
    # Blocks that end with a call, not with the turn.
    (NO_END, "diffusion_gemma_training", TOOL - {"text_and_call"}),
    ("aren't one for each reply", "diffusion_gemma_training", {"text_and_call"}),
    # The prompt opens a reasoning block: replies need reasoning, and a template that writes it.
    ("leaves? out a reply's reasoning", "deepseek_r1_distill$", {"reasoning"}),
    ("leaves? out a reply's reasoning", "deepseekv3", REASONING),
    (OTHER_PROMPT, "deepseek_r1_distill$", EVERY - {"reasoning"}),
    (OTHER_PROMPT, "deepseekv3$", EVERY - REASONING),
    (OTHER_PROMPT, "(deepseek_r1_distill|deepseekv3)_training", EVERY - TOOL - {"reasoning"}),
    (OTHER_PROMPT, "deepseekv3_training", {"tool_last"}),
    (NO_END, "deepseek_r1_distill_training", {"tool", "two_calls"}),  # one call ends nothing, three end twice
    (f"{OTHER_PROMPT}|{NO_END}", "deepseek_r1_distill_training", {"tool_last"}),
    ("leave out a tool call", "deepseek_r1_distill_training", {"text_and_call", "tool_reasoning"}),
    (OTHER_PROMPT, "nemotron_3", EVERY - REASONING),
    (OTHER_PROMPT, "qwen3_5_nothink", REASONING),  # the prompt closes the block again
]


def trl_templates() -> list[Path]:
    return sorted((Path(importlib.util.find_spec("trl").origin).parent / "chat_templates").glob("*.jinja"))


def trl_tokenizer(path: Path):
    """The tiny tokenizer with the control tokens that the template names."""
    source = path.read_text()
    tokenizer = tiny_tokenizer(source)
    names = re.findall(
        r"<\|[^'\"{}\s]*?\|>|<｜[^｜]*｜>|<[a-z_]*_turn>|<\|turn>|<turn\|>|<end_of_utterance>|<\|?tool_\w+\|?>|\[gMASK\]|<sop>",
        source,
    )
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(set(names) - {"<|im_end|>", "<|im_start|>"})})
    tokenizer.bos_token = "<|endoftext|>"
    if "eos_token" in source:
        tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


# After the last turn these write an end-of-text token as well, which the model has no need to learn.
WRITES_MORE = ("phi3", "phi3_5")


def refusal(template: str, name: str) -> str | None:
    return next((reason for reason, pattern, names in REFUSED if name in names and re.match(pattern, template)), None)


def segments(tokenizer, labels: np.ndarray, ids: np.ndarray) -> list[tuple[int, str]]:
    """Each run of labelled tokens: its start and its text."""
    bears_loss = np.concatenate([[False], labels != -100, [False]])
    borders = np.flatnonzero(bears_loss[1:] != bears_loss[:-1]).reshape(-1, 2)
    return [(start, tokenizer.decode(ids[start:end])) for start, end in borders.tolist()]


@pytest.mark.parametrize("path", trl_templates(), ids=lambda path: path.stem)
def test_the_real_templates_that_trl_ships(path):
    tokenizer = trl_tokenizer(path)
    labeller = Labeller(tokenizer)
    for name, messages in CONVERSATIONS.items():
        tools = TOOLS if name in TOOL else None
        found, reason = label(labeller, messages, tools), refusal(path.stem, name)
        if reason is not None:
            assert isinstance(found, str) and re.search(reason, found), (name, found)
            continue
        assert not isinstance(found, str), (name, found)
        ids, labels, _ = found
        check_conversation(tokenizer, labeller.finder.template, messages, tools, ids, labels, path.stem, name)


def check_conversation(tokenizer, template, messages, tools, ids, labels, family, name) -> None:
    """The labelled tokens against what apply_chat_template writes of the conversation and of its beginnings."""

    def written(count, **extra):
        taken = [template.taken(message) for message in messages[:count]]
        return tokenizer.apply_chat_template(taken, tools=tools, tokenize=False, **extra)

    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    found = segments(tokenizer, labels, ids)
    assert len(found) == len(turns), (name, found)
    assert tokenizer.decode(ids) == written(None)
    prompt = prompt_ids(tokenizer, messages[: turns[-1]], tools)
    assert ids[: len(prompt)].tolist() == prompt and found[-1][0] == len(prompt), name
    for number, (turn, (_, text)) in enumerate(zip(turns, found, strict=True)):
        message, last = messages[turn], number == len(turns) - 1
        assert message["content"] in text, (name, text)
        for one in message.get("tool_calls", []):
            assert one["function"]["name"] in text and one["function"]["arguments"]["city"] in text, (name, text)
        assert not last or message.get("reasoning_content", "") in text, (name, text)
        assert not any(other["content"] in text for other in messages if other["role"] != "assistant"), (name, text)
        assert any(text.endswith(token) for token in tokenizer.all_special_tokens), (name, text)
        # What stands between the prompt and the end of the conversation, were this its last turn.
        alone, before = written(turn + 1), written(turn, add_generation_prompt=True)
        whole = alone.removeprefix(before).rstrip()
        if last and family in WRITES_MORE:
            assert whole.startswith(text), (name, text)
        elif last:
            assert whole == text, (name, text)
        elif written(None).startswith(before) and not message.get("reasoning_content"):
            # An earlier turn may end otherwise (gpt-oss), but begins as it would alone, unless reasoning was dropped.
            start = text.removesuffix(next(token for token in tokenizer.all_special_tokens if text.endswith(token)))
            assert whole.startswith(start) or whole.endswith(text), (name, text)


def test_reasoning_that_the_prompt_opens_is_written_by_the_model_from_there():
    path = next(path for path in trl_templates() if path.stem == "qwen3_5_think")
    tokenizer = trl_tokenizer(path)
    ids, labels, _ = label(Labeller(tokenizer), CONVERSATIONS["reasoning"])
    assert segments(tokenizer, labels, ids)[-1][1] == "Look again.\n</think>\n\nYes é🎉<|im_end|>"


def test_reasoning_without_a_place_in_the_template_is_written_into_the_reply():
    labeller = Labeller(FAMILIES["chatml"].tokenizer())
    assert not labeller.finder.template.folds_reasoning
    ids, labels, _ = label(labeller, CONVERSATIONS["reasoning"][:2])
    assert labelled_text(labeller.tokenizer, labels) == "<think>\nI saw it.\n</think>\n\nHere, I think.<|im_end|>"
    assert labeller.finder.template.folds_reasoning


def mistral_tools():
    return Family(
        MISTRAL_TOOLS,
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
         "[TOOL_RESULTS]", "[/TOOL_RESULTS]"), bos="<s>", eos="</s>", end="</s>",
    ).tokenizer()  # fmt: skip


def test_tool_calls_of_a_template_that_moves_the_tools_to_the_last_user_turn():
    tokenizer = mistral_tools()
    labeller = Labeller(tokenizer)
    messages = CONVERSATIONS["tool_last"]
    ids, labels, replies = label(labeller, messages, TOOLS)
    arguments = '"arguments": {"city": "%s", "days": 2}, "id": "call00001"}]</s>'
    assert [text for _, text in segments(tokenizer, labels, ids)] == [
        '[TOOL_CALLS] [{"name": "get_weather", ' + arguments % "Paris",
        " Yes, there.</s>",
        '[TOOL_CALLS] [{"name": "get_weather", ' + arguments % "Rome",
    ]
    assert len(replies) == 3
    prompt = prompt_ids(tokenizer, messages[:5], TOOLS)
    assert ids[: len(prompt)].tolist() == prompt
    messages = [user("Rain?"), reply("", "Paris")]
    messages[1]["tool_calls"][0]["id"] = "call_1"
    assert "length 9" in label(labeller, messages, TOOLS)


def test_tools_and_messages_that_a_template_leaves_out_are_refused():
    labeller = Labeller(FAMILIES["deepseek"].tokenizer())
    assert "no place for the list of tools" in label(labeller, CONVERSATIONS["single"], TOOLS)
    # DEEPSEEK writes user, assistant and system messages only.
    messages = [user("Rain?"), reply("I'll look."), result("12 mm"), reply("Yes.")]
    assert "leaves out message 3 (tool)" in label(labeller, messages)


def test_control_tokens_in_calls_tools_and_reasoning_are_refused():
    labeller = Labeller(mistral_tools())
    bad = [user("Rain?"), reply("", "Pa[/INST]ris")]
    assert "message 2 (assistant) holds [/INST]" in label(labeller, bad, TOOLS)
    tools = [{"type": "function", "function": {"name": "get_weather", "description": "see </s>"}}]
    assert "the list of tools holds </s>" in label(labeller, [user("Rain?"), reply("", "Paris")], tools)
    reasoning = [user("Rain?"), reply("Yes.", reasoning_content="</s>")]
    assert "message 2 (assistant) holds </s>" in label(labeller, reasoning)


def test_templates_whose_replies_end_in_nothing_are_refused():
    chatglm = Family(CHATGLM, ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"), eos="<|endoftext|>").tokenizer()
    assert NO_END in label(Labeller(chatglm), conversation("a?", "A."))
    last = Family(EOS_LAST, eos="<|endoftext|>").tokenizer()
    _, labels, _ = label(Labeller(last), conversation("a?", "A."))
    assert labelled_text(last, labels) == "A.\n<|endoftext|>"
    assert NO_END in label(Labeller(last), conversation("a?", "A.", "b?", "B."))
    _, labels, _ = label(Labeller(last, "last"), conversation("a?", "A.", "b?", "B."))
    assert labelled_text(last, labels) == "B.\n<|endoftext|>"


def test_contents_are_given_as_parts_where_a_template_needs_them():
    labeller = Labeller(FAMILIES["parts"].tokenizer())
    assert not labeller.finder.template.takes_text
    assert all(Labeller(FAMILIES[name].tokenizer()).finder.template.takes_text for name in FAMILIES if name != "parts")


# --- the short way --------------------------------------------------------------------------------------------------


def phi3():
    template = FAMILIES["phi"].template
    return rstrip_tokenizer(template, "<|assistant|>"), rstrip_tokenizer(template, "<|end|>")


SHORT = {name: family.tokenizer() for name, family in FAMILIES.items()}
SHORT |= {"phi3_prompt": phi3()[0], "phi3_end": phi3()[1]}
# Reply and prompt join in one token (" is"), or in one control token.
SHORT["spaced"] = Family(SPACED).tokenizer()
SHORT["longer"] = Family(FAMILIES["cohere"].template, (*FAMILIES["cohere"].tokens, "<|resp|>1")).tokenizer()
SHORT["lacks_bytes"] = lacking_bytes(FAMILIES["chatml"].template)
SHORT["sentencepiece"] = sentencepiece_like_tokenizer(FAMILIES["mistral"].template)


@st.composite
def batches(draw):
    """Conversations of a few shapes, so that all but the first of each have a shape to go by."""
    found = []
    for _ in range(draw(st.integers(2, 6))):
        turns = draw(st.integers(1, 2))
        text = st.one_of(TEXT, st.sampled_from(["is four", "1 is", "é"]))
        contents = draw(st.lists(text, min_size=2 * turns, max_size=2 * turns))
        messages = conversation(*contents, system=draw(st.none() | TEXT))
        if draw(st.integers(0, 4)) == 0:
            messages[-1]["train"] = False
        found.append({"messages": messages})
    return found


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("name", SHORT)
def test_the_short_way_gives_what_the_long_way_gives(name, loss_on):
    short, long = (Labeller(SHORT[name], loss_on, short_way) for short_way in (True, False))

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(batches())
    def check(conversations):
        for one, other in zip(short.label(conversations), long.label(conversations), strict=True):
            if isinstance(other, UnusableRow):
                assert str(one) == str(other)
                continue
            assert np.array_equal(one.ids, other.ids) and np.array_equal(one.labels, other.labels)
            assert one.replies == other.replies

    check()


GOES_SHORT = sorted({*FAMILIES} - {"vicuna", "plain", "parts", "qwen_think"})


@pytest.mark.parametrize("name", GOES_SHORT)
def test_the_usual_templates_go_the_short_way(name):
    labeller = Labeller(SHORT[name])
    conversations = [
        {"messages": conversation(f"Where is {number}?", "Here é.", "Sure?", "Yes.")} for number in range(9)
    ]
    assert len(labeller._short_way(conversations).rows) == 9


def test_a_template_that_looks_at_contents_goes_the_long_way():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content'] +", "('Calm: ' if 'please' in message['content'] else '') + message['content'] +"
    )
    labeller = Labeller(tokenizer)
    conversations = [{"messages": conversation(text, "Yes.")} for text in ("a?", "b, please?", "c?")]
    assert labeller._short_way(conversations).rows.tolist() == [0, 2]
    texts = [tokenizer.decode(found.ids) for found in labeller.label(conversations)]
    assert "Calm: b, please?" in texts[1] and "Calm" not in texts[0] + texts[2]
