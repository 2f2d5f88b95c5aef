"""Which graphics cards are here and whether torch can use them: if not, why, and what to install."""

import functools
import importlib.util
import os
import re
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path

DRIVER_FILE = Path("/proc/driver/nvidia/version")
VISIBLE = "CUDA_VISIBLE_DEVICES"
MIG = "MIG-"
# Whose graphics torch can use, and this project can't.
OTHERS = {"mps": "Apple's GPU (MPS)", "xpu": "Intel's GPU (XPU)"}


@dataclass(frozen=True)
class Card:
    """A graphics card: compute capability (major, minor), memory in bytes."""

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name} ({self.memory_bytes / 2**30:.0f} GiB, compute capability {major}.{minor})"


@dataclass(frozen=True)
class Surroundings:
    """What there is for computing on a GPU.

    torch: its version. built_for: see there. cards: those that torch can use. error: what CUDA says where it can use
    none. visible: CUDA_VISIBLE_DEVICES, None where it isn't set. driver: version of NVIDIA's, None without one. other:
    one of OTHERS. code_for: architectures that this torch has code for, "sm_90" and "compute_90". triton: its version.
    """

    torch: str
    built_for: str | None
    cards: tuple[Card, ...] = ()
    error: str = ""
    visible: str | None = None
    driver: str | None = None
    other: str | None = None
    code_for: tuple[str, ...] = ()
    triton: str | None = None


def card(device: str | int = 0) -> Card:
    """The card that is torch's `device`, "cuda:1" or its number. On "cpu", for tests, one that stands for none."""
    import torch

    if device == "cpu":
        return Card(-1, "CPU", (0, 0), 0)
    index = torch.device(device).index if isinstance(device, str) else device
    if index is None:
        index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    return Card(index, properties.name, (properties.major, properties.minor), properties.total_memory)


def built_for() -> str | None:
    """What this torch is built for: "CUDA 12.8", "ROCm 6.4"; None for one that knows no GPU."""
    import torch

    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else None


@functools.cache
def driver_version() -> str | None:
    """Version of NVIDIA's driver, "550.54.15"; None where there is none, or it can't be found out."""
    try:
        text = DRIVER_FILE.read_text()
    except OSError:
        text = said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found[0] if found else None


def said_by(*command: str) -> str:
    """What a program writes; nothing where it isn't there or gives no answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def look() -> Surroundings:
    """Look at this machine."""
    import torch

    count, error = _count()
    other = "mps" if torch.backends.mps.is_available() else "xpu" if torch.xpu.is_available() else None
    return Surroundings(
        torch=torch.__version__,
        built_for=built_for(),
        cards=tuple(card(index) for index in range(count)),
        error=error,
        visible=os.environ.get(VISIBLE),
        driver=driver_version(),
        other=other,
        code_for=tuple(torch.cuda.get_arch_list()) if count else (),
        triton=_triton_version(),
    )


def _count() -> tuple[int, str]:
    """How many cards torch can use, and what CUDA says where it can use none."""
    import torch

    if built_for() is None:
        return 0, ""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return torch.cuda.device_count(), ""
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as problem:
            return 0, " ".join(str(problem).split())
    return 0, " ".join(str(said[-1].message).split()) if said else ""


def _triton_version() -> str | None:
    from importlib import metadata

    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:  # AMD's comes under another name
        return "of unknown version"


def visible_cards() -> tuple[Card, ...]:
    """All cards that torch sees, in its order."""
    import torch

    return tuple(card(index) for index in range(torch.cuda.device_count())) if torch.cuda.is_available() else ()


def drives_display(index: int = 0) -> bool:
    """Whether a screen hangs on a card, so that windows take memory of it while something else computes."""
    import torch

    uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
    return any(uuid and uuid in line and "Enabled" in line for line in _displays().splitlines())


@functools.cache
def _displays() -> str:
    """Lines of UUID and "Enabled" or "Disabled"."""
    return said_by("nvidia-smi", "--query-gpu=uuid,display_active", "--format=csv,noheader")


def usable(found: Surroundings) -> tuple[Card, ...]:
    """The cards that this torch can compute on: those it has code for."""
    return tuple(card for card in found.cards if _has_code(card, found))


def _has_code(card: Card, found: Surroundings) -> bool:
    """Whether torch has machine code for a card, of its own generation, or code that its driver can translate."""
    if not found.code_for or (found.built_for or "").startswith("ROCm"):
        return True
    for name in found.code_for:
        kind, _, number = name.partition("_")
        digits = re.match(r"\d+", number)
        if digits is None:
            continue
        has = (int(digits[0]) // 10, int(digits[0]) % 10)
        specific = not number.isdigit()  # sm_90a: for just this one
        if kind == "sm" and has[0] == card.capability[0] and has <= card.capability and not specific:
            return True
        if (kind == "compute" and has <= card.capability and not specific) or has == card.capability:
            return True
    return False


def obstacle(found: Surroundings) -> str | None:
    """Why no GPU can be used though there is one, or might be, and what to do: one sentence. None where all is well.

    None as well on a machine without any sign of a GPU.
    """
    if usable(found):
        return None
    if found.cards:
        card = found.cards[0]
        return (
            f"torch {found.torch} has no code for {card}, but for {', '.join(found.code_for)}; install a torch that "
            "has it (https://pytorch.org/get-started)"
        )
    if found.other is not None:
        return f"{OTHERS[found.other]} can't be used: quantised training and the kernels here are for CUDA"
    if found.visible is not None and found.built_for is not None and found.driver is not None:
        if found.visible.strip() in ("", "-1", "none", "NoDevFiles"):
            return f"{VISIBLE} is {found.visible!r}, which hides every GPU; unset it to use them"
        if "driver" not in found.error:
            return (
                f"{VISIBLE} is {found.visible!r}, which names no GPU that is here; `nvidia-smi -L` lists their numbers "
                "and UUIDs"
            )
    if found.built_for is None:
        if found.driver is None:
            return None
        return (
            f"an NVIDIA driver ({found.driver}) is here, but torch {found.torch} is built for CPUs alone; install one "
            "built for CUDA (https://pytorch.org/get-started)"
        )
    return _cuda_says(found)


def _cuda_says(found: Surroundings) -> str | None:
    """What is wrong, by CUDA's own words."""
    text = found.error
    with_driver = f"NVIDIA's driver{f' {found.driver}' if found.driver else ''}"
    if any(sign in text for sign in ("too old", "insufficient", "InsufficientDriver")):
        return (
            f"{with_driver} is too old for torch {found.torch}, which is built for {found.built_for}; install a newer "
            "driver, or a torch built for the CUDA version that `nvidia-smi` shows"
        )
    if found.driver is None:
        return None  # torch for CUDA on a machine without a GPU
    if any(sign in text for sign in ("forward compatibility", "system has unsupported", "initialization error")):
        return (
            f"{with_driver} and torch {found.torch}, built for {found.built_for}, don't fit ({text}); restart the "
            "machine after an update of the driver, or install a torch for another CUDA version"
        )
    said = f": {text[:300]}" if text else ""
    return f"{with_driver} is here, and torch {found.torch}, built for {found.built_for}, sees no GPU{said}"


def alike(cards: tuple[Card, ...]) -> tuple[Card, ...]:
    """Of several cards those of one kind that have the most memory together, in their order."""
    kinds: dict[tuple[str, tuple[int, int]], list[Card]] = {}
    for card in cards:
        kinds.setdefault((card.name, card.capability), []).append(card)
    best = max(kinds.values(), key=lambda kind: sum(card.memory_bytes for card in kind), default=[])
    return tuple(best)
