"""What the report knows of a run: what its stages left for it, read once and typed.

Each stage's declaration says in `shows` which of its files these are. Those that the report knows by name are fields of
RunFacts; what other stages show is in `other`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from adder.core.choice import ChoiceRecord
from adder.core.errors import UserError
from adder.core.files import read_json, read_jsonl
from adder.core.stage_record import StageRecord
from adder.data.model_types import ModelRecord
from adder.data.records import SourceRecord
from adder.evaluation.degenerate_replies import ReplyFaults, faults_of
from adder.evaluation.records import Judgement, JudgeRecord, SampleRecord, ScoresRecord
from adder.evaluation.tasks.records import TaskSample, TaskScoresRecord
from adder.formatting.records import Card, Reject
from adder.merging.records import ProofRecord
from adder.packing.records import LengthsRecord
from adder.report.doubts import Doubt, find_doubts
from adder.tokenization.records import TokenizeRecord
from adder.training.monitoring import doctor, preflight_warnings
from adder.training.monitoring.advice import advise
from adder.training.monitoring.reply_symptoms import reply_symptoms
from adder.training.monitoring.symptoms import Diagnosis
from adder.training.records import MetricsRow, SampleRow, TrainingFacts, TrainRecord
from adder.training.stage import TrainSettings

STAGES = (
    "model", "data", "format", "tokenize", "lengths", "train", "merge", "evaluate_base", "evaluate_tuned",
)  # fmt: skip
# What has a field of RunFacts, by the stage that shows it.
KNOWN = {
    "model": {"model"},
    "data": {"data"},
    "format": {"format", "rejects"},
    "tokenize": {"tokenize"},
    "lengths": {"lengths"},
    "train": {"train", "plan", "curve", "sampled"},
    "merge": {"merge"},
    "evaluate_base": {"evaluate", "samples"},
    "evaluate_tuned": {"evaluate", "samples"},
    "task": {"task", "samples"},
    "judge": {"judge", "judgements"},
}
TASK = re.compile(r"task_(base|tuned)_(\d+)")
SHOWN_REJECTS = 12

Shows = Mapping[str, Mapping[str, str]]
"""What each stage shows, by the name under which the report knows it: {stage: {name: file}}."""


Sample = TypeVar("Sample")


class Paired(NamedTuple, Generic[Sample]):
    """Both models' samples of one row."""

    id: str
    base: Sample
    tuned: Sample


PairedSample = Paired[SampleRecord]


class TaskFacts(NamedTuple):
    """Base and tuned model on a task beside the held-out rows."""

    base: TaskScoresRecord
    tuned: TaskScoresRecord
    samples: list[Paired[TaskSample]]


@dataclass(frozen=True)
class RunFacts:
    """The stages of one run, as far as the report shows them.

    folders and records (stage.json): of each stage, in the order in which a reader follows a run. rejects: the first
    rows that can't be used. curve: metrics of the training, a row a step or evaluation. sampled: replies on the way.
    diagnoses, advice, preflight_warnings: what doctor, advice and preflight say of the training, judged anew by what it
    left, and by the tuned model's replies. samples: replies of base and tuned to the held-out rows. faults: of the
    tuned replies. doubts: what stands against a good verdict. judge: None without one. other: what further
    stages show, {stage: {name: content}}.
    """

    folders: dict[str, Path]
    records: dict[str, StageRecord]
    model: ModelRecord
    data: list[SourceRecord]
    format: Card
    rejects: list[Reject]
    tokenize: TokenizeRecord
    lengths: LengthsRecord
    train: TrainRecord
    plan: dict[str, ChoiceRecord]
    curve: list[MetricsRow]
    sampled: list[SampleRow]
    diagnoses: list[Diagnosis]
    advice: list[str]
    preflight_warnings: list[str]
    merge: ProofRecord
    base: ScoresRecord
    tuned: ScoresRecord
    samples: list[PairedSample]
    faults: ReplyFaults
    doubts: list[Doubt]
    tasks: list[TaskFacts]
    judge: JudgeRecord | None
    judgements: list[Judgement]
    other: dict[str, dict[str, Any]]


