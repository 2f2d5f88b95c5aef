"""A job's time limit. Slurm's commands are stood in for here; tests/slurm asks the real ones."""

import pytest

from adder.workflow import slurm_job


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1:25", 85), ("2:00:00", 7200), ("1-02:03:04", 93784), ("UNLIMITED", None), ("INVALID", None), ("", None)],
)
def test_times_are_read_as_slurm_writes_them(text, seconds):
    assert slurm_job.seconds(text) == seconds


@pytest.fixture
def answers(monkeypatch, tmp_path):
    """Let `squeue` and `scontrol` be a script that says and does as asked."""

    def let(text: str, status: int = 0) -> None:
        for name in ("squeue", "scontrol"):
            (tmp_path / name).write_text(f"#!/bin/sh\necho '{text}'\nexit {status}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setenv("SLURM_JOB_ID", "7")

    return let


def test_time_is_up_near_the_limit_of_a_job_that_nobody_ends(answers):
    for text, up in (
        ("RUNNING|2:59", True),
        ("RUNNING|3:01", False),
        ("COMPLETING|0:10", False),
        ("RUNNING|UNLIMITED", False),
    ):
        answers(text)
        assert slurm_job.time_is_up() == up, text
    answers("slurm_load_jobs error", status=1)
    assert not slurm_job.time_is_up()


def test_outside_slurm_no_time_is_ever_up(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert slurm_job.seconds_left() is None and not slurm_job.time_is_up()


def test_a_cluster_that_puts_no_job_back_says_so(answers):
    answers("")
    assert slurm_job.put_back()
    answers("Requested operation is presently disabled", status=1)
    assert not slurm_job.put_back()
