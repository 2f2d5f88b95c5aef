"""A line a stage, whatever its record says."""

import io

import pytest

from adder.core.progress import duration
from adder.workflow.stages import SPECS
from adder.workflow.terminal.screen import Screen
from adder.workflow.terminal.story import Story, result

SUMMARIES = {
    "model": {"parameters": 134515008, "context_length": 8192},
    "data": {"rows": 820, "sources": 1, "unreadable": 0},
    "format": {"train": 620, "heldout": 200, "rejected": 3, "duplicates": 0},
    "tokenize": {"counts": {"train": {"tokens": 51206, "labelled": 21072}}, "rejected": 0},
    "lengths": {"max_seq_length": 256, "packing": True, "examples": 620, "packs": 214, "dropped": 2},
    "isolation": {"attention": {"value": "sdpa"}, "layers": 2, "of": 30},
    "train": {"steps": 214, "final_loss": 0.0074, "eval_loss": 0.0209, "tokens_per_second": 236.0},
    "merge": {"base": "original", "kl": 2e-6, "tolerance": 1e-3},
    "evaluate": {"exact_match": 0.86, "loss": 0.0162, "perplexity": 1.016},
    "task": {"acc": 0.5},
    "judge": {"win_rate": 0.6, "verdict": "better"},
    "report": {"verdict": "better", "sentence": "…"},
    "gguf": {"type": "q8_0", "bytes": 144e6},
}


@pytest.mark.parametrize("name", SPECS)
def test_every_stage_says_what_came_out_of_it(name):
    said = result(SPECS[name], SUMMARIES[name])
    assert 6 < len(said) < 80 and not said.endswith(".") and "None" not in said


@pytest.mark.parametrize("name", SPECS)
def test_a_summary_of_another_version_is_shown_as_it_is(name):
    assert result(SPECS[name], {"some_figure": 1234.0, "parts": [1]}).endswith("1,234") or name in ("merge", "evaluate")


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (279, "4:39"), (3661, "1:01:01")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_job_that_failed_twice_is_told_once():
    written = io.StringIO()
    story = Story(Screen(written))
    story.job_begins(1, "Aligning", "x.txt", None)
    story.job_failed(1, "SLURM-job '7' failed, SLURM status is: 'TIMEOUT'")
    story.job_failed(1, "again")
    assert written.getvalue().count("TIMEOUT") == 1 and "again" not in written.getvalue()
