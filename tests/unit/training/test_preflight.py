"""Preflight: sees what it should, stops what can't work, warns of what is hopeless, and leaves no trace."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from adder.core.errors import UserError
from adder.core.files import digest_file
from adder.core.progress import Progress
from adder.kernels.labelled_loss import labelled_losses
from adder.training import base_model, preflight
from adder.training.lora import add_adapter
from adder.training.monitoring.preflight_warnings import warnings
from adder.training.preflight import DiskNeeds
from adder.training.records import PreflightFigures
from adder.training.stage import TrainSettings
from tiny import pack_rows, save_tiny_model, tiny_tokenizer, token_row, write_training_inputs
from training_stage import FIGURES, run_training, train_settings, training_facts


def settings(**changes) -> TrainSettings:
    values = {"epochs": 2, "learning_rate": 1e-3, "effective_batch_size": 6, "compute_dtype": "float32"}
    return train_settings(**{**values, "eval_samples": 0, "samples": 0, **changes})


def pack_of(*rows: dict) -> dict:
    return {name: np.array(values) for name, values in pack_rows([list(rows)])[0].items()}


PACK = pack_of(token_row(1, 40), token_row(2, 25), token_row(3, 31))


def load(folder, method: str = "lora", dtype: str = "float32"):
    model, _ = base_model.load(folder, method, dtype, "cpu")
    torch.manual_seed(0)
    return model if method == "full" else add_adapter(model, settings(method=method))


@pytest.fixture
def disk(tmp_path) -> DiskNeeds:
    return DiskNeeds(tmp_path / "checkpoints" / "not" / "yet", 2, tmp_path, 1_000_000)


def check(model, disk, pack=PACK, dtype="float32", checkpointing=False, method="lora") -> PreflightFigures:
    facts = training_facts(steps=50, tokens_per_step=400)
    values = settings(method=method)
    return preflight.check(model, tiny_tokenizer(), pack, values, dtype, checkpointing, facts, disk)


def warnings_of(found: PreflightFigures) -> list[str]:
    return warnings(found, {})


def changed(folder, tmp_path, change):
    """The model in `folder` with `change` made to its weights, LoRA on top."""
    target = save_tiny_model(tmp_path / "changed")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return load(target)


@pytest.mark.parametrize(
    ("method", "dtype", "checkpointing"),
    [
        ("qlora", "float32", False),
        ("qlora", "bfloat16", True),
        ("lora", "float32", True),
        ("lora", "float16", False),
        ("full", "float32", False),
    ],
)
def test_a_sound_set_up_passes_without_a_word_and_without_a_trace(tiny_model_dir, disk, method, dtype, checkpointing):
    model = load(tiny_model_dir, method, dtype)
    model.eval()
    kept = next(p for p in model.parameters() if p.requires_grad)
    kept.grad = torch.full_like(kept, 3.0)
    gradient = kept.grad
    weights = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    modes = [module.training for module in model.modules()]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(11)
    drawn = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    found = check(model, disk, dtype=dtype, checkpointing=checkpointing, method=method)
    assert warnings_of(found) == [] and found["layers_without_gradient"] == []
    assert found["layers"] == (14 if method != "full" else len([p for p in model.parameters() if p.requires_grad]))
    assert abs(found["base_loss"] - found["ln_vocabulary"]) < 0.5, "random weights guess"
    assert 0 < found["gradient_norm"] < 100
    assert kept.grad is gradient and torch.equal(gradient, torch.full_like(kept, 3.0))
    assert all(p.grad is None for p in model.parameters() if p is not kept)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items() if name in weights)
    assert modes == [module.training for module in model.modules()]
    assert not model.is_activation_checkpointing
    assert random.getstate() == drawn[0] and (np.random.get_state()[1] == drawn[1]).all()
    assert torch.equal(torch.get_rng_state(), drawn[2])


def test_the_figures_are_those_of_the_pack(tiny_model_dir, disk):
    model = load(tiny_model_dir)
    found = check(model, disk)
    assert (found["tokens"], found["labelled"]) == (96, 20 + 13 + 16)
    assert found["labelled_share"] == pytest.approx(49 / 96)
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([dict(PACK)])
    with torch.no_grad():
        expected = labelled_losses(model.get_base_model().eval(), **batch).mean().item()
    assert found["base_loss"] == pytest.approx(expected, rel=1e-5), "the base's loss, without dropout, examples apart"
    assert found["ln_vocabulary"] == pytest.approx(math.log(model.config.vocab_size))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["trainable_parameters"] == trainable
    assert found["disk"]["checkpoints"]["needed_bytes"] == 3 * trainable * 12
    assert found["estimated_seconds"] == pytest.approx(found["seconds"] / 96 * 400 * 50, abs=0.005 / 96 * 20_000 + 1)


def test_a_head_that_caps_logits_is_asked_for_its_own_loss(tmp_path, disk):
    """Gemma's kind: the loss over plain logits would be another one."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.5,
        pad_token_id=0,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = add_adapter(Gemma2ForCausalLM(config), settings())
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight.mul_(100)
    pack = pack_of(token_row(1, 30))
    found = check(model, disk, pack)
    ids, labels = torch.tensor(pack["input_ids"])[None], torch.tensor(pack["labels"])[None]
    assert found["base_loss"] == pytest.approx(model.eval()(input_ids=ids, labels=labels, use_cache=False).loss.item())


