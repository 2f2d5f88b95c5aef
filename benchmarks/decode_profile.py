"""Where a decoding step's time goes on a GPU: kernels of a few replays of the evaluate stage's CUDA graph, by name.

Usage: python benchmarks/decode_profile.py [--slots 100] [--length 200] [--tiny]
"""

import argparse
from contextlib import ExitStack

import torch
from evaluate import random_llama
from speed_model import LLAMA_8B, TINY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=100)
    parser.add_argument("--length", type=int, default=200, help="tokens of each reply so far, prompt included")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a try")
    options = parser.parse_args()
    from adder.evaluation import graph_slots

    cuda = torch.cuda.is_available()
    shape, layers, dtype = (TINY, 2, "float32") if options.tiny or not cuda else (LLAMA_8B, 32, "bfloat16")
    model = random_llama(shape, layers, "cuda" if cuda else "cpu", dtype)
    texts = [[7, 8, 9, 10, 11, 12]] * options.slots
    with ExitStack() as stack, torch.inference_mode():
        slots = graph_slots.graph_slots(model, texts, options.slots, options.length + 64, stack)
        assert slots is not None
        slots.rows, slots.places = list(range(options.slots)), list(range(options.slots))
        slots.lengths = [options.length] * options.slots
        slots.steps([7] * options.slots, 4)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
            start.record()
            for _ in range(10):
                slots.graph.replay()
            end.record()
            torch.cuda.synchronize()
            print(f"a step: {start.elapsed_time(end) / 10:.3f} ms")
            activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            slots.steps([7] * options.slots, 4)
            if cuda:
                torch.cuda.synchronize()
    order = "cuda_time_total" if cuda else "cpu_time_total"
    print(profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))


if __name__ == "__main__":
    main()
