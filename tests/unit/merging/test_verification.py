"""The proof holds whatever the memory: by layers as in one piece, in a fresh process, and with near-ties told apart."""

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from adder.core import hardware
from adder.core.errors import UserError
from adder.core.files import read_json
from adder.core.labels import IGNORE_INDEX
from adder.core.progress import Progress
from adder.core.safetensors_layout import parameter_count, stored_tensors
from adder.core.stage_spec import Context, Runtime
from adder.merging import run as merging
from adder.merging import streamed_merge, verification, weight_deltas
from adder.training import base_model, lora
from architectures import tiny_architecture
from merge_fixture import make_inputs, reply_by_dtype, run
from tiny import save_tiny_model, token_row, write_tokens
from training_stage import train_settings


def rows_of(inputs):
    return verification.spread_rows(inputs["tokenize"] / "heldout.arrow", 16, 1024)


def adapted(loaded, inputs):
    return verification.Loaded(
        PeftModel.from_pretrained(loaded.model, inputs["train"] / "adapter").eval(), loaded.by_layers
    )


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        ({}, {}),
        ({"tie_word_embeddings": False, "attention_bias": True}, {"use_dora": True, "bias": "lora_only"}),
        ({"tie_word_embeddings": False}, {"modules_to_save": ["lm_head"]}),
    ],
)
def test_a_model_loaded_by_layers_predicts_as_one_held_in_memory(tmp_path, model, lora):
    """fp32 sums in another order: logits of about one agree to 1e-5. Batches of several rows are made here."""
    inputs = make_inputs(tmp_path / "in", save_tiny_model(tmp_path / "base", **model), **lora)
    base, rows = inputs["model"] / "model", rows_of(inputs)
    assert len(verification._batches(rows, verification.BATCH)) < len(rows)
    found = []
    for loading in ("whole", "by layers"):
        plain = verification.load(base, torch.float32, loading, "cpu")
        bare = list(verification.logits_of(plain, rows))
        found.append((bare, list(verification.logits_of(adapted(plain, inputs), rows))))
    for one, other in zip(*found, strict=True):
        for (logits, target), (same, same_target) in zip(one, other, strict=True):
            assert torch.equal(target, same_target) and torch.allclose(logits, same, atol=1e-5)
    assert not torch.allclose(found[0][0][0][0], found[0][1][0][0], atol=1e-3)


def test_by_layers_the_weights_stay_16_bit_in_their_file_between_passes(tmp_path):
    inputs = make_inputs(tmp_path / "in", save_tiny_model(tmp_path / "base"))
    loaded = verification.load(inputs["model"] / "model", torch.float32, "by layers", "cpu")
    seen = []
    layers = loaded.model.model.layers
    layers[0].mlp.register_forward_hook(lambda *_: seen.append([layer.mlp.up_proj.weight.dtype for layer in layers]))
    list(verification.logits_of(loaded, rows_of(inputs)))
    assert seen[0] == [torch.float32, torch.bfloat16]
    assert {parameter.dtype for parameter in layers.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "falcon", "jamba", "opt", "stablelm", "gpt_oss", "mamba"])
def test_rows_in_one_pass_do_not_see_one_another(tmp_path, name):
    """Whatever the attention, and with recurrent states."""
    tiny_architecture(name).save_pretrained(tmp_path)
    loaded = verification.load(tmp_path, torch.float32, "by layers", "cpu")
    rows = [token_row(number, 9 + number, 128) for number in range(5)]
    together = list(verification.logits_of(loaded, rows))
    for row, (logits, target) in zip(rows, together, strict=True):
        [(alone, own)] = verification.logits_of(loaded, [row])
        assert torch.equal(target, own) and torch.allclose(logits, alone, atol=1e-5)


def test_loading_is_chosen_by_free_memory(tmp_path, monkeypatch):
    base = save_tiny_model(tmp_path / "base")
    needed = 4 * parameter_count(base)
    for device, share in (("cpu", verification.MEMORY_SHARE), ("cuda", verification.GPU_SHARE)):
        for factor, value in ((1.01, "whole"), (0.99, "by layers")):
            monkeypatch.setattr(hardware, "free_memory", lambda _, f=factor, s=share: needed / s * f)
            choice = verification.choose_loading(base, torch.float32, device)
            assert choice.value == value and "GiB of weights" in choice.reason and "float32" in choice.reason


