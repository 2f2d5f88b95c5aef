"""The stage "task": a model's score on a task of lm-eval's or of the user's."""

from typing import Self

from pydantic import Field, model_validator

from adder.core.file_digests import FileDigests
from adder.core.section import Section
from adder.core.stage_spec import Memory, StageSpec
from adder.evaluation.tasks.task_files import data_files, task_files


class TaskSettings(Section):
    """A task of lm-eval's, or one of your own in its format, before and after training."""

    name: str | None = None
    """Name of one of lm-eval's tasks, such as `gsm8k`, `ifeval` or `mmlu`."""
    path: str | None = None
    """A task of your own: a YAML file in lm-eval's format."""
    data: dict[str, str] | None = Field(default=None, min_length=1)
    """Local files by split (`{test: data/test.jsonl}`) in place of the data set that the task fetches."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in the prompt; the task's own number without it."""
    limit: int | None = Field(default=None, ge=2)
    """Only the first so many of its questions."""
    chat_template: bool = True
    """Ask through the model's chat template."""
    metric: str | None = None
    """The score that counts, where a task has several; its first without it."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.name is None) == (self.path is None):
            raise ValueError("a task has either `name` or `path`")
        return self


class EvaluationTask(TaskSettings):
    """A task of lm-eval's, or one of your own in its format, before and after training."""

    max_drop: float | None = Field(default=None, ge=0, le=1)
    """Regression guard: the run fails if the score falls by more than this from base to tuned."""


def _identity(settings: TaskSettings, where: str, digests: FileDigests) -> dict[str, object]:
    """A task's own files count by their names and content."""
    identity = settings.model_dump(mode="json")
    if settings.path is not None:
        digests.of_named(settings.path, f"{where}.path")
    data = {split: digests.named(data_files(settings, split, digests.root)) for split in settings.data or {}}
    files = digests.named(task_files(settings, digests.root))
    return {**identity, "path": settings.path and settings.path.rsplit("/", 1)[-1], "data": data, "files": files}


TASK = StageSpec(
    name="task",
    rule="evaluate_task",
    run="adder.evaluation.tasks.run",
    settings=TaskSettings,
    section="evaluate.tasks",
    message="Evaluating on a task",
    result=lambda found: ", ".join(f"{name} {value:.3g}" for name, value in found.items()),
    reads={"model": ("model/",), "tokenize": ("tokenizer/", "tokenize.json")},
    variants={"base": {"model": "model"}, "tuned": {"model": "merge"}},
    identity=_identity,
    shows={"task": "scores.json", "samples": "samples.jsonl"},
    gpu=True,
    threads=None,
    minutes=480,
    memory=Memory(base_mb=8000, bytes_per_parameter=2.0),
)
