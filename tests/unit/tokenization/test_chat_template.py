"""Which chat template is used, and the forms in which conversations are given to it."""

import pytest

from adder.core.errors import UserError
from adder.tokenization.chat_template import NAMED, ChatTemplate, choose_template, set_variables
from adder.tokenization.labels import Labeller
from adder.tokenization.stage import NAMED_TEMPLATES
from chat_families import (
    FAMILIES,
    TOOLS,
    bos_adding,
    conversation,
    label,
    labelled_text,
    sentencepiece_like_tokenizer,
)
from conversation_cases import (
    CONVERSATIONS,
)
from tiny import tiny_tokenizer


def test_the_date_does_not_change_what_is_written(labellers):
    text = labellers["llama3"].finder.template.render(conversation("a?", "A."))
    assert "Today: 26 Jul 2024" in text


@pytest.mark.parametrize("extra", [{}, {"add_generation_prompt": True}])
@pytest.mark.parametrize("name", FAMILIES)
def test_rendering_is_that_of_apply_chat_template(labellers, name, extra):
    messages = conversation("Where?", "Here.", "Sure?", system="Be brief.")
    tokenizer = labellers[name].tokenizer
    template = ChatTemplate(tokenizer)
    taken = [template.taken(message) for message in messages]
    assert template.render(messages, prompt=bool(extra)) == tokenizer.apply_chat_template(
        taken, tokenize=False, **extra
    )


def test_models_without_a_template_get_chatml_where_they_can_express_it():
    tokenizer = tiny_tokenizer(None)
    assert choose_template(tokenizer, None) == "chatml"
    text = tokenizer.apply_chat_template(conversation("a?", "A."), tokenize=False)
    assert text == "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nA.<|im_end|>\n"


def test_other_models_without_a_template_get_the_plain_one_and_no_new_tokens():
    tokenizer = sentencepiece_like_tokenizer(None)
    size = len(tokenizer)
    assert choose_template(tokenizer, None) == "plain" and len(tokenizer) == size
    messages = conversation("a?", "A.", "b?", "B.")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "### User:\na?\n\n### Assistant:\nA.</s>\n\n### User:\nb?\n\n### Assistant:\nB.</s>"
    assert text.startswith(tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True))
    assert labelled_text(tokenizer, label(Labeller(tokenizer), messages)[1]) == "A.</s>B.</s>"
    tokenizer.chat_template = tokenizer.eos_token = None
    with pytest.raises(UserError, match="tokenize.chat_template"):
        choose_template(tokenizer, None)


def test_bos_stands_in_a_named_template_where_the_tokenizer_adds_it():
    tokenizer = bos_adding(sentencepiece_like_tokenizer(None))
    choose_template(tokenizer, "plain")
    ids = label(Labeller(tokenizer), conversation("a?", "A."))[0]
    assert ids[0] == tokenizer.bos_token_id and (ids == ids[0]).sum() == 1


def test_a_named_template_can_be_asked_for():
    tokenizer = tiny_tokenizer()
    assert choose_template(tokenizer, "plain") == "plain" and "### Assistant" in tokenizer.chat_template
    assert set(NAMED) == set(NAMED_TEMPLATES)
    with pytest.raises(UserError, match=r"chatml needs the tokens <\|im_end\|>, <\|im_start\|>"):
        choose_template(sentencepiece_like_tokenizer(None), "chatml")


def test_a_template_from_a_file_is_used_or_refused_with_its_name(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    tokenizer = tiny_tokenizer()
    assert choose_template(tokenizer, str(path)) == "file"
    assert labelled_text(tokenizer, label(Labeller(tokenizer), conversation("a?", "A."))[1]) == "A.<|im_end|>"
    with pytest.raises(UserError, match="missing.jinja"):
        choose_template(tokenizer, str(tmp_path / "missing.jinja"))
    path.write_text("{% for m in messages %}\n{{ m.content }")
    choose_template(tokenizer, str(path))
    with pytest.raises(UserError, match="line 2"):
        Labeller(tokenizer)


def test_contents_are_given_as_parts_where_a_template_needs_them():
    labeller = Labeller(FAMILIES["parts"].tokenizer())
    assert not labeller.finder.template.takes_text
    assert all(Labeller(FAMILIES[name].tokenizer()).finder.template.takes_text for name in FAMILIES if name != "parts")


def test_reasoning_without_a_place_in_the_template_is_written_into_the_reply():
    labeller = Labeller(FAMILIES["chatml"].tokenizer())
    assert not labeller.finder.template.folds_reasoning
    _, labels, _ = label(labeller, CONVERSATIONS["reasoning"][:2])
    assert labelled_text(labeller.tokenizer, labels) == "<think>\nI saw it.\n</think>\n\nHere, I think.<|im_end|>"
    assert labeller.finder.template.folds_reasoning


def test_template_variables_become_defaults_that_a_caller_can_still_set():
    tokenizer = tiny_tokenizer(
        "{%- if deep %}{{ 'deep ' }}{%- endif %}{%- macro level() %}{{ effort }}{% endmacro %}\n"
        "{% for message in messages %}{{ level() + message.content }}{% endfor %}"
    )
    set_variables(tokenizer, {"deep": True, "effort": 'é"\n'})
    messages = [{"role": "user", "content": "a?"}]
    assert ChatTemplate(tokenizer).render(messages) == 'deep é"\na?'
    assert tokenizer.apply_chat_template(messages, tokenize=False) == 'deep é"\na?'
    assert tokenizer.apply_chat_template(messages, tokenize=False, deep=False, effort="") == "a?"
    with pytest.raises(UserError, match="reads no variable 'depth'; it reads deep, effort"):
        set_variables(tokenizer, {"depth": 1})
    plain = tiny_tokenizer()
    set_variables(plain, {})
    assert plain.chat_template == tiny_tokenizer().chat_template


def test_named_templates_are_chosen_as_transformers_does_and_kept():
    tokenizer = tiny_tokenizer()
    default = tokenizer.chat_template
    tokenizer.chat_template = {
        "default": default,
        "tool_use": "{{ tools | tojson }}" + default,
        "rag": "{{ documents }}",
    }
    assert choose_template(tokenizer, None) == "own" and tokenizer.chat_template["rag"] == "{{ documents }}"
    template, messages = ChatTemplate(tokenizer), conversation("a?", "A.")
    assert "get_weather" not in template.render(messages) and "get_weather" in template.render(messages, tools=TOOLS)
    _, labels, _ = label(Labeller(tokenizer), messages, TOOLS)
    assert labelled_text(tokenizer, labels) == "A.<|im_end|>"
    tokenizer.chat_template = {"tool_use": default}
    with pytest.raises(UserError, match="none is the default"):
        choose_template(tokenizer, None)
