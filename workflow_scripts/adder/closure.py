"""Which modules a stage is made of, and a digest of what they do.

Snakemake reruns a stage when a file of its closure changes; the digest then tells whether the change can matter:
comments, docstrings and layout are not part of it.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# What shows progress, names mistakes, watches a training, looks at the machine or starts processes on it cannot change
# what a stage computes.
INFRASTRUCTURE = {
    *("progress", "errors", "hardware", "choice", "parallel", "launch"),
    *("advice", "doctor", "preflight", "trackers", "randomness"),
}
# Files beside the code that a module reads.
RESOURCES = {"pages": "templates"}


@cache
def closure(module: str) -> tuple[Path, ...]:
    """Return the files of the package that `module` is made of, itself included, sorted."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = PACKAGE / f"{name}.py"
        if name in found or name in INFRASTRUCTURE or not path.exists():
            continue
        found[name] = path
        waiting += _imports(path)
    resources = [
        p for name in found if name in RESOURCES for p in (PACKAGE / RESOURCES[name]).rglob("*") if p.is_file()
    ]
    return tuple(sorted([*found.values(), *resources]))


def code_digest(module: str) -> str:
    """Digest of a module's closure that comments, docstrings and formatting leave alone."""
    digest = hashlib.blake2b(digest_size=16)
    for path in closure(module):
        digest.update(f"{path.relative_to(PACKAGE)}\n".encode())
        digest.update(normalised(path.read_text()).encode() if path.suffix == ".py" else path.read_bytes())
    return digest.hexdigest()


def normalised(source: str) -> str:
    """Return Python source as its syntax tree without docstrings: equal for texts that do the same."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and _starts_with_text(
            body
        ):
            node.body = body[1:] or [ast.Pass()]
    return ast.dump(tree)


def _starts_with_text(body: list[ast.stmt]) -> bool:
    return bool(body) and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


def _imports(path: Path) -> set[str]:
    """Names of the package's modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "adder":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adder."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("adder.")}
    return names
