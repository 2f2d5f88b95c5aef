"""What the report reads of every stage alike, and what it shows of several: the record, choices, scores."""

from typing import Any, NotRequired, TypedDict

from adder.training.records import ChoiceRecord


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


class Score(TypedDict):
    """A score with its 95 % interval over `n` rows."""

    value: float | None
    ci95: list[float] | None
    n: int
    stderr: NotRequired[float]


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