def test_the_whole_proof_by_layers(tmp_path, monkeypatch):
    inputs = make_inputs(tmp_path / "in", save_tiny_model(tmp_path / "base"))
    monkeypatch.setattr(verification, "reply_of_fresh_process", reply_by_dtype("bfloat16"))
    monkeypatch.setattr(hardware, "free_memory", lambda _: 1000)
    run(inputs, tmp_path / "out")
    found = read_json(tmp_path / "out" / "proof.json")
    assert found["loading"]["value"] == "by layers" and 0 < found["kl"] < found["tolerance"]
    assert found["reloaded"]["dtype"] == "bfloat16"
    assert "each layer's weights read when its turn comes" in found["reason"]


def test_a_fresh_process_replies_as_base_and_adapter_do(tmp_path):
    """The real thing: another Python, which has nothing but the merged folder."""
    inputs = make_inputs(tmp_path / "in", save_tiny_model(tmp_path / "base"), size=0.1)
    run(inputs, tmp_path / "out")
    found = read_json(tmp_path / "out" / "proof.json")["reloaded"]
    assert found["same"] or found["tied"]
    assert found["dtype"] == "float32" and "Message" in found["prompt"] and found["reply"]


def reply_logits(ids, gap=None, at=1):
    """Logits whose favourites are `ids`, but for one that is `gap` below another token."""
    logits = torch.zeros(len(ids), 10)
    logits[torch.arange(len(ids)), torch.tensor(ids)] = 5.0
    if gap is not None:
        logits[at, (ids[at] + 1) % 10] = 5.0 + gap
    return logits


def test_equal_and_nearly_tied_replies_pass_and_others_fail():
    reply = {"input_ids": [3, 4, 5], "text": "a b c"}
    same = {"reply": "a b c", "same": True, "tied": None, "counts_as_tied": 0.1}
    assert verification.compare_reply(reply_logits([3, 4, 5]), reply, 0.1) == same
    found = verification.compare_reply(reply_logits([3, 4, 5], 0.05), reply, 0.1)
    assert not found["same"] and found["tied"] == {"position": 2, "gap": pytest.approx(0.05, abs=1e-6)}
    with pytest.raises(UserError, match="at token 2 of 'a b c' they prefer another one by 0.2 nats"):
        verification.compare_reply(reply_logits([3, 4, 5], 0.2), reply, 0.1)


