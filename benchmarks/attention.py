"""How fast a layer's attention over packs is, forward and backward, by each way that runs on this card.

Usage: python benchmarks/attention.py [--seconds 70] [--out benchmarks/results/attention.json] [--tiny]

Packs of 2,048 tokens with train_speed.py's lengths, joined in one row as in training. Every way gets the same queries,
keys and values and is compared with fp32 attention of each example by itself:

per_example    Adder's fallback: one sdpa call an example
triton         Adder's own kernel, its first choice
torch_varlen   torch.nn.attention.varlen, its second
flash_attn     the flash-attn package, if installed
flex           FlexAttention as Adder compiles it, for changing lengths after the second
flex_static    the same compiled for one length, where `flex` was for changing ones (micro-batch 4)
dense_mask     sdpa with a block-diagonal mask of tokens × tokens, as transformers makes it
cudnn          cuDNN's packed attention by torch's own operator; cudnn_repeated: keys and values repeated for each head

seconds                median of a forward and a backward pass
first_seconds          the first such pass, with compiling or planning
peak_memory_bytes      what the passes take beyond queries, keys, values and the output's gradient
error                  the worst relative norm among output and the three gradients; largest_difference: of one number
seconds of `masks`     making FlexAttention's block mask, and the dense one, once for all layers
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import speed_model
import torch
from torch.nn.attention import flex_attention as flex
from train_speed import version
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from adder.kernels import packed_attention

SHAPES = {
    "llama": {"heads": 32, "groups": 8, "size": 128, "window": None, "cap": None},
    "window": {"heads": 32, "groups": 8, "size": 128, "window": 1024, "cap": None},
    "gemma2": {"heads": 16, "groups": 8, "size": 256, "window": None, "cap": 50.0},
}
TINY = {
    "llama": {"heads": 4, "groups": 2, "size": 16, "window": None, "cap": None},
    "window": {"heads": 4, "groups": 2, "size": 16, "window": 100, "cap": None},
    "gemma2": {"heads": 2, "groups": 1, "size": 32, "window": None, "cap": 2.0},
}
# What matters most comes first: later cases are left out when the time is up.
CASES = [
    *[("llama", workload, 8, "bfloat16") for workload in speed_model.MEANS],
    ("gemma2", "short_chat", 4, "bfloat16"),
    ("window", "long_document", 8, "bfloat16"),
    *[("llama", workload, 4, "bfloat16") for workload in speed_model.MEANS],
    *[("llama", workload, size, "float16") for size in (8, 4) for workload in speed_model.MEANS],
]
MEASURE_SECONDS = 0.15


class Cudnn(torch.autograd.Function):
    """cuDNN's attention over (tokens, heads, head size); torch's own wrapper of it is switched off."""

    @staticmethod
    def forward(ctx, query, key, value, ends, longest):
        """Causal attention within each example."""
        made = torch.ops.aten._cudnn_attention_forward(
            query, key, value, None, ends, ends, longest, longest, True, 0.0, True, False
        )
        ctx.save_for_backward(query, key, value, made[0], made[1], made[6], made[7], ends)
        ctx.longest = longest
        return made[0]

    @staticmethod
    def backward(ctx, gradient):
        """Gradients to query, key and value."""
        *tensors, ends = ctx.saved_tensors
        sizes = (ctx.longest, ctx.longest)
        found = torch.ops.aten._cudnn_attention_backward(
            gradient.contiguous(), *tensors, None, ends, ends, *sizes, 0.0, True
        )
        return *found, None, None


def by_cudnn(module, query, key, value, mask, *, cu_seq_lens_q, max_length_q, sliding_window, softcap, repeat=False):
    """As Adder's attention functions."""
    if sliding_window is not None or softcap is not None:
        raise NotImplementedError("no window and no cap")
    groups = query.shape[1] // key.shape[1] if repeat else 1
    rows = [x.transpose(1, 2)[0] for x in (query, key, value)]
    rows[1:] = (x.repeat_interleave(groups, dim=1) for x in rows[1:])
    return Cudnn.apply(*(x.contiguous() for x in rows), cu_seq_lens_q, max_length_q)[None], None


