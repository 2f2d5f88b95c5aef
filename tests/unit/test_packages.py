"""The house: packages in one order, no circles, rooms that are not too full, a test for each module."""

import ast
from pathlib import Path

import pytest

import adder

PACKAGE = Path(adder.__file__).parent
UNIT = Path(__file__).parent
# Each may import those after it.
ORDER = (
    "workflow", "report", "serving", "export", "merging", "training", "evaluation", "packing", "tokenization",
    "formatting", "data", "kernels", "core",
)  # fmt: skip
MODULES = {
    ".".join(["adder", *path.relative_to(PACKAGE).with_suffix("").parts]): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}


def imports(path: Path) -> set[str]:
    """The package's modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adder"):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def test_packages_import_downwards_only():
    rank = {name: number for number, name in enumerate(ORDER)}
    upwards = [
        f"{name} imports {other}"
        for name, path in MODULES.items()
        for other in imports(path)
        if rank[other.split(".")[1]] < rank[name.split(".")[1]]
    ]
    assert upwards == []


def test_no_import_goes_in_a_circle():
    above: dict[str, set[str]] = {name: imports(path) for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " → ".join([*way, name])
        if name not in done:
            for other in above[name]:
                visit(other, (*way, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_no_room_is_too_full():
    counts = {folder: len(list(folder.glob("*.py"))) - 1 for folder in {path.parent for path in MODULES.values()}}
    assert max(counts.values()) <= 25
    assert not [path for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE and path.read_text().strip()]


@pytest.mark.parametrize("name", MODULES)
def test_where_a_module_lives_its_test_lives(name):
    path = MODULES[name].relative_to(PACKAGE)
    assert (UNIT / path.parent / f"test_{path.name}").exists()
