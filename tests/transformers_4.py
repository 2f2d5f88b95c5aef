"""transformers 4.57 beside the installed libraries, as many vLLM, TGI and notebook installations have it.

`python tests/transformers_4.py FOLDER...` says how each model directory is read by both: tokens, prompt, logits.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("transformers==4.57.6", "huggingface-hub==0.36.0", "tokenizers==0.22.2")
TEXTS = ("Where is my order 48213?\n\nIt's 19.99, <|im_end|> or so.", "  two  spaces, Grüße, 東京 and 🙂")
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "And now?"},
]

# Runs in both: what a model directory is to the transformers that it finds.
READ = """
import json, sys
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
asked = json.load(sys.stdin)
found = {}
for folder in asked["folders"]:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    ids = torch.arange(3, 3 + asked["positions"])[None] % model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        logits = model(ids).logits[0, -8:].double()
    prompt = None
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(asked["messages"], tokenize=False, add_generation_prompt=True)
    found[folder] = {
        "tokens": [tokenizer(text)["input_ids"] for text in asked["texts"]],
        "text": [tokenizer.decode(tokenizer(text)["input_ids"]) for text in asked["texts"]],
        "special": {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
        "all_special": sorted(tokenizer.all_special_tokens),
        "length": tokenizer.model_max_length,
        "prompt": prompt,
        "logits": logits.tolist(),
        "ends": model.generation_config.eos_token_id,
        "use_cache": model.config.get_text_config().use_cache,
    }
print(json.dumps({"version": transformers.__version__, "found": found}))
"""


# Makes tiny random models as transformers 4 publishes them: names of tensors and config.json are its own.
MAKE = """
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
for folder, settings in json.load(sys.stdin).items():
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = kind.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.to(torch.bfloat16).save_pretrained(folder)
"""


@functools.cache
def library() -> Path | None:
    """The folder with transformers 4, installed into .cache once; None where the package index can't be reached."""
    folder = ROOT / ".cache" / "transformers-4"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "whole").exists():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--upgrade", "--target", str(folder), "--retries", "1", *PACKAGES]
            if subprocess.run(command, capture_output=True, timeout=300).returncode:
                return None
            (folder / "whole").touch()
    return folder


def make(models: dict[Path, dict[str, Any]], path: Path) -> None:
    """Let transformers 4, in `path`, save a tiny model of each configuration into its folder."""
    asked = json.dumps({str(folder): settings for folder, settings in models.items()})
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, "-c", MAKE], input=asked, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


def read(folders: list[Path], path: Path | None = None, positions: int = 200) -> dict[str, Any]:
    """{version, found: {folder: what it is}} as a new process reads the folders, with `path` before other libraries.

    Raises RuntimeError with the end of what it says where that fails.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(path or "")}
    asked = {"folders": [str(f) for f in folders], "texts": TEXTS, "messages": MESSAGES, "positions": positions}
    done = subprocess.run(
        [sys.executable, "-c", READ], input=json.dumps(asked), env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What two readings of a folder differ in: names of READ's, and the largest difference of a logit above 1e-4."""
    found = [name for name in one if name != "logits" and one[name] != other[name]]
    gaps = [abs(a - b) for x, y in zip(one["logits"], other["logits"], strict=True) for a, b in zip(x, y, strict=True)]
    return found + ([f"logits by {max(gaps):.2g}"] if max(gaps) > 1e-4 else [])


def main() -> int:
    """Compare the folders named on the command line."""
    path, folders = library(), [Path(name).resolve() for name in sys.argv[1:]]
    if path is None:
        print("transformers 4 can't be installed: the package index is out of reach")
        return 2
    own, old = read(folders), read(folders, path)
    worst = 0
    for folder in map(str, folders):
        found = differences(own["found"][folder], old["found"][folder])
        worst |= bool(found)
        verdict = f"differ in {', '.join(found)}" if found else "read the same"
        print(f"{folder}: transformers {own['version']} and {old['version']} {verdict}")
    return worst


if __name__ == "__main__":
    sys.exit(main())
