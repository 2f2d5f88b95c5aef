"""LoRA fused into the base matmuls: the results of PEFT's own layers, whatever the model, and nothing left behind."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from adder.core.files import read_jsonl
from adder.core.progress import Progress
from adder.kernels import labelled_loss
from adder.kernels.fused_lora import attach
from adder.training import lora as adapter
from fused_lora_cases import (
    FAMILIES,
    LENGTHS,
    PROJECTIONS,
    autocast_step,
    batch_of,
    errors,
    family,
    on_gpu,
    step,
    step_loss,
    with_adapter,
    worst_error,
)
from tiny import pack_rows, token_row, write_training_inputs
from training_stage import run_training, train_settings


def assert_same_step(model, batch: dict, tolerance: float = 2e-5) -> dict:
    """Fold a model; loss and all gradients stay what PEFT's layers gave."""
    expected_loss, expected = step(model, batch)
    report = attach.attach(model)
    found_loss, found = step(model, batch)
    assert found_loss == pytest.approx(expected_loss, rel=1e-5)
    assert worst_error(found, expected) < tolerance
    return report


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_its_losses_and_gradients(name):
    report = assert_same_step(with_adapter(family(name)), batch_of(9, 23, 14))
    assert report["decoder_layers"] == FAMILIES[name][1], report
    assert report["left_to_peft"] == 0, report


def test_detach_restores_peft():
    model = with_adapter(family("Qwen2"))
    before = step(model, batch_of(9, 23))
    weights = {name: p.clone() for name, p in model.named_parameters()}
    attach.attach(model)
    attach.detach(model)
    assert not any("forward" in module.__dict__ for module in model.get_base_model().modules())
    assert all(p.is_contiguous() and torch.equal(p, weights[name]) for name, p in model.named_parameters())
    after = step(model, batch_of(9, 23))
    assert after[0] == before[0] and worst_error(after[1], before[1]) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["o_proj", "up_proj"]},
        {"target_modules": ["down_proj"], "r": 3},
        {"use_rslora": True, "r": 8},
        {"r": 2, "rank_pattern": {"k_proj": 5, "down_proj": 9}, "alpha_pattern": {"v_proj": 40}},
    ],
    ids=["q and v", "o and up", "rank 3", "rslora", "ranks by module"],
)
def test_any_choice_of_pairs(changes):
    report = assert_same_step(with_adapter(family("Qwen2"), **changes), batch_of(9, 23))
    assert report["left_to_peft"] == 0 and report["decoder_layers"] == 2


def test_what_does_not_fit_is_left_to_peft():
    model = with_adapter(family("Llama"), use_dora=True)
    report = assert_same_step(model, batch_of(9, 23))
    assert report["left_to_peft"] == 14 and report["decoder_layers"] == 0
    assert report["reasons"]["a LoRA variant"] >= 14


def test_an_adapted_lm_head_is_left_to_peft():
    """The loss calls the head in its own way, and its weight may be the embedding's."""
    model = with_adapter(family("Llama"), target_modules=[*PROJECTIONS, "lm_head"])
    assert assert_same_step(model, batch_of(9, 23))["left_to_peft"] == 1


def test_attaching_leaves_the_random_state_alone():
    model = with_adapter(family("Llama"))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    attach.attach(model)
    assert torch.equal(torch.rand(3), expected)


def test_a_layer_that_computes_something_else_is_refused():
    """A stranger with Llama's parts but another sum: found by running it."""
    model = family("Llama")
    layer = model.model.layers[1]

    class Stranger(type(layer)):
        def forward(self, hidden_states, **kwargs):
            return super().forward(hidden_states, **kwargs) * 1.1

    layer.__class__ = Stranger
    report = assert_same_step(with_adapter(model), batch_of(9, 23))
    assert report["decoder_layers"] == 1 and report["mlps"] == 1 and report["products"] == 2
    assert report["reasons"] == {"FoldedLayer computes something else": 1} or "Stranger" in str(report["reasons"])


