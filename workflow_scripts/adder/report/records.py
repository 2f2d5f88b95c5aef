"""What the report reads of every stage alike, and what it shows of several: the record, choices, scores."""

from typing import Any, NotRequired, Required, TypedDict


class OutputFile(TypedDict):
    """A file that a stage wrote."""

    digest: str
    bytes: int
    mtime_ns: int


class StageRecord(TypedDict):
    """stage.json, written when a stage has finished: what it was made from, what it made, how long it took.

    versions: of the libraries. hardware: of the machine. attempts: where it was interrupted. memory in bytes.
    """

    stage: str
    key: str
    settings: dict[str, Any]
    outputs: dict[str, OutputFile]
    seconds: float
    restored: bool
    finished_at: str
    peak_memory_bytes: int
    versions: dict[str, str]
    hardware: dict[str, Any]
    peak_gpu_memory_bytes: NotRequired[int]
    attempts: NotRequired[int]
    energy_joules: NotRequired[float]


class ChoiceRecord(TypedDict):
    """A choice as stages write it (see core.choice)."""

    value: Any
    reason: str
    alternatives: list[dict[str, Any]]


class Score(TypedDict):
    """A score with its 95 % interval over `n` rows."""

    value: float | None
    ci95: list[float] | None
    n: int
    stderr: NotRequired[float]


class MetricsRow(TypedDict, total=False):
    """A row of metrics.jsonl."""

    step: Required[int]
    epoch: float
    loss: float
    grad_norm: float | None
    learning_rate: float
    tokens_per_second: float
    eval_loss: float
    exact_match: float


class SampleRow(TypedDict):
    """A reply while training."""

    step: int
    id: str
    prompt: str
    reference: str
    reply: str
    exact_match: float
    finished: bool


class Diagnosis(TypedDict):
    """What the doctor found."""

    name: str
    severity: str
    step: int | None
    evidence: str
    cause: str
    change: str


class PreflightFigures(TypedDict):
    """What a look at the first pack measured."""

    batch: Any
    tokens: int
    labelled: int
    labelled_share: float
    base_loss: float
    ln_vocabulary: float
    layers: int
    layers_without_gradient: list[str]
    disk: dict[str, dict[str, int]]
    estimated_seconds: int
    warnings: NotRequired[list[str]]


class EffectiveBatch(TypedDict):
    """Examples a step."""

    asked: int
    mean_examples: float


class TrainRecord(TypedDict):
    """train.json."""

    steps: int
    planned_steps: int
    epochs: float
    tokens_per_epoch: int
    tokens_per_second: float
    first_loss: float
    final_loss: float
    eval_loss: float | None
    effective_batch: EffectiveBatch
    trainable_parameters: int
    total_parameters: int
    resumed_from: int | None
    kept: ChoiceRecord
    preflight: PreflightFigures
    diagnoses: NotRequired[list[Diagnosis]]
    advice: NotRequired[list[str]]


class GenerationRecord(TypedDict):
    """How the replies came about."""

    seconds: float
    new_tokens: int
    truncated: int


class ScoresRecord(TypedDict):
    """scores.json of a model on the held-out rows."""

    heldout: dict[str, Any]
    metrics: ChoiceRecord
    lm_eval_version: str
    generation: NotRequired[GenerationRecord]
    max_new_tokens: NotRequired[ChoiceRecord]


class HeldoutSample(TypedDict):
    """A row of samples.jsonl; of a task, it has the metrics by name too."""

    id: str
    prompt: Any
    reference: str
    reply: str | None
    loss: float
    labelled_tokens: int
    group: NotRequired[str]
    exact_match: NotRequired[int]
    json_valid: NotRequired[int]
    rouge_l: NotRequired[float]
    chrf: NotRequired[float]
    fields: NotRequired[dict[str, Any]]


class TaskRecord(TypedDict):
    """scores.json of a model on a task."""

    task: str
    version: Any
    metric: str
    higher_is_better: bool
    metrics: dict[str, Score]
    subtasks: dict[str, Score] | None
    num_fewshot: int
    limit: int | None
    chat_template: bool
    prompts_cut: int


class JudgeRecord(TypedDict):
    """judge.json."""

    model: str
    base_url: str
    criteria: str | None
    failed: int
    pairs: int
    wins: int
    losses: int
    ties: int
    inconsistent: int
    win_rate: Score
    p: float
    verdict: str
    sentence: str


class Judgement(TypedDict):
    """A row of judgements.jsonl."""

    id: str
    prompt: list[Any]
    reference: str
    base: str
    tuned: str
    first: str
    second: str
    reasons: list[str]
