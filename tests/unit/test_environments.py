"""The environments agree with one another: what is asked for, the locks, conda's."""

from pathlib import Path

import yaml

ENVS = Path(__file__).resolve().parents[2] / "envs"


def requirements(name: str) -> dict[str, str]:
    """{package: pinned version, or ""} of a requirements file."""
    lines = [line.partition("#")[0].strip() for line in (ENVS / name).read_text().splitlines()]
    pairs = [line.partition("==")[::2] for line in lines if line and not line.startswith("-r")]
    return {package.lower().replace("_", "-"): version for package, version in pairs}


def test_locks_hold_what_is_asked_for():
    for asked, lock in (("requirements.in", "requirements.lock"), ("requirements-dev.in", "requirements-dev.lock")):
        locked = requirements(lock)
        assert all(locked.values()), "a lock pins everything"
        for package, version in requirements(asked).items():
            assert package in locked and version in ("", locked[package]), package


def test_the_locks_agree():
    plain, dev = requirements("requirements.lock"), requirements("requirements-dev.lock")
    assert plain.items() <= dev.items()


def test_condas_environment_asks_for_the_same():
    pip = yaml.safe_load((ENVS / "adder.yaml").read_text())["dependencies"][-1]["pip"]
    conda = dict(line.partition("==")[::2] for line in pip)
    asked = requirements("requirements.in")
    asked.pop("snakemake")  # runs the rules, so it is there already
    assert conda == asked