def test_the_batch_is_shown_with_what_carries_loss():
    tokenizer = tiny_tokenizer()
    prompt, reply = tokenizer.encode("My order has not arrived"), tokenizer.encode(" It is four.<|im_end|>")
    row = {"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}
    found = preflight.shown(tokenizer, pack_of(row, row))
    assert [(piece["text"], piece["loss"], piece["example"]) for piece in found["pieces"]] == [
        ("My order has not arrived", 0, 0),
        (" It is four.<|im_end|>", 1, 0),
        ("My order has not arrived", 0, 1),
        (" It is four.<|im_end|>", 1, 1),
    ]


def test_a_long_prompt_does_not_hide_the_reply():
    ids = list(range(10, 260)) * 4
    found = preflight.shown(tiny_tokenizer(), pack_of({"input_ids": ids, "labels": [-100] * 900 + ids[900:]}))
    assert (found["from"], found["tokens"]) == (800, 1000)
    assert [piece["loss"] for piece in found["pieces"]] == [0, 1]
    shortened = preflight.shown(tiny_tokenizer(), pack_of({"input_ids": ids, "labels": ids}))
    total = tiny_tokenizer().decode(ids[: preflight.SHOWN_TOKENS])
    assert "".join(piece["text"] for piece in shortened["pieces"]) == total


def test_no_labelled_token_stops(tiny_model_dir, disk):
    masked = pack_of(token_row(1, 30))
    masked["labels"][:] = -100
    masked["labels"][0] = masked["input_ids"][0]  # nothing predicts it, so it is none
    with pytest.raises(UserError, match=r"none of the first pack's 30 tokens carries loss.*tokenize.loss_on"):
        check(load(tiny_model_dir), disk, masked)


def test_nothing_to_train_stops(tiny_model_dir, disk):
    model = load(tiny_model_dir)
    model.requires_grad_(False)
    with pytest.raises(UserError, match="no parameter of this model is trained; check train.target_modules"):
        check(model, disk)


def test_a_loss_that_is_no_number_stops(tiny_model_dir, tmp_path, disk):
    def damage(weights):
        weights["model.norm.weight"][3] = float("inf")

    with pytest.raises(UserError, match=r"the loss of the untrained model on the first pack is nan.*damaged"):
        check(changed(tiny_model_dir, tmp_path, damage), disk)


def test_fp16_overflow_names_the_dtype(tiny_model_dir, disk):
    model = load(tiny_model_dir, dtype="float16")
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight.fill_(6e4)
        model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.mul_(1e4)
    with pytest.raises(UserError, match=r"is (nan|inf)\. float16 overflows.*train.compute_dtype: bfloat16"):
        check(model, disk, dtype="float16")


def test_no_gradient_anywhere_stops(tiny_model_dir, tmp_path, disk):
    """A final norm of zeros: the loss is ln(vocabulary), finite, and nothing before it can change that."""

    def damage(weights):
        weights["model.norm.weight"].zero_()

    with pytest.raises(UserError, match="no trained layer gets a gradient"):
        check(changed(tiny_model_dir, tmp_path, damage), disk)


def test_a_gradient_that_is_no_number_stops(tiny_model_dir, disk):
    model = load(tiny_model_dir)
    parameter = dict(model.named_parameters())["base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"]
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(UserError, match=r"the gradient of the first pack is no number in model.layers.1.self_attn.q_p"):
        check(model, disk)


def test_a_disk_that_is_too_small_stops_before_anything_is_computed(tiny_model_dir, disk, monkeypatch):
    monkeypatch.setattr(preflight, "_try", lambda *args: pytest.fail("computed"))
    with pytest.raises(UserError, match=r"GB free, and .*merged model \(1,000,000.0 GB\).*make room there"):
        check(load(tiny_model_dir), replace(disk, base_bytes=10**15))
    with pytest.raises(UserError, match=r"1000000001 checkpoints \(.*runtime.save_total_limit"):
        check(load(tiny_model_dir), replace(disk, save_total_limit=10**9))


def test_room_is_counted_once_a_disk_and_old_checkpoints_make_room(tiny_model_dir, disk, tmp_path, monkeypatch):
    model = load(tiny_model_dir)
    needed = 3 * 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    usage = type("Usage", (), {"free": needed + disk.base_bytes - 1})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="checkpoints .* and the merged model"):
        check(model, disk)
    (tmp_path / "old" / "checkpoint-4" / "deep").mkdir(parents=True)
    (tmp_path / "old" / "checkpoint-4" / "deep" / "state").write_bytes(b"x" * 1000)
    found = check(model, replace(disk, checkpoints=tmp_path / "old"))
    assert found["disk"]["checkpoints"]["needed_bytes"] == needed - 1000
    assert check(model, replace(disk, save_total_limit=0))["disk"]["checkpoints"]["needed_bytes"] == 0


