"""List the stage folders that no run of the named configurations needs; remove them on confirmation (`make prune`).

Usage: python workflow_scripts/prune.py [--yes] [CONFIG.yaml ...]     (default: config/config.yaml)
"""

import sys
from pathlib import Path

from adder import config_file, plan, prune, settings
from adder.errors import UserError


def needed_stages(files: list[str]) -> tuple[Path, dict[str, plan.Stage]]:
    """Return the results directory and every stage, by folder, that the configurations need."""
    needed, results = {}, set()
    for file in files:
        config = config_file.read(file)
        for run, loaded in settings.load(config).items():
            results.add(loaded.runtime.results)
            digests = plan.Digests(Path(loaded.runtime.results) / "cache" / "digests.json")
            rows = settings.resolved(loaded, config, run)
            for stage in plan.stages_of_run(run, loaded, rows, Path.cwd(), digests).values():
                needed |= stage.family()
    if len(results) != 1:
        raise UserError(f"the configurations write to different directories: {', '.join(sorted(results))}")
    return Path(results.pop()), needed


def main(arguments: list[str]) -> None:
    files = [name for name in arguments if name != "--yes"] or ["config/config.yaml"]
    results, needed = needed_stages(files)
    folders = prune.unneeded(results, needed)
    if not folders:
        print(f"Nothing to prune: every stage in {results}/ is needed by {', '.join(files)}.")
        return
    print("\n".join(map(str, folders)))
    megabytes = prune.freed_bytes(folders) / 1e6
    print(f"{len(folders)} folders, {megabytes:,.1f} MB, that no run of {', '.join(files)} needs.")
    if "--yes" in arguments or input("Remove them? [y/N] ").strip().lower() in {"y", "yes"}:
        prune.remove(folders)
        print("Removed.")
    else:
        print("Nothing was removed.")


try:
    main(sys.argv[1:])
except UserError as error:
    sys.exit(f"prune: {error}")
