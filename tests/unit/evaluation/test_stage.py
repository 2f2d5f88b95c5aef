"""What the declarations of "evaluate" and "judge" refuse."""

import pytest
from pydantic import ValidationError

from adder.core.errors import UserError
from adder.core.file_digests import FileDigests
from adder.evaluation.stage import EVALUATE, JUDGE, EvaluateSettings, JudgeSettings


def test_a_key_in_the_judges_address_is_refused(tmp_path):
    settings = JudgeSettings(base_url="https://judge.example/v1?api_key=abc", model="judge-1")
    with pytest.raises(UserError, match=r"evaluate.judge.base_url: .*looks like a secret"):
        JUDGE.identity(settings, "evaluate.judge", FileDigests(tmp_path / "digests.json", tmp_path))


def test_one_row_is_too_few_and_metrics_are_those_of_the_registry():
    for wrong in ({"max_samples": 1}, {"metrics": ["bleu"]}, {"batch_size": 0}):
        with pytest.raises(ValidationError):
            EvaluateSettings(**wrong)
    assert EvaluateSettings(metrics=["chrf"]).metrics == ["chrf"]


def test_base_and_tuned_are_evaluated_alike():
    assert dict(EVALUATE.variants) == {"base": {"model": "model"}, "tuned": {"model": "merge"}}
