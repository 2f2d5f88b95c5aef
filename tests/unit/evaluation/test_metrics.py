"""The registry of scores: what it chooses, what a reply gets, and what follows from it elsewhere."""

import json
from pathlib import Path

import pytest

from adder.core.errors import UserError
from adder.evaluation import metrics
from adder.report.scores import per_row
from adder.workflow import settings, settings_docs

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("references", "wanted", "chosen", "kind"),
    [
        (['{"a": 1}'], "auto", ["exact_match", "json"], "json"),
        (["#### 3"], "auto", ["exact_match", "final_answer"], "final_answer"),
        (["Yes."], "auto", ["exact_match", "rouge_l", "chrf"], "text"),
        ([], "auto", ["exact_match", "rouge_l", "chrf"], "text"),
        (['{"a": 1}'], ["exact_match"], ["exact_match"], "text"),  # then as text, character for character
        (['{"a": 1}'], ["chrf", "json", "chrf"], ["exact_match", "chrf", "json"], "json"),
        (["so\n#### 3"], ["rouge_l"], ["exact_match", "rouge_l"], "text"),
    ],
)
def test_metrics_follow_from_the_references_or_the_setting(references, wanted, chosen, kind):
    choice = metrics.choose_metrics(references, wanted)
    assert choice.value == chosen and metrics.kind_of(choice.value) == kind and choice.reason


@pytest.mark.parametrize("wanted", [["json"], ["exact_match", "final_answer"]])
def test_a_metric_that_the_references_have_no_form_for_is_refused(wanted):
    with pytest.raises(UserError, match=f"evaluate.metrics: '{wanted[-1]}' needs .* but one is 'Yes.'"):
        metrics.choose_metrics(['{"a": "#### 3"}', "Yes."], wanted)


@pytest.mark.parametrize(
    ("chosen", "reference", "reply", "scores"),
    [
        (["exact_match", "json"], '{"a": 1}', '{"a": 2}', {"exact_match": 0, "json_valid": 1}),
        (["exact_match", "json"], '{"a": 1}', "a: 1", {"exact_match": 0, "json_valid": 0}),
        (["exact_match", "json", "rouge_l"], '{"a": 1}', ' {"a":1}', {"exact_match": 1, "json_valid": 1, "rouge_l": 1}),
        (["exact_match", "final_answer"], "so\n#### 4", "#### 4.0", {"exact_match": 1}),
        (["exact_match", "rouge_l", "chrf"], "Yes.", " Yes.\n", {"exact_match": 1, "rouge_l": 1, "chrf": 1}),
        (["exact_match"], "Yes.", "yes.", {"exact_match": 0}),
    ],
)
def test_a_reply_gets_the_scores_that_were_chosen(chosen, reference, reply, scores):
    assert metrics.score_reply(chosen, reference, reply) == scores


def test_ratios_are_sums_over_rows():
    fields = {
        "a": {"expected": 1, "found": 1, "correct": True},
        "b": {"expected": 2, "found": None, "correct": False},
    }
    row = {"loss": 0.5, "labelled_tokens": 4, "fields": fields}
    assert metrics.field_f1(row) == (2, 3) and metrics.loss(row) == metrics.perplexity(row) == (2.0, 4)


def test_every_score_is_named_and_explained():
    for name, score in metrics.SCORES.items():
        assert score.name == name and score.label and score.hub
        assert len(score.meaning.split()) > 3 and not score.meaning.endswith(".")
        assert score.is_share or score.better == "lower"
    assert metrics.SCORES["exact_match"].meaning.startswith("replies that say what their reference says: the same")


@pytest.fixture
def brevity():
    """A score of somebody's, registered for one test."""

    @metrics.reply_score("Brevity", auto=True)
    def brevity(reference: str, reply: str) -> float:
        """How much shorter a reply is than its reference."""
        return 1 - min(1.0, len(reply) / max(1, len(reference)))

    yield brevity
    del metrics.SCORES["brevity"]


def test_one_function_makes_a_score(brevity):
    """Settings, evaluation and report take it from the registry."""
    assert metrics.metric_names()[-1] == "brevity"
    assert metrics.choose_metrics(["Yes."]).value[-1] == "brevity"
    scores = metrics.score_reply(["exact_match", "brevity"], "Well, yes.", "Yes.")
    assert scores == {"exact_match": 0, "brevity": pytest.approx(0.6)}
    assert per_row("brevity", [scores, scores]).tolist() == [scores["brevity"]] * 2


def test_the_settings_take_the_registrys_names_and_no_others():
    evaluate = json.loads(settings_docs.schema())["$defs"]["Evaluate"]["properties"]["metrics"]["anyOf"]
    assert evaluate[1]["items"]["enum"] == list(metrics.metric_names())
    with pytest.raises(UserError, match="evaluate.metrics.0: should be 'exact_match', 'json', .*found 'bleu'"):
        settings.load({"model": "x", "evaluate": {"metrics": ["bleu"]}})
