"""Compare all runs of the configuration on one page and in one table: `compare.html` and `compare.csv`."""

import json
import sys
from pathlib import Path

from adder.core.errors import UserError
from adder.core.progress import Progress
from adder.report.comparison import page

runs = json.loads(snakemake.params.runs)
folders = {run: {stage: Path(folder) for stage, folder in stages.items()} for run, stages in runs.items()}
progress = Progress("compare")
try:
    sentence = page.run(folders, Path(snakemake.output.page).parent)["sentence"]
except UserError as error:
    Path(snakemake.log[0]).write_text(f"{error}\n", encoding="utf-8")
    progress.say(f"cannot go on: {error}")
    sys.exit(1)
Path(snakemake.log[0]).write_text(f"{sentence}\n", encoding="utf-8")
progress.say(sentence)