def test_evaluation_is_training_without_dropout():
    model = with_adapter(family("Llama"), lora_dropout=0.2)
    batch = batch_of(9, 23)
    model.eval()
    expected = step(model, batch)[0]
    attach.attach(model)
    assert step(model, batch)[0] == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        assert labelled_loss.labelled_losses(model.get_base_model(), **batch).sum().item() == pytest.approx(
            expected, rel=1e-5
        )


def test_a_saved_adapter_is_peft_s(tmp_path):
    model = with_adapter(family("Llama"))
    model.save_pretrained(tmp_path / "plain")
    expected = step(model, batch_of(9, 23))[0]
    attach.attach(model)
    model.save_pretrained(tmp_path / "fused")
    name = "adapter_model.safetensors"
    assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = PeftModel.from_pretrained(family("Llama"), tmp_path / "fused")
    assert step_loss(loaded, batch_of(9, 23)) == pytest.approx(expected, rel=1e-5)
    merged = model.merge_and_unload()
    value = labelled_loss.labelled_losses(merged, **batch_of(9, 23)).sum().item()
    assert value == pytest.approx(expected, rel=1e-4)


def test_packed_is_unpacked():
    model = with_adapter(family("Qwen3"))
    attach.attach(model)
    lengths = (9, 23, 14)
    rows = [token_row(i, length) for i, length in enumerate(lengths)]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    single = step(model, *(collate(pack_rows([[row]])) for row in rows))
    packed = step(model, batch_of(*lengths))
    assert packed[0] == pytest.approx(single[0], rel=1e-5) and worst_error(packed[1], single[1]) < 2e-5


def test_fused_training_is_training(tmp_path, tiny_model_dir, monkeypatch):
    """The whole train stage, with evaluations and checkpointing: the same losses and the same adapter."""
    inputs = write_training_inputs(tmp_path / "inputs", tiny_model_dir)
    values = {"epochs": 2, "learning_rate": 1e-3, "effective_batch_size": 6, "lora_r": 4, "compute_dtype": "float32"}
    values |= {"method": "lora", "eval_samples": 4, "eval_times": 2, "gradient_checkpointing": True, "lora_dropout": 0}
    settings = train_settings(**values)
    add_adapter = adapter.add_adapter
    losses, weights = {}, {}
    for kind in ("peft", "fused"):
        if kind == "fused":

            def fused(*arguments):
                model = add_adapter(*arguments)
                assert attach.attach(model)["decoder_layers"] == 2
                return model

            monkeypatch.setattr(adapter, "add_adapter", fused)
        out = tmp_path / kind
        out.mkdir()
        run_training(settings, inputs, out, Progress.silent())
        rows = read_jsonl(out / "metrics.jsonl")
        losses[kind] = [row[name] for row in rows for name in ("loss", "eval_loss") if name in row]
        weights[kind] = load_file(out / "adapter" / "adapter_model.safetensors")
    assert losses["fused"] == pytest.approx(losses["peft"], rel=1e-4) and len(losses["peft"]) > 8
    assert worst_error(weights["fused"], weights["peft"]) < 1e-2


