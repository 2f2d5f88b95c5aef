"""What people look at, `results/<run>/`: which stages it is made of, what is in it, whether it is as it was made."""

from collections.abc import Mapping
from pathlib import Path

from adder.core.errors import UserError
from adder.core.file_digests import FileDigests
from adder.core.files import has_digest, read_json, write_json
from adder.core.stage_record import OutputFile
from adder.workflow.stage_runner import WEIGHTS, read_record

PAGES = ("report.html", "card.md", "metrics.json", "run.yaml")
# The stages that a run's folder is made of, where the run has them.
SHOWN = ("train", "merge", "report", "gguf")
# What it takes of them: {stage: (path in the stage's folder, path in the run's)}.
TAKEN = {
    "merge": ("model", "merged_model"),
    "train": ("adapter", "adapter"),
    "gguf": ("model.gguf", "model.gguf"),
}
# What a run's folder says it is made of: the stages' keys by name.
RECORD = "stages.json"
# Sizes and digests of what is in it, for whoever receives it.
FILES = "files.json"
# The stages' keys that the comparison is of, below the results.
COMPARED = "cache/compared.json"


def has_weights(folder: Path, stages: Mapping[str, Path], digests: FileDigests) -> bool:
    """Whether the weights in a run's folder are those of its stages (their folders), as far as these have finished."""
    return all(
        digests.holds(folder / name, known["digest"], known["bytes"])
        for name, known in published(stages).items()
        if name.endswith(WEIGHTS)
    )


def published(stages: Mapping[str, Path]) -> dict[str, OutputFile]:
    """What a run's folder takes of its stages (their folders): the files by their path there, with their digests."""
    found: dict[str, OutputFile] = {}
    for name, (there, here) in TAKEN.items():
        record = read_record(stages[name]) if name in stages else None
        for path, known in record["outputs"].items() if record else ():
            if path == there or path.startswith(f"{there}/"):
                found[here + path.removeprefix(there)] = known
    return found


def write_record(folder: Path, stages: Mapping[str, Path], digests: FileDigests) -> None:
    """Write down what a run's folder is made of and what is in it. Weights that are links or clones aren't read."""
    write_json(folder / RECORD, {name: stage.name for name, stage in stages.items()})
    names = sorted(_files(folder))
    write_json(folder / FILES, dict(zip(names, digests.of_all([folder / name for name in names]), strict=True)))


def verify(folder: Path) -> list[str]:
    """Read all of a run's folder and hold it against its record; a sentence for each file that differs, is missing or
    was added.

    Raises UserError where there is no record.
    """
    if not (folder / FILES).is_file():
        raise UserError(f"{folder}: has no {FILES}, which says what is in it; name a run's folder, results/<run>")
    recorded = _recorded(folder)
    found = _files(folder)
    return [
        *(f"{name}: missing" for name in sorted(recorded.keys() - found)),
        *(f"{name}: not in the record" for name in sorted(found - recorded.keys())),
        *(
            f"{name}: other content"
            for name in sorted(found & recorded.keys())
            if not has_digest(folder / name, recorded[name])
        ),
    ]


def _recorded(folder: Path) -> dict[str, str]:
    try:
        content = read_json(folder / FILES)
        return {str(name): str(digest) for name, digest in content.items()}
    except (ValueError, AttributeError):
        raise UserError(f"{folder / FILES}: is damaged, so nothing can be held against it") from None


def _files(folder: Path) -> set[str]:
    """The files that a run's folder was filled with, by their path there.

    What is written later, such as guard.json and pushed.json, is none of these.
    """
    own = [folder / name for name in (*PAGES, RECORD, "model.gguf")]
    own += [path for part in ("merged_model", "adapter") for path in (folder / part).rglob("*")]
    return {str(path.relative_to(folder)) for path in own if path.is_file()}
