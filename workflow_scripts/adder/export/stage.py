"""The stage "gguf": the merged model as one GGUF file."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from adder.core.files import read_json
from adder.core.section import Section
from adder.core.stage_spec import Memory, StageSpec
from adder.export.gguf_architectures import refuse_unsupported


class Export(Section):
    """What else is made of the merged model."""

    gguf: Literal["off", "f32", "f16", "bf16", "q8_0"] = "off"
    """Write `model.gguf` in this precision, for llama.cpp and Ollama."""
    hub: str | None = Field(default=None, pattern="^[^/\\s]+/[^/\\s]+$")
    """Repository of the Hugging Face hub (`owner/name`) that `snakemake --cores 1 push` uploads the merged model to."""
    private: bool = True
    """Make the repository private where it isn't there yet."""


class GgufSettings(Section):
    """What decides the file."""

    type: Literal["off", "f32", "f16", "bf16", "q8_0"]
    """Precision of the weights; see `export.gguf`."""


def _refuse(settings: GgufSettings, model: Path) -> None:
    refuse_unsupported(read_json(model / "config.json"))


GGUF = StageSpec(
    name="gguf",
    rule="write_gguf",
    run="adder.export.gguf",
    settings=GgufSettings,
    section="export",
    takes={"type": "export.gguf"},
    message="Writing the GGUF file",
    result=lambda found: f"{found['type']}, {found['bytes'] / 1e6:,.0f} MB",
    reads={"merge": ("model/",)},
    wanted=lambda settings: settings.type != "off",
    refuse=_refuse,
    threads=None,
    memory=Memory(base_mb=8000),
)
