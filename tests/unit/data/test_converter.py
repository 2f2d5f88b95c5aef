"""Files that the user's own Python reads, and what it imports from beside it."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from adder.core.errors import UserError
from adder.data import converter
from data_stages import read, write_rows

CONVERTER = """
def rows(path, encoding):
    with open(path, encoding=encoding) as file:
        for line in file:
            yield {"prompt": line.strip(), "completion": "ok"} if line.strip() else None
"""


def test_converter_reads_any_format(tmp_path):
    (tmp_path / "mine.py").write_text(CONVERTER)
    (tmp_path / "rows.dat").write_bytes("caf\xe9\n\nb\n".encode("latin-1"))
    own = {"path": str(tmp_path / "rows.dat"), "convert": str(tmp_path / "mine.py"), "encoding": "latin-1"}
    _, records, entries, *_ = write_rows(tmp_path / "data", [own])
    assert records[0]["data"] == {"prompt": "café", "completion": "ok"}
    assert "null" in records[1]["error"]
    assert entries[0]["kind"] == "converted" and len(entries[0]["convert"]["sha256"]) == 64
    assert not (tmp_path / "__pycache__").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\n", r"mine\.py: has no function rows\(path, encoding\)"),
        (
            "def rows(path, encoding):\n    yield {}\n    1 / 0\n",
            r"mine\.py, line 3: ZeroDivisionError while converting",
        ),
        ("import nowhere_to_be_found\n", r"mine\.py, line 1: ModuleNotFoundError"),
        ("def rows(:\n", r"mine\.py: SyntaxError"),
        ("def rows(path):\n    yield {}\n", r"mine\.py: TypeError"),
        (CONVERTER, r"rows\.dat: byte 3 \(0xe9\) is not valid utf-8"),
    ],
)
def test_converter_mistakes_are_named(tmp_path, code, message):
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "rows.dat").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "rows.dat", convert=str(tmp_path / "mine.py"))
    with pytest.raises(UserError, match="is not a file"):
        read(tmp_path / "rows.dat", convert=str(tmp_path / "absent.py"))


HELPED = """
import helper
from parts import names
from parts.deep.last import LAST
def rows(path, encoding):
    yield {"a": helper.shout(names.FIRST), "b": LAST}
"""


def write_helped(folder: Path) -> Path:
    """A converter that imports a module and parts of a package beside it; one file more is there that it doesn't."""
    for name, text in {
        "mine.py": HELPED,
        "helper.py": "import json\nfrom other import END\ndef shout(text):\n    return text.upper() + END\n",
        "other.py": "END = '!'\n",
        "parts/__init__.py": "",
        "parts/names.py": "from .deep import middle\nFIRST = middle.NAME\n",
        "parts/deep/middle.py": "from ..base import NAME\n",
        "parts/deep/last.py": "LAST = 'z'\n",
        "parts/base.py": "NAME = 'hi'\n",
        "unused.py": "",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "mine.py"


def test_files_that_a_converter_imports_are_found_without_running_it(tmp_path):
    mine = write_helped(tmp_path)
    found = [str(file.relative_to(tmp_path)) for file in converter.imported_files(mine)]
    deep = ["parts/deep/last.py", "parts/deep/middle.py"]
    assert found == ["helper.py", "other.py", "parts/__init__.py", "parts/base.py", *deep, "parts/names.py"]
    mine.write_text("import mine, json, os.path, numpy\nfrom . import helper\nraise SystemExit")
    assert [file.name for file in converter.imported_files(mine)] == ["helper.py", "other.py"]
    mine.write_text("import helper\n(")
    assert converter.imported_files(mine) == []


def test_a_converter_imports_from_beside_it_and_leaves_nothing_behind(tmp_path):
    """Two converters may each have a `helper` of their own, and a helper that was edited is read anew."""
    for name, end in (("one", "!"), ("two", "?"), ("one", "...")):
        mine = write_helped(tmp_path / name)
        (tmp_path / name / "other.py").write_text(f"END = {end!r}\n")
        (tmp_path / "rows.dat").touch()
        assert read(tmp_path / "rows.dat", convert=str(mine)) == [(1, {"a": "HI" + end, "b": "z"})]
    assert not list(tmp_path.rglob("__pycache__")) and not {"helper", "other", "parts"} & sys.modules.keys()
    assert not any(isinstance(finder, converter._Beside) for finder in sys.meta_path)


def test_a_module_of_another_place_does_not_stand_in_for_the_file_beside_a_converter(tmp_path, monkeypatch):
    """It is there again afterwards; a file named as one of Python's own modules hides nothing from others."""
    mine = write_helped(tmp_path)
    (tmp_path / "other.py").write_text("END = '!'\n")
    (tmp_path / "json.py").write_text("raise SystemExit")
    (tmp_path / "rows.dat").touch()
    elsewhere = {name: ModuleType(name) for name in ("other", "parts", "parts.base")}
    for name, module in elsewhere.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert read(tmp_path / "rows.dat", convert=str(mine)) == [(1, {"a": "HI!", "b": "z"})]
    assert {name: sys.modules.get(name) for name in elsewhere} == elsewhere


def test_a_mistake_in_a_helper_is_named_by_the_line_that_led_there(tmp_path):
    mine = write_helped(tmp_path)
    (tmp_path / "other.py").write_text("END = 1\n")
    (tmp_path / "rows.dat").touch()
    with pytest.raises(UserError, match=r"mine\.py, line 6: TypeError while converting .*rows\.dat"):
        read(tmp_path / "rows.dat", convert=str(mine))
