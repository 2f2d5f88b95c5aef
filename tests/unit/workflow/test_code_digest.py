"""What a stage is made of: no module of the package is forgotten, and none too many is in it."""

import sys
from pathlib import Path

import pytest

from adder.workflow import code_digest as module
from adder.workflow.code_digest import LEFT_OUT, PACKAGE, closure, code_digest, normalised
from adder.workflow.stages import SPECS

# What runs, shows or exports around the stages, and so is part of none of them.
AROUND = (
    "adder.workflow.",
    "adder.core.display.",
    "adder.serving.",
    "adder.report.comparison.",
    "adder.export.hub_push",
)


def modules(name: str) -> set[str]:
    """The modules that a stage's code is made of, by their dotted names."""
    files = (path for path in closure(SPECS[name].run) if path.suffix == ".py")
    return {".".join(["adder", *path.relative_to(PACKAGE).with_suffix("").parts]) for path in files}


def every_module() -> set[str]:
    files = (path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    return {".".join(["adder", *path.relative_to(PACKAGE).with_suffix("").parts]) for path in files}


def test_every_module_is_part_of_a_stage_or_left_out_with_a_reason():
    parts = set().union(*(modules(name) for name in SPECS))
    rest = {name for name in every_module() - parts - LEFT_OUT.keys() if not name.startswith(AROUND)}
    assert rest == set()
    assert LEFT_OUT.keys() <= every_module() and not parts & LEFT_OUT.keys()
    assert all(len(reason) > 10 for reason in LEFT_OUT.values())


def test_what_decides_a_dtype_is_part_of_what_computes_in_it():
    for name in ("train", "merge", "evaluate", "task"):
        assert "adder.core.precision" in modules(name)
        assert "adder.core.hardware" not in modules(name)


def test_stages_are_apart():
    """Editing the packer must not evaluate the base anew, nor editing the report train anew."""
    assert "adder.packing.best_fit_decreasing" not in modules("evaluate")
    assert "adder.report.run" not in modules("train") | modules("lengths") | modules("evaluate")
    assert not {name for name in modules("train") if name.startswith(("adder.workflow", "adder.report"))}
    assert not {name for name in modules("model") if "ticket" in name or "readers" in name}
    assert not {name for name in modules("task") if name.startswith("adder.report")}


def test_pages_are_made_of_their_templates():
    assert "report.html.jinja" in {path.name for path in closure(SPECS["report"].run)}


def test_comments_docstrings_layout_and_declarations_are_not_code():
    source = '''
"""Module."""
class Settings(Section):
    """A section."""
    rate: float = 1.0
    """Help on the rate."""
TRAIN = StageSpec(name="train", message="Training", minutes=60)
def f(x):
    """Old."""
    return x + 1
'''
    same = '''
class Settings(Section):
    rate: float = 1.0
    """Other help."""


TRAIN = StageSpec(name="train", message="Learning", minutes=90)


def f(
    x,
):
    # a comment
    return x + 1
'''
    assert normalised(source) == normalised(same)
    assert normalised(source) != normalised(source.replace("+ 1", "+ 2"))
    assert normalised(source) != normalised(source.replace("float = 1.0", "float = 2.0"))


@pytest.mark.parametrize("name", SPECS)
def test_a_digest_is_of_the_code_alone(name):
    assert len(code_digest(SPECS[name].run)) == 32 and code_digest(SPECS[name].run) == code_digest(SPECS[name].run)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Start anew, as another process does, with what is kept in a folder of the test's; gives the file."""
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))

    def start() -> Path:
        module._kept.cache_clear()
        closure.cache_clear()
        return module._kept().place

    start().parent.mkdir(parents=True)
    yield start
    monkeypatch.undo()
    start()


def no_parsing(*_):
    raise AssertionError("a source was parsed again")


def digests() -> list[str]:
    return [code_digest(spec.run) for spec in SPECS.values()]


def test_a_source_is_parsed_once_and_gives_the_same_later(kept, monkeypatch):
    first = digests()
    assert kept().is_file()
    monkeypatch.setattr(module.ast, "parse", no_parsing)
    assert digests() == first
    with pytest.raises(AssertionError, match="parsed again"):
        module._found_in(Path(__file__))  # another source


@pytest.mark.parametrize(
    "damage", [lambda text: text[: len(text) // 2], lambda text: text.replace("adder.core", "adder.more")]
)
def test_what_is_kept_and_damaged_is_made_again(kept, damage):
    first = digests()
    whole = kept().read_text()
    kept().write_text(damage(whole))
    kept()
    assert digests() == first and kept().read_text() == whole


def test_where_nothing_can_be_kept_digests_are_the_same(kept):
    first = digests()
    kept().unlink()
    kept().mkdir()  # nothing can be written there
    kept()
    assert digests() == first


JUDGES = {f"adder.training.monitoring.{name}" for name in ("advice", "doctor", "preflight_warnings", "symptoms")}


def test_a_mended_diagnosis_reaches_the_report_and_trains_nothing_anew():
    assert not JUDGES & modules("train")
    assert modules("report") >= JUDGES
