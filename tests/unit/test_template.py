import importlib.util
import re
from pathlib import Path

import pytest

from adder.errors import UserError
from adder.template import ChatTemplate, choose_template
from adder.tokenize import Labeller
from chat_families import (
    FAMILIES,
    conversation,
    labelled_text,
    prompt_ids,
    sentencepiece_like_tokenizer,
    stopped_clock,  # noqa: F401
)  # fmt: skip
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def labellers():
    return {name: Labeller(family.tokenizer()) for name, family in FAMILIES.items()}


def test_the_date_does_not_change_what_is_written(labellers):
    text = labellers["llama3"].template.render(conversation("a?", "A."))
    assert "Today: 26 Jul 2024" in text


@pytest.mark.parametrize("extra", [{}, {"add_generation_prompt": True}])
@pytest.mark.parametrize("name", FAMILIES)
def test_rendering_is_that_of_apply_chat_template(labellers, name, extra):
    messages = conversation("Where?", "Here.", "Sure?", system="Be brief.")
    tokenizer = labellers[name].tokenizer
    expected = tokenizer.apply_chat_template(messages, tokenize=False, **extra)
    assert ChatTemplate(tokenizer).render(messages, prompt=bool(extra)) == expected


def trl_templates() -> list[Path]:
    return sorted((Path(importlib.util.find_spec("trl").origin).parent / "chat_templates").glob("*.jinja"))


# Templates that TRL ships and that can't be used for text conversations, each with the reason that a user must see.
REFUSED = {
    "finished reply lacks": ("deepseek_r1", "deepseekv3", "nemotron_3_"),  # their prompts open a reasoning block
    "no end-of-turn token": ("glm4moe.",),
    "refuses this conversation": ("llava_next",),  # contents must be lists of parts
    "0 times": ("idefics3.", "smolvlm."),
    "leave out a reply": ("idefics3_training", "smolvlm_training"),
}


@pytest.mark.parametrize("path", trl_templates(), ids=lambda path: path.stem)
def test_the_real_templates_that_trl_ships(path):
    source = path.read_text()
    tokenizer = tiny_tokenizer(source)
    names = re.findall(r"<\|[^'\"{}\s]*?\|>|<｜[^｜]*｜>|<[a-z_]*_turn>|<\|turn>|<turn\|>|<end_of_utterance>", source)
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(set(names) - {"<|im_end|>", "<|im_start|>"})})
    tokenizer.bos_token = "<|endoftext|>"
    if "eos_token" in source:
        tokenizer.eos_token = "<|endoftext|>"
    messages = conversation("Where is it?", "Here, I think.", "Sure?", "Yes é🎉")
    result = Labeller(tokenizer).label([messages])[0]
    refusal = next((reason for reason, starts in REFUSED.items() if path.name.startswith(starts)), None)
    if refusal:
        assert isinstance(result, str) and refusal in result
        return
    assert not isinstance(result, str), result
    ids, labels, _ = result
    text = labelled_text(tokenizer, labels)
    first, second = text.split("Here, I think.")
    middle, last = second.split("Yes é🎉")
    assert "Where" not in text and "Sure" not in text
    assert "Here" not in first and not text.endswith("\n")
    for end in (middle, last):
        assert tokenizer(end, add_special_tokens=False).input_ids[0] in tokenizer.all_special_ids
    prompt = prompt_ids(tokenizer, messages[:3])
    assert ids[: len(prompt)].tolist() == prompt and (labels[len(prompt) - 1], labels[len(prompt)]) == (
        -100,
        ids[len(prompt)],
    )


def test_models_without_a_template_get_chatml_where_they_can_express_it():
    tokenizer = tiny_tokenizer(None)
    assert choose_template(tokenizer, None) == "chatml"
    text = tokenizer.apply_chat_template(conversation("a?", "A."), tokenize=False)
    assert text == "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nA.<|im_end|>\n"
    other = sentencepiece_like_tokenizer(None)
    with pytest.raises(UserError, match=r"<\|im_end\|>, <\|im_start\|>.*tokenize\.chat_template"):
        choose_template(other, None)


def test_a_template_from_a_file_is_used_or_refused_with_its_name(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    tokenizer = tiny_tokenizer()
    assert choose_template(tokenizer, str(path)) == "file"
    assert labelled_text(tokenizer, Labeller(tokenizer).label([conversation("a?", "A.")])[0][1]) == "A.<|im_end|>"
    with pytest.raises(UserError, match="missing.jinja"):
        choose_template(tokenizer, str(tmp_path / "missing.jinja"))
    path.write_text("{% for m in messages %}\n{{ m.content }")
    choose_template(tokenizer, str(path))
    with pytest.raises(UserError, match="line 2"):
        Labeller(tokenizer)
