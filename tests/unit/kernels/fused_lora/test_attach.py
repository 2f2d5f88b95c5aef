"""LoRA folded into the base products: the numbers of PEFT's own layers, whatever the model, and nothing left behind."""

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from adder.core.files import read_jsonl
from adder.core.progress import Progress
from adder.kernels import labelled_loss
from adder.kernels.dropout import dropout_mask
from adder.kernels.fused_lora import attach
from adder.training import base_model
from adder.training import lora as adapter
from adder.training import run as train
from adder.workflow.settings import Train
from fused_lora_cases import (
    FAMILIES,
    LENGTHS,
    PROJECTIONS,
    batch_of,
    errors,
    family,
    on_gpu,
    step,
    with_adapter,
    worst_error,
)
from tiny import pack_rows, save_tiny_model, token_row, write_training_inputs


def assert_same_step(model, batch: dict, tolerance: float = 2e-5) -> dict:
    """Fold a model; loss and all gradients stay what PEFT's layers gave."""
    expected_loss, expected = step(model, batch)
    report = attach.attach(model)
    found_loss, found = step(model, batch)
    assert found_loss == pytest.approx(expected_loss, rel=1e-5)
    assert worst_error(found, expected) < tolerance
    return report


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_its_numbers(name):
    report = assert_same_step(with_adapter(family(name)), batch_of(9, 23, 14))
    assert report["decoder_layers"] == FAMILIES[name][1], report
    assert report["left_to_peft"] == 0, report


def test_every_layer_is_replaced():
    """A folded model whose layers did not run folded would pass all comparisons."""
    model = with_adapter(family("Llama"))
    attach.attach(model)
    calls = []
    for item in model._fused_lora:
        run = item._run
        item._run = lambda *args, run=run, **kwargs: calls.append(1) or run(*args, **kwargs)
    step(model, batch_of(9, 5))
    assert len(calls) == 2


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


def test_folded_weights_follow_the_optimizer():
    """Three steps of AdamW end where PEFT's own end."""
    batch = batch_of(9, 23, 14)
    plain = with_adapter(family("Llama"))
    folded = copy.deepcopy(plain)
    attach.attach(folded)
    for model in (plain, folded):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            step(model, batch)
            optimizer.step()
    found, expected = (
        {n: p.detach() for n, p in model.named_parameters() if p.requires_grad} for model in (folded, plain)
    )
    assert worst_error(found, expected) < 1e-3


def test_folded_weights_follow_whatever_changes_them():
    """A state dict that is loaded, tensors that are exchanged, a scaling that is changed."""
    model, batch = with_adapter(family("Llama")), batch_of(9, 23)
    attach.attach(model)
    pairs = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def load():
        model.load_state_dict({name: p * 2 for name, p in pairs.items()}, strict=False)

    def exchange():
        for p in pairs.values():
            p.data = p.data.double().float() * 0.7

    def scale():
        model.get_base_model().model.layers[0].mlp.up_proj.scaling["default"] *= 3

    for change in (load, exchange, scale):
        before = step_loss(model, batch)
        change()
        found = step_loss(model, batch)
        assert found != pytest.approx(before, rel=1e-4)
        attach.detach(model)
        assert found == pytest.approx(step_loss(model, batch), rel=1e-5)
        attach.attach(model)


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


def test_attaching_leaves_the_random_numbers_alone():
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


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(name, reentrant):
    """Also with dropout: the mask of the forward pass is made again."""
    model = with_adapter(family(name), lora_dropout=0.3).train()
    attach.attach(model)
    batch = batch_of(9, 23, 14)
    torch.manual_seed(3)
    plain = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(3)
    again = step(model, batch)
    assert again[0] == pytest.approx(plain[0], rel=1e-6) and worst_error(again[1], plain[1]) < 1e-5
    torch.manual_seed(4)
    assert step(model, batch)[0] != pytest.approx(plain[0], rel=1e-4)


class MaskedDropout(torch.nn.Module):
    """Dropout by dropout_mask, with seeds drawn as the folded path draws them."""

    def __init__(self, p: float, seeds: dict):
        super().__init__()
        self.p, self.seeds = p, seeds

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        mask = dropout_mask(self.seeds[self], *rows.shape, self.p, x.device)
        return (rows * mask / (1 - self.p)).view(x.shape)


