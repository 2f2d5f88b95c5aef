"""scores.json of a task has the keys of its record, and no others."""

from adder.evaluation.tasks.records import TaskSample, TaskScoresRecord
from task_stage import run


def test_the_scores_and_samples_of_a_task(inputs, own_tasks, tmp_path):
    scores, samples = run(inputs, tmp_path / "out", path=str(own_tasks / "capitals.yaml"), limit=2)
    assert set(scores) == TaskScoresRecord.__required_keys__
    assert set(samples[0]) == {*TaskSample.__required_keys__, *scores["metrics"]}
