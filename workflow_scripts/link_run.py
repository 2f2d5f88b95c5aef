"""Put a run's model and pages where people look, `results/<run>/`: the weights as hard links, all else as copies.

People edit and mail small files, and Snakemake sets the time stamp of its outputs: neither may reach into a stage.
"""

from pathlib import Path

from adder.stage import link_tree

target = Path(snakemake.output.model).parents[1]
report = Path(snakemake.input.report).parent
for page in ("report.html", "card.md", "metrics.json", "run.yaml"):
    (target / page).write_bytes((report / page).read_bytes())
link_tree(Path(snakemake.input.merge).parent / "model", target / "merged_model")
for path in (target / "merged_model").rglob("*"):
    if path.is_file() and path.suffix != ".safetensors":
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
Path(snakemake.log[0]).write_text(f"model: {snakemake.input.merge}\npages: {snakemake.input.report}\n")
