"""What the processes of one training tell each other; with a single process each of these does nothing.

Each process computes its share of a step's packs on a copy of the weights that it trains. Gradients are added up once a
step, when all of a process's forward passes are done.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

# Numbers added up at once: a copy of so many, 256 MiB in fp32, is all the memory that it takes.
BUCKET = 2**26


def count() -> int:
    """Processes that share this training."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def number() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the one that writes files and speaks."""
    return number() == 0


def wait() -> None:
    """Go on when every process has come here."""
    if count() > 1:
        distributed.barrier()


def on_main(function: Callable, *arguments: Any) -> Any:
    """The result of a call (anything that can be pickled) that the main process makes, in every process."""
    if count() == 1:
        return function(*arguments)
    box = [function(*arguments) if is_main() else None]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def total(*values: float) -> list[float]:
    """Each value's sum over the processes."""
    if count() == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64, device=_device())
    distributed.all_reduce(numbers)
    return numbers.tolist()


def largest(value: float) -> float:
    """The largest of the processes' values."""
    if count() == 1:
        return value
    numbers = torch.tensor(value, dtype=torch.float64, device=_device())
    distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
    return numbers.item()


def share(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give every process the main one's values, but for what is in shards."""
    if count() > 1:
        for parameter in _whole(parameters):
            distributed.broadcast(parameter.data, src=0)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes; a process without one counts as zero.

    For shards backward has done that.
    """
    if count() == 1:
        return
    bucket: list[torch.Tensor] = []
    for parameter in _whole(parameters):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(gradient.numel() for gradient in bucket) >= BUCKET:
            _average(bucket)
            bucket = []
    if bucket:
        _average(bucket)


def _whole(parameters: Iterable[torch.nn.Parameter]) -> Iterable[torch.nn.Parameter]:
    return (parameter for parameter in parameters if not isinstance(parameter, DTensor))


def _average(tensors: list[torch.Tensor]) -> None:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= count()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def _device() -> torch.device:
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
