"""What an adapter changes in its base's weights, read from the files that PEFT writes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from adder.core.errors import UserError
from adder.core.files import read_json

# What follows ".lora_" in the names of an adapter's tensors.
PARTS = {"A.weight": "a", "B.weight": "b", "magnitude_vector": "magnitude"}
# PEFT's starts that leave the base's weights as they are.
ORDINARY_STARTS = (True, False, "gaussian", "eva", "orthogonal")
END_MODULES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head", "embed_out", "output_layer")

AdapterConfig = dict[str, Any]  # PEFT's adapter_config.json


class WeightDelta(Protocol):
    """What becomes of one of the base's tensors."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor, as it is stored."""
        ...

    @property
    def rank(self) -> int:
        """Multiplications for each element, which is what the sum costs."""
        ...

    @property
    def by_rows(self) -> bool:
        """Whether some rows can be computed without the others."""
        ...

    def apply(self, weight: torch.Tensor, first: int = 0) -> torch.Tensor:
        """The changed weight in fp32. `weight`: fp32, those rows of it that begin with row `first`."""
        ...


@dataclass(frozen=True)
class LoraDelta:
    """A LoRA pair: the weight becomes W + `scale * B @ A`. A: (r, in), B: (out, r), fp32.

    With DoRA (Liu et al. 2024, arXiv:2402.09353) each output's row of that sum is then given the length that was
    trained, `magnitude`: (out,), fp32. In training on NF4 the rows were those of base + pair with the quantised base,
    scaled to the same lengths; here they are of the base that is merged into, as wherever PEFT loads the adapter on it.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool  # the weight is stored (in, out), as GPT-2's Conv1D has it
    magnitude: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, as it is stored."""
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.transposed else shape

    @property
    def rank(self) -> int:
        """The adapter's rank."""
        return len(self.a)

    @property
    def by_rows(self) -> bool:
        """Whether some rows can be computed without the others."""
        return self.magnitude is None or not self.transposed

    def apply(self, weight: torch.Tensor, first: int = 0) -> torch.Tensor:
        """The changed weight in fp32. `weight`: fp32, those rows of it that begin with row `first`."""
        rows = slice(first, first + len(weight))
        left, right = (self.a.T[rows], self.b.T) if self.transposed else (self.b[rows], self.a)
        result = torch.addmm(weight, left.to(weight.device), right.to(weight.device), alpha=self.scale)
        if self.magnitude is None:
            return result
        if self.transposed:
            return result * (self.magnitude.to(weight.device) / result.norm(dim=0))
        return result * (self.magnitude[rows].to(weight.device) / result.norm(dim=1))[:, None]


@dataclass(frozen=True)
class TensorDelta:
    """A change that is one tensor, shaped as the base's."""

    value: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.value.shape)

    @property
    def rank(self) -> int:
        """Nothing is multiplied."""
        return 0

    @property
    def by_rows(self) -> bool:
        """Rows are independent."""
        return True