def masked_reference(model, p: float, seed: int) -> PeftModel:
    """PEFT's own layers with the masks that the folded path makes after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    seeds = {}
    for layer in model.get_base_model().model.layers:
        for parent, names in ((layer.self_attn, PROJECTIONS[:4]), (layer.mlp, PROJECTIONS[4:])):
            for name in names:
                dropout = MaskedDropout(p, seeds)
                seeds[dropout] = int(torch.randint(2**31, ()))
                getattr(parent, name).lora_dropout["default"] = dropout
    return model


def test_dropout_drops_the_adapters_input_alone():
    p = 0.25
    model = with_adapter(family("Llama"), lora_dropout=p).train()
    reference = masked_reference(copy.deepcopy(model), p, 7)
    expected = step(reference, batch_of(9, 23, 14))
    attach.attach(model)
    torch.manual_seed(7)
    found = step(model, batch_of(9, 23, 14))
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert worst_error(found[1], expected[1]) < 2e-5


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


def test_padded_batches_and_a_cache_work():
    model = with_adapter(family("Llama")).eval()
    ids = torch.randint(3, 300, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "use_cache": True}
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
        replies = model.generate(**options)
        attach.attach(model)
        assert torch.allclose(model(input_ids=ids, attention_mask=mask).logits[:, 5:], logits[:, 5:], atol=1e-4)
        assert torch.equal(model.generate(**options), replies)


def test_an_adapter_switched_off_or_merged_is_peft_s_business():
    model = with_adapter(family("Llama")).eval()
    batch = batch_of(9, 23)
    on = step(model, batch)[0]
    with model.disable_adapter():
        off = labelled_loss.labelled_losses(model.get_base_model(), **batch).sum().item()
    assert off != pytest.approx(on, rel=1e-3)
    attach.attach(model)
    with model.disable_adapter():
        assert labelled_loss.labelled_losses(model.get_base_model(), **batch).sum().item() == pytest.approx(
            off, rel=1e-5
        )
    model.merge_adapter()
    with torch.no_grad():
        assert labelled_loss.labelled_losses(model.get_base_model(), **batch).sum().item() == pytest.approx(
            on, rel=1e-4
        )
    model.unmerge_adapter()
    assert step(model, batch)[0] == pytest.approx(on, rel=1e-4)


def test_a_saved_adapter_is_peft_s(tmp_path):
    model = with_adapter(family("Llama"))
    model.save_pretrained(tmp_path / "plain")
    expected = step(model, batch_of(9, 23))[0]
    attach.attach(model)
    model.save_pretrained(tmp_path / "folded")
    name = "adapter_model.safetensors"
    assert (tmp_path / "folded" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = PeftModel.from_pretrained(family("Llama"), tmp_path / "folded")
    assert step_loss(loaded, batch_of(9, 23)) == pytest.approx(expected, rel=1e-5)
    merged = model.merge_and_unload()
    value = labelled_loss.labelled_losses(merged, **batch_of(9, 23)).sum().item()
    assert value == pytest.approx(expected, rel=1e-4)


def step_loss(model, batch: dict) -> float:
    with torch.no_grad():
        return labelled_loss.labelled_losses(model.get_base_model(), **batch).sum().item()


@pytest.mark.parametrize("hold", [True, False])
def test_nf4_values_are_those_of_bitsandbytes(tmp_path, hold):
    folder = save_tiny_model(tmp_path / "model", hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    model, _ = base_model.load(folder, "qlora", "float32", "cpu")
    assert not base_model.four_bit_layers(model)  # on a CPU they are held dequantised already
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, attn_implementation="adder_segments"
    )
    base_model.keep_cpu_weights_intact(model)
    model = with_adapter(model)
    batch = batch_of(9, 23)
    expected_loss, expected = step(model, batch)
    report = attach.attach(model, hold=hold)
    assert report["held"] is hold and report["decoder_layers"] == 2
    assert (report["held_bytes"] > 0) is hold
    found_loss, found = step(model, batch)
    assert found_loss == pytest.approx(expected_loss, rel=1e-5)
    assert worst_error(found, expected) < 2e-5


def test_packed_is_unpacked():
    model = with_adapter(family("Qwen3"))
    attach.attach(model)
    lengths = (9, 23, 14)
    rows = [token_row(i, length) for i, length in enumerate(lengths)]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    single = step(model, *(collate(pack_rows([[row]])) for row in rows))
    packed = step(model, batch_of(*lengths))
    assert packed[0] == pytest.approx(single[0], rel=1e-5) and worst_error(packed[1], single[1]) < 2e-5


def test_training_folded_is_training(tmp_path, tiny_model_dir, monkeypatch):
    """The whole train stage, with evaluations and checkpointing: the same losses and the same adapter."""
    inputs = write_training_inputs(tmp_path / "inputs", tiny_model_dir)
    values = {"epochs": 2, "learning_rate": 1e-3, "effective_batch_size": 6, "lora_r": 4, "compute_dtype": "float32"}
    values |= {"method": "lora", "eval_samples": 4, "eval_times": 2, "gradient_checkpointing": True, "lora_dropout": 0}
    settings = Train(**values).model_dump(mode="json") | {"reshuffle": False}
    add_adapter = adapter.add_adapter
    losses, weights = {}, {}
    for kind in ("peft", "folded"):
        if kind == "folded":

            def folded(model, settings):
                model = add_adapter(model, settings)
                assert attach.attach(model)["decoder_layers"] == 2
                return model

            monkeypatch.setattr(adapter, "add_adapter", folded)
        out = tmp_path / kind
        out.mkdir()
        train.run(settings, inputs, out, Progress.silent())
        rows = read_jsonl(out / "metrics.jsonl")
        losses[kind] = [row[name] for row in rows for name in ("loss", "eval_loss") if name in row]
        weights[kind] = load_file(out / "adapter" / "adapter_model.safetensors")
    assert losses["folded"] == pytest.approx(losses["peft"], rel=1e-4) and len(losses["peft"]) > 8
    assert worst_error(weights["folded"], weights["peft"]) < 1e-2


# On a GPU -------------------------------------------------------------------------------------------------------------


gpu = pytest.mark.gpu


def autocast_step(model, dtype, *batches):
    with torch.autocast("cuda", dtype):
        return step(model, *batches)


@gpu
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "plain") for name in ("Llama", "Qwen2", "Qwen3", "Gemma", "Olmo2")] + [("Llama", "checkpointing")],
)
def test_folding_is_as_exact_as_peft(name, kind):
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


@gpu
def test_folding_is_as_exact_as_peft_in_fp16():
    batch = batch_of(*LENGTHS, device="cuda")
    exact = step(on_gpu("Llama", torch.float32, "sdpa"), batch)
    model = on_gpu("Llama", torch.float16, "adder_varlen")
    peft = errors(autocast_step(model, torch.float16, batch), exact)
    assert attach.attach(model)["decoder_layers"] == 4
    found = errors(autocast_step(model, torch.float16, batch), exact)
    assert all(found[part] < max(1.3 * peft[part], 1e-3) for part in peft), (found, peft)


@gpu
def test_dropout_on_a_gpu_is_the_references():
    p, batch = 0.25, batch_of(*LENGTHS, device="cuda")
    dropout = {"lora_dropout": p}
    exact = step(masked_reference(on_gpu("Llama", torch.float32, "sdpa", dropout).train(), p, 7), batch)
    peft = masked_reference(on_gpu("Llama", torch.bfloat16, "adder_varlen", dropout).train(), p, 7)
    peft = errors(autocast_step(peft, torch.bfloat16, batch), exact)
    model = on_gpu("Llama", torch.bfloat16, "adder_varlen", dropout).train()
    attach.attach(model)
    torch.manual_seed(7)
    found = errors(autocast_step(model, torch.bfloat16, batch), exact)
    for part in peft.keys() - {"loss"}:
        assert found[part] < 1.3 * peft[part], (part, found[part], peft[part])


@gpu
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


@gpu
def test_nf4_on_a_gpu(tmp_path):
    """Values held or dequantised in each product: the same gradients to the bit, and as exact as PEFT's."""
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "head_dim": 64}
    folder = save_tiny_model(tmp_path / "model", **shape)
    batch = batch_of(*LENGTHS, device="cuda")
    model = with_adapter(base_model.load(folder, "qlora", "bfloat16", "cuda")[0]).cuda()
    peft = autocast_step(model, torch.bfloat16, batch)
    results = {}
    for hold in (True, False):
        report = attach.attach(model, hold=hold)
        assert report["decoder_layers"] == 2 and report["held"] is hold
        results[hold] = step(model, batch)
    assert results[True][0] == results[False][0]
    assert worst_error(results[True][1], results[False][1]) == 0
    attach.detach(model)
    base = base_model.load(folder, "qlora", "bfloat16", "cuda")[0]
    base_model.hold_dequantised(base, torch.bfloat16)
    exact_model = with_adapter(base.float()).cuda()
    exact_model.get_base_model().set_attn_implementation("sdpa")
    exact = step(exact_model, batch)
    assert errors(results[True], exact)["all"] < 1.3 * errors(peft, exact)["all"]


@gpu
def test_folded_weights_follow_fused_adamw():
    """torch's fused optimizers change parameters without raising their version (2.11): each step must be seen."""
    batch = batch_of(*LENGTHS, device="cuda")
    model = on_gpu("Llama", torch.bfloat16, "adder_varlen")
    attach.attach(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    for _ in range(2):
        step(model, batch)
        optimizer.step()
        found = step(model, batch)[0]
        attach.attach(model)  # reads the parameters anew
        assert step(model, batch)[0] == found
