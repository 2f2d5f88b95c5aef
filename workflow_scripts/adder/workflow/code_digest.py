"""Which modules a stage is made of, and a digest of what they do.

Snakemake reruns a stage when a file of its closure changes; the digest then tells whether the change can matter:
comments, docstrings, layout and what a stage declares of itself are not part of it.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# What cannot change what a stage computes, each with the reason. Everything else that a stage imports is part of it.
LEFT_OUT = {
    "adder.core.choice": "carries a value and its reason; what chooses is elsewhere",
    "adder.core.errors": "names mistakes, which leave no result",
    "adder.core.file_digests": "remembers digests; how they are made is in core.files",
    "adder.core.file_lock": "keeps two processes from the same file",
    "adder.core.hardware": "measures the machine; what dtype follows from it is in core.precision",
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
        digest.update(normalised(path.read_text()).encode() if path.suffix == ".py" else path.read_bytes())
    return digest.hexdigest()


@cache
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
    return _imported_by(path.read_text())


@cache
def _imported_by(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "adder":
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if _file(name)}
            names |= modules if len(modules) == len(inner) else {*modules, str(node.module)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("adder.")}
    return names


def _file(module: str) -> Path | None:
    """The file of a module of the package; packages have none, since their `__init__` says nothing."""
    path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return path if path.is_file() else None
