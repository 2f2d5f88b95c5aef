"""How long people wait: every stage of a run from the first row to the proven model, at Llama-3.1-8B's shape.

Usage: python benchmarks/whole_run.py [--data ../shared/data/gsm8k] [--rows 2000] [--heldout 100] [--tiny]
                                      [--again] [--scratch DIR] [--out benchmarks/results/whole_run.json]

The model has random weights, written shard by shard, and a tokenizer that is trained on the data; the settings are
those of config/examples/llama-3.1-8b-24gb.yaml on GSM8K (github.com/openai/grade-school-math), or on made-up rows of
like lengths without --data. Every stage runs in a process of its own, in the order in which `snakemake --cores 1` runs
them, by the function that its jobs call (workflow.stage_runner.execute), so Snakemake needn't be installed.

cold: Triton's kernels aren't compiled yet (an empty cache folder); warm: the same run anew with them; with --again also
`another_learning_rate`, for which model, data and evaluation of the base are there already. `limit_seconds` is what
the device allows: tokens times the frozen base's matmuls at the rate of a large matmul, replies at the rate of reading
weights and cache, files at the rate of a copy of the model; links and what is small have none. The first and the last
are measured here. --tiny tries it all out in a minute on a CPU.
"""

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow_scripts"))
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
SHARD = 5e9
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STAGES = (
    "model",
    "data",
    "format",
    "tokenize",
    "lengths",
    "evaluate_base",
    "train",
    "merge",
    "evaluate_tuned",
    "report",
)