def test_a_base_worse_than_guessing_is_warned_of(tiny_model_dir, tmp_path, disk):
    def change(weights):
        weights["model.norm.weight"].mul_(50)

    found = check(changed(tiny_model_dir, tmp_path, change), disk)
    assert found["base_loss"] > found["ln_vocabulary"] + 1
    assert any("worse than guessing" in text and "tokenizer" in text for text in warnings_of(found))


def test_another_models_tokenizer_is_noticed_on_the_real_model(embedded_model_dir, disk):
    """The same words in other ids: what a tokenizer that is not the model's makes of them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir)
    model = load(embedded_model_dir)
    ids = tokenizer.encode("The capital of France is Paris. Water boils at one hundred degrees at sea level.")
    right = check(model, disk, pack_of({"input_ids": ids, "labels": ids}))
    assert warnings_of(right) == [] and right["base_loss"] < 5
    # Merges come in another order in another tokenizer: other ids of the same kind.
    wrong = [(token * 7919 + 13) % 49_152 for token in ids]
    found = check(model, disk, pack_of({"input_ids": wrong, "labels": wrong}))
    assert any("worse than guessing" in text for text in warnings_of(found))


def test_one_layer_without_gradient_is_named(tiny_model_dir, disk):
    model = load(tiny_model_dir)
    for name, parameter in model.named_parameters():
        if "layers.1.mlp.down_proj.lora_" in name:
            torch.nn.init.zeros_(parameter)
    found = check(model, disk)
    assert found["layers_without_gradient"] == ["model.layers.1.mlp.down_proj"]
    assert any("1 of 14 trained layers get no gradient" in text and "down_proj" in text for text in warnings_of(found))


def test_a_layer_that_the_pass_does_not_reach_is_named(tiny_model_dir, disk, monkeypatch):
    """No gradient at all (None), as of an expert that no token is sent to."""
    model = load(tiny_model_dir)
    mlp = model.get_base_model().model.layers[0].mlp
    monkeypatch.setattr(mlp, "forward", lambda x: x)
    found = check(model, disk)
    assert found["layers_without_gradient"] == [f"model.layers.0.mlp.{name}_proj" for name in ("down", "gate", "up")]


def test_hardly_any_loss_is_warned_of(tiny_model_dir, disk):
    row = token_row(1, 300)
    row["labels"] = [-100] * 298 + row["input_ids"][-2:]
    found = check(load(tiny_model_dir), disk, pack_of(row))
    assert any("2 of the first pack's 300 tokens carry loss (0.67 %)" in text for text in warnings_of(found))


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_the_result_of_training_is_the_same_with_and_without(tiny_model_dir, tmp_path, monkeypatch, method):
    inputs = write_training_inputs(tmp_path / "inputs", tiny_model_dir)
    values = settings(method=method, lora_dropout=0.1, reshuffle=True)
    real, seen = preflight.check, []

    def recorded(*args):
        seen.append(real(*args))
        return seen[-1]

    digests = []
    for name, function in (
        ("without", lambda *args: FIGURES),
        ("with", recorded),
    ):
        monkeypatch.setattr(preflight, "check", function)
        (tmp_path / name).mkdir()
        run_training(values, inputs, tmp_path / name, Progress.silent())
        digests.append({path.name: digest_file(path) for path in sorted((tmp_path / name).glob("*/*.safetensors"))})
    assert digests[0] and digests[0] == digests[1] and len(seen) == 1 and not warnings_of(seen[0])


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_on_a_gpu_too(tiny_model_dir, disk, method):
    model, _ = base_model.load(tiny_model_dir, method, "bfloat16", "cuda")
    model = model if method == "full" else add_adapter(model, settings(method=method))
    before = torch.cuda.get_rng_state()
    found = check(model, disk, dtype="bfloat16", checkpointing=True, method=method)
    assert warnings_of(found) == [] and abs(found["base_loss"] - found["ln_vocabulary"]) < 0.5
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_merge_that_compares_candidates_as_files_has_room_for_both(monkeypatch):
    monkeypatch.setattr(preflight.hardware, "total_memory", lambda device: 100)
    assert preflight.merged_copies(59, "qlora", "cuda", "bfloat16") == 1
    assert preflight.merged_copies(61, "qlora", "cuda", "bfloat16") == 2
    assert preflight.merged_copies(31, "qlora", "cpu", "float32") == 2
    assert preflight.merged_copies(61, "lora", "cuda", "bfloat16") == 1


@pytest.mark.parametrize("kind", ["zero", "equal", "mean"])
def test_control_tokens_that_nobody_trained_are_named(tiny_model_dir, tmp_path, disk, kind):
    """As libraries make them where a template's tokens are added to a model that never saw them."""
    tokenizer = tiny_tokenizer()
    first, second = tokenizer.all_special_ids[:2]
    row = token_row(1, 40)
    row["input_ids"][:2] = [first, second]

    def spoil(weights):
        name = next(name for name in weights if "embed_tokens" in name or "wte" in name)
        table = weights[name].float()
        spoilt = {"zero": torch.zeros_like(table[0]), "equal": table[second], "mean": table.mean(0)}
        table[first] = spoilt[kind]
        weights[name] = table.to(weights[name].dtype)

    model = changed(tiny_model_dir, tmp_path, spoil)
    found = check(model, disk, pack_of(row))["untrained_tokens"]
    # The second one pads too, so that torch has it at zero: by itself it is no finding.
    assert found == sorted(tokenizer.convert_ids_to_tokens([first, second]), key=tokenizer.convert_tokens_to_ids)
    assert "never trained on control tokens" in " ".join(warnings_of(check(model, disk, pack_of(row))))
    # Where they are trained, and in a base that knows its tokens, there is nothing to say.
    assert check(load(tmp_path / "changed", "full"), disk, pack_of(row), method="full")["untrained_tokens"] == []
    assert check(load(tiny_model_dir), disk, pack_of(row))["untrained_tokens"] == []
