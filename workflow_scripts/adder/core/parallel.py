"""The same function over many batches, on all cores, with results in order and memory bounded; what children see to."""

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

Batch = TypeVar("Batch")
Result = TypeVar("Result")

AHEAD = 2  # batches a worker that are under way or waiting to be taken

_function: Callable[[Any], Any]


def map_batches(
    make: Callable[[], Callable[[Batch], Result]], batches: Iterable[Batch], workers: int
) -> Iterator[Result]:
    """Yield `make()(batch)` for each batch in order; `make` runs once in each worker, which then keeps its function.

    At most AHEAD batches a worker are taken from `batches` before a result is taken: memory stays flat. With one worker
    everything runs here. A worker's exception is raised here; a worker that was killed (out of memory) is an error too.
    """
    _calm_collector()
    if workers <= 1:
        yield from map(make(), batches)
        return
    # Forked: workers start in milliseconds with everything imported. Nothing has started threads that hold a lock yet.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(make,)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_run, batch))
                if len(waiting) >= AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def worker_count(items: int, enough: int, threads: int) -> int:
    """Workers for so many items, of which each worker should have `enough`: one core is quicker for little work.

    `threads`: as many workers at most, as Context.threads has them.
    """
    # Elsewhere processes start anew and would run Snakemake's job script a second time.
    most = threads if sys.platform == "linux" else 1
    return max(1, min(most, items // max(1, enough)))


def _calm_collector() -> None:
    """Look for cyclic garbage rarely, and never among what is there now: a sixth of the time went into that.

    Rows come as many small containers without cycles; with the usual thresholds each few hundred of them have Python
    walk through all that torch and transformers have loaded. Workers inherit it.
    """
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def _start(make: Callable[[], Callable[[Any], Any]]) -> None:
    global _function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    _function = make()


def _run(batch: Any) -> Any:
    return _function(batch)


def die_with_parent() -> None:
    """Let Linux kill this process when the one that started it ends (prctl's PR_SET_PDEATHSIG).

    To be called in the new process (subprocess' `preexec_fn`); elsewhere it does nothing.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGKILL)
