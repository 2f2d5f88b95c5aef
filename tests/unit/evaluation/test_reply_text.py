"""Replies as text: a reply that is its reference, token for token, scores 1 whatever the family and the metric."""

import pytest

import family_templates
from adder.core.labels import IGNORE_INDEX
from adder.evaluation import metrics
from adder.evaluation.reply_text import ReplyReader
from adder.evaluation.run import score_reply
from adder.tokenization.chat_template import UnusableRow
from adder.tokenization.labels import Labeller
from conversation_cases import reply, user
from template_matrix import CASES, TOOLS, WITH_TOOLS, runs, tokenizer_for, trl_templates
from tiny import tiny_tokenizer

SOURCES = {
    **{name: trl_templates()[file].read_text() for name, file in family_templates.SHIPPED.items()},
    **family_templates.OWN,
}
METRICS = [name for name, score in metrics.SCORES.items() if isinstance(score, metrics.ReplyScore) and not score.form]
JSON = {"json": [user("Which?"), reply('{"city": "Ulm", "days": 2}', reasoning_content="They ask for Ulm; hmm.")]}


def learnt(labeller, messages, tools):
    """The ids of each reply that is learnt."""
    found = labeller.label([{"messages": messages, "tools": tools} if tools else {"messages": messages}])[0]
    if isinstance(found, UnusableRow):
        return []
    return [
        one.ids[start:end].tolist()
        for one in found
        for start, end in runs([*one.labels.tolist(), IGNORE_INDEX], one.replies)
    ]


@pytest.mark.parametrize("family", SOURCES)
def test_what_is_learnt_scores_1_through_the_evaluations_own_reading(family):
    tokenizer = tokenizer_for(SOURCES[family])
    labeller, reader = Labeller(tokenizer), ReplyReader(tokenizer)
    for cases in (*CASES.values(), JSON):
        for name, messages in cases.items():
            for ids in learnt(labeller, messages, TOOLS if name in WITH_TOOLS else None):
                reference, written = reader.text(ids[:-1]), reader.text([*ids, *ids], {ids[-1]})
                chosen = ["exact_match", "json"] if name == "json" else METRICS
                scores = score_reply(chosen, reference, written, reader.answer)
                assert set(scores.values()) == {1}, (name, reference, scores)


@pytest.mark.parametrize(
    "family", ["Qwen3", "gpt-oss", "Magistral", "Gemma 4 (small)", "DeepSeek R1 distills", "GLM 4.5 to 4.7"]
)
def test_the_answer_is_what_stands_behind_the_reasoning(family):
    tokenizer = tokenizer_for(SOURCES[family])
    labeller, reader = Labeller(tokenizer), ReplyReader(tokenizer)
    (plain,) = learnt(labeller, [user("2 + 2?"), reply("It is 4.")], None)
    (thought,) = learnt(labeller, [user("2 + 2?"), reply("It is 4.", reasoning_content="Add.")], None)
    (other,) = learnt(labeller, [user("2 + 2?"), reply("It is 4.", reasoning_content="Two twos.")], None)
    texts = [reader.text(ids[:-1]) for ids in (plain, thought, other)]
    assert [reader.answer(text) for text in texts] == ["It is 4."] * 3
    assert "Add." in texts[1] and "Two twos." in texts[2]
    shown = reader.shown(texts[1])
    assert "Add." in shown and shown.endswith("It is 4.") and not reader.control.spans(shown)
    assert score_reply(["exact_match"], texts[1], texts[2], reader.answer) == {"exact_match": 1}


def test_reasoning_is_taken_off_both_sides():
    text = "<think>\nAdd.\n</think>\n\nIt is 4."
    assert score_reply(["exact_match", "rouge_l", "chrf"], text, text) == {"exact_match": 1, "rouge_l": 1, "chrf": 1}
    assert score_reply(["exact_match"], text, "It is 4.") == {"exact_match": 1}


def test_a_model_without_a_template_is_read_too():
    reader = ReplyReader(tiny_tokenizer(None))
    ids = reader.tokenizer("It is 4.<|im_end|>", add_special_tokens=False).input_ids
    assert reader.answer(reader.text(ids, {ids[-1]})) == "It is 4."