@functools.partial(torch.compile, dynamic=False, fullgraph=True)
def static_flex(query, key, value, **options):
    """A function of its own, which shares no compilations with Adder's."""
    return flex.flex_attention(query, key, value, **options)


def by_static_flex(module, *tensors, **options):
    """FlexAttention compiled for this length alone."""
    usual, packed_attention._compiled_flex = packed_attention._compiled_flex, lambda: static_flex
    try:
        return packed_attention.ATTENTION_FUNCTIONS[packed_attention.FLEX](module, *tensors, **options)
    finally:
        packed_attention._compiled_flex = usual


def by_kernel(name: str) -> Callable:
    """Adder's way of that name, without what it leaves to the fallback."""

    def way(module, query, *tensors, **options):
        if name == packed_attention.FA2 and packed_attention._flash_attn() is None:
            raise ModuleNotFoundError("flash-attn isn't installed")
        problem = packed_attention._unsupported(name, query.shape[-1], options["softcap"], 0.0)
        if problem:
            raise NotImplementedError(problem)
        return packed_attention.ATTENTION_FUNCTIONS[name](module, query, *tensors, **options)

    return way


def dense(ends: torch.Tensor, tokens: int, window: int | None) -> torch.Tensor:
    """Which token sees which: (1, 1, tokens, tokens) bool."""
    at = torch.arange(tokens, dtype=ends.dtype, device=ends.device)
    example = torch.bucketize(at, ends[1:], right=True)
    mask = (example[:, None] == example) & (at[:, None] >= at)
    return (mask if window is None else mask & (at[:, None] - at < window))[None, None]


def by_dense_mask(module, query, key, value, mask, *, softcap, sliding_window, **packs):
    """transformers' sdpa attention, which has no cap."""
    if softcap is not None:
        raise NotImplementedError("no cap")
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return sdpa_attention_forward(None, query, key, value, mask, is_causal=False)


WAYS: dict[str, Callable] = {
    "per_example": packed_attention.segment_attention,
    "triton": by_kernel(packed_attention.TRITON),
    "torch_varlen": by_kernel(packed_attention.VARLEN),
    "flash_attn": by_kernel(packed_attention.FA2),
    "flex": by_kernel(packed_attention.FLEX),
    "flex_static": by_static_flex,
    "dense_mask": by_dense_mask,
    "cudnn": by_cudnn,
    "cudnn_repeated": functools.partial(by_cudnn, repeat=True),
}


