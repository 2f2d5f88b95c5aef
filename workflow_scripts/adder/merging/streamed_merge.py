"""Write a model's weights as an adapter changes them, and check what was written, a block of rows at a time.

Nothing but a few blocks is in memory, whatever the model's size; what nothing changes is copied as bytes.
"""

import errno
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from adder.core.errors import UserError
from adder.core.safetensors_layout import DTYPES, INDEX, Layout, Stored, layout, shard_files, stored_tensors
from adder.core.stage_spec import Context
from adder.merging.records import ChangedFile, WeightCheck
from adder.merging.stochastic_rounding import round_without_bias
from adder.merging.trained_tensors import TrainedTensor
from adder.merging.weight_deltas import Replacement, WeightDelta

# Elements computed at once: in fp32 a MiB, which a core's cache holds. On an AMD EPYC (Zen 4), two threads merging, an
# element takes 3.7 ns of a core so, with half as many 5, with a quarter 6 (one run each, beside other work).
BLOCK = 2**18
AHEAD = 2**26  # bytes that the system is asked to read before they are needed
PIECE = 2**22  # bytes copied or compared at once
# An estimate, not measured: getting a block to a GPU and back (1.5 MB) and starting a dozen kernels.
GPU_BLOCK_SECONDS = 2e-4

# Copying inside the system is for one file system, or for some.
CANT_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}
Item = TypeVar("Item")
Result = TypeVar("Result")
Deltas = Mapping[str, WeightDelta]  # by the name of the base's tensor
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Block:
    """Bytes of a file that stay as they are: `start` to `stop` from its beginning."""

    start: int
    stop: int


@dataclass(frozen=True)
class ChangedBlock(Block):
    """Some rows of a tensor that `delta` changes, from row `first` on."""

    tensor: Stored
    delta: WeightDelta
    first: int

    def changed(self, data: Bytes, device: str) -> Bytes:
        """What becomes of the block's bytes. Raises UserError when that isn't finite."""
        dtype = DTYPES[self.tensor.dtype]
        weight = torch.from_numpy(data).view(dtype).view(-1, *self.tensor.shape[1:])
        # First to the device: a copy that changes the type, too, would do that in main memory.
        exact = self.delta.apply(weight.to(device).to(torch.float32), self.first)
        low, high = torch.aminmax(exact)  # both are NaN if any element is
        if not max(-float(low), float(high)) <= torch.finfo(dtype).max:
            raise UserError(
                f"{self.tensor.name}: base + adapter holds numbers that aren't finite in {self.tensor.dtype}"
            )
        # A tensor that is stored twice, as embedding and as LM head, is rounded alike.
        seed = "whole" if isinstance(self.delta, Replacement | TrainedTensor) else self.tensor.name
        rounded = round_without_bias(exact, dtype, seed, self.first)
        return rounded.cpu().reshape(-1).view(torch.uint8).numpy()


def merge_weights(base: Path, deltas: Deltas, target: Path, context: Context, device: str | None = None) -> None:
    """Write the base's safetensors files into `target` as `deltas` have them.

    A changed weight is computed in fp32 and rounded once to the base's dtype (see stochastic_rounding). Every other
    tensor, the division into files, their headers and the index stay as they are. The bytes don't depend on the number
    of threads. `device`: where the sums are made ("cpu" or "cuda"), by default sums_device's choice. Raises UserError,
    before anything is written, when the deltas don't fit the base.
    """
    check_fit(base, deltas)
    device = device or sums_device(deltas, context)
    files = shard_files(base)
    for number, file in enumerate(files, 1):
        plan, done = layout(base / file), 0
        with opened(base / file) as source, (target / file).open("wb", buffering=0) as sink:
            os.posix_fallocate(sink.fileno(), 0, plan.size)  # a disk that is too small says so at once
            write = partial(_write_block, source.fileno(), sink.fileno(), device)
            for size in in_threads(write, blocks(plan, deltas), threads_for(deltas, context)):
                done += size
                context.progress.line(
                    f"merging file {number} of {len(files)}: {done / 1e9:.1f} of {plan.size / 1e9:.1f} GB"
                )
    if (base / INDEX).exists():
        shutil.copyfile(base / INDEX, target / INDEX)


def opened(path: Path) -> BinaryIO:
    """A file that will be read from its beginning to its end."""
    file = path.open("rb", buffering=0)
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return file


