"""Made-up families of kernels, for trials on a CPU; a child process finds them here by name."""

import os
import signal
import time
from dataclasses import replace

import torch

from adder.kernels.trials import declared
from adder.kernels.trials.shapes import ModelShapes
from adder.kernels.trials.trial import Case, KernelFamily

SHAPES = ModelShapes(
    hidden=64,
    intermediate=128,
    heads=4,
    kv_heads=2,
    head_size=16,
    vocabulary=300,
    dtype="float32",
    rank=8,
    dropout=0.1,
    four_bit=True,
    fp8=True,
)


class OutOfResources(Exception):
    """As Triton's, which isn't installed everywhere."""


class CompilationError(Exception):
    """As Triton's."""


def right() -> list[torch.Tensor]:
    return [torch.ones(4)]


def out_of_resources() -> list[torch.Tensor]:
    raise OutOfResources("out of resource: shared memory, Required: 147456, Hardware limit: 101376")


def compilation_error() -> list[torch.Tensor]:
    raise CompilationError("at 7:4: type fp8e4nv not supported in this architecture")


def runtime_error() -> list[torch.Tensor]:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul")


def no_memory() -> list[torch.Tensor]:
    raise torch.OutOfMemoryError("CUDA out of memory")


def wrong() -> list[torch.Tensor]:
    return [torch.full((4,), 1.5)]


def no_number() -> list[torch.Tensor]:
    return [torch.full((4,), torch.nan)]


def other_shape() -> list[torch.Tensor]:
    return [torch.ones(4, 4)]


def slow() -> list[torch.Tensor]:
    time.sleep(0.02)
    return right()


def killed() -> list[torch.Tensor]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return right()


def exits() -> list[torch.Tensor]:
    os._exit(3)


def hangs() -> list[torch.Tensor]:
    time.sleep(600)
    return right()


KERNELS = (
    right,
    out_of_resources,
    compilation_error,
    runtime_error,
    no_memory,
    wrong,
    no_number,
    other_shape,
    slow,
    killed,
    exits,
    hangs,
)


def family(name: str, after: str | None = None) -> KernelFamily:
    """The family whose kernel is the function of that name."""
    kernel = next(function for function in KERNELS if function.__name__ == name)
    timed = name in {"slow"}
    case = Case("a case", kernel, right, timed=timed)
    return KernelFamily(name, f"what is {name}", "plain torch", 0.01, "made up", lambda *_: [case], after=after)


def families(names: str) -> list[KernelFamily]:
    """The families of these names, joined by commas; one of "a<b" is only tried where b can't be used."""
    pairs = [name.split("<") for name in names.split(",")]
    return [family(pair[0], pair[1] if len(pair) > 1 else None) for pair in pairs]


def said_to_be(kind: str) -> list[KernelFamily]:
    """All declared families, each with kernels that raise, are wrong or are slow as the function `kind` is."""
    spoil = family(kind).cases
    every = [*declared.families("lora"), *declared.families("inference")]
    return [replace(one, cases=spoil, lacks=lambda shapes: None, after=None) for one in every]
