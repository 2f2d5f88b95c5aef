"""A quantised checkpoint made into an ordinary one in 16 bit, under the names on disk, a weight at a time.

The values are those that the library which quantised them computes with; unpacking them is its own code, or that of
transformers. In memory is one weight and a file's worth of results.
"""

import importlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from adder.core.errors import UserError
from adder.core.files import read_json
from adder.core.progress import Progress
from adder.core.safetensors_layout import DTYPES, INDEX, Stored, shard_files, stored_tensors
from adder.data.checkpoints import integer_forms, integer_weights
from adder.data.checkpoints.quantisation import Quantisation, quantisation, without_quantisation
from adder.data.model_types import QuantisedRecord

FILE_BYTES = 2**31  # of results that are written as one file
# Values that a core makes a second, with room for writing them. Measured without that, on an Intel Xeon with AMX, one
# thread and a matrix of 2,048 by 2,048: 5.4e7 (GPTQ), 5.5e7 (MXFP4), 1.4e8 (FP8), 2.6e9 (NF4).
VALUES_PER_SECOND = 3e7
# Of activations and of the KV cache, which are computed in 16 bits here.
DROPPED = (
    *(".input_scale", ".activation_scale", ".qscale_act", ".input_scale_ub", ".k_scale", ".v_scale", ".q_scale"),
    *(".output_scale", ".input_global_scale", ".input_zero_point", ".k_zero_point", ".v_zero_point", ".kv_scale"),
)
FP8 = ("F8_E4M3", "F8_E5M2")
PACKED = (*FP8, "F4", "F8_E8M0", "U8", "I8", "U16", "I16", "U32", "I32")

Tensors = dict[str, torch.Tensor]
Parts = dict[str, list[str]]  # by the name of a weight in the result, the stored tensors that it is made of


@dataclass(frozen=True)
class Method:
    """How weights of one kind are found among the names of a file, and unpacked.

    ends: by which a name shows that it belongs to a quantised weight. weight: the name in the result of what has this
    end. unpack: from the weight's name, its parts by name and the dtype that is wanted. beside: whether the packed
    numbers have the weight's own name, so that what has such an end beside no weight is something else.
    """

    ends: tuple[str, ...]
    weight: Callable[[str, str], str]
    unpack: Callable[[str, Tensors, torch.dtype], torch.Tensor]
    beside: bool = False


def dequantise(packed: Path, folder: Path, source: str, threads: int, progress: Progress) -> QuantisedRecord:
    """Write the model of the directory `packed`, which is quantised, into `folder` in 16 bit; return what was done.

    Everything but weights and config.json is copied. Raises UserError for weights that aren't understood, and where
    there is no room for them.
    """
    config = read_json(packed / "config.json")
    found = quantisation(config)
    assert found is not None
    dtype = _dtype(config)
    stored = stored_tensors(packed)
    method = _method(found, dtype)
    parts = _parts(stored, method)
    weights = [name for name, own in parts.items() if own != [name]]
    if not weights:
        raise UserError(f"model.source: {source} says that it is quantised ({found.spoken}), but no weight of it is")
    values = sum(_values(stored, own) for own in parts.values())
    needed, seconds = 2 * values, values / VALUES_PER_SECOND / threads
    progress.say(
        f"dequantising {source} ({found.spoken}): {len(weights)} weights, {values / 1e9:.2f} billion numbers, "
        f"{needed / 1e9:.1f} GB in 16 bit, about {max(1, round(seconds / 60))} min"
    )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"model.source: in 16 bit {source} takes {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free"
        )
    torch.set_num_threads(threads)
    for path in packed.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", INDEX):
            shutil.copyfile(path, folder / path.name)
    _write(packed, folder, parts, partial(_value, method=method, dtype=dtype, source=source), progress)
    plain = without_quantisation(config)
    (folder / "config.json").write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _check_shapes(folder, source)
    return {
        "method": found.spoken,
        "weights": len(weights),
        "stored_bytes": sum(tensor.stop - tensor.start for tensor in stored.values()),
        "dtype": str(dtype).removeprefix("torch."),
        "trained_as_it_is": found.trained_as_it_is,
    }


