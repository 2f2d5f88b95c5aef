"""The families of kernels, and which of them this process does without, because a trial on its card said so.

Where a family is switched off, its plain PyTorch reference does the work on the GPU as well
(`triton_utils.runs_kernels`), or what is built on it isn't used.
"""

from typing import Literal, TypeAlias

Family: TypeAlias = Literal[
    "adder_triton",
    "adder_varlen",
    "adder_fa2",
    "adder_flex",
    "rmsnorm",
    "rope",
    "swiglu",
    "swiglu_backward",
    "lm_head_loss",
    "dropout",
    "nf4",
    "folded_lora",
    "fp8",
    "decode_attention",
    "row_argmax",
]

_off: dict[str, str] = {}


def turn_off(family: str, why: str) -> None:
    """Do without a family's kernels from now on, since `why`: "it was off by 0.3", say."""
    _off[family] = why


def turn_all_on() -> None:
    """Forget what was switched off."""
    _off.clear()


def why_off(family: str) -> str | None:
    """Why a family's kernels aren't used in this process; None where they are."""
    return _off.get(family)
