"""What is left of Snakemake's errors."""

import pytest

from adder.workflow.terminal.snakemake_text import configuration_mistake, is_of_failed_job, killed_by, reason, sentence

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
        (
            'Traceback (most recent call last):\n\n  File "/a.py", line 1, in f\n    open(x)\n    ^^^^^\n\n'
            "PermissionError: [Errno 13] Permission denied: '/a b/.snakemake'\n",
            "/a b/.snakemake: Permission denied; give yourself the right to it, or name another place",
        ),
        (
            'InputFunctionException in rule push in file "/a/Snakefile", line 48:\nError:\n  WorkflowError:\n'
            '    push: no run says where to\nWildcards:\n\nTraceback:\n  File "/a/x.smk", line 23, in uploads',
            "push: no run says where to",
        ),
        (
            "OSError: [Errno 28] No space left on device",
            "the disk: No space left on device; make room, then the same command goes on",
        ),
        ("OSError: [Errno 5] Input/output error", "Input/output error"),
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


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Missing output files: a, b; Input files updated by another job: c", "not made yet"),
        (
            "Updated input files: a; Params have changed since last execution",
            "what it reads has changed, its settings have changed",
        ),
        ("Something new: a b", "Something new"),
        ("", ""),
    ],
)
def test_a_reason_without_its_files(given, expected):
    assert reason(given) == expected


def test_the_signal_that_ended_a_process():
    assert killed_by("Command 'python' died with <Signals.SIGKILL: 9>.") == "SIGKILL"
    assert killed_by(FAILED) is None


@pytest.mark.parametrize(
    "option", [["--configfile", "my.yaml"], ["--configfile=my.yaml"], ["--configfiles", "my.yaml"]]
)
def test_a_target_behind_the_configuration_is_told_to_go_before_it(tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("model: {source: x}\n")
    assert configuration_mistake(["report", "--cores", "1", *option, "-n"]) is None
    if "=" not in option[0]:
        told = configuration_mistake(["--cores", "1", *option, "merged_model"])
        assert told is not None and told.startswith("merged_model was taken for a configuration file")
        assert "snakemake merged_model --cores 1 --configfile my.yaml" in told


def test_a_configuration_that_cannot_be_read_says_where(tmp_path):
    file = tmp_path / "my.yaml"
    assert str(configuration_mistake(["--configfile", str(file)])).startswith(f"{file}: can't be read (No such file")
    file.write_text("a: [")
    assert "line 1, column" in str(configuration_mistake(["--configfile", str(file)]))