def refuse_packed(folder: Path, source: str) -> None:
    """Raise UserError where a model whose config.json tells of no quantisation has packed weights all the same."""
    for tensor in stored_tensors(folder).values():
        last = tensor.name.rpartition(".")[2]
        is_weight = "weight" in last or last.endswith(("_blocks", "_packed", "_proj"))
        if tensor.dtype in (*FP8, "F4", "F8_E8M0") or (tensor.dtype in PACKED and is_weight):
            raise UserError(
                f"model.source: {source} stores {tensor.name} in {tensor.dtype}, and its config.json doesn't say how "
                "it is quantised; name its 16-bit model instead"
            )


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The 16-bit dtype that the model is made for."""
    text = config.get("text_config") or {}
    said = [part.get(key) for part in (config, text) for key in ("dtype", "torch_dtype")]
    return torch.float16 if next((one for one in said if one), None) == "float16" else torch.bfloat16


# What belongs together -----------------------------------------------------------------------------------------------


def _parts(stored: Mapping[str, Stored], method: Method) -> Parts:
    """The parts of each tensor of the result, in the order of their names; those in 16 bit are of one part."""
    parts: Parts = {}
    for name in sorted(stored):
        if name.endswith(DROPPED):
            continue
        end = next((end for end in method.ends if name.endswith(end)), None)
        weight = name if end is None else method.weight(name, end)
        parts.setdefault(name if method.beside and weight not in stored else weight, []).append(name)
    return parts


def _values(stored: Mapping[str, Stored], names: Iterable[str]) -> int:
    """About how many numbers the result has: those of its largest part, several of which may be in one element."""
    largest = max((stored[name] for name in names), key=lambda tensor: tensor.stop - tensor.start)
    count = prod(largest.shape)
    # By far the most common are four bits.
    return count * {"U8": 2, "I32": 8}.get(largest.dtype, 1)


def _value(name: str, tensors: Tensors, method: Method, dtype: torch.dtype, source: str) -> torch.Tensor:
    """A tensor of the result. Raises UserError for what isn't understood."""
    try:
        value = tensors[name] if list(tensors) == [name] else method.unpack(name, tensors, dtype)
    except Exception as error:  # libraries refuse what they don't know in any way that they like
        raise UserError(
            f"model.source: {name} of {source} can't be dequantised from {', '.join(sorted(tensors))}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    if value.is_floating_point() and value.element_size() == 1:
        raise UserError(f"model.source: {name} of {source} is in {value.dtype} and has no scale")
    return value.contiguous()


def _write(
    packed: Path, folder: Path, parts: Parts, value: Callable[[str, Tensors], torch.Tensor], progress: Progress
) -> None:
    """Write files of about FILE_BYTES, the weights in the order of the files in which they were stored."""
    files = {file: safe_open(packed / file, "pt") for file in shard_files(packed)}
    file_of = {name: opened for opened in files.values() for name in opened.keys()}
    order = {name: number for number, name in enumerate(file_of)}
    group: Tensors = {}
    groups: list[list[str]] = []

    def flush() -> None:
        save_file(group, folder / f".part-{len(groups)}", {"format": "pt"})
        groups.append(list(group))
        group.clear()

    for number, name in enumerate(sorted(parts, key=lambda name: min(order[part] for part in parts[name])), 1):
        group[name] = value(name, {part: file_of[part].get_tensor(part) for part in parts[name]})
        progress.line(f"dequantising: {number} of {len(parts)} tensors")
        if sum(tensor.nbytes for tensor in group.values()) >= FILE_BYTES:
            flush()
    if group:
        flush()
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
        index = {tensor: file for file, own in zip(names, groups, strict=True) for tensor in own}
        text = json.dumps({"metadata": {}, "weight_map": index}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")
    for number, file in enumerate(names):
        (folder / f".part-{number}").rename(folder / file)


def _check_shapes(folder: Path, source: str) -> None:
    """Raise UserError unless the result is a model: each tensor as the architecture has it, and in 16 or 32 bits."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    refuse_packed(folder, source)
    stored = stored_tensors(folder)
    odd = next((t for t in stored.values() if t.dtype not in DTYPES and "weight" in t.name.rpartition(".")[2]), None)
    if odd:
        raise UserError(f"model.source: {odd.name} of {source} came out in {odd.dtype}")
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    except (ValueError, KeyError):  # what can't be loaded is refused by name, later
        return
    for name, parameter in model.named_parameters():
        if name in stored and stored[name].shape != tuple(parameter.shape):
            raise UserError(
                f"model.source: {name} of {source} came out as {list(stored[name].shape)}, where "
                f"{type(model).__name__} has {list(parameter.shape)}"
            )


# Methods --------------------------------------------------------------------------------------------------------------


def _method(found: Quantisation, dtype: torch.dtype) -> Method:
    """Of what config.json tells; see quantisation.METHODS."""

    def of_module(name: str, end: str) -> str:
        return name.removesuffix(end) + ".weight"

    def of_weight(name: str, end: str) -> str:
        return name.removesuffix(end)

    if found.method in ("fp8", "mxfp8", "fbgemm_fp8"):
        block = found.settings.get("weight_block_size")
        ends = ("_scale_inv", ".qscale_weight", ".scale", "_scale")
        return Method(ends, _of_scale, partial(_unpack_fp8, block=block), beside=True)
    if found.method == "mxfp4":
        return Method(("_blocks", "_scales"), of_weight, _unpack_mxfp4)
    if found.method == "bitsandbytes_4bit":
        ends = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
        ends = (*(f".weight.{end}" for end in ends), ".weight.quant_state.bitsandbytes__fp4")
        return Method(ends, of_module, _unpack_bitsandbytes_4bit, beside=True)
    if found.method == "bitsandbytes_8bit":
        return Method((".SCB", ".weight_format"), of_module, _unpack_bitsandbytes_8bit, beside=True)
    if found.method == "compressed-tensors":
        ends = (
            "weight_packed",
            "weight_scale",
            "weight_zero_point",
            "weight_global_scale",
            "weight_shape",
            "weight_g_idx",
        )
        return Method(tuple(f".{end}" for end in ends), of_module, _compressed_tensors(found.settings))
    packing = integer_forms.packing(found.method, found.settings)
    return Method(integer_weights.ENDS, of_module, partial(integer_weights.unpack, packing=packing))


def _of_scale(name: str, end: str) -> str:
    """The weight that has this scale: `q_proj.weight_scale_inv` and `q_proj.scale` are those of `q_proj.weight`."""
    rest = name.removesuffix(end)
    return rest if end.startswith("_") else f"{rest}.weight"


def _unpack_fp8(name: str, tensors: Tensors, dtype: torch.dtype, block: list[int] | None) -> torch.Tensor:
    """Weights of eight bits (or two of four in a byte), a scale for each block, row, or all of them."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = tensors.pop(name)
    (scale,) = tensors.values()
    rows, columns = weight.shape[-2:]
    if scale.ndim == 0 or scale.numel() == 1:
        scale = scale.reshape(1, 1)
    elif scale.ndim == 1:
        scale = scale[:, None]
    elif block and weight.dtype not in (torch.int8, torch.uint8):
        # The last block of a row or column may be cut off, which transformers' code doesn't expect.
        more = [scale.shape[-2] * block[0] - rows, scale.shape[-1] * block[1] - columns]
        if not all(0 <= m < b for m, b in zip(more, block, strict=True)):
            raise ValueError(f"{list(scale.shape)} scales of blocks of {block} don't fit {list(weight.shape)}")
        weight = torch.nn.functional.pad(weight.float(), (0, more[1], 0, more[0]))
    unpack: Any = Fp8Dequantize(None)._dequantize_one
    return unpack(weight, scale, dtype)[..., :rows, : (2 * columns if weight.dtype == torch.int8 else columns)]


def _unpack_mxfp4(name: str, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """gpt-oss's experts: (experts, outputs, groups, 16) bytes and a scale a group become (experts, inputs, outputs)."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=dtype)


def _unpack_bitsandbytes_4bit(name: str, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """In the dtype that was quantised, in which bitsandbytes computes the values in each matmul."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    weight = tensors.pop(name)
    state = QuantState.from_dict(tensors, torch.device("cpu"))
    return dequantize_4bit(weight, state)


def _unpack_bitsandbytes_8bit(name: str, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    form = tensors.get(name.removesuffix("weight") + "weight_format")
    if form is not None and int(form) != 0:
        raise ValueError(f"its rows are in an order (weight_format {int(form)}) that bitsandbytes no longer knows")
    return int8_vectorwise_dequant(tensors[name], tensors[name.removesuffix("weight") + "SCB"]).to(dtype)


def _library(module: str) -> Any:
    """A module of compressed-tensors, which is untyped."""
    return importlib.import_module(f"compressed_tensors.{module}")


def _compressed_tensors(settings: Mapping[str, Any]) -> Callable[[str, Tensors, torch.dtype], torch.Tensor]:
    compressors = _library("compressors").BaseCompressor
    match_name = _library("utils.match").match_name
    config = _library("quantization").QuantizationConfig.model_validate(dict(settings))

    def unpack(name: str, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
        module = name.removesuffix(".weight")
        groups = config.config_groups.values()
        named = [group for group in groups if any(match_name(module, target) for target in group.targets)]
        # Names of classes, as "Linear", are for all that no name is for.
        scheme = (named or [group for group in groups if not all(t.startswith("re:") for t in group.targets)])[0]
        form = scheme.format or settings.get("format")
        if form in (None, "mixed-precision"):
            form = _library("compressors.format").infer_module_format(torch.nn.Linear, scheme)
        own = {part.removeprefix(f"{module}."): tensor for part, tensor in tensors.items()}
        return compressors.get_value_from_registry(form).decompress(own, scheme)["weight"].to(dtype)

    return unpack
