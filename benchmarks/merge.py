"""How fast an adapter is merged, and in how much memory: beside copying the base's files, and beside PEFT.

Usage: python benchmarks/merge.py [--shapes 1.5b 8b] [--peft 1.5b] [--repeats 3] [--scratch DIR]
                                  [--out benchmarks/results/merge.json]

The bases have the named models' shapes and random bf16 weights in files of at most 5 GB; the adapter is LoRA of rank 16
on all seven projections of each layer. Every arm starts cold, with the base's files dropped from the page cache, runs
in a process of its own, and ends when its files are on the disk (fsync). Its memory is the largest resident set of that
process. Base and result are on the disk at the same time: twice the model's size must be free.

copy           the base's files, copied by `cp`
peft           from_pretrained, PeftModel.from_pretrained, merge_and_unload and save_pretrained, all in bf16
adder          merge_weights: a block of rows at a time, rounded at random so that the mean is kept
adder_checked  the same, and check_weights: every byte of base and result read again from the disk and compared
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]

Shape = dict[str, Any]
SHAPES: dict[str, Shape] = {
    "135m": {"hidden": 576, "wide": 1536, "layers": 30, "heads": 9, "groups": 3, "vocabulary": 49152, "tied": True},
    "1.5b": {"hidden": 1536, "wide": 8960, "layers": 28, "heads": 12, "groups": 2, "vocabulary": 151936, "tied": True},
    "3b": {"hidden": 2048, "wide": 11008, "layers": 36, "heads": 16, "groups": 2, "vocabulary": 151936, "tied": True},
    "8b": {"hidden": 4096, "wide": 14336, "layers": 32, "heads": 32, "groups": 8, "vocabulary": 128256, "tied": False},
}
LIKE = {"135m": "SmolLM2-135M", "1.5b": "Qwen2.5-1.5B", "3b": "Qwen2.5-3B", "8b": "Llama-3.1-8B"}
PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy")
RANK = 16
SHARD = 5e9
CHUNK = 2**24  # numbers written at once


def projections(shape: Shape) -> dict[str, tuple[int, int]]:
    """(out, in) of a layer's linear layers."""
    hidden, wide = shape["hidden"], shape["wide"]
    narrow = hidden // shape["heads"] * shape["groups"]
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }


