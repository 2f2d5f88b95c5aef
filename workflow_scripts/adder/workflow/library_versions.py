"""Versions of the libraries that can change a stage's numbers: which are installed, and which made what is finished."""

import ast
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

from adder.core.files import read_json
from adder.core.stage_spec import StageSpec
from adder.workflow.code_digest import closure

# Distribution by the name under which it is imported.
LIBRARIES = {
    "torch": "torch",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "peft": "peft",
    "trl": "trl",
    "bitsandbytes": "bitsandbytes",
    "lm_eval": "lm-eval",
}
# Which of them work inside others.
BENEATH = {"transformers": ("tokenizers",), "peft": ("torch",), "trl": ("torch", "accelerate")}
RECORDED = (*LIBRARIES.values(), "accelerate", "datasets", "pyarrow", "snakemake")


@cache
def version(distribution: str) -> str | None:
    """The installed version of a distribution, None where it isn't."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def recorded_versions() -> dict[str, str]:
    """The versions that a stage's record has, by distribution."""
    return {name: found for name in RECORDED if (found := version(name))}


@cache
def libraries(module: str) -> tuple[str, ...]:
    """Distributions that can change the numbers of a stage whose work is in `module`: those that its code imports."""
    names = set().union(*(_imported(path) for path in closure(module) if path.suffix == ".py"))
    found = {LIBRARIES[name] for name in names & LIBRARIES.keys()}
    return tuple(sorted(found.union(*(BENEATH.get(name, ()) for name in found))))


def installed_versions(spec: StageSpec) -> dict[str, str]:
    """The installed versions of the libraries that can change a stage's numbers."""
    return {name: found for name in libraries(spec.run) if (found := version(name))}


def other_versions(records: Iterable[tuple[StageSpec, Path]]) -> list[str]:
    """A sentence for each difference between installed libraries and those that made the finished stages.

    records: each stage's declaration with its `stage.json`, which may not be there.
    """
    stages: dict[tuple[str, str, str], set[str]] = {}
    for spec, record in records:
        if not record.is_file():
            continue
        made_with = read_json(record).get("versions", {})
        for name, now in installed_versions(spec).items():
            if made_with.get(name, now) != now:
                stages.setdefault((name, made_with[name], now), set()).add(spec.name)
    return [
        f"{', '.join(sorted(names))}: made with {library} {before}; {now} is installed"
        for (library, before, now), names in sorted(stages.items())
    ]


def _imported(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    return names