def test_a_wrong_reply_fails_the_stage(tmp_path, monkeypatch):
    inputs = make_inputs(tmp_path / "in", save_tiny_model(tmp_path / "base"), size=0.1)
    right = reply_by_dtype("float32")

    def wrong(model, prompt, device):
        reply, dtype = right(model, prompt, device)
        return reply | {"input_ids": [(token + 1) % 300 for token in reply["input_ids"]]}, dtype

    monkeypatch.setattr(verification, "reply_of_fresh_process", wrong)
    with pytest.raises(UserError, match="doesn't reply as base \\+ adapter do: at token 1"):
        run(inputs, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_logits_that_are_not_finite_fail(tmp_path):
    good = [(torch.zeros(2, 5), torch.tensor([1, 2]))]
    bad = [(torch.full((2, 5), torch.nan), torch.tensor([1, 2]))]
    for expected, actual in ((good, bad), (bad, good)):
        with pytest.raises(UserError, match="aren't finite"):
            verification.differences(expected, iter(actual), good)


def test_differences_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    make = [[(torch.randn(n, 7, generator=generator), torch.arange(n)) for n in (3, 2)] for _ in range(3)]
    found = verification.differences(make[0], iter(make[1]), make[2])
    before, after, _ = (torch.cat([logits for logits, _ in pairs]).double() for pairs in make)
    target = torch.cat([t for _, t in make[0]])
    kl = torch.nn.functional.kl_div(
        after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert found["kl"] == pytest.approx(float(kl), rel=1e-5) and found["positions"] == 5
    assert found["max_difference"] == pytest.approx(float((before - after).abs().max()), rel=1e-6)
    assert found["mean_difference"] == pytest.approx(float((before - after).abs().mean()), rel=1e-5)
    loss = torch.nn.functional.cross_entropy(after, target)
    assert found["heldout_loss"]["merged"] == pytest.approx(float(loss), rel=1e-5)
    assert found["top_token_agreement"] == float((before.argmax(-1) == after.argmax(-1)).double().mean())
    assert found["base_kl"] > 0


def test_a_few_flipped_routers_pass_and_a_shift_of_all_positions_does_not():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(40, 7, generator=generator)
    pairs = [(before, torch.arange(40) % 7)]
    few = before.clone()
    few[::10] += 0.3 * torch.randn(4, 7, generator=generator)
    shifted = before + 0.1 * torch.randn(40, 7, generator=generator)
    flipped, wrong = (verification.differences(pairs, [(x, pairs[0][1])], pairs) for x in (few, shifted))
    assert flipped["kl"] > 1e-3 < wrong["kl"]
    assert flipped["kl_median"] == 0 and wrong["kl_median"] > 1e-3
    assert flipped["applied"] is None  # base and adapter are one here
    worse = {**flipped, "applied": 1.0, "heldout_loss": {"merged": 2.1, "adapter": 2.0}}
    same = {**worse, "heldout_loss": {"merged": 2.001, "adapter": 2.0}}
    others = (same, worse, {**same, "kl_median": 2e-3}, {**same, "applied": 0.9}, {**same, "applied": None})
    passed = [verification.only_routers_flip(found, 1e-3) for found in others]
    assert passed == [True, False, False, False, False]


def test_how_much_of_the_adapter_is_applied_is_told_whatever_the_noise():
    generator = torch.Generator().manual_seed(0)
    bare, change, noise = (torch.randn(200, 50, generator=generator) * size for size in (1, 0.05, 0.05))
    target = torch.arange(200) % 50

    def found(share, noise):
        merged = bare + share * change + noise + 3.0  # a constant changes no prediction
        return verification.differences([(bare + change, target)], [(merged, target)], [(bare, target)])

    for share in (0.5, 0.9, 1.0, 2.0):
        assert found(share, 0)["applied"] == pytest.approx(share, abs=1e-4)
        assert verification.is_misapplied(found(share, 0)) == (share != 1.0)
    assert found(0.5, 0)["kl"] < 1e-3  # which the tolerance alone would let pass
    assert not verification.is_misapplied(found(1.0, noise)) and verification.is_misapplied(found(0.5, noise))


@dataclass(frozen=True)
class Adapted:
    """A mixture of experts with a little adapter: base and adapter on disk, deltas, logits of both."""

    folder: Path
    deltas: dict
    expected: list
    plain: list

    def merged(self, name, deltas):
        out = self.folder / name
        if not out.exists():
            out.mkdir()
            streamed_merge.merge_weights(self.folder / "base", deltas, out, CONTEXT)
            shutil.copyfile(self.folder / "base" / "config.json", out / "config.json")
        return out

    def passes(self, out):
        """Whether the proof by predictions lets it pass."""
        loaded = verification.load(out, torch.float32, "whole", "cpu")
        found = verification.differences(self.expected, verification.logits_of(loaded, labelled()), self.plain)
        near = found["kl"] <= verification.TOLERANCE or verification.only_routers_flip(found, verification.TOLERANCE)
        return near and not verification.is_misapplied(found)


CONTEXT = Context(Progress.silent(), Runtime(threads=1))


def labelled():
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 120, (40,), generator=generator).tolist() for _ in range(16)]
    return [{"id": "x", "input_ids": row, "labels": [IGNORE_INDEX, *row[1:]]} for row in rows]


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "deepseek_v3", "llama"])
def adapted_moe(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny_architecture(request.param).to(torch.bfloat16).save_pretrained(folder / "base")
    model, _ = base_model.load(folder / "base", "lora", "float32", "cpu", packs=False)
    model = lora.add_adapter(model, train_settings(method="lora", lora_r=4))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.01
    model.save_pretrained(str(folder / "adapter"))
    expected = list(verification.logits_of(verification.Loaded(model.eval(), False), labelled()))
    base = verification.load(folder / "base", torch.float32, "whole", "cpu")
    plain = list(verification.logits_of(base, labelled()))
    deltas = merging._on_disk(weight_deltas.read_adapter(folder / "adapter"), folder / "base", folder / "adapter")
    return Adapted(folder, deltas, expected, plain)


def test_a_right_merge_passes_though_routers_flip(adapted_moe):
    out = adapted_moe.merged("right", adapted_moe.deltas)
    assert adapted_moe.passes(out)
    streamed_merge.check_weights(adapted_moe.folder / "base", out, adapted_moe.deltas, CONTEXT)


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 2.0])
def test_a_wrong_scale_never_passes_for_flipped_routers(adapted_moe, factor):
    """Not even where it is wrong in reading the adapter, which the comparison of bytes can't see."""
    scaled = {name: replace(delta, scale=factor * delta.scale) for name, delta in adapted_moe.deltas.items()}
    assert not adapted_moe.passes(adapted_moe.merged(f"times {factor}", scaled))


