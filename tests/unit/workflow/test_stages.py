"""Declarations and code agree: what a stage says it reads is what its `run` takes."""

import dataclasses
import importlib
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from adder.core.stage_spec import Context, NoInputs
from adder.workflow.settings import Settings
from adder.workflow.stages import SPECS

COMPUTING = [spec for spec in SPECS.values() if spec.name != "report"]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_run_takes_what_is_declared(spec):
    run = importlib.import_module(spec.run).run
    hints = typing.get_type_hints(run)
    assert list(inspect.signature(run).parameters) == ["settings", "inputs", "out", "context"]
    assert (hints["settings"], hints["out"], hints["context"]) == (spec.settings, Path, Context)
    if spec.name == "report":
        assert hints["inputs"] == dict[str, Path]
    else:
        assert hints["inputs"] is NoInputs or dataclasses.is_dataclass(hints["inputs"])
        assert {field.name for field in dataclasses.fields(hints["inputs"])} == spec.reads.keys()


@pytest.mark.parametrize("spec", COMPUTING, ids=lambda spec: spec.name)
def test_every_setting_of_a_stage_is_one_of_the_configuration(spec):
    """Each field is in the stage's section, or in the place that `takes` names, and has the same type there."""
    section = Settings
    for name in (spec.section or "").split("."):
        section = section_in(section.model_fields[name].annotation)
    for name, field in spec.settings.model_fields.items():
        owner, own = section, name
        if name in spec.takes:
            *path, own = spec.takes[name].split(".")
            owner = Settings
            for part in path:
                owner = section_in(owner.model_fields[part].annotation)
        assert owner.model_fields[own].annotation == field.annotation, name


def section_in(annotation):
    """The section that an annotation such as `list[Section]` or `Section | None` is of."""
    inner = typing.get_args(annotation)
    return annotation if not inner else next(one for one in inner if one is not type(None))


def test_parents_come_before_children():
    seen = set()
    for spec in SPECS.values():
        variants = {f"{name}_{variant}" for name in seen for variant in SPECS[name].variants}
        assert spec.reads.keys() <= seen | variants
        seen.add(spec.name)


def test_the_workflow_is_parsed_without_what_computes():
    heavy = "torch transformers peft trl datasets pyarrow pandas lm_eval scipy".split()
    code = f"import sys, adder.workflow.stage_graph; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
