"""The safetensors files of a model directory, read by their headers: where each tensor lies, without loading any.

The format: eight bytes with the header's length, little-endian; the header, JSON; the tensors' bytes.
Source: https://github.com/huggingface/safetensors#format.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from adder.core.errors import UserError
from adder.core.files import read_json

INDEX = "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs"  # how what Git LFS leaves in a file's place begins
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `start` to `stop` are bytes from the beginning of its file."""

    name: str
    dtype: str  # by safetensors' name
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """A file's tensors in the order in which they lie; the first `begin` bytes are its header."""

    begin: int
    size: int
    tensors: tuple[Stored, ...]


def shard_files(folder: Path) -> list[str]:
    """Names of a model directory's safetensors files, sorted. Raises UserError if there are none."""
    if (folder / INDEX).exists():
        return sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    raise UserError(f"{folder}: holds no model.safetensors and no {INDEX}")


def layout(path: Path) -> Layout:
    """Read a file's header. Raises UserError for a file that isn't one of safetensors, or isn't whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        begin = 8 + int.from_bytes(start, "little")
        if start == LFS_POINTER[:8]:
            raise UserError(f"{path} is no whole safetensors file: it only points to one (Git LFS); run `git lfs pull`")
        text = file.read(begin - 8) if 8 < begin <= size else b""
    try:
        header = json.loads(text)
        tensors = [
            Stored(name, one["dtype"], tuple(one["shape"]), *(begin + offset for offset in one["data_offsets"]))
            for name, one in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} is no whole safetensors file: it doesn't begin with a header") from None
    if max((tensor.stop for tensor in tensors), default=begin) > size:
        raise UserError(f"{path} is no whole safetensors file: it ends before its last tensor does")
    return Layout(begin, size, tuple(sorted(tensors, key=lambda tensor: (tensor.start, tensor.name))))


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a model directory by name."""
    return {tensor.name: tensor for file in shard_files(folder) for tensor in layout(folder / file).tensors}


def total_bytes(folder: Path) -> int:
    """Size of a model directory's weights."""
    return sum((folder / file).stat().st_size for file in shard_files(folder))


def parameter_count(folder: Path) -> int:
    """Parameters in a model directory's weights."""
    return sum(prod(tensor.shape) for tensor in stored_tensors(folder).values())
