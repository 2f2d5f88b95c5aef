"""Put a run's model and pages where people look, `results/<run>/`: the weights as hard links, all else as copies.

People edit and mail small files, and Snakemake sets the time stamp of its outputs: neither may reach into a stage.
"""

import shutil
from pathlib import Path

from adder.core.files import link_or_copy
from adder.workflow.stage_runner import link_tree

target = Path(snakemake.output.model).parents[1]
stages = {name: Path(record).parent for name, record in snakemake.input.items()}
LARGE = (".safetensors", ".gguf")


def put(source: str, place: str) -> None:
    """Link weights, copy what is small."""
    (link_or_copy if source.endswith(LARGE) else shutil.copy2)(source, place)


def put_tree(source: Path, name: str) -> None:
    """Put a stage's folder into the run's; where the run no longer has it, nothing stays."""
    if source.is_dir():
        link_tree(source, target / name, put)
    else:
        shutil.rmtree(target / name, ignore_errors=True)


for page in ("report.html", "card.md", "metrics.json", "run.yaml"):
    (target / page).write_bytes((stages["report"] / page).read_bytes())
put_tree(stages["merge"] / "model", "merged_model")
put_tree(stages["train"] / "adapter", "adapter")
shutil.copyfile(stages["report"] / "model_card.md", target / "merged_model" / "README.md")
(target / "model.gguf").unlink(missing_ok=True)
if "gguf" in stages:
    link_or_copy(stages["gguf"] / "model.gguf", target / "model.gguf")
Path(snakemake.log[0]).write_text("".join(f"{name}: {folder}\n" for name, folder in stages.items()))
