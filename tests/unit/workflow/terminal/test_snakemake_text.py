"""What is left of Snakemake's errors."""

import pytest

from adder.workflow.terminal.snakemake_text import is_of_failed_job, killed_by, sentence

FAILED = """CalledProcessError in file "/a/rules/stages.smk", line 70:
Command 'set -euo pipefail;  /venv/python /a/.snakemake/scripts/x.run_stage.py' returned non-zero exit status 1.
  File "/a/rules/stages.smk", line 70, in __rule_train_adapter"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'WorkflowError in file "/a b/rules/run_inputs.smk", line 23:\npush: no run says where to',
            "push: no run says where to",
        ),
        ("MissingRuleException:\nNo rule to produce nonsense", "No rule to produce nonsense"),
        ('ValueError in file "x.smk", line 3:\nwrong\n  File "x.smk", line 3, in <module>', "wrong"),
        ("Error: one line", "Error: one line"),
        ("WorkflowError:", "WorkflowError:"),
    ],
)
def test_the_sentence_alone(text, expected):
    assert sentence(text) == expected


def test_what_says_only_that_a_job_failed():
    assert is_of_failed_job(FAILED)
    assert is_of_failed_job("Exiting because a job execution failed. Look above for error messages")
    assert is_of_failed_job("WorkflowError:\nAt least one job did not complete successfully.")
    assert not is_of_failed_job("WorkflowError:\npush: no run says where to")


def test_the_signal_that_ended_a_process():
    assert killed_by("Command 'python' died with <Signals.SIGKILL: 9>.") == "SIGKILL"
    assert killed_by(FAILED) is None
