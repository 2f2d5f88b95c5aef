"""Quantised checkpoints of a tiny model, packed by the libraries that people use, or as these document their forms."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adder.core.progress import Progress
from adder.core.stage_spec import Context, NoInputs, Runtime
from adder.data import fetch_model
from adder.data.model_types import ModelSettings
from tiny import save_tiny_model

Tensors = dict[str, torch.Tensor]


def is_quantised(name: str) -> bool:
    """Whether a tensor of the tiny model is the matrix of a layer."""
    return name.endswith("proj.weight")


def tiny_model(folder: Path, **config: Any) -> Path:
    """In bf16, with matrices whose sizes are no multiple of a block of 32."""
    return save_tiny_model(folder, **{"intermediate_size": 80, "tie_word_embeddings": False, **config})


def repacked(
    plain: Path, folder: Path, settings: dict[str, Any], pack: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
) -> Tensors:
    """Write the model `plain` with each matrix as `pack` stores it; return the values that they then stand for.

    pack: from a weight (fp32) to its tensors, by what follows the module's name, and to its values.
    """
    folder.mkdir()
    for path in plain.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    expected = load_file(plain / "model.safetensors")
    stored: Tensors = {}
    for name, tensor in expected.items():
        if is_quantised(name):
            packed, values = pack(tensor.float())
            stored |= {f"{name.removesuffix('weight')}{end}": part.contiguous() for end, part in packed.items()}
            expected[name] = values.to(torch.bfloat16)
        else:
            stored[name] = tensor
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    tell(folder, settings)
    return expected


def tell(folder: Path, settings: dict[str, Any]) -> None:
    """Let config.json say how the model is quantised."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))


def by_bitsandbytes(plain: Path, folder: Path, device: str = "cpu", **settings: Any) -> Path:
    """As people publish them: loaded in 4 or 8 bit on `device` and saved."""
    config = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, dtype=torch.bfloat16, device_map={"": device}
    )
    model.save_pretrained(folder)
    for path in plain.glob("tok*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def model_stage(out: Path, source: Path) -> Path:
    """What the stage "model" makes of it, in the folder `out`."""
    out.mkdir()
    settings = ModelSettings(source=str(source))
    fetch_model.run(settings, NoInputs(), out, Context(Progress.silent(), Runtime(threads=1)))
    return out


def fp8_blocks(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """E4M3 numbers, a scale for each block (which may be cut off at the end), and the values."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % size, 0, -rows % size))
    blocks = padded.unflatten(1, (-1, size)).unflatten(0, (-1, size))
    scales = blocks.abs().amax((1, 3)) / 448
    numbers = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    values = numbers.float() * scales[:, None, :, None]
    whole = values.flatten(2, 3).flatten(0, 1)[:rows, :columns]
    return numbers.flatten(2, 3).flatten(0, 1)[:rows, :columns], scales, whole


def packed_in_int32(numbers: torch.Tensor, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """Neighbours in a row, several in an int32 from the lowest bits on; `order`: AutoAWQ's."""
    each = 32 // bits
    order = order or list(range(each))
    groups = numbers.long().unflatten(1, (-1, each))
    words = sum(groups[..., place] << (bits * number) for number, place in enumerate(order))
    assert isinstance(words, torch.Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def packed_in_bits(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows as one string of bits, lowest first, cut into int32s: numbers may go on in the next one."""
    string = (numbers.long()[..., None] >> torch.arange(bits)) & 1
    words = (string.flatten(1).unflatten(1, (-1, 32)) << torch.arange(32)).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def integers(weight: torch.Tensor, bits: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a weight (inputs, outputs): numbers from 0 on, zeros and fp16 scales of each group of `size` inputs."""
    groups = weight.unflatten(0, (-1, size))
    low, high = groups.amin(1), groups.amax(1)
    scales = ((high - low) / (2**bits - 1)).half()
    zeros = (-low / scales.float()).round().clamp(1, 2**bits - 1)
    numbers = (groups / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 2**bits - 1)
    return numbers.flatten(0, 1), zeros, scales
