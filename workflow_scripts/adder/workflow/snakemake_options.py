"""Options of Snakemake's that don't go with what the rules leave to the package; each is refused before anything runs.

A stage's record, `stage.json`, is all that its rule declares as output. The files beside it are hard-linked into cache
and runs, written under a lease, and may differ with the settings; Snakemake removes what is declared before a job and
after one that failed, and knows nothing of links.
"""

from collections.abc import Sequence
from pathlib import Path

from adder.core.errors import UserError


def refuse(arguments: Sequence[str], storage_provider: str | None, shared_files: bool, results: Path) -> None:
    """Raise UserError for options that would do something else than they say.

    arguments: Snakemake's command line. storage_provider: its --default-storage-provider. shared_files: whether all
    jobs see the same files (--shared-fs-usage input-output). results: the directory of all results.
    """
    if storage_provider is not None or not shared_files:
        option = f"--default-storage-provider {storage_provider}" if storage_provider else "--shared-fs-usage"
        raise UserError(
            f"{option}: results have to be on a file system that all jobs share, for stages share weights by hard "
            "links and lock them by files there; set runtime.results to such a directory, and copy finished runs from "
            f"there ({results}/<run>, which `adder verify` checks anywhere)"
        )
    if _given(arguments, "--delete-all-output"):
        raise UserError(
            "--delete-all-output: would remove the records of the stages and leave their data and weights; `adder "
            f"prune` removes what no run needs, and everything is in the directory {results}"
        )
    if _given(arguments, "--archive"):
        raise UserError(
            "--archive: would hold the rules without the package that they run; keep the commit of this project with "
            "envs/requirements.lock, and of a run its folder, whose run.yaml makes it again"
        )


def _given(arguments: Sequence[str], option: str) -> bool:
    """Whether an option is on the command line; argparse takes beginnings of it as well."""
    names = [argument.partition("=")[0] for argument in arguments]
    return any(option.startswith(name) and len(name) >= len("--arc") for name in names)
