"""Every architecture: loaded as training loads it, given pairs on all linear layers, merged, read back, compared."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from adder.core import text_model
from adder.core.errors import UserError
from adder.core.files import write_json
from adder.core.progress import Progress
from adder.core.safetensors_layout import stored_tensors
from adder.core.stage_spec import Context, Runtime
from adder.merging import base_choice, verification
from adder.merging import run as merging
from adder.merging.stage import MergeSettings
from adder.merging.streamed_merge import check_weights, merge_weights
from adder.merging.weight_deltas import read_adapter
from adder.training import base_model, lora
from architectures import ARCHITECTURES, tiny_architecture
from training_stage import train_settings
from vision_models import VISION_MODELS, save_vision_model

CONTEXT = Context(Progress.silent(), Runtime(threads=1))
# A few of each kind, for NF4.
QUICK = "llama gemma2 gemma3_text gpt2 falcon gptj bloom phimoe gpt_oss mamba jamba deepseek_v3".split()
# Whose experts transformers takes apart to quantise them, so that what training saw isn't on disk.
NOT_DEQUANTISED = ("llama4_text", "llama4")
CASES = [(name, "lora") for name in [*ARCHITECTURES, *VISION_MODELS]]
CASES += [(name, "qlora") for name in [*QUICK, *VISION_MODELS] if name not in NOT_DEQUANTISED]


@dataclass
class Adapted:
    """An adapted model as it was trained, its base and its adapter on disk."""

    model: PeftModel
    base: Path
    adapter: Path


def save_base(folder: Path, name: str) -> Path:
    if name in VISION_MODELS:
        return save_vision_model(folder, name)
    tiny_architecture(name).to(torch.bfloat16).save_pretrained(folder)
    return folder


def adapt(folder: Path, name: str, method: str) -> Adapted:
    base = save_base(folder / "base", name)
    model, _ = base_model.load(base, method, "float32", "cpu", packs=False)
    model = lora.add_adapter(model, train_settings(method=method, lora_r=4))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    model.save_pretrained(str(folder / "adapter"))
    return Adapted(model.eval(), base, folder / "adapter")


def rows():
    """Rows that make pairs of few outliers: every position is labelled."""
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, 120, (length,), generator=generator).tolist() for length in (20, 14, 33)]
    return [{"id": "x", "input_ids": row, "labels": [-100, *row[1:]]} for row in ids]


def merge(adapted: Adapted, out: Path, dequantised: bool) -> Path:
    deltas = merging._on_disk(read_adapter(adapted.adapter), adapted.base, adapted.adapter)
    if dequantised:
        deltas = base_choice.on_dequantised(adapted.base, deltas, torch.float32, "cpu")
    out.mkdir()
    merge_weights(adapted.base, deltas, out, CONTEXT)
    check_weights(adapted.base, out, deltas, CONTEXT)
    shutil.copyfile(adapted.base / "config.json", out / "config.json")
    return out


@pytest.mark.parametrize(("name", "method"), CASES)
def test_the_merged_model_predicts_as_it_was_trained(tmp_path, name, method):
    """In the base's own names and 16-bit rounding; a router may send a token elsewhere for that, so: by the median."""
    adapted = adapt(tmp_path, name, method)
    folder = merge(adapted, tmp_path / "out", method == "qlora")
    expected = list(verification.logits_of(verification.Loaded(adapted.model, False), rows()))
    found = list(verification.logits_of(verification.load(folder, torch.float32, "whole", "cpu"), rows()))
    plain = verification.load(adapted.base, torch.float32, "whole", "cpu")
    bare = list(verification.logits_of(plain, rows()))

    def median(pairs, others):
        kl = [
            (x.log_softmax(-1).exp() * (x.log_softmax(-1) - y.log_softmax(-1))).sum(-1)
            for (x, _), (y, _) in zip(pairs, others, strict=True)
        ]
        return float(torch.cat(kl).median())

    assert median(expected, found) < 1e-3 and median(expected, bare) > 10 * median(expected, found)
    trained = [name for name, _ in lora.layers(adapted.model)]
    assert trained and not [name for name in trained if set(name.split(".")) & {"router", "gate", "visual"}]


@pytest.mark.parametrize("name", NOT_DEQUANTISED)
def test_where_the_dequantised_base_cannot_be_written_the_original_is_taken(tmp_path, name):
    adapted = adapt(tmp_path, name, "qlora")
    deltas = merging._on_disk(read_adapter(adapted.adapter), adapted.base, adapted.adapter)
    with pytest.raises(UserError, match="experts.* so it can't be dequantised"):
        base_choice.on_dequantised(adapted.base, deltas, torch.float32, "cpu")
    shutil.copytree(adapted.base, tmp_path / "model" / "model")
    write_json(tmp_path / "model" / "source.json", {"quantised": None})
    (tmp_path / "out").mkdir()
    inputs = merging.MergeInputs(tmp_path, tmp_path / "model", tmp_path, tmp_path)
    settings = MergeSettings(method="qlora")
    merged = merging._merge_into_chosen(settings, inputs, deltas, tmp_path / "out", tmp_path, CONTEXT)
    assert merged.choice.value == "original" and "there is no other" in merged.choice.reason
    assert stored_tensors(tmp_path / "out") == stored_tensors(adapted.base)


@pytest.mark.parametrize("name", VISION_MODELS)
def test_what_does_not_read_text_stays_byte_for_byte(tmp_path, name):
    adapted = adapt(tmp_path, name, "lora")
    folder = merge(adapted, tmp_path / "out", False)
    before, after = (load_file(path / "model.safetensors") for path in (adapted.base, folder))
    assert before.keys() == after.keys()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) == len(list(lora.layers(adapted.model)))
    assert not [key for key in changed if "vision" in key or "visual" in key or "projector" in key]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "deepseek_v3", *VISION_MODELS])
def test_a_full_training_stands_in_the_bases_files(tmp_path, name):
    base = save_base(tmp_path / "base", name)
    model, _ = base_model.load(base, "full", "float32", "cpu", packs=False)
    towers = len(list(model.parameters())) - sum(parameter.requires_grad for parameter in model.parameters())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05
    lora._save_full_model(model, base, tmp_path / "trained")
    (tmp_path / "out").mkdir()
    proof = merging._take_full(tmp_path / "trained", base, tmp_path / "out", CONTEXT)
    shutil.copyfile(base / "config.json", tmp_path / "out" / "config.json")
    assert "are the base's byte for byte" in proof["reason"] or not towers or name not in ("qwen3_5", "llama4")
    before, after = (stored_tensors(path) for path in (base, tmp_path / "out"))
    assert before == after  # names, shapes, dtypes, places
    found, expected = (
        list(verification.logits_of(verification.Loaded(one.eval(), False), rows()))
        for one in (text_model.load(tmp_path / folder, dtype=torch.float32) for folder in ("out", "trained"))
    )
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(found, expected, strict=True))
    old, new = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    unseen = [key for key in old if "vision" in key or "visual" in key or "projector" in key]
    assert all(torch.equal(old[key], new[key]) for key in unseen)
    assert bool(unseen) == (name in VISION_MODELS)
