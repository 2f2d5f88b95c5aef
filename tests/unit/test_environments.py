"""The environments agree with one another: what is asked for, the locks, conda's, the package's own ranges."""

import ast
import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import torch
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
ENVS = ROOT / "envs"
PACKAGE = ROOT / "workflow_scripts" / "adder"
# Imported where somebody has it and asks for it; nothing is missed without it.
OPTIONAL = {"flash_attn", "mlflow", "trackio", "triton", "vllm", "wandb"}
# What comes with a package that is asked for and is one with it.
PARTS = {"markupsafe": "jinja2", "nltk": "rouge-score", "pydantic-core": "pydantic", "urllib3": "requests"}


def canonical(name: str) -> str:
    """A distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(name: str) -> dict[str, str]:
    """{package: pinned version, or ""} of a requirements file."""
    lines = [re.split("[#;]", line)[0].strip() for line in (ENVS / name).read_text().splitlines()]
    pairs = [line.partition("==")[::2] for line in lines if line and not line.startswith("-r")]
    return {canonical(package): version for package, version in pairs}


def ranges() -> dict[str, Requirement]:
    """{package: the range of it} that pyproject.toml has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [Requirement(text) for text in project["dependencies"]]
    return {canonical(requirement.name): requirement for requirement in found}


def imported() -> set[str]:
    """The top-level modules of other projects that a module of the package imports."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.partition(".")[0])
    return found - {"adder"} - sys.stdlib_module_names


def test_locks_hold_what_is_asked_for():
    for asked, lock in (("requirements.in", "requirements.lock"), ("requirements-dev.in", "requirements-dev.lock")):
        locked = requirements(lock)
        assert all(locked.values()), "a lock pins everything"
        for package, version in requirements(asked).items():
            assert package in locked and version in ("", locked[package]), package


def test_the_locks_agree():
    plain, dev = requirements("requirements.lock"), requirements("requirements-dev.lock")
    assert plain.items() <= dev.items()


def test_the_tests_triton_is_pinned_apart_from_the_locks():
    """A CUDA torch asks for the Triton that it was built with: no lock may ask for another."""
    (version,) = requirements("triton.lock").values()
    assert version and not any("triton" in requirements(f"requirements{dev}.lock") for dev in ("", "-dev"))
    installed = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else version
    assert installed == version or torch.version.cuda is not None


def test_condas_environment_asks_for_the_same():
    pip = yaml.safe_load((ENVS / "adder.yaml").read_text())["dependencies"][-1]["pip"]
    conda = {canonical(package): version for package, _, version in (line.partition("==") for line in pip)}
    asked = requirements("requirements.in")
    for package in ("snakemake", "snakemake-interface-logger-plugins"):  # run the rules, so they are there already
        asked.pop(package)
    assert conda == asked


def test_the_packages_ranges_hold_what_is_locked():
    locked = requirements("requirements.lock")
    assert ranges().keys() == requirements("requirements.in").keys()
    for package, requirement in ranges().items():
        assert requirement.specifier.contains(locked[package]), requirement


def test_what_the_package_imports_is_asked_for():
    of_module = packages_distributions()
    asked = requirements("requirements.in")
    for module in imported() - OPTIONAL:
        packages = {canonical(name) for name in of_module[module]}
        assert packages & asked.keys() or {PARTS.get(name) for name in packages} & asked.keys(), module


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()
