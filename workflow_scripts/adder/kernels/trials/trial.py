"""Trying a family of kernels: does it run on this card, compute what its reference computes, and pay?

A trial runs each of the family's cases forward and backward, with the model's widths and few rows. What raises
anything, is off by more than the family's tolerance, or takes longer than what it replaces, isn't used.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from adder.kernels.trials.shapes import ModelShapes

# A kernel is slower than what it replaces if it takes so many times as long: the best of a few timings of one kernel
# differ by some 10 % on a card that others use as well.
SLOWER = 1.25
# Timings of each side, the best of which counts, and how often a case is run in one, up to so many seconds.
TIMINGS, RUNS, LONG = 3, 4, 0.02
# A GPU waits so many of its cycles, some 2 ms, before what is timed, while the host launches all of it: in training,
# too, the host is ahead, and it is the GPU's time that counts.
WAITED_CYCLES = 4_000_000


class Case(NamedTuple):
    """One use of a family's kernels. `kernel` and `reference` give the same tensors, by kernels and by plain PyTorch.

    replaced: what computes where the kernels don't, if that is not `reference`. timed: whether that is compared.
    tolerance: of this case, where it isn't the family's. launched: time from the first launch on, since it is launching
    that takes the time where examples are attended to one by one.
    """

    name: str
    kernel: Callable[[], Sequence[torch.Tensor]]
    reference: Callable[[], Sequence[torch.Tensor]]
    replaced: Callable[[], object] | None = None
    timed: bool = True
    tolerance: float | None = None
    launched: bool = False


def nothing_lacks(shapes: ModelShapes) -> str | None:
    """For families that any machine may try."""
    return None


@dataclass(frozen=True)
class KernelFamily:
    """A family as it is declared.

    name: as `kernels.families` has it. title: for people. instead: what computes without it. tolerance: relative norm
    of the difference to the reference, `reason` says why so much. cases: from the shapes and the device to cases.
    lacks: why these shapes or this machine have no use for it, so that it isn't tried; None where it is.
    after: one that is preferred; only where that can't be used, this is tried. slower: how many times as long as what
    it replaces a family may take. with_lora: whether LoRA's rank and dropout, NF4 and fp8 matter to it.
    """

    name: str
    title: str
    instead: str
    tolerance: float
    reason: str
    cases: Callable[[ModelShapes, str], Iterable[Case]]
    lacks: Callable[[ModelShapes], str | None] = nothing_lacks
    after: str | None = None
    slower: float = SLOWER
    with_lora: bool = False

    def sizes(self, shapes: ModelShapes) -> ModelShapes:
        """Of the shapes what matters to this family: what is asked with others is answered alike."""
        return shapes if self.with_lora else replace(shapes, rank=0, dropout=0.0, four_bit=False, fp8=False)


Outcome = Literal["used", "lacking", "unneeded", "raised", "wrong", "slow", "died", "no memory"]


@dataclass(frozen=True)
class Verdict:
    """What a trial found.

    why: for a sentence. error: the largest relative error. seconds: of all timed cases, by the kernels;
    replaced_seconds: by what they replace.
    """

    family: str
    outcome: Outcome
    why: str = ""
    error: float | None = None
    tolerance: float | None = None
    seconds: float | None = None
    replaced_seconds: float | None = None

    @property
    def used(self) -> bool:
        """Whether the family computes from now on."""
        return self.outcome == "used"

    @property
    def lasting(self) -> bool:
        """Whether to keep it for another time: not what memory was free, nor what is known without a trial."""
        return self.outcome not in {"no memory", "lacking", "unneeded"}

    def row(self) -> dict[str, Any]:
        """As one of a choice's alternatives."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


def what_lacks(family: KernelFamily, shapes: ModelShapes) -> str | None:
    """As the family's `lacks`; what that raises is a reason, too."""
    try:
        return family.lacks(shapes)
    except Exception as problem:  # of drivers that are asked for a card
        return in_words(problem)


def try_family(family: KernelFamily, shapes: ModelShapes, device: str) -> Verdict:
    """Try a family on `device` ("cuda", "cuda:1"; for tests "cpu"). Whatever is raised becomes part of the verdict."""
    lacking = what_lacks(family, shapes)
    if lacking is not None:
        return Verdict(family.name, "lacking", lacking)
    worst, seconds, replaced_seconds = 0.0, 0.0, 0.0
    try:
        for case in family.cases(shapes, device):
            error = relative_error(case.kernel(), case.reference())
            allowed = family.tolerance if case.tolerance is None else case.tolerance
            if not error <= allowed:
                off = "gave what is no number" if math.isnan(error) else f"was off by {error:.2g}"
                why = f"{off} ({case.name}; {allowed:g} is allowed: {family.reason})"
                return Verdict(family.name, "wrong", why, _finite(error), allowed)
            if case.tolerance is None:
                worst = max(worst, error)
            if case.timed:
                both = timed(case.kernel, case.replaced or case.reference, device, case.launched)
                seconds, replaced_seconds = seconds + both[0], replaced_seconds + both[1]
    except torch.OutOfMemoryError:
        return Verdict(family.name, "no memory", "couldn't be tried: there was not enough free memory on the card")
    except Exception as problem:  # compilers, drivers and kernels raise what they like
        return Verdict(family.name, "raised", f"failed: {in_words(problem)}")
    found = (worst, family.tolerance, seconds, replaced_seconds)
    if seconds > family.slower * replaced_seconds:
        why = f"took {1e3 * seconds:.3g} ms where {family.instead} took {1e3 * replaced_seconds:.3g}"
        return Verdict(family.name, "slow", why, *found)
    return Verdict(family.name, "used", "", *found)


def in_words(problem: BaseException) -> str:
    """An exception in one line."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}".rstrip(": ")


def relative_error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest norm of a difference relative to the expected tensor's; NaN where anything is no number.

    Raises ValueError for other shapes or another count of tensors.
    """
    errors: list[float] = []
    for f, e in zip(found, expected, strict=True):
        if f.shape != e.shape:
            raise ValueError(f"it gave {tuple(f.shape)} where {tuple(e.shape)} is right")
        f, e = f.detach().float(), e.detach().float()
        errors.append(((f - e).norm() / e.norm().clamp(min=1e-30)).item() if e.numel() else 0.0)
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)


def timed(
    kernel: Callable[[], object], replaced: Callable[[], object], device: str, launched: bool = False
) -> tuple[float, float]:
    """Seconds of one run of each, the best of several timings that take turns. Both have run before.

    `launched`: as a Case has it.
    """
    best, runs = [math.inf, math.inf], [RUNS, RUNS]
    one = _seconds if device == "cpu" or launched else _gpu_seconds
    for _ in range(TIMINGS):
        for side, run in enumerate((kernel, replaced)):
            best[side] = min(best[side], one(run, runs[side], device))
            if best[side] > LONG:
                runs[side] = 1
    return best[0], best[1]


def _seconds(run: Callable[[], object], times: int, device: str) -> float:
    """Seconds of a run, launching included."""
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(times):
        run()
    _synchronise(device)
    return (time.perf_counter() - start) / times


def _gpu_seconds(run: Callable[[], object], times: int, device: str) -> float:
    """Seconds of a run on the GPU alone, as far as launching keeps ahead of it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _synchronise(device)
    torch.cuda._sleep(WAITED_CYCLES)
    start.record()
    for _ in range(times):
        run()
    end.record()
    _synchronise(device)
    return start.elapsed_time(end) / 1e3 / times


def _synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _finite(error: float) -> float | None:
    """JSON knows no other numbers."""
    return error if math.isfinite(error) else None
