"""How a checkpoint is quantised, told by its config.json alone, and whether it can be made into 16-bit weights here.

Light to import: a local model is refused before any job, one of the hub before its weights are fetched.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adder.core.errors import UserError
from adder.data.checkpoints import integer_forms

# What config.json calls it: `compression_config` is compressed-tensors' older name.
KEYS = ("quantization_config", "compression_config")
# Of the weights that are quantised. 4-bit ones of bitsandbytes are also trained as they are.
METHODS = {
    "bitsandbytes_4bit": "bitsandbytes, 4 bit",
    "bitsandbytes_8bit": "bitsandbytes, 8 bit",
    "fp8": "FP8 in blocks",
    "mxfp8": "MXFP8",
    "fbgemm_fp8": "FP8 by rows",
    "mxfp4": "MXFP4",
    "compressed-tensors": "compressed-tensors",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "auto-round": "AutoRound",
}
# The library that unpacks them, where that is none of those which Adder always has.
LIBRARY = {"compressed-tensors": "compressed_tensors"}
INSTEAD = "name its 16-bit model instead"


@dataclass(frozen=True)
class Quantisation:
    """method: a key of METHODS, or whatever else config.json says; settings: all that it says."""

    method: str
    settings: Mapping[str, Any]

    @property
    def spoken(self) -> str:
        """The method as people call it."""
        return METHODS.get(self.method, self.method)

    @property
    def trained_as_it_is(self) -> bool:
        """Whether `train.method: qlora` trains on these very weights."""
        return self.method == "bitsandbytes_4bit"


def quantisation(config: Mapping[str, Any]) -> Quantisation | None:
    """How a model with this config.json is quantised; None where it isn't."""
    for part in (config, config.get("text_config") or {}):
        for key in KEYS:
            settings = part.get(key)
            if settings:
                return Quantisation(_method(settings), settings)
    return None


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the same model in 16 bit."""
    plain = {key: value for key, value in config.items() if key not in KEYS}
    if plain.get("text_config"):
        plain["text_config"] = {key: value for key, value in plain["text_config"].items() if key not in KEYS}
    return plain


def refuse_unknown(config: Mapping[str, Any], source: str) -> None:
    """Raise UserError for a checkpoint whose weights can't be made into 16-bit ones here."""
    found = quantisation(config)
    if found is None:
        return
    start = f"model.source: {source} is quantised ({found.spoken}), and "
    if found.method not in METHODS:
        raise UserError(f"{start}only {', '.join(METHODS.values())} can be dequantised here; {INSTEAD}")
    problem = _problem(found)
    if problem:
        raise UserError(f"{start}{problem}; {INSTEAD}")
    library = LIBRARY.get(found.method)
    if library and importlib.util.find_spec(library) is None:
        raise UserError(
            f"{start}what unpacks that, {library.replace('_', '-')}, is not installed here: pip install "
            f"{library.replace('_', '-')}, or {INSTEAD}"
        )


def _method(settings: Mapping[str, Any]) -> str:
    for bits in (4, 8):
        if settings.get(f"load_in_{bits}bit"):
            return f"bitsandbytes_{bits}bit"
    method = str(settings.get("quant_method") or "an unnamed method")
    return "auto-round" if method == "intel/auto-round" else method


def _problem(found: Quantisation) -> str | None:
    """What of a known method isn't known; None where all is."""
    settings = found.settings
    if found.method in ("awq", "gptq", "auto-round"):
        return integer_forms.problem(found.method, settings)
    if found.method == "compressed-tensors":
        # Both would have to be undone as well; what is left would be another model.
        if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
            return "its weights are stored sparse, which can't be unpacked here"
        if settings.get("transform_config"):
            return "its weights are rotated (transform_config), which can't be undone here"
    return None
