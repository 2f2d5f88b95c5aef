"""How fast conversations become tokens and labels under each family's chat template, beside the tokenizer alone.

Usage: python benchmarks/templates.py [--data ../shared/data/gsm8k/train.jsonl] [--rows 300]
                                      [--out benchmarks/results/templates.json] [FAMILY ...]

The templates are those of `tests/family_templates.py`, the vocabulary is SmolLM2-135M-Instruct's with each family's
control tokens added, the texts are GSM8K's. Seconds are a core's (process time), the least of some rounds in which the
arms take turns. The tokenizer alone is its fastest call (encode_batch_fast) over the finished texts of all examples.

plain        a question and a reply                   reasoning    the same, with reasoning
several      three questions and replies              tools        a question, a call, its result and a reply; one
system       plain, all with one system prompt                     list of three tools for all
chinese      plain, in Chinese                        own_tools    the same, each with a list of its own
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "workflow_scripts"), str(ROOT / "tests")]
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

KNOWN = 100  # rows that each arm has seen before it is measured
ROUNDS = 3


def conversations(rows: list[dict[str, str]], count: int) -> dict[str, list[dict[str, Any]]]:
    """So many conversations of each kind."""
    from template_matrix import reply, result, system, user

    found: dict[str, list[dict[str, Any]]] = {}
    for number in range(count):
        own = [rows[(7 * number + place) % len(rows)] for place in range(3)]
        asked, answered = own[0]["question"], own[0]["answer"]
        turns = [turn for one in own for turn in (user(one["question"]), reply(one["answer"]))]
        called = [user(asked), reply("", asked[:30]), result(own[1]["question"]), reply(answered)]
        made = {
            "plain": {"messages": turns[:2]},
            "system": {"messages": [system("Solve the problem step by step."), *turns[:2]]},
            "chinese": {
                "messages": [
                    user(f"{number} 加 {number} 等于多少?请一步一步地解答这个问题。" * 2),
                    reply("先把两个数相加,然后写出结果。" * 6),
                ]
            },
            "several": {"messages": turns},
            "reasoning": {"messages": [user(asked), reply(own[1]["answer"], reasoning=answered)]},
            "tools": {"messages": called, "tools": [tool(place) for place in range(3)]},
            "own_tools": {"messages": called, "tools": [tool(3 * number + place) for place in range(3)]},
        }
        for name, one in made.items():
            found.setdefault(name, []).append(one)
    return found


def tool(number: int) -> dict[str, Any]:
    """A tool's definition; the first is that of the calls."""
    from template_matrix import TOOLS

    name = "find_kestrel" if number % 3 == 0 else f"look_up_{number}"
    return {
        "type": "function",
        "function": {**TOOLS[0]["function"], "name": name, "description": f"Describes {number}"},
    }


def least(calls: list[Callable[[], object]]) -> list[float]:
    """Process seconds of each call, the least of ROUNDS."""
    took = [float("inf")] * len(calls)
    for _ in range(ROUNDS):
        for number, call in enumerate(calls):
            began = time.process_time()
            call()
            took[number] = min(took[number], time.process_time() - began)
    return took


def measure(source: str, kinds: dict[str, list[dict[str, Any]]], model: Path) -> dict[str, Any]:
    """Each kind of conversation under a template: microseconds a row, and the ratio to the tokenizer alone."""
    from adder.tokenization.block_tokenizer import load_tokenizer
    from adder.tokenization.labels import Labeller
    from template_matrix import tokenizer_for

    tokenizer = tokenizer_for(source, base=load_tokenizer(model))
    backend = tokenizer.backend_tokenizer
    found: dict[str, Any] = {}
    for kind, rows in kinds.items():
        labeller, slow = (Labeller(tokenizer, fast_path=fast_path) for fast_path in (True, False))
        labeller.label_batch(rows[:KNOWN])
        batch, rejected = labeller.label_batch(rows[KNOWN:])
        if rejected:
            found[kind] = {"refused": str(next(iter(rejected.values())))}
            continue
        part, number = rows[KNOWN:], len(rows) - KNOWN
        ends = batch.lengths.cumsum()
        texts = [
            backend.decode(batch.ids[end - size : end].tolist(), skip_special_tokens=False)
            for end, size in zip(ends.tolist(), batch.lengths.tolist(), strict=True)
        ]
        adder, alone = least(
            [
                lambda labeller=labeller, part=part: labeller.label_batch(part),
                lambda texts=texts: backend.encode_batch_fast(texts, add_special_tokens=False),
            ]
        )
        before = least([lambda slow=slow, part=part: slow.label_batch(part[:50])])[0] / 50
        found[kind] = {
            "examples": len(texts) / number,
            "tokens": round(int(ends[-1]) / number, 1),
            "microseconds": round(1e6 * adder / number, 1),
            "tokenizer_alone": round(1e6 * alone / number, 1),
            "slow_path": round(1e6 * before, 1),
            "ratio": round(adder / alone, 2),
            "slow_ratio": round(before * number / alone, 2),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/gsm8k/train.jsonl")
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/embedded_model/model", help="SmolLM2's folder")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/templates.json")
    parser.add_argument("families", nargs="*")
    options = parser.parse_args()
    import family_templates
    from adder.core import hardware
    from template_matrix import trl_templates

    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()[:2000]]
    kinds = conversations(rows, options.rows + KNOWN)
    shipped = {name: trl_templates()[file].read_text("utf-8") for name, file in family_templates.SHIPPED.items()}
    families: dict[str, Any] = {}
    for name, source in sorted({**shipped, **family_templates.OWN}.items()):
        if not options.families or name in options.families:
            families[name] = measure(source, kinds, options.model)
            told = {kind: one.get("ratio", "refused") for kind, one in families[name].items()}
            print(f"{name}: {told}", flush=True)
    packages = ("transformers", "tokenizers", "trl", "jinja2", "numpy", "orjson")
    ratios = {kind: [one[kind]["ratio"] for one in families.values() if "ratio" in one[kind]] for kind in kinds}
    found = {
        "benchmark": "conversations to tokens and labels by family: process time of a core, beside the tokenizer alone",
        "hardware": hardware.describe(),
        "versions": {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages},
        "load_average": round(os.getloadavg()[1], 2),
        "ratios": {
            kind: {"median": sorted(found)[len(found) // 2], "most": max(found)}
            for kind, found in ratios.items()
            if found
        },
        "families": families,
    }
    options.out.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(found["ratios"]))


if __name__ == "__main__":
    main()