def write_base(folder: Path, shape: Shape) -> None:
    """A Llama of that shape: config, index and shards, never more than one chunk in memory."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["wide"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["groups"],
        tie_word_embeddings=shape["tied"],
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    ends = (shape["vocabulary"], shape["hidden"])
    tensors = {"model.embed_tokens.weight": ends}
    for layer in range(shape["layers"]):
        named = projections(shape) | {
            name: (shape["hidden"],) for name in ("input_layernorm", "post_attention_layernorm")
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": size for name, size in named.items()}
    tensors |= {"model.norm.weight": (shape["hidden"],)} | ({} if shape["tied"] else {"lm_head.weight": ends})
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, size in tensors.items():
        if 2 * sum(map(np.prod, shards[-1].values())) + 2 * np.prod(size) > SHARD:
            shards.append({})
        shards[-1][name] = size
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    random = np.random.SFC64(0)
    for file, shard in zip(names, shards, strict=True):
        write_shard(folder / file, shard, random)
    index = {"metadata": {}, "weight_map": {name: f for f, shard in zip(names, shards, strict=True) for name in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], random: np.random.SFC64) -> None:
    """Numbers of either sign between 2^-7 and 2^-5, evenly spread over bf16's values there."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, size in tensors.items():
        stop = place + 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [place, stop]}
        place = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = place // 2
        while left:
            count = min(left, CHUNK)
            bits = random.random_raw(-(-count // 4)).view(np.uint16)[:count]
            file.write(((bits & np.uint16(0x80FF)) | np.uint16(0x3C00)).data)
            left -= count


def write_adapter(folder: Path, shape: Shape) -> None:
    """Random pairs in fp32, as PEFT stores them."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    targets = [name.rpartition(".")[2] for name in projections(shape)]
    LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(str(folder))
    torch.manual_seed(0)
    tensors = {}
    for layer in range(shape["layers"]):
        for name, (out, into) in projections(shape).items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, into) / into**0.5
            tensors[f"{module}.lora_B.weight"] = 0.005 * torch.randn(out, RANK)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def copy(base: Path, adapter: Path, target: Path) -> None:
    subprocess.run(["cp", *map(str, base.glob("*.safetensors")), str(target)], check=True)


def peft(base: Path, adapter: Path, target: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(target)


def adder(base: Path, adapter: Path, target: Path, checked: bool = False) -> None:
    from adder.core.progress import Progress
    from adder.core.stage_spec import Context
    from adder.merging.streamed_merge import check_weights, merge_weights
    from adder.merging.weight_deltas import read_adapter

    deltas, context = read_adapter(adapter), Context(Progress.silent())
    merge_weights(base, deltas, target, context)
    if checked:
        found = check_weights(base, target, deltas, context)
        assert found["changed_weights"] == found["adapted_weights"] == len(deltas), found


ARMS = {
    "copy": copy,
    "peft": peft,
    "adder": adder,
    "adder_checked": lambda base, adapter, target: adder(base, adapter, target, checked=True),
}


def drop_from_cache(folder: Path) -> None:
    """Let the system forget a folder's files, which must be on the disk for that."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def import_all() -> None:
    """The imports are no part of the time."""
    from peft import PeftModel  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    from adder.core import hardware

    hardware.use_threads("auto")


def run_arm(arm: str, work: Path) -> dict[str, float]:
    """In a process of its own: the arm's seconds, imports left out, and its largest resident set in bytes."""
    if arm != "copy":  # whose memory would be taken for that of `cp`
        import_all()
    start = time.perf_counter()
    ARMS[arm](work / "base", work / "adapter", work / "out")
    for path in (work / "out").glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    who = resource.RUSAGE_CHILDREN if arm == "copy" else resource.RUSAGE_SELF
    return {"seconds": seconds, "peak_memory_bytes": resource.getrusage(who).ru_maxrss * 1024}


def measure(arm: str, shape: str, work: Path) -> dict[str, float]:
    """Start one arm cold; what it wrote is removed."""
    (work / "out").mkdir()
    drop_from_cache(work / "base")
    command = [sys.executable, __file__, "--arm", arm, "--work", str(work)]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(work / "out")
    if done.returncode:
        sys.exit(f"{arm} failed on {shape} (exit code {done.returncode})")
    found = json.loads(done.stdout.splitlines()[-1])
    memory = f"{found['peak_memory_bytes'] / 1e9:6.2f} GB"
    print(f"{shape:5} {arm:14} {found['seconds']:8.1f} s {memory}", flush=True)
    return found


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run all arms on all shapes; the figures as merge.json has them."""
    from adder.core import hardware
    from adder.core.safetensors_layout import parameter_count, shard_files, total_bytes

    arms, shapes, ratios = [], {}, {}
    for name in options.shapes:
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            work = Path(folder)
            for part in ("base", "adapter"):
                (work / part).mkdir()
            write_base(work / "base", SHAPES[name])
            write_adapter(work / "adapter", SHAPES[name])
            sizes = [out * into for out, into in projections(SHAPES[name]).values()]
            shapes[name] = SHAPES[name] | {
                "like": LIKE[name],
                "bytes": total_bytes(work / "base"),
                "files": len(shard_files(work / "base")),
                "parameters": parameter_count(work / "base"),
                "adapted_parameters": SHAPES[name]["layers"] * sum(sizes),
            }
            wanted = [arm for arm in ARMS if arm != "peft" or name in options.peft]
            # In turn, so that a disk that is slower for a while is slower for all.
            runs = [(arm, measure(arm, name, work)) for _ in range(options.repeats) for arm in wanted]
        median = {}
        for arm in wanted:
            own = [found for other, found in runs if other == arm]
            seconds = [found["seconds"] for found in own]
            median[arm] = statistics.median(seconds)
            arms.append(
                {
                    "name": arm,
                    "shape": name,
                    "seconds": round(median[arm], 2),
                    "all_seconds": [round(one, 2) for one in seconds],
                    "peak_memory_bytes": max(found["peak_memory_bytes"] for found in own),
                }
            )
        ratios[name] = {f"{arm}_to_copy": round(median[arm] / median["copy"], 3) for arm in wanted if arm != "copy"}
    return {
        "benchmark": "LoRA of rank 16 on all seven projections merged into bf16: seconds and largest resident set",
        "cache": "cold: the base's files dropped from the page cache before a run, the result on the disk at its end",
        "hardware": hardware.describe(),
        "versions": {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in PACKAGES},
        "shapes": shapes,
        "ratios": ratios,
        "arms": arms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.5b", "8b"])
    parser.add_argument("--peft", nargs="*", choices=SHAPES, default=["1.5b"], help="shapes that PEFT merges too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/merge.json")
    parser.add_argument(
        "--scratch", type=Path, help="folder for base and result; the system's temporary one without it"
    )
    for name, kind in (("--arm", str), ("--work", Path)):  # what measure() starts
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run_arm(options.arm, options.work)))
        return
    found = compare(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found["ratios"]))


if __name__ == "__main__":
    main()
