"""What ranks exchange: nothing where there is one, and the same in each where there are two (gloo on the CPU)."""

from pathlib import Path

import torch
from torch import distributed, multiprocessing

from adder.training.distributed import collectives


def test_one_process_keeps_what_it_has():
    parameter = torch.nn.Parameter(torch.ones(3))
    collectives.all_reduce_mean_gradients([parameter])
    collectives.broadcast_parameters([parameter])
    collectives.barrier()
    assert parameter.grad is None and collectives.rank() == 0 and collectives.world_size() == 1
    assert collectives.is_main() and collectives.call_on_main(max, 2, 3) == 3
    assert collectives.all_reduce_sum(1.5, 2) == [1.5, 2] and collectives.all_reduce_max(4) == 4


def exchange(rank: int, folder: str) -> None:
    """In each of two processes: everything once; what is found goes to a file."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    a, b = (torch.nn.Parameter(torch.full((size,), float(rank))) for size in (3, 5))
    if rank == 0:
        a.grad = torch.full((3,), 4.0)  # rank 1 has none, which counts as zero
    b.grad = torch.full((5,), float(rank))
    collectives.BUCKET_ELEMENTS = 2  # an exchange for each
    collectives.all_reduce_mean_gradients([a, b])
    collectives.broadcast_parameters([a])
    found = {
        "ranks": (collectives.rank(), collectives.world_size(), collectives.is_main()),
        "gradients": (a.grad, b.grad),
        "parameters": (a.data, b.data),
        "main": collectives.call_on_main(lambda: f"of rank {rank}"),
        "sum": collectives.all_reduce_sum(1.0, rank),
        "max": collectives.all_reduce_max(rank),
    }
    collectives.barrier()
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_have_the_same(tmp_path: Path):
    multiprocessing.start_processes(exchange, (str(tmp_path),), nprocs=2, start_method="fork")
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["ranks"] == (rank, 2, rank == 0)
        assert [gradient.tolist() for gradient in found["gradients"]] == [[2.0] * 3, [0.5] * 5]
        assert [values.tolist() for values in found["parameters"]] == [[0.0] * 3, [float(rank)] * 5]
        assert found["main"] == "of rank 0" and found["sum"] == [2.0, 1.0] and found["max"] == 1.0