@pytest.mark.parametrize("left_out", ["one weight", "a layer"])
def test_what_is_left_out_never_passes(adapted_moe, left_out):
    first = next(iter(adapted_moe.deltas))
    gone = {name for name in adapted_moe.deltas if (name == first if left_out == "one weight" else ".1." in name)}
    fewer = {name: delta for name, delta in adapted_moe.deltas.items() if name not in gone}
    assert 0 < len(fewer) < len(adapted_moe.deltas)
    assert not adapted_moe.passes(adapted_moe.merged(left_out, fewer))


@pytest.mark.parametrize("kind", ["expert", "router"])
def test_experts_and_routers_that_are_not_the_bases_never_pass(adapted_moe, kind):
    """No pair adapts them, so every byte is compared: an expert without its values, two experts' routes swapped."""
    names = [n for n in stored_tensors(adapted_moe.folder / "base") if re.search(r"\.(gate|router)\.weight$", n)]
    if not names:
        pytest.skip("no mixture of experts")
    out = adapted_moe.folder / kind
    shutil.copytree(adapted_moe.merged("right", adapted_moe.deltas), out)
    tensors = load_file(out / "model.safetensors")
    if kind == "router":
        tensors[names[0]] = tensors[names[0]][[1, 0, 2, 3]].contiguous()
    else:
        name = next(n for n in tensors if ".experts." in n)
        tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="isn't its base's, though nothing adapts it"):
        streamed_merge.check_weights(adapted_moe.folder / "base", out, adapted_moe.deltas, CONTEXT)


def test_rows_are_spread_and_cut_to_the_labels_asked_for(tmp_path):
    write_tokens(tmp_path / "rows.arrow", [token_row(number, 20) for number in range(40)])
    rows = verification.spread_rows(tmp_path / "rows.arrow", 16, 1024)
    assert len(rows) == 16 and rows[1]["input_ids"] == token_row(2, 20)["input_ids"]
    rows = verification.spread_rows(tmp_path / "rows.arrow", 16, 25)
    assert sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:]) == 25
    assert verification.shortest_prompt([token_row(1, 20), token_row(2, 8)]) == token_row(2, 8)["input_ids"][:4]


@pytest.mark.gpu
@pytest.mark.parametrize("loading", ["whole", "by layers"])
def test_the_proof_on_a_gpu(tmp_path, monkeypatch, loading):
    inputs = make_inputs(tmp_path / "in", save_tiny_model(tmp_path / "base"))
    if loading == "by layers":
        monkeypatch.setattr(hardware, "free_memory", lambda _: 1000)
        monkeypatch.setattr(verification, "reply_of_fresh_process", reply_by_dtype("bfloat16"))
    out = tmp_path / "out"
    out.mkdir()
    rows = rows_of(inputs)
    context = Context(Progress.silent(), Runtime(device="cuda", threads=1))
    streamed_merge.merge_weights(
        inputs["model"] / "model", weight_deltas.read_adapter(inputs["train"] / "adapter"), out, context
    )
    for path in (inputs["model"] / "model").glob("*.json"):
        (out / path.name).write_bytes(path.read_bytes())
    found = verification.compare(inputs["model"] / "model", inputs["train"] / "adapter", out, rows, 1e-3, context)
    assert 0 < found["kl"] < 1e-3 and found["loading"]["value"] == loading
