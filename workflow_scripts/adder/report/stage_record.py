"""What the report reads of every stage alike: the record that it leaves when it has finished."""

from typing import Any, NotRequired, TypedDict


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
