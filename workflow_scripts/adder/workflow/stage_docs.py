"""What the stages' declarations say of them, for the documentation and for a cluster's profile."""

from adder.core.stage_spec import CLUSTER_CORES, StageSpec
from adder.workflow.stages import SPECS


def table() -> str:
    """Return a Markdown table of all stages: rule, module, what is read of which stage, what is asked of a cluster."""
    rows = [
        f"| {name} | `{spec.rule}` | `{spec.run}` | {_reads(spec)} | {_needs(spec)} |" for name, spec in SPECS.items()
    ]
    return "| stage | rule | its work | reads | asks for |\n|---|---|---|---|---|\n" + "\n".join(rows)


def cluster_partitions() -> str:
    """Which rules go to the partition with GPUs, of which the profile says above what it is called."""
    return "".join(f"  {spec.rule}: *with_gpus\n" for spec in SPECS.values() if spec.gpu)


def _reads(spec: StageSpec) -> str:
    if spec.name == "report":
        return "everything of every stage of the run"
    return "; ".join(f"{name}: {', '.join(f'`{path}`' for path in paths)}" for name, paths in spec.reads.items()) or "–"


def _needs(spec: StageSpec) -> str:
    memory = f"{spec.memory.base_mb / 1000:g} GB"
    if spec.memory.bytes_per_parameter:
        memory += f" and {spec.memory.bytes_per_parameter:g} bytes a parameter"
    cores = f"{CLUSTER_CORES} cores" if spec.threads is None else f"{spec.threads} core"
    where = "runs where Snakemake does" if spec.local else "GPUs" if spec.several_gpus else "a GPU" if spec.gpu else ""
    return ", ".join(filter(None, [cores, memory, f"{spec.minutes} min", where]))
