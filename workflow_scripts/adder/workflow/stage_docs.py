"""What the stages' declarations say of them, for the documentation and for a cluster's profile."""

from adder.core.stage_spec import StageSpec
from adder.workflow.stages import SPECS

CLUSTER_CORES = 8  # of a stage that uses all cores it is given


def table() -> str:
    """Return a Markdown table of all stages: rule, module, what is read of which stage, what is asked of a cluster."""
    rows = [
        f"| {name} | `{spec.rule}` | `{spec.run}` | {_reads(spec)} | {_needs(spec)} |" for name, spec in SPECS.items()
    ]
    return "| stage | rule | its work | reads | asks for |\n|---|---|---|---|---|\n" + "\n".join(rows)


def cluster_resources() -> str:
    """What the stages ask a cluster for beyond their rules' own: cores, a GPU and its partition."""
    threads = "".join(
        f"  {spec.rule}: {CLUSTER_CORES}\n" for spec in SPECS.values() if spec.threads is None and not spec.local
    )
    gpu = "".join(
        f"  {spec.rule}:\n    slurm_partition: \"'gpu'\"\n    gpu: 1\n" for spec in SPECS.values() if spec.gpu
    )
    return f"set-threads:\n{threads}set-resources:\n{gpu}"


def _reads(spec: StageSpec) -> str:
    if spec.name == "report":
        return "everything of every stage of the run"
    return "; ".join(f"{name}: {', '.join(f'`{path}`' for path in paths)}" for name, paths in spec.reads.items()) or "–"


def _needs(spec: StageSpec) -> str:
    memory = f"{spec.memory.base_mb / 1000:g} GB"
    if spec.memory.bytes_per_parameter:
        memory += f" and {spec.memory.bytes_per_parameter:g} bytes a parameter"
    cores = "all cores" if spec.threads is None else f"{spec.threads} core"
    where = "runs where Snakemake does" if spec.local else "a GPU" if spec.gpu else ""
    return ", ".join(filter(None, [cores, memory, f"{spec.minutes} min", where]))
