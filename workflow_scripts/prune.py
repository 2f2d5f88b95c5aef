"""List the stage folders that no run of the named configurations needs; remove them on confirmation (`make prune`).

Usage: python workflow_scripts/prune.py [--yes] [CONFIG.yaml ...]     (default: config/config.yaml)
"""

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from adder.core import file_lock
from adder.core.errors import UserError
from adder.workflow import config_file, prune, settings, stage_graph


def needed_stages(files: list[str]) -> tuple[Path, dict[str, stage_graph.Stage]]:
    """Return the results directory and every stage, by folder, that the configurations need."""
    needed, results = {}, set()
    for file in files:
        config = config_file.read(file)
        for run, loaded in settings.load(config).items():
            results.add(loaded.runtime.results)
            digests = stage_graph.Digests(Path(loaded.runtime.results) / "cache" / "digests.json")
            rows = settings.resolved(loaded, config, run)
            for stage in stage_graph.stages_of_run(run, loaded, rows, Path.cwd(), digests).values():
                needed |= stage.family()
    if len(results) != 1:
        raise UserError(f"the configurations write to different directories: {', '.join(sorted(results))}")
    return Path(results.pop()), needed


@contextlib.contextmanager
def nobody_at_work(results: Path) -> Iterator[None]:
    """Keep everybody else from writing to `results`. Raises UserError, which names who does so already."""

    def busy(stage: Path, who: str) -> None:
        raise UserError(f"{who} is still at work on {stage}; wait for it, or end it")

    with contextlib.ExitStack() as locks:
        locks.enter_context(file_lock.take(results, "make prune"))
        # A job may outlive its Snakemake. Lock files that killed jobs have left are gone afterwards.
        for file in sorted(results.glob("stages/*/.*.lock")):
            stage = file.with_name(file.stem.removeprefix("."))
            locks.enter_context(file_lock.held(file, functools.partial(busy, stage)))
        yield


def confirmed() -> bool:
    try:
        return input("Remove them? [y/N] ").strip().lower() in {"y", "yes"}
    except EOFError:  # nobody there to answer
        print()
        return False


def main(arguments: list[str]) -> None:
    files = [name for name in arguments if name != "--yes"] or ["config/config.yaml"]
    results, needed = needed_stages(files)
    if not results.exists():
        print(f"Nothing to prune: there is no {results}/.")
        return
    with nobody_at_work(results):
        remove_unneeded(results, needed, files, ask="--yes" not in arguments)


def remove_unneeded(results: Path, needed: dict[str, stage_graph.Stage], files: list[str], ask: bool) -> None:
    folders = prune.unneeded(results, needed)
    if not folders:
        print(f"Nothing to prune: every stage in {results}/ is needed by {', '.join(files)}.")
        return
    print("\n".join(map(str, folders)))
    megabytes = prune.freed_bytes(folders) / 1e6
    print(f"{len(folders)} folders, {megabytes:,.1f} MB, that no run of {', '.join(files)} needs.")
    if not ask or confirmed():
        prune.remove(folders)
        print("Removed.")
    else:
        print("Nothing was removed.")


try:
    main(sys.argv[1:])
except UserError as error:
    sys.exit(f"prune: {error}")
