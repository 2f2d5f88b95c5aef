"""Upload a run's merged model to the Hugging Face hub, and write down where it is."""

import sys
from pathlib import Path

from adder.core.errors import UserError
from adder.core.files import read_json, write_json
from adder.core.progress import Progress
from adder.export.hub_push import push

folder = Path(snakemake.input[0]).parent
verdict = read_json(folder.parent / "metrics.json")["verdict"]["sentence"]
progress = Progress("push")
try:
    found = push(
        folder, snakemake.params.hub, snakemake.params.private, f"{snakemake.wildcards.run}: {verdict}", progress
    )
except UserError as error:
    Path(snakemake.log[0]).write_text(f"{error}\n", encoding="utf-8")
    progress.say(f"cannot go on: {error}")
    sys.exit(1)
Path(snakemake.log[0]).write_text(f"{found['url']} at commit {found['commit']}\n", encoding="utf-8")
write_json(Path(snakemake.output[0]), found)