def _write_block(source: int, sink: int, device: str, block: Block) -> int:
    if isinstance(block, ChangedBlock):
        _write(sink, block.changed(read_bytes(source, block.start, block.stop), device), block.start)
    else:
        _copy(source, sink, block.start, block.stop)
    return block.stop - block.start


def check_fit(base: Path, deltas: Deltas) -> None:
    """Raise UserError unless each delta has its tensor in the base, of its shape and of a dtype that can be merged."""
    stored = stored_tensors(base)
    missing = sorted(deltas.keys() - stored.keys())
    if missing:
        raise UserError(
            f"the adapter changes {missing[0]} (and {len(missing) - 1} more), which the base in {base} doesn't have "
            "as a tensor of its own: the adapter belongs to another model, or to a layer that shares its weight or is "
            "stored in parts"
        )
    for name, delta in deltas.items():
        tensor = stored[name]
        if delta.shape != tensor.shape:
            raise UserError(f"{name}: the adapter's change has shape {delta.shape}, the weight {tensor.shape}")
        if tensor.dtype not in DTYPES:
            raise UserError(f"{name} of the base is {tensor.dtype}: merging needs 16-bit or 32-bit weights")


def sums_device(deltas: Deltas, context: Context) -> str:
    """Where base + adapter is computed: on a GPU only where all cores together would take longer.

    A block takes a core 0.8 ms (measured on an AMD EPYC with rank 16) and 0.01 ms more for each rank (from the time of
    that matmul, taken to grow with the rank); a GPU takes GPU_BLOCK_SECONDS for it, one after the other.
    """
    if context.device == "cpu":
        return "cpu"
    if not all(delta.by_rows for delta in deltas.values()):
        return "cuda"  # whole weights in fp32 would fill the main memory, and quantising them is work for a GPU
    rank = max((delta.rank for delta in deltas.values()), default=0)
    return "cuda" if (8e-4 + 1e-5 * rank) / context.threads > GPU_BLOCK_SECONDS else "cpu"


def threads_for(deltas: Deltas, context: Context) -> int:
    """Cores to use: fewer where blocks are whole weights, which take hundreds of megabytes each."""
    return context.threads if all(delta.by_rows for delta in deltas.values()) else min(context.threads, 6)


def blocks(plan: Layout, deltas: Deltas) -> Iterator[Block]:
    """Cut a file into blocks, in its order: the changed tensors by rows, all that lies between them by bytes."""
    done = 0
    for tensor in plan.tensors:
        if tensor.name in deltas:
            yield from _unchanged(done, tensor.start)
            yield from _by_rows(tensor, deltas[tensor.name])
            done = tensor.stop
    yield from _unchanged(done, plan.size)


def _unchanged(start: int, stop: int) -> Iterator[Block]:
    for place in range(start, stop, PIECE):
        yield Block(place, min(place + PIECE, stop))