def synchronized() -> float:
    """Seconds on a clock, when all that was asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function: Callable) -> tuple[float, object]:
    """Seconds of a call, and what it gives."""
    start = synchronized()
    result = function()
    return synchronized() - start, result


def median_seconds(function: Callable) -> float:
    """Of as many calls as MEASURE_SECONDS allow, three at least, after one to warm up."""
    function()
    once = timed(function)[0]
    return statistics.median(timed(function)[0] for _ in range(min(20, max(3, int(MEASURE_SECONDS / once)))))


def memory(kind: str) -> int:
    """Bytes allocated now ("memory_allocated") or at most ("max_memory_allocated"); 0 without a GPU."""
    return getattr(torch.cuda, kind)() if torch.cuda.is_available() else 0


def measure_case(shape: dict, workload: str, micro_batch: int, dtype: str, deadline: float) -> dict:
    """All ways on one row of packs."""
    lengths = [n for pack in speed_model.full_packs(workload, micro_batch) for n in pack]
    tokens, device = sum(lengths), speed_model.device()
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    generator = torch.Generator(device).manual_seed(0)
    kind = getattr(torch, dtype)

    def random(heads: int) -> torch.Tensor:
        """(1, tokens, heads, head size)."""
        return torch.randn(1, tokens, heads, shape["size"], device=device, generator=generator).to(kind)

    # As a model's layers hand them over: heads before tokens in the shape, not in memory.
    leaves = [random(shape[n]).transpose(1, 2).requires_grad_() for n in ("heads", "groups", "groups")]
    gradient = random(shape["heads"])
    options = {"max_length_q": max(lengths), "sliding_window": shape["window"], "softcap": shape["cap"]}
    options["cu_seq_lens_q"] = ends

    def results(way: Callable, mask=None, inputs=leaves, gradient=gradient) -> list[torch.Tensor]:
        """Output and the three gradients."""
        out = way(None, *inputs, mask, **options)[0]
        return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]

    doubled = [x.detach().float().requires_grad_() for x in leaves]
    exact = results(packed_attention.segment_attention, None, doubled, gradient.float())
    makers = {name: functools.partial(make, ends, tokens, shape["window"]) for name, make in MASKS.items()}
    masks = {name: round(median_seconds(make), 6) for name, make in makers.items()}
    case = {"workload": workload, "micro_batch": micro_batch, "dtype": dtype, "tokens": tokens}
    case |= {"examples": len(lengths), **shape, "masks": masks, "arms": []}
    for name, way in WAYS.items():
        if way is by_static_flex and (micro_batch, dtype) != (4, "bfloat16"):
            continue
        row = {"name": name}
        case["arms"].append(row)
        try:
            if time.perf_counter() > deadline:
                raise TimeoutError("the time was up")
            run = functools.partial(results, way, makers["dense"]() if way is by_dense_mask else None)
            first, found = timed(run)
            errors = [(f.float() - e).norm() / e.norm() for f, e in zip(found, exact, strict=True)]
            worst = max((f.float() - e).abs().max().item() for f, e in zip(found, exact, strict=True))
            del found
            before = memory("memory_allocated")
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            seconds = median_seconds(run)
            row |= {"seconds": round(seconds, 6), "first_seconds": round(first, 3)}
            row["peak_memory_bytes"] = memory("max_memory_allocated") - before
            row |= {"error": round(max(errors).item(), 5), "largest_difference": round(worst, 5)}
        except Exception as problem:  # a way that doesn't run here is part of the answer
            row["problem"] = f"{type(problem).__name__}: {str(problem).strip()}"[:300]
    return case


MASKS = {"blocks": packed_attention.flex_block_mask, "dense": dense}


def main() -> None:
    """Measure, print a table, write the JSON after each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=70, help="what comes later is left out")
    parser.add_argument("--out", type=Path, default=speed_model.ROOT / "benchmarks/results/attention.json")
    parser.add_argument("--tiny", action="store_true", help="small heads, for a try without a GPU")
    options = parser.parse_args()
    deadline = time.perf_counter() + options.seconds
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {name: version(name) for name in ("torch", "triton", "transformers", "flash-attn")}
    result = {"hardware": {"gpu": hardware}, "versions": versions, "pack": speed_model.LENGTH, "cases": []}
    for before, (shape, workload, micro_batch, dtype) in zip([CASES[0], *CASES], CASES, strict=False):
        if (before[0], before[3]) != (shape, dtype):
            torch.compiler.reset()  # as in the process of another training
        if time.perf_counter() > deadline:
            print(f"{shape} {workload} {micro_batch} {dtype}: the time was up", flush=True)
            continue
        sizes = (TINY if options.tiny else SHAPES)[shape]
        case = {"model": shape} | measure_case(sizes, workload, micro_batch, dtype, deadline)
        result["cases"].append(case)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{shape} {workload} {micro_batch} {dtype}: {case['tokens']} tokens, {case['examples']} examples; masks",
              case["masks"])  # fmt: skip
        for row in case["arms"]:
            print(f"  {row['name']:15}", *(f"{k} {v}" for k, v in row.items() if k != "name"), flush=True)


if __name__ == "__main__":
    main()
