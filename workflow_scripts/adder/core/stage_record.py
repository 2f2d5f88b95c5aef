"""The record that every stage leaves when it has finished, stage.json: the runner writes it, the report reads it."""

from typing import Any, NotRequired, TypedDict

from adder.core.hardware import Machine


class OutputFile(TypedDict):
    """A file that a stage wrote."""

    digest: str
    bytes: int


class StageMeaning(TypedDict):
    """What decides a stage's result, known before it runs.

    identity: what stands for the settings in the key. asked_versions: of the libraries, where they are part of the key.
    inputs: digests of the files that are read, by parent and path. code: digest of the stage's modules.
    """

    stage: str
    key: str
    settings: dict[str, Any]
    identity: Any
    asked_versions: dict[str, str]
    inputs: dict[str, dict[str, str]]
    code: str


class StageRecord(StageMeaning):
    """What a stage was made from, what it made, how long it took.

    fingerprint: digest of what decides the result. summary: a few figures of the stage's own. versions: of the
    libraries. hardware: of the machine. attempts: where it was interrupted. seconds: of all attempts. Memory in bytes.
    energy_joules: of the parts of the machine that tell, which energy_parts has ("cpu", "memory", "gpu"); where there
    was one attempt alone. check: digest of the rest.
    """

    fingerprint: str
    summary: dict[str, Any]
    outputs: dict[str, OutputFile]
    seconds: float
    restored: bool
    finished_at: str
    peak_memory_bytes: int
    versions: dict[str, str]
    hardware: Machine
    peak_gpu_memory_bytes: NotRequired[int]
    attempts: NotRequired[int]
    check: NotRequired[str]
    energy_joules: NotRequired[float]
    energy_parts: NotRequired[dict[str, float]]
