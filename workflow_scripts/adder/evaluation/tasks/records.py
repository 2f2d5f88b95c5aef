"""What the stage "task" leaves for the report: scores.json, and the lines of samples.jsonl."""

from typing import TypedDict

from adder.core.choice import ChoiceRecord
from adder.core.intervals import Estimate


class SubtaskScore(TypedDict):
    """The mean of one member of a group, over n questions."""

    value: float
    n: int


class TaskScoresRecord(TypedDict):
    """scores.json.

    metric: the one that counts, by its name in `metrics`. subtasks: by name, of a group. prompts_cut: prompts that lost
    their beginning, to fit the context.
    """

    task: str
    version: float | str | None
    metric: str
    higher_is_better: bool
    metrics: dict[str, Estimate]
    subtasks: dict[str, SubtaskScore] | None
    num_fewshot: int
    limit: int | None
    chat_template: bool
    prompts_cut: int
    lm_eval_version: str
    compute_dtype: ChoiceRecord
    seconds: float


class TaskSample(TypedDict):
    """A line of samples.jsonl. Beside these keys stand the question's scores, each under its metric's name.

    reply: None where the task compares likelihoods of one text.
    """

    id: str
    prompt: str
    reference: str
    reply: str | None
