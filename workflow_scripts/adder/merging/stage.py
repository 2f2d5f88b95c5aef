"""The stage "merge": the adapter merged into the base's weights, and the proof that the result is base + adapter."""

from typing import Annotated, Literal

from pydantic import Field

from adder.core.section import Auto, Section
from adder.core.stage_spec import Memory, StageSpec


class Merge(Section):
    """Merging and its proof."""

    base: Literal["auto", "original", "dequantized"] = "auto"
    """After `qlora`, which weights to merge into: the original ones, or those that training saw, quantised to NF4 and
    back. `auto` measures both on held-out rows and takes the one with the lower loss."""
    tolerance: Auto | Annotated[float, Field(gt=0)] = "auto"
    """Largest mean KL divergence (nats a token) allowed between the merged model and base + adapter."""


class MergeSettings(Merge):
    """What decides the merged weights."""

    method: Literal["qlora", "lora", "full"]
    """How the adapter was trained; see `train`."""


MERGE = StageSpec(
    name="merge",
    rule="merge_adapter",
    run="adder.merging.run",
    settings=MergeSettings,
    section="merge",
    takes={"method": "train.method"},
    message="Merging, and proving the merge",
    result=lambda found: (
        f"into the {found['base']} base; the proof holds (KL {found['kl']:.1e})" if "kl" in found else "merged"
    ),
    reads={
        "train": ("adapter/", "model/"),
        "model": ("model/", "source.json"),
        "tokenize": ("heldout.arrow", "tokenizer/", "tokenize.json"),
        "format": ("heldout.parquet",),
    },
    shows={"merge": "proof.json"},
    gpu=True,
    threads=None,
    minutes=120,
    memory=Memory(base_mb=8000, bytes_per_parameter=6.0),
)
