"""Put a run's model and pages where people look: `results/<run>/`, as hard links to the files of its stages."""

from pathlib import Path

from adder.stage import link_tree

target = Path(snakemake.output.model).parents[1]
report = Path(snakemake.input.report).parent
for page in ("report.html", "metrics.json", "run.yaml"):
    # A page is opened in editors and mailed around: a copy, so that nobody writes into the stage.
    (target / page).write_bytes((report / page).read_bytes())
link_tree(Path(snakemake.input.merge).parent / "model", target / "merged_model")
Path(snakemake.log[0]).write_text(f"model: {snakemake.input.merge}\npages: {snakemake.input.report}\n")
