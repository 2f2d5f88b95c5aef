"""Which dtype the matrix products have on this machine. It decides numbers, so it is part of what a stage is."""

import os
from pathlib import Path

from adder.core.choice import Choice
from adder.core.machine import graphics_cards


def compute_dtype(device: str, wanted: str = "auto") -> Choice:
    """Choose the dtype of the matrix products: "bfloat16", "float16" or "float32".

    CUDA: bf16 where the card has it (compute capability 8.0 on), else fp16 (a T4). CPU: bf16 only with instructions for
    it, since without AVX512-BF16 or AMX a bf16 backward product runs at a fiftieth of fp32's rate. By the CPU's flags
    and not by a timing, so that base and tuned model are evaluated alike whatever else the machine does.
    """
    if wanted != "auto":
        return Choice(wanted, "as set by train.compute_dtype")
    if device == "cuda":
        return dtype_of_card(graphics_cards.card())
    if cpu_has_bf16():
        return Choice("bfloat16", "this CPU has bf16 matrix instructions (AVX512-BF16 or AMX)")
    return Choice("float32", "this CPU has neither AVX512-BF16 nor AMX: bf16 would be emulated and slow")


def dtype_of_card(card: graphics_cards.Card) -> Choice:
    """As compute_dtype, for a card."""
    major, minor = card.capability
    about = f"{card.name} (compute capability {major}.{minor})"
    if major >= 8:
        return Choice("bfloat16", f"{about} computes in bf16")
    return Choice("float16", f"{about} has no bf16; fp16 with a gradient scaler")


def cpu_has_bf16() -> bool:
    """Whether the CPU has bf16 matrix instructions (AVX512-BF16 or AMX)."""
    flags = _cpu_flags()
    # oneDNN obeys this variable, so a CPU that is told to act as an AVX2 one must be treated as one.
    limited = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE"}
    return not limited and bool({"avx512_bf16", "amx_bf16"} & flags)


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split(":", 1)[1].split()}