def load(inputs: Mapping[str, Path], shows: Shows) -> RunFacts:
    """Read what the stages in the folders `inputs` show.

    `inputs`: of STAGES, of `task_base_0`, `task_tuned_0` and so on, of `judge` where there is one, and of any other.
    Raises UserError where a stage or one of its files is missing, and where base and tuned were evaluated on different
    rows.
    """
    missing = [stage for stage in STAGES if stage not in inputs]
    if missing:
        raise UserError(f"report: no folder given for {', '.join(missing)}; it needs {', '.join(STAGES)}")
    folders = {stage: inputs[stage] for stage in _in_order(inputs)}
    shown = _Shown(folders, shows)
    records: dict[str, StageRecord] = {stage: _read(folder / "stage.json") for stage, folder in folders.items()}
    train: TrainRecord = shown.json("train", "train")
    plan: dict[str, ChoiceRecord] = shown.json("train", "plan")
    curve: list[MetricsRow] = list(shown.lines("train", "curve"))
    sampled: list[SampleRow] = list(shown.lines("train", "sampled"))
    if "facts" not in train:
        raise UserError(f"report: {folders['train']} has nothing to judge the training by; an older version wrote it")
    settings = TrainSettings.model_validate(records["train"]["settings"])
    training = TrainingFacts(**train["facts"])
    samples: list[PairedSample] = paired_samples(
        shown.path("evaluate_base", "samples"), shown.path("evaluate_tuned", "samples")
    )
    faults = faults_of([sample.tuned for sample in samples])
    diagnoses = with_replies(doctor.diagnose(curve, sampled, training, settings), faults)
    card: Card = shown.json("format", "format")
    tasks = 1 + max((int(match[2]) for stage in folders if (match := TASK.fullmatch(stage))), default=-1)
    return RunFacts(
        folders=folders,
        records=records,
        model=shown.json("model", "model"),
        data=shown.json("data", "data"),
        format=card,
        rejects=list(islice(shown.lines("format", "rejects"), SHOWN_REJECTS)),
        tokenize=shown.json("tokenize", "tokenize"),
        lengths=shown.json("lengths", "lengths"),
        train=train,
        plan=plan,
        curve=curve,
        sampled=sampled,
        diagnoses=diagnoses,
        advice=advise(settings, training),
        preflight_warnings=preflight_warnings.warnings(train["preflight"], plan),
        merge=shown.json("merge", "merge"),
        base=shown.json("evaluate_base", "evaluate"),
        tuned=shown.json("evaluate_tuned", "evaluate"),
        samples=samples,
        faults=faults,
        doubts=find_doubts(diagnoses, faults, card["quality"]["overlap"]),
        tasks=[_task(number, shown) for number in range(tasks)],
        judge=shown.json("judge", "judge") if "judge" in folders else None,
        judgements=list(shown.lines("judge", "judgements")) if "judge" in folders else [],
        other=_others(shown),
    )


def paired_samples(base: Path, tuned: Path) -> list[Paired[Any]]:
    """Join the samples of two evaluations (their samples.jsonl) by id, in the tuned model's order.

    Raises UserError when they were not made from the same rows: a paired comparison would be meaningless.
    """
    base_rows = {row["id"]: row for row in read_jsonl(base)}
    tuned_rows = {row["id"]: row for row in read_jsonl(tuned)}
    if base_rows.keys() != tuned_rows.keys():
        apart = sorted(base_rows.keys() ^ tuned_rows.keys())
        raise UserError(
            f"report: base ({base.parent}) and tuned ({tuned.parent}) were evaluated on different rows, "
            f"{len(apart)} stand in just one of them, such as {apart[0]}"
        )
    return [Paired(id_, base_rows[id_], row) for id_, row in tuned_rows.items()]


def with_replies(diagnoses: Sequence[Diagnosis], faults: ReplyFaults) -> list[Diagnosis]:
    """The training's diagnoses, those of sampled replies replaced by those of all held-out ones."""
    found = reply_symptoms(faults, None, "tuned replies to held-out rows")
    names = {one["name"] for one in found}
    return [one for one in diagnoses if one["name"] not in names] + found


@dataclass(frozen=True)
class _Shown:
    """The files that stages show."""

    folders: dict[str, Path]
    shows: Shows

    def path(self, stage: str, name: str) -> Path:
        """Where a stage keeps what it shows under this name."""
        return self.folders[stage] / self.shows[stage][name]

    def json(self, stage: str, name: str) -> Any:
        """The content of a JSON file; raises UserError where it is missing."""
        return _read(self.path(stage, name))

    def lines(self, stage: str, name: str) -> Iterable[Any]:
        """The rows of a JSON-lines file; none where a stage had nothing to write."""
        path = self.path(stage, name)
        return read_jsonl(path) if path.exists() else ()

    def content(self, stage: str, name: str) -> Any:
        """What a stage shows, read by the ending of its name."""
        return list(self.lines(stage, name)) if self.path(stage, name).suffix == ".jsonl" else self.json(stage, name)


def _in_order(stages: Iterable[str]) -> list[str]:
    """Stages in the order in which a reader follows a run; Snakemake gives them by name."""

    def place(stage: str) -> tuple[int, int, str]:
        if stage in STAGES:
            return 0, STAGES.index(stage), ""
        if match := TASK.fullmatch(stage):
            return 1, int(match[2]), match[1]
        return (2 if stage == "judge" else 3), 0, stage

    return sorted(stages, key=place)


def _task(number: int, shown: _Shown) -> TaskFacts:
    names = [f"task_{who}_{number}" for who in ("base", "tuned")]
    base, tuned = (shown.json(name, "task") for name in names)
    return TaskFacts(base, tuned, paired_samples(*(shown.path(name, "samples") for name in names)))


def _others(shown: _Shown) -> dict[str, dict[str, Any]]:
    """What is shown and has no field, of the stages that show such."""
    found = {}
    for stage in shown.folders:
        known = KNOWN.get("task" if TASK.fullmatch(stage) else stage, set())
        found[stage] = {name: shown.content(stage, name) for name in shown.shows.get(stage, {}) if name not in known}
    return {stage: contents for stage, contents in found.items() if contents}


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError:
        raise UserError(f"report: {path} is missing; its stage did not finish, or an older version wrote it") from None