def test_what_an_adapter_adds_is_not_lost_to_rounding_on_a_cpu():
    """PEFT adds it to outputs that are rounded to bf16 already, by which anything below half a bit is lost."""
    model = with_adapter(family("Llama", torch.bfloat16, hidden_size=200))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1e-3)
    torch.manual_seed(0)
    x = torch.randn(1, 400, 200, dtype=torch.bfloat16)
    first, second = model.get_base_model().model.layers
    layers = [first.self_attn.q_proj, second.mlp.up_proj]

    def low_rank(layer):
        return layer.scaling["default"] * layer.lora_B["default"](layer.lora_A["default"](x.float()))

    with torch.no_grad():
        base = [layer.base_layer(x).float() for layer in layers]
        added = [low_rank(layer) for layer in layers]
        assert attach.attach_on_cpu(model, "bfloat16").value == "folded"
        for layer, without, delta in zip(layers, base, added, strict=True):
            found = (layer(x).float() - without).mul(delta).sum() / delta.square().sum()
            # Over some 25,000 outputs rounding, which goes either way, leaves a few hundredths; PEFT's share is 0.08.
            assert found.item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("dtype", "changes", "reason"),
    [
        ("float32", {}, "serves bf16, not float32"),
        ("bfloat16", {"lora_dropout": 0.1}, "PEFT's dropout"),
        ("bfloat16", {"use_dora": True}, "a LoRA variant"),
    ],
)
def test_what_a_cpu_leaves_to_peft(dtype, changes, reason):
    choice = attach.attach_on_cpu(with_adapter(family("Llama", torch.bfloat16), **changes), dtype)
    assert choice.value == "PEFT" and reason in choice.reason


def test_memory_behind_the_inputs_in_a_cpu_s_buffer_is_finite(monkeypatch):
    """oneDNN's bf16 matmul on AMX reads on to its next block of columns."""
    model = with_adapter(family("Llama", torch.bfloat16))
    attach.attach_on_cpu(model, "bfloat16")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))
    group = model._fused_lora[0].groups[0]
    assert not group.buffer(3)._base[:, group.inputs :].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "plain") for name in ("Llama", "Qwen2", "Qwen3", "Gemma", "Olmo2")] + [("Llama", "checkpointing")],
)
def test_fused_lora_is_as_exact_as_peft(name, kind):
    """bf16 against the same values in fp32: at most 1.3 times PEFT's own error (and a loss within 0.2 %)."""
    batch = batch_of(*LENGTHS, device="cuda")
    exact = step(on_gpu(name, torch.float32, "sdpa"), batch)
    model = on_gpu(name, torch.bfloat16, "adder_varlen")
    peft = errors(autocast_step(model, torch.bfloat16, batch), exact)
    report = attach.attach(model)
    assert report["left_to_peft"] == 0 and report["decoder_layers"] == (0 if name == "Olmo2" else 4)
    if kind == "checkpointing":
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = errors(autocast_step(model, torch.bfloat16, batch), exact)
    print(name, kind, {k: (round(v, 5), round(found[k], 5)) for k, v in peft.items()})
    assert found["loss"] < max(2e-3, 1.3 * peft["loss"])
    for part in peft.keys() - {"loss"}:
        assert found[part] < 1.3 * peft[part], (part, found[part], peft[part])


@pytest.mark.gpu
def test_fused_lora_is_as_exact_as_peft_in_fp16():
    batch = batch_of(*LENGTHS, device="cuda")
    exact = step(on_gpu("Llama", torch.float32, "sdpa"), batch)
    model = on_gpu("Llama", torch.float16, "adder_varlen")
    peft = errors(autocast_step(model, torch.float16, batch), exact)
    assert attach.attach(model)["decoder_layers"] == 4
    found = errors(autocast_step(model, torch.float16, batch), exact)
    assert all(found[part] < max(1.3 * peft[part], 1e-3) for part in peft), (found, peft)


@pytest.mark.gpu
def test_packed_is_unpacked_on_a_gpu():
    """Each within bf16's own error of the exact gradient, and the packed one no further off."""
    rows = [token_row(i, length) for i, length in enumerate(LENGTHS)]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    apart = [collate(pack_rows([[row]])) for row in rows]
    apart = [{k: v.cuda() if hasattr(v, "cuda") else v for k, v in batch.items()} for batch in apart]
    exact = step(on_gpu("Llama", torch.float32, "sdpa"), *apart)
    model = on_gpu("Llama", torch.bfloat16, "adder_varlen")
    attach.attach(model)
    single, packed = step(model, *apart), step(model, batch_of(*LENGTHS, device="cuda"))
    assert errors(packed, exact)["all"] < 1.3 * errors(single, exact)["all"]
