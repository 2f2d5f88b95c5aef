"""What the machine is: device, cores, memory. It decides no number; what dtype follows from it is in `precision`."""

import os
import platform
from pathlib import Path
from typing import TypedDict

from adder.core.errors import UserError
from adder.core.machine import graphics_cards

# What a desktop's windows may take of a card's memory while something else computes on it.
DISPLAY_BYTES = 2**30


def device(wanted: str) -> str:
    """Return "cuda" or "cpu"; `wanted` is runtime.device, where "auto" takes a GPU if there is one that can be used.

    Raises UserError when a GPU is asked for and none can be used, with the reason where one is known.
    """
    if wanted == "cpu":
        return wanted
    found = graphics_cards.look()
    if graphics_cards.usable(found):
        return "cuda"
    if wanted == "cuda":
        why = graphics_cards.obstacle(found)
        raise UserError(
            "runtime.device: 'cuda' was asked for, but torch sees no CUDA device here that it can use"
            f"{f' ({why})' if why else ''}; use 'auto' or 'cpu'"
        )
    return "cpu"


def why_on_cpu() -> str | None:
    """Why the CPU computes though there is, or might be, a GPU; None where there is no sign of one, or it is used."""
    return graphics_cards.obstacle(graphics_cards.look())


def available_cores() -> int:
    """Cores that this process may use: by affinity, and by what its Slurm job asked for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(cores, int(asked)) if asked.isdigit() else cores


def use_threads(wanted: str | int) -> int:
    """Let torch compute with `wanted` threads, as `threads` has them; return the number.

    "auto" is every core that this process may use: `snakemake --cores 1` means one job at a time, and a training run
    on one core of many helps nobody.
    """
    import torch

    count = threads(wanted)
    torch.set_num_threads(count)
    return count


def threads(wanted: str | int) -> int:
    """Cores to compute on: `wanted` is runtime.threads, where "auto" is all that this process may use."""
    return available_cores() if wanted == "auto" else int(wanted)


def free_memory(device: str) -> int:
    """Free memory of the device ("cuda" or "cpu") in bytes: on a GPU, of what this process may take of it."""
    if device == "cuda":
        import torch

        return min(torch.cuda.mem_get_info()[0], total_memory("cuda") - torch.cuda.memory_reserved())
    import psutil

    return psutil.virtual_memory().available


def total_memory(device: str) -> int:
    """Memory of the device in bytes, or the part of a GPU's that ADDER_MEMORY_LIMIT_GB (in 10^9 bytes) leaves to us."""
    if device == "cuda":
        import torch

        total = torch.cuda.mem_get_info()[1]
        limit = os.environ.get("ADDER_MEMORY_LIMIT_GB")
        return min(total, int(float(limit) * 1e9)) if limit else total
    import psutil

    return psutil.virtual_memory().total


def display_margin() -> int:
    """Bytes of the GPU that are left to its screen: windows that are opened while it computes take memory of it."""
    import torch

    return DISPLAY_BYTES if graphics_cards.drives_display(torch.cuda.current_device()) else 0


def prepare_gpu() -> None:
    """Before the first tensor on the GPU: hold the allocator to total_memory, and let it grow pieces in place.

    Batches of ever other shapes leave gaps in memory that is handed out in pieces of fixed size.
    """
    import torch

    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    torch.cuda.set_per_process_memory_fraction(total_memory("cuda") / torch.cuda.mem_get_info()[1])


class Machine(TypedDict):
    """A machine as a stage's record has it: CPU's name, cores, memory in bytes, names of its GPUs, operating system."""

    cpu: str
    cores: int
    memory_bytes: int
    gpu: list[str]
    system: str


def describe() -> Machine:
    """CPU name, cores, memory in bytes and GPU names, for the provenance of a stage. Does not import torch."""
    import psutil

    names = [line.split(":", 1)[1].strip() for line in _read("/proc/cpuinfo").splitlines() if "model name" in line]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": available_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": _gpu_names(),
        "system": platform.platform(),
    }


def _gpu_names() -> list[str]:
    import sys

    torch = sys.modules.get("torch")  # a stage that computes has it; one that does not needs no GPU
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
