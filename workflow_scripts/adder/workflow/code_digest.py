"""Which modules a stage is made of, and a digest of what they do.

Snakemake reruns a stage when a file of its closure changes; the digest then tells whether the change can matter:
comments, docstrings, layout and what a stage declares of itself are not part of it.

What is found in a module's source is kept where Python keeps bytecode: parsing all of them takes two seconds, which
each start of the workflow would need, and each of its jobs a part of it.
"""

import ast
import contextlib
import hashlib
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import TypedDict

from adder.core.files import atomic_write

PACKAGE = Path(__file__).resolve().parents[1]
# What cannot change what a stage computes, each with the reason. Everything else that a stage imports is part of it.
LEFT_OUT = {
    "adder.core.choice": "carries a value and its reason; what chooses is elsewhere",
    "adder.core.errors": "names mistakes, which leave no result",
    "adder.core.file_digests": "remembers digests; how they are made is in core.files",
    "adder.core.file_lock": "keeps two processes from the same file",
    "adder.core.hardware": "measures the machine; what dtype follows from it is in core.precision",
    "adder.core.machine.energy": "measures what a stage used, beside it",
    "adder.core.opened_files": "tells which files a user's code opened",
    "adder.core.parallel": "runs the same function over batches, with results in order",
    "adder.core.progress": "shows what is going on",
    "adder.core.rng": "keeps generators as they were",
    "adder.core.stage_spec": "declares stages, and carries what concerns the machine",
    "adder.data.hub_errors": "words what can't be had from the hub, which leaves no result",
    "adder.kernels.trials.declared": "tries kernels in a process of its own; what they compute is beside it",
    "adder.training.distributed.launcher": "starts processes, which compute elsewhere",
    # The only way from training to doctor, symptoms, advice and preflight_warnings, which are part of the report.
    "adder.training.monitoring.live": "says what training measured; the report judges the same anew",
    "adder.training.monitoring.trackers": "sends curves to services beside the training",
}
# Files beside the code that a module reads.
RESOURCES = {"adder.report.html_page": "templates"}
MOST_KEPT = 2_000  # sources; edited ones are others


class _Found(TypedDict):
    """What a module's source says, whatever else there is. imports: [module, *names imported from it]."""

    does: str
    imports: list[list[str]]


@cache
def closure(module: str) -> tuple[Path, ...]:
    """Return the files of the package that `module` ("adder.training.run") is made of, itself included, sorted."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file(name)
        if name in found or name in LEFT_OUT or path is None:
            continue
        found[name] = path
        waiting += _imports(path)
    _kept().save()
    resources = [
        file
        for name in found.keys() & RESOURCES.keys()
        for file in (found[name].parent / RESOURCES[name]).rglob("*")
        if file.is_file()
    ]
    return tuple(sorted([*found.values(), *resources]))


def code_digest(module: str) -> str:
    """Digest of a module's closure that comments, docstrings, formatting and declarations leave alone."""
    digest = hashlib.blake2b(digest_size=16)
    for path in closure(module):
        digest.update(f"{path.relative_to(PACKAGE)}\n".encode())
        digest.update(_found_in(path)["does"].encode() if path.suffix == ".py" else path.read_bytes())
    return digest.hexdigest()


def normalised(source: str) -> str:
    """Return Python source as its syntax tree without what computes nothing: equal for texts that do the same.

    That is docstrings, also those under attributes, and the declaration of a stage (`NAME = StageSpec(...)`).
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            body[:] = [statement for statement in body if not _computes_nothing(statement)] or [ast.Pass()]
    return ast.dump(tree)


def _computes_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "StageSpec"


def _imports(path: Path) -> set[str]:
    """Names of the package's modules that a file imports, anywhere in it."""
    names = set()
    for module, *inner in _found_in(path)["imports"]:
        modules = {name for name in (f"{module}.{one}" for one in inner) if _file(name)}
        names |= modules if inner and len(modules) == len(inner) else {*modules, module}
    return names


def _found_in(path: Path) -> _Found:
    """What is kept of a file's source, or else found in it."""
    source, found = path.read_text(), _kept().found
    key = _digest(_own_source() + source)
    if key not in found:
        found[key] = {"does": _digest(normalised(source)), "imports": _imported_by(source)}
    return found[key]


def _imported_by(source: str) -> list[list[str]]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "adder":
            found.append([str(node.module), *sorted({alias.name for alias in node.names})])
        elif isinstance(node, ast.Import):
            found += [[alias.name] for alias in node.names if alias.name.startswith("adder.")]
    return found


@cache
def _own_source() -> str:
    return Path(__file__).read_text()


class _Kept:
    """What was found in sources, by their digest, in a file for each Python: their syntax trees differ."""

    def __init__(self) -> None:
        self.place = Path(importlib.util.cache_from_source(__file__)).with_suffix(".json")
        self.found: dict[str, _Found] = {}
        with contextlib.suppress(OSError, ValueError):
            check, _, text = self.place.read_text().partition("\n")
            if check == _digest(text):  # else it isn't as it was written
                self.found = json.loads(text)
        self.saved = len(self.found)

    def save(self) -> None:
        """Write what is new, where the package's folder can be written to."""
        if len(self.found) == self.saved:
            return
        self.saved = len(self.found)
        text = json.dumps(dict(list(self.found.items())[-MOST_KEPT:]))
        with contextlib.suppress(OSError):
            self.place.parent.mkdir(exist_ok=True)
            with atomic_write(self.place) as partial:
                partial.write_text(f"{_digest(text)}\n{text}")


@cache
def _kept() -> _Kept:
    return _Kept()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _file(module: str) -> Path | None:
    """The file of a module of the package; packages have none, since their `__init__` says nothing."""
    path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return path if path.is_file() else None