def make_rows(folder: Path, data: Path | None, rows: int, heldout: int) -> None:
    """train.jsonl and heldout.jsonl with `question` and `answer`."""
    folder.mkdir(parents=True)
    for name, source, count in (("train", "train", rows), ("heldout", "test", heldout)):
        if data is not None:
            lines = (data / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        else:
            lines = [json.dumps(problem(random.Random(f"{name} {number}"))) for number in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def problem(draw: random.Random) -> dict[str, str]:
    """A sum in words, as long as GSM8K's, with its steps."""
    total = draw.randint(20, 90)
    question = f"A shop has {total} {draw.choice(['books', 'lamps', 'kettles', 'chairs'])}. "
    answer = f"There are {total} at first.\n"
    for day in range(draw.randint(3, 9)):
        number = draw.randint(2, 30)
        question += f"On day {day + 1} {draw.choice(['Anna', 'Ben', 'Carla', 'Dmitri'])} brings {number} more of them. "
        answer += f"After day {day + 1} there are {total} + {number} = <<{total}+{number}={total + number}>>"
        total += number
        answer += f"{total} of them.\n"
    return {"question": question + "How many are there in the end?", "answer": f"{answer}#### {total}"}


def make_model(folder: Path, text: list[str], shape: dict[str, Any], layers: int, device: str) -> str:
    """A Llama with random bf16 weights and a tokenizer trained on `text`; no more than a shard is in memory."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=min(shape["vocab_size"], 16384),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template, fast.model_max_length = CHAT, shape["max_position_embeddings"]
    fast.save_pretrained(folder)
    config = LlamaConfig(**shape, num_hidden_layers=layers, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 2, 0
    config.tie_word_embeddings = False
    config.save_pretrained(folder)
    with torch.device("meta"):
        names = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, dims in names.items():
        size += 2 * math.prod(dims)
        if size > SHARD and shards[-1]:
            shards.append({})
            size = 2 * math.prod(dims)
        shards[-1][name] = dims
    torch.manual_seed(0)
    table: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        state = {}
        for name, dims in shard.items():
            made = torch.ones(dims, device=device) if "norm" in name else 0.02 * torch.randn(dims, device=device)
            state[name] = made.to(torch.bfloat16).cpu()
        save_file(state, folder / file, metadata={"format": "pt"})
        table |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = 2 * sum(math.prod(dims) for dims in names.values())
        index = {"metadata": {"total_size": total}, "weight_map": table}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if device == "cuda":
        torch.cuda.empty_cache()
    return f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e9:.1f} GB"


def configuration(model: Path, rows: Path, results: Path, tiny: bool) -> dict[str, Any]:
    """The 24 GB example's settings, with this model and these rows."""
    import yaml

    example = yaml.safe_load((ROOT / "config/examples/llama-3.1-8b-24gb.yaml").read_text())
    example["model"] = {"source": str(model)}
    example["data"] = {
        "sources": [{"path": str(rows / "train.jsonl")}],
        "heldout": {"sources": [{"path": str(rows / "heldout.jsonl")}]},
    }
    example["runtime"] = {"results": str(results)}
    if tiny:
        example["train"] |= {"epochs": 1}
        example["evaluate"] = {"max_new_tokens": 16}
    return example


def run_stages(config: dict[str, Any], environment: dict[str, str], log: Path) -> dict[str, Any]:
    """Run what isn't finished, in order; return seconds and peaks by stage. Raises where one fails."""
    file = log.with_suffix(".yaml")
    file.write_text(json.dumps(config))
    results = Path(config["runtime"]["results"])
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    for name in ("parse", *STAGES):
        start = time.perf_counter()
        command = [sys.executable, str(Path(__file__)), "--stage", name, str(file)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            tail = "\n".join(
                line
                for path in sorted((results / "logs").glob(f"{name}*.log"))
                for line in path.read_text()[-3000:].split("\n")
            )
            print(tail, flush=True)
            raise SystemExit(f"whole_run: the stage {name} failed ({done.returncode})")
        told = json.loads(done.stdout.strip().splitlines()[-1]) if done.stdout.strip() else {}
        rows.append({"name": name, "seconds": round(seconds, 2), **told})
        print(f"{name:16} {seconds:7.1f} s  {json.dumps(told)}", flush=True)
    return {"total_seconds": round(time.perf_counter() - started, 1), "stages": rows}


def one_stage(name: str, file: Path) -> None:
    """In a process of its own: what a job of Snakemake does; the last line printed is what the stage's record says."""
    from adder.core.file_digests import FileDigests
    from adder.core.files import read_json
    from adder.workflow import config_file, stage_graph, stage_runner
    from adder.workflow.settings import load, resolved

    config = config_file.read(str(file))
    run, settings = next(iter(load(config).items()))
    results = Path(settings.runtime.results)
    digests = FileDigests(results / "cache" / "digests.json", Path.cwd())
    stages = stage_graph.stages_of_run(run, settings, resolved(settings, config, run), digests)
    if name == "parse":
        stage_graph.refuse_impossible(run, settings, stages, results, Path.cwd())
        return
    stage = stages[name]
    if (results / stage.folder / "stage.json").exists():
        return
    stage_runner.execute(
        stage.name,
        json.loads(stage.parameters()),
        runtime=settings.runtime.model_dump(mode="json"),
        inputs={parent: results / own.folder for parent, own in stage.parents.items()},
        results=results,
        key=stage.key,
        log=results / "logs" / f"{name}.log",
    )
    record = read_json(results / stage.folder / "stage.json")
    kept = {key: record.get(key) for key in ("peak_memory_bytes", "peak_gpu_memory_bytes")}
    kept["own_seconds"] = record["seconds"]
    for figures, path in (("train.json", ("tokens_per_second", "steps")), ("scores.json", ("generation",))):
        found = results / stage.folder / figures
        if found.exists():
            values = read_json(found)
            kept |= {key: values[key] for key in path if key in values}
    print(json.dumps(kept))


def limits(results: Path, shape: dict[str, Any], layers: int, scratch: Path) -> dict[str, float]:
    """Seconds that the device allows for train, evaluate and merge, from rates measured here."""
    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from evaluate import copy_bytes_per_second
    from speed_model import flop_per_token

    model = sorted(scratch.glob("model/*.safetensors"))
    start = time.perf_counter()
    for path in model:
        shutil.copyfile(path, scratch / "copied")
    copy_seconds = time.perf_counter() - start
    (scratch / "copied").unlink(missing_ok=True)
    found = {"merge": copy_seconds, "data_format_tokenize_lengths": 0.0}
    if not torch.cuda.is_available():
        return found
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    seconds = []
    for _ in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    rate = 2 * 8192**3 / sorted(seconds)[3]
    del a, b
    train = json.loads(next(results.glob("stages/train/*/train.json")).read_text())
    tokens = train["tokens_per_epoch"] * train["epochs"]
    found["train"] = tokens * flop_per_token(shape, layers) / rate
    bandwidth = copy_bytes_per_second(2**33)
    weights = sum(path.stat().st_size for path in model) - 2 * shape["vocab_size"] * shape["hidden_size"]
    for name in ("evaluate_base", "evaluate_tuned"):
        folder = next(results.glob("stages/evaluate/*/scores.json"))
        scores = json.loads(folder.read_text())
        steps = scores.get("max_new_tokens", {}).get("value", 0)
        found[name] = steps * weights / bandwidth
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/gsm8k")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--heldout", type=int, default=100)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few rows")
    parser.add_argument("--again", action="store_true", help="also warm, and with another learning rate")
    parser.add_argument("--scratch", type=Path, help="where model and results go; three times the model must be free")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/whole_run.json")
    parser.add_argument("--stage", nargs=2, metavar=("NAME", "CONFIG"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        return one_stage(options.stage[0], Path(options.stage[1]))
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import torch
    from speed_model import LLAMA_8B, TINY

    from adder.core import hardware

    shape, layers = (TINY | {"max_position_embeddings": 2048}, 2) if options.tiny else (LLAMA_8B, 32)
    if options.tiny:
        options.rows, options.heldout = min(options.rows, 60), min(options.heldout, 8)
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="whole-run-") as folder:
        scratch = Path(folder)
        data = options.data if options.data.is_dir() else None
        make_rows(scratch / "rows", data, options.rows, options.heldout)
        start = time.perf_counter()
        text = (scratch / "rows/train.jsonl").read_text(encoding="utf-8").splitlines()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # In a process of its own: this one's largest size would count as that of each stage's process that it starts.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own:
            made = own.submit(make_model, scratch / "model", text, shape, layers, device).result()
        print(f"made the model in {time.perf_counter() - start:.1f} s ({made})", flush=True)
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT / 'workflow_scripts'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "TRITON_CACHE_DIR": str(scratch / "triton"),
            "HF_HUB_OFFLINE": "1",
        }
        results = scratch / "results"
        config = configuration(scratch / "model", scratch / "rows", results, options.tiny)
        found: dict[str, Any] = {
            "benchmark": "seconds of a whole run, by stage",
            "model": "Llama-3.1-8B's shape, random weights" if not options.tiny else "tiny",
            "rows": options.rows,
            "heldout_rows": options.heldout,
            "data": "GSM8K" if data else "made up",
            "hardware": hardware.describe(),
            "versions": {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in PACKAGES},
        }

        def note(name: str, config: dict[str, Any]) -> None:
            found[name] = run_stages(config, environment, scratch / name)
            print(f"{name}: {found[name]['total_seconds']} s", flush=True)
            found["stages"] = found.get("warm", found["cold"])["stages"]
            found["total_seconds"] = {
                part: found[part]["total_seconds"]
                for part in ("cold", "warm", "another_learning_rate")
                if part in found
            }
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

        note("cold", config)
        allowed = limits(results, shape, layers, scratch)
        if options.again:
            config["train"]["learning_rate"] *= 2
            note("another_learning_rate", config)
            shutil.rmtree(results)
            note("warm", config)
        for part in ("cold", "warm", "another_learning_rate"):
            for row in found.get(part, {}).get("stages", []):
                row["limit_seconds"] = round(allowed.get(row["name"], 0.0), 2)
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
