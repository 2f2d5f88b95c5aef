"""Chat templates of real families: each conversation comes out right, or is refused with the reason listed here."""

import importlib.util
import re
from pathlib import Path

import pytest

from adder.tokenization.labels import Labeller
from chat_families import (
    TOOLS,
    label,
    prompt_ids,
)
from conversation_cases import (
    CONVERSATIONS,
    segments,
)
from tiny import tiny_tokenizer

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
