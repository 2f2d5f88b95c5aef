"""What the processes of one training exchange; with a single process each of these does nothing.

Each rank computes its share of a step's packs on a copy of the weights that it trains. Gradients are averaged once a
step, when all of a rank's forward passes are done.
"""

from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

# Elements that are reduced at once: a copy of so many, 256 MiB in fp32, is all the memory that it takes.
BUCKET_ELEMENTS = 2**26

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def world_size() -> int:
    """Processes that share this training."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """This process's rank, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_main() -> bool:
    """Whether this is rank 0, which writes files and speaks."""
    return rank() == 0


def barrier() -> None:
    """Go on when every rank has come here."""
    if world_size() > 1:
        distributed.barrier()


def call_on_main(
    function: Callable[Arguments, Result], *arguments: Arguments.args, **options: Arguments.kwargs
) -> Result:
    """The result of a call (anything that can be pickled) that rank 0 makes, in every rank."""
    if world_size() == 1:
        return function(*arguments, **options)
    box: list[Result | None] = [function(*arguments, **options) if is_main() else None]
    distributed.broadcast_object_list(box, src=0)
    return box[0]  # pyright: ignore[reportReturnType] - rank 0's own result, of whatever kind


def all_reduce_sum(*values: float) -> list[float]:
    """Each value's sum over the ranks."""
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=_device())
    distributed.all_reduce(tensor)
    return tensor.tolist()


def all_reduce_max(value: float) -> float:
    """The largest of the ranks' values."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=_device())
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tensor.item()


def broadcast_parameters(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give every rank the values of rank 0, but for what is in shards."""
    if world_size() > 1:
        for parameter in _unsharded(parameters):
            distributed.broadcast(parameter.data, src=0)


def all_reduce_mean_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over the ranks; a rank without one counts as zero.

    For shards backward has done that.
    """
    if world_size() == 1:
        return
    bucket: list[torch.Tensor] = []
    for parameter in _unsharded(parameters):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(gradient.numel() for gradient in bucket) >= BUCKET_ELEMENTS:
            all_reduce_mean_(bucket)
            bucket = []
    if bucket:
        all_reduce_mean_(bucket)


def all_reduce_mean_(tensors: list[torch.Tensor]) -> None:
    """Replace tensors of one dtype by their means over the ranks, in one exchange."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def _unsharded(parameters: Iterable[torch.nn.Parameter]) -> Iterable[torch.nn.Parameter]:
    return (parameter for parameter in parameters if not isinstance(parameter, DTensor))


def _device() -> torch.device:
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
