"""How GPTQ, AWQ and AutoRound store weights as integers, by config.json alone.

Light to import; integer_weights.py unpacks what this finds nothing against.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# The columns of the numbers in a word of AutoAWQ's form gemm, from the lowest bits on.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# What AutoRound calls its forms: whether outputs are packed (as AWQ does), and what is added to stored zeros.
AUTO_ROUND_FORMS: dict[str, tuple[Literal["inputs", "outputs"], int]] = {
    "auto_round:auto_gptq": ("inputs", 1),
    "auto_round:gptq": ("inputs", 1),
    "auto_round:gptqmodel": ("inputs", 0),
    "auto_round": ("inputs", 0),
    "auto_round:auto_awq": ("outputs", 0),
    "auto_round:awq": ("outputs", 0),
}
GPTQ_FORMS = {"gptq": 1, "gptq_v2": 0}  # what is added to stored zeros


@dataclass(frozen=True)
class Packing:
    """packed: whether several inputs or several outputs stand in a word; added: to the stored zeros.

    order: the columns of the numbers in a word, where they aren't as stored. symmetric, reordered, group_size: what
    config.json says of all weights; None where layers may differ.
    """

    packed: Literal["inputs", "outputs"]
    added: int
    order: tuple[int, ...] | None
    symmetric: bool | None
    reordered: bool | None
    group_size: int | None


def packing(method: str, settings: Mapping[str, Any]) -> Packing:
    """Of what config.json says of a method of quantisation.METHODS that `problem` knows nothing against."""
    order: tuple[int, ...] | None = None
    packed: Literal["inputs", "outputs"] = "inputs"
    added = GPTQ_FORMS.get(_form(settings), 1)
    if method == "awq":
        packed, added = "outputs", 0
    elif method == "auto-round":
        packed, added = AUTO_ROUND_FORMS[_auto_round_form(settings)]
    if packed == "outputs":
        order = AWQ_ORDER
    layers_differ = any(settings.get(key) for key in ("dynamic", "extra_config"))
    return Packing(
        packed,
        added,
        order,
        None if layers_differ else bool(settings.get("sym")),
        None if layers_differ else bool(settings.get("desc_act")),
        None if layers_differ else int(settings.get("group_size", 128)),
    )


def problem(method: str, settings: Mapping[str, Any]) -> str | None:
    """What of config.json can't be unpacked here; None where all can."""
    bits = settings.get("bits", settings.get("w_bit", 4))
    if method == "awq":
        form = str(settings.get("version", "gemm")).lower()
        if bits != 4 or form != "gemm":
            return f"of AWQ only 4 bit in the form gemm can be unpacked here, not {bits} bit in {form}"
        return None
    if method == "gptq":
        form = _form(settings)
        if form not in GPTQ_FORMS:
            return f"of GPTQ only the forms {' and '.join(GPTQ_FORMS)} can be unpacked here, not {form}"
        if settings.get("pack_dtype", "int32") != "int32":
            return f"of GPTQ only words of 32 bits can be unpacked here, not {settings['pack_dtype']}"
    else:
        form = _auto_round_form(settings)
        if form not in AUTO_ROUND_FORMS or settings.get("data_type", "int") != "int":
            return (
                "of AutoRound only whole numbers in the forms of GPTQ and AWQ can be unpacked here, not "
                f"{settings.get('data_type', 'int')} in {form}"
            )
        if settings.get("rotation_config") or settings.get("hadamard_config"):
            return "its weights are rotated, which can't be undone here"
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        return f"only weights of 2 to 8 bits can be unpacked here, not {bits}"
    return None


def _form(settings: Mapping[str, Any]) -> str:
    """Of GPTQ, as GPTQModel and AutoGPTQ tell it."""
    if settings.get("is_marlin_format"):
        return "marlin"
    return str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()


def _auto_round_form(settings: Mapping[str, Any]) -> str:
    """Without a word it is GPTQ's, as AutoRound itself takes it."""
    form = str(settings.get("packing_format") or settings.get("backend") or "auto").lower()
    return "auto_round:auto_gptq" if form == "auto" else form