def _by_rows(tensor: Stored, delta: WeightDelta) -> Iterator[ChangedBlock]:
    rows, width = tensor.shape[0] if tensor.shape else 1, prod(tensor.shape[1:])
    at_once = max(1, BLOCK // width) if delta.by_rows else rows
    row_bytes = width * DTYPES[tensor.dtype].itemsize
    for first in range(0, rows, at_once):
        stop = min(first + at_once, rows)
        yield ChangedBlock(tensor.start + first * row_bytes, tensor.start + stop * row_bytes, tensor, delta, first)


def in_threads(work: Callable[[Item], Result], todo: Iterable[Item], cores: int) -> Iterator[Result]:
    """Results of `work`, in order, from threads; the first error ends them all.

    Twice as many threads as cores: while some wait for the disk, the others compute. No more results than twice as many
    again wait for whoever takes them.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # each of ours computes by itself
    pool = ThreadPoolExecutor(2 * cores)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in todo:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= 4 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _copy(source: int, sink: int, start: int, stop: int) -> None:
    """Copy bytes from file to file at the same place, inside the system where it can do that."""
    while start < stop:
        try:
            copied = os.copy_file_range(source, sink, stop - start, start, start)
        except OSError as error:
            if error.errno not in CANT_COPY:
                raise
            _write(sink, read_bytes(source, start, stop), start)
            return
        if not copied:
            raise OSError(errno.EIO, "a file of the base became shorter while it was read")
        start += copied


def read_bytes(file: int, start: int, stop: int) -> Bytes:
    """These bytes of a file."""
    os.posix_fadvise(file, stop + AHEAD, stop - start, os.POSIX_FADV_WILLNEED)
    data = np.empty(stop - start, np.uint8)
    view = data.data
    while view:
        size = os.preadv(file, [view], stop - len(view))
        if not size:
            raise OSError(errno.EIO, "a file became shorter while it was read")
        view = view[size:]
    return data


def _write(file: int, data: Bytes, start: int) -> None:
    view = data.data
    while view:
        size = os.pwrite(file, view, start)
        view, start = view[size:], start + size


def check_weights(base: Path, model: Path, deltas: Deltas, context: Context) -> WeightCheck:
    """Compare the merged files with what base and `deltas` make, byte by byte.

    All of both models is read; the merged files, which were just written, from the disk and not from the system's
    memory. Raises UserError unless every adapted weight is the rounded sum and finite, and every other byte, headers
    included, the base's. An adapted weight may be unchanged only if all of its change is lost in rounding.
    """
    files = shard_files(base)
    if shard_files(model) != files:
        raise UserError(f"{model}: the merged model's files aren't those of its base: {shard_files(model)}")
    device = sums_device(deltas, context)
    changed: dict[str, int] = {}
    sizes: dict[str, int] = {}
    table: list[ChangedFile] = []
    for number, file in enumerate(files, 1):
        plan, done = layout(base / file), 0
        if layout(model / file) != plan:
            raise UserError(f"{model / file}: holds other tensors than its base")
        adapted = [tensor for tensor in plan.tensors if tensor.name in deltas]
        changed |= dict.fromkeys((tensor.name for tensor in adapted), 0)
        sizes |= {tensor.name: max(1, prod(tensor.shape)) for tensor in adapted}
        with opened(base / file) as source, opened(model / file) as merged:
            os.fsync(merged.fileno())
            os.posix_fadvise(merged.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            compare = partial(_compare_block, source.fileno(), merged.fileno(), device, model / file, plan)
            for block, count in in_threads(compare, blocks(plan, deltas), threads_for(deltas, context)):
                done += block.stop - block.start
                if isinstance(block, ChangedBlock):
                    changed[block.tensor.name] += count
                context.progress.line(
                    f"checking file {number} of {len(files)}: {done / 1e9:.1f} of {plan.size / 1e9:.1f} GB"
                )
        count = sum(changed[tensor.name] > 0 for tensor in adapted)
        table.append({"name": file, "bytes": plan.size, "changed": count})
    unchanged = sorted(name for name, count in changed.items() if not count)
    return {
        "adapted_weights": len(changed),
        "changed_weights": len(changed) - len(unchanged),
        "unchanged_weights": len(unchanged),
        "unchanged": unchanged,
        "changed_share": sum(count / sizes[name] for name, count in changed.items()) / len(changed),
        "files": table,
        "bytes_read_back": sum(row["bytes"] for row in table),
    }


def _compare_block(source: int, merged: int, device: str, path: Path, plan: Layout, block: Block) -> tuple[Block, int]:
    """The block, and how many of its elements differ from the base's. Raises UserError if its bytes aren't right."""
    old, new = (read_bytes(file, block.start, block.stop) for file in (source, merged))
    if not isinstance(block, ChangedBlock):
        if not np.array_equal(old, new):
            place = block.start + int(np.flatnonzero(old != new)[0])
            names = [tensor.name for tensor in plan.tensors if tensor.start <= place < tensor.stop]
            raise UserError(f"{path}: {(names or ['the header'])[0]} isn't its base's, though nothing adapts it")
        return block, 0
    dtype = DTYPES[block.tensor.dtype]
    bits = np.uint16 if dtype.itemsize == 2 else np.uint32
    if not np.array_equal(block.changed(old, device).view(bits), new.view(bits)):  # what it should be is finite
        finite = torch.isfinite(torch.from_numpy(new).view(dtype)).all()
        what = "isn't base + adapter" if finite else "holds numbers that aren't finite"
        raise UserError(f"{path}: {block.tensor.name} {what}")
    return block, int(np.count_nonzero(old.view(bits) != new.view(bits)))
