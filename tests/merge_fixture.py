"""Parents of a merge stage with real tiny models and PEFT adapters, for the tests of merging."""

import shutil

import pyarrow as pa
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adder.core.files import write_json, write_table
from adder.core.labels import IGNORE_INDEX
from adder.core.progress import Progress
from adder.core.stage_spec import Context, Runtime
from adder.merging import fresh_process_reply, verification
from adder.merging import run as merging
from adder.merging.stage import MergeSettings
from tiny import write_tokens

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SILENT = Context(Progress.silent(), Runtime(threads=1))
REPLIES = ["Paris.", "Refund of 19.99 for the kettle.", "It has not arrived.", "Four."] * 3


@pytest.fixture
def reply_in_this_process(monkeypatch):
    """What a fresh process would reply, without the seconds that one takes to start."""

    monkeypatch.setattr(verification, "reply_of_fresh_process", reply_by_dtype("float32"))


def reply_by_dtype(dtype):
    """The same in this process, as a function that says that it computed in `dtype`."""

    def reply(model, prompt, device):
        return fresh_process_reply.greedy_reply(str(model), "float32", "cpu", prompt, verification.REPLY_TOKENS), dtype

    return reply


def make_inputs(folder, base, adapter=None, groups=None, **lora):
    """Folders of the stages that merge reads: `base` is a model directory; the adapter has random, realistic pairs.

    `groups`: what each held-out row belongs to, of REPLIES' length.
    """
    inputs = {name: folder / name for name in ("model", "train", "tokenize", "format")}
    for path in inputs.values():
        path.mkdir(parents=True)
    shutil.copytree(base, inputs["model"] / "model")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(inputs["tokenize"] / "tokenizer")
    rows = []
    for number, reply in enumerate(REPLIES):
        prompt = f"<|im_start|>user\nMessage {number}<|im_end|>\n<|im_start|>assistant\n"
        before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, reply))
        after.append(tokenizer.eos_token_id)
        rows.append({"id": f"x:{number}", "input_ids": before + after, "labels": [IGNORE_INDEX] * len(before) + after})
    write_tokens(inputs["tokenize"] / "heldout.arrow", rows)
    columns = {"id": [row["id"] for row in rows]} | ({"group": groups} if groups else {})
    write_table(inputs["format"] / "heldout.parquet", pa.table(columns))
    details = {"end_of_turn": {"token": "<|im_end|>", "id": tokenizer.eos_token_id}, "reply_ends": []}
    write_json(inputs["tokenize"] / "tokenize.json", {**details, "counts": {"train": {"examples": 9, "labelled": 99}}})
    write_json(
        inputs["model"] / "source.json", {"source": "org/tiny", "kind": "hub", "revision": "abc", "license": "MIT"}
    )
    if adapter is None:
        make_adapter(base, inputs["train"] / "adapter", **lora)
    return inputs


def make_adapter(base, folder, size=0.02, **lora):
    """A LoRA adapter whose pairs are all random, so that each adapted weight changes by about `size`."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **lora}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=size)
        elif "magnitude" in name or "modules_to_save" in name:
            parameter.data *= 1 + 10 * size * torch.randn_like(parameter)
    model.save_pretrained(folder)


def run(inputs, out, tolerance="auto", base="auto", method="lora"):
    """Run the merge stage on what `make_inputs` wrote, as after a training by `method`."""
    out.mkdir()
    settings = MergeSettings(tolerance=tolerance, base=base, method=method)
    return merging.run(settings, merging.MergeInputs(**inputs), out, SILENT)


def weights(folder):
    """All tensors of a model directory by name."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
