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
    "dropout_values",
    "nf4",
    "folded_lora",
    "fp8",
    "decode_attention",
    "row_argmax",
]

# What is known of each family: None where it is right and pays, else why it isn't used.
_known: dict[str, str | None] = {}


def turn_off(family: str, why: str) -> None:
    """Do without a family's kernels from now on, since `why`: "it was off by 0.3", say."""
    _known[family] = why


def trust(family: str) -> None:
    """Note that a trial on this card found nothing against a family."""
    _known[family] = None


def forget() -> None:
    """Forget what trials found; all families are used then."""
    _known.clear()


def is_tried(family: str) -> bool:
    """Whether it is known if a family is right and pays on this card."""
    return family in _known


def why_off(family: str) -> str | None:
    """Why a family's kernels aren't used in this process; None where they are."""
    return _known.get(family)
