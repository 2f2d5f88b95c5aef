"""The user's own Python file that reads a format (`convert:`), and the Python files beside it that it imports.

Light to import: the workflow is parsed with it, since all of these files stand for the source in its stage's key.
"""

import ast
import contextlib
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any, cast

from adder.core.errors import UserError


def rows(convert: str, path: Path, encoding: str) -> Iterator[Any]:
    """Yield what the file `convert`'s function `rows(path, encoding)` yields.

    Raises UserError for whatever it raises, with the line; UserError and UnicodeDecodeError as they are.
    """
    converter = Path(convert).expanduser()
    if not converter.is_file():
        raise UserError(f"data: `convert: {convert}` is not a file (looked from {Path.cwd()})")
    try:
        with _importing_from(converter.absolute().parent):
            yield from _function(converter, convert)(str(path), encoding)
    except (UserError, UnicodeDecodeError):
        raise
    except Exception as error:
        line = _line_within(converter, error.__traceback__)
        raise UserError(f"{convert}{line}: {type(error).__name__} while converting {path}: {error}") from error


def imported_files(converter: Path) -> list[Path]:
    """The Python files in the converter's folder that it imports, itself or by way of others, sorted.

    They are found in the text, nothing is run. A file with a mistake in its syntax imports nothing.
    """
    folder, waiting = converter.parent, [converter]
    found: set[Path] = set()
    while waiting:
        for parts in _imported_names(waiting.pop(), folder):
            files = _files_of(parts, folder) - found - {converter}
            found |= files
            waiting += files
    return sorted(found)


def _function(converter: Path, shown: str) -> Callable[[str, str], Iterable[Any]]:
    module = types.ModuleType("adder_converter")
    module.__file__ = str(converter)
    # Not imported: an import would leave a __pycache__ beside the user's file and could run a stale one.
    exec(compile(converter.read_bytes(), str(converter), "exec"), module.__dict__)
    function = getattr(module, "rows", None)
    if not callable(function):
        raise UserError(f"{shown}: has no function rows(path, encoding) that yields one dictionary a row")
    return cast(Callable[[str, str], Iterable[Any]], function)


class _Uncached(SourceFileLoader):
    """Loads a module from its source each time: no bytecode is read or left beside it."""

    def path_stats(self, path: str) -> Any:
        raise OSError("bytecode is not used")  # what SourceLoader.get_code asks before it looks for some


class _Beside:
    """Finds modules in one folder, also submodules; remembers their names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loaded: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        for entry in [str(self.folder)] if path is None else path:
            if Path(entry).is_relative_to(self.folder):
                spec = FileFinder(entry, (_Uncached, importlib.machinery.SOURCE_SUFFIXES)).find_spec(name)
                if spec is not None and spec.loader is not None:
                    self.loaded.add(name)
                    return spec
        return None


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Let imports look into `folder` first, as for a script there; forget afterwards what was imported from it.

    A module that was loaded from elsewhere under the name of a file in `folder` is out of the way meanwhile.
    """
    finder = _Beside(folder)
    hidden = {name: module for name, module in sys.modules.items() if _is_hidden_by(folder, name.split(".")[0])}
    for name in hidden:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in finder.loaded:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


def _is_hidden_by(folder: Path, name: str) -> bool:
    """Whether `import name` means a file in `folder`; Python's own modules, which others here use, stay theirs."""
    if name in sys.stdlib_module_names or name == "__main__":
        return False
    return (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()


def _imported_names(file: Path, folder: Path) -> Iterator[tuple[str, ...]]:
    """What a file's imports name, as parts of dotted names seen from `folder`."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # ValueError: a null byte
        return
    package = file.relative_to(folder).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = (*above, *(node.module.split(".") if node.module else ()))
            yield from ((*module, alias.name) for alias in node.names)


def _files_of(parts: tuple[str, ...], folder: Path) -> set[Path]:
    """The files that are run to import a dotted name: of each package on the way its `__init__`, and the module."""
    places = [folder.joinpath(*parts[:length]) for length in range(1, len(parts) + 1)]
    candidates = [file for place in places for file in (place / "__init__.py", place.with_name(f"{place.name}.py"))]
    return {file for file in candidates if file.is_file()}


def _line_within(file: Path, traceback: types.TracebackType | None) -> str:
    """ ", line N" for the deepest frame that runs `file`."""
    line = ""
    while traceback:
        if traceback.tb_frame.f_code.co_filename == str(file):
            line = f", line {traceback.tb_lineno}"
        traceback = traceback.tb_next
    return line