class Replacement(TensorDelta):
    """A tensor of which all was trained, which takes the base's place."""

    def apply(self, weight: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Those rows of the trained tensor, in fp32, that begin with row `first` and are as many as the weight's."""
        return self.value[first : first + len(weight)].to(weight.device, torch.float32)


class BiasDelta(TensorDelta):
    """A bias to which another, trained with the pair (PEFT's `lora_bias`), is added; fp32, scaled already."""

    def apply(self, weight: torch.Tensor, first: int = 0) -> torch.Tensor:
        """The changed bias in fp32, from element `first` on."""
        return weight + self.value[first : first + len(weight)].to(weight.device)


def is_nothing(delta: WeightDelta) -> bool:
    """Whether a change is a pair whose product is zero, as a pair's is before its first step."""
    return isinstance(delta, LoraDelta) and delta.magnitude is None and not (delta.a.any() and delta.b.any())


def read_adapter(folder: Path) -> dict[str, WeightDelta]:
    """What a PEFT directory changes, by the name of the base's tensor: pairs, biases and tensors trained in full.

    Raises UserError for what isn't LoRA or DoRA of linear layers, or modules and biases trained in full, and for
    numbers that aren't finite.
    """
    config: AdapterConfig = read_json(folder / "adapter_config.json")
    _refuse_unknown(config, folder)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    deltas: dict[str, WeightDelta] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{folder}: {name} holds numbers that aren't finite: the adapter is broken")
        module, is_lora, kind = name.removeprefix("base_model.model.").rpartition(".lora_")
        if is_lora and (kind in PARTS or kind == "B.bias"):
            pairs.setdefault(module, {})[PARTS.get(kind, "bias")] = tensor.float()
        elif not is_lora and _is_bias(kind, config):
            deltas[kind.replace(".base_layer.", ".")] = Replacement(tensor)
        elif not is_lora and _is_saved_module(kind, config):
            deltas[kind] = Replacement(tensor)
        else:
            raise UserError(
                f"{folder}: can't merge {name}: only LoRA pairs of linear layers and whole modules are supported"
            )
    for module, parts in sorted(pairs.items()):
        missing = {"a", "b", *(["magnitude"] if config.get("use_dora") else [])} - parts.keys()
        if missing:
            raise UserError(f"{folder}: {module} lacks a part of its LoRA pair: {', '.join(sorted(missing))}")
        scale = _scale(config, module, len(parts["a"]))
        transposed = bool(config.get("fan_in_fan_out"))
        if "bias" in parts:
            deltas[f"{module}.bias"] = BiasDelta(scale * parts["bias"])
        deltas[f"{module}.weight"] = LoraDelta(parts["a"], parts["b"], scale, transposed, parts.get("magnitude"))
    if not deltas:
        raise UserError(f"{folder}: the adapter is empty")
    return deltas


def _is_saved_module(name: str, config: AdapterConfig) -> bool:
    """Whether a tensor belongs to a module that was trained in full; PEFT names those by how their names end."""
    names = tuple(config.get("modules_to_save") or ())
    modules = [name[:end] for end, letter in enumerate(name) if letter == "."]
    # An embedding's partner is saved with it, under its own name, where the two share one tensor.
    return any(m.endswith(names) for m in modules) or (bool(config.get("ensure_weight_tying")) and bool(names))


def _is_bias(name: str, config: AdapterConfig) -> bool:
    """Whether a tensor is one of the base's own biases, trained beside the pairs (`bias: all` or `lora_only`)."""
    return config.get("bias", "none") != "none" and name.endswith(".bias")


def share_tied(deltas: Mapping[str, WeightDelta], stored: set[str], folder: Path) -> dict[str, WeightDelta]:
    """For a base whose LM head is its embedding: leave out the one of the two that it doesn't store.

    `stored`: names of the base's tensors. Raises UserError if only one of the two was trained, or if they differ: one
    tensor can't hold both.
    """
    ends = {name: delta.value for name, delta in sorted(deltas.items()) if isinstance(delta, Replacement)}
    ends = {name: value for name, value in ends.items() if _is_end(name)}
    if not ends:
        return dict(deltas)
    if len(ends) != 2 or not torch.equal(*ends.values()):
        raise UserError(
            f"{folder}: the base stores one tensor for its embedding and its LM head, and the adapter has "
            f"{' and '.join(ends)}{' in different values' if len(ends) == 2 else ' alone'}: there is no place to merge "
            "it into. Where train.modules_to_save names one of the two, Adder trains both as one"
        )
    return {name: delta for name, delta in deltas.items() if name not in ends or name in stored}


def _is_end(name: str) -> bool:
    """Whether a tensor is an embedding of tokens or an LM head, under the names that models give them."""
    return name.split(".")[-2] in END_MODULES and name.endswith(".weight")


def _refuse_unknown(config: AdapterConfig, folder: Path) -> None:
    variants = (
        "use_qalora", "alora_invocation_tokens", "use_bdlora", "arrow_config", "monteclora_config", "kasa_config",
        "layer_replication",
    )  # fmt: skip
    unknown = {
        "another method than LoRA": config.get("peft_type") != "LORA",
        "trained tokens": config.get("trainable_token_indices"),
        "weights adapted by name (target_parameters), such as those of experts": config.get("target_parameters"),
        "a start that changes the base's weights": config.get("init_lora_weights") not in (None, *ORDINARY_STARTS),
        "a variant of LoRA": any(config.get(name) for name in variants),
    }
    for what, is_there in unknown.items():
        if is_there:
            raise UserError(f"{folder}: the adapter has {what}, which merging doesn't support")


def _scale(config: AdapterConfig, module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732); alpha may be a module's own."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
