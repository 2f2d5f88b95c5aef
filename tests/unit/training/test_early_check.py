"""At the beginning of a run: refused or not by the first layers, before anything long runs."""

import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adder.core.errors import UserError
from adder.core.files import read_json
from adder.core.progress import Progress
from adder.core.stage_spec import Context, Runtime
from adder.evaluation.stage import EVALUATE
from adder.packing.stage import LENGTHS
from adder.training import early_check
from adder.training.early_check import IsolationInputs, first_of_each_kind, layer_kinds
from adder.training.stage import ISOLATION, IsolationSettings, Train
from architectures import ARCHITECTURES, SHAPE, tiny_architecture
from tiny import save_tiny_model, tiny_tokenizer, write_training_inputs


def config(name: str, layers: int, **changes):
    return AutoConfig.for_model(name, **{**SHAPE, **ARCHITECTURES[name], "num_hidden_layers": layers, **changes})


@pytest.mark.parametrize(
    ("name", "layers", "needed", "changes"),
    [
        ("llama", 6, 1, {}),
        ("gemma2", 6, 2, {}),
        ("gemma3_text", 8, 6, {}),  # five with a window, then one without
        ("deepseek_v3", 6, 2, {}),  # dense ones first
        ("qwen3_next", 8, 4, {"layer_types": ["linear_attention"] * 3 + ["full_attention"] + ["linear_attention"] * 4}),
    ],
)
def test_as_many_layers_as_show_each_kind(name, layers, needed, changes):
    whole = config(name, layers, **changes)
    few = first_of_each_kind(whole)
    assert few is not None and few.get_text_config().num_hidden_layers == needed
    assert set(layer_kinds(few)) == set(layer_kinds(whole))
    assert whole.num_hidden_layers == layers


def test_all_layers_where_the_last_is_of_a_kind_of_its_own():
    assert first_of_each_kind(config("llama", 1)) is None
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    assert first_of_each_kind(config("qwen3_next", 4, layer_types=kinds)) is None


def settings(merge_base="auto", **changes) -> IsolationSettings:
    own = Train.model_validate(changes).model_dump() | {"merge_base": merge_base}
    return IsolationSettings(**{name: own[name] for name in IsolationSettings.model_fields if name in own})


def check(inputs, out, **changes) -> dict:
    out.mkdir()
    folders = IsolationInputs(**{name: inputs[name] for name in ("lengths", "tokenize", "model")})
    context = Context(Progress(), Runtime(threads=1), out)
    early_check.run(settings(compute_dtype="float32", **changes), folders, out, context)
    return read_json(out / "check.json")


def saved(folder, name, layers=4, **changes):
    model = tiny_architecture(name, num_hidden_layers=layers, **changes)
    model.resize_token_embeddings(len(tiny_tokenizer()))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_packs_that_are_right_are_said_to_be(tmp_path, method):
    inputs = write_training_inputs(
        tmp_path / "inputs", save_tiny_model(tmp_path / "model", num_hidden_layers=3), packs=2
    )
    record = check(inputs, tmp_path / "out", method=method)
    assert (record["layers"], record["of"]) == (1, 3)
    assert "one example at a time" not in record["attention"]["value"]


def test_packs_that_would_be_wrong_are_said_before_anything_long_runs(tmp_path, capsys):
    inputs = write_training_inputs(tmp_path / "inputs", saved(tmp_path / "model", "stablelm"), packs=2)
    record = check(inputs, tmp_path / "out", method="lora")
    assert record["attention"]["value"] == "sdpa, one example at a time" and record["layers"] == 1
    assert "other examples of its pack" in capsys.readouterr().err


def test_what_can_never_be_right_is_refused_with_architecture_and_reason(tmp_path):
    sizes = {key: value for key, value in SHAPE.items() if key != "head_dim"} | {"vocab_size": len(tiny_tokenizer())}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("roberta", **sizes))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "model")
    inputs = write_training_inputs(tmp_path / "inputs", tmp_path / "model", packs=2)
    with pytest.raises(UserError, match="RobertaForCausalLM can't be trained rightly here.*tokens behind it"):
        check(inputs, tmp_path / "out", method="lora")


def test_names_that_do_not_fit_the_model_are_refused_then_too(tmp_path):
    inputs = write_training_inputs(tmp_path / "inputs", save_tiny_model(tmp_path / "model"), packs=2)
    with pytest.raises(UserError, match=r"train.target_modules: \['nonesuch'\] does not fit this model"):
        check(inputs, tmp_path / "out", target_modules=["nonesuch"])


def test_what_can_be_trained_and_not_generated_from_is_refused_before_it_is_trained(tmp_path):
    """Layers of a convolution alone, of which transformers' generate finds no length."""
    inputs = write_training_inputs(
        tmp_path / "inputs", saved(tmp_path / "model", "lfm3", 2, layer_types=["conv"] * 2), packs=2
    )
    with pytest.raises(UserError, match="Lfm3ForCausalLM can't write replies here: its code fails in generating with"):
        check(inputs, tmp_path / "out", method="lora")


def test_layers_that_only_all_together_generate_are_not_refused(tmp_path, monkeypatch):
    inputs = write_training_inputs(
        tmp_path / "inputs", save_tiny_model(tmp_path / "model", num_hidden_layers=3), packs=2
    )
    found = early_check.reply_problem
    monkeypatch.setattr(
        early_check,
        "reply_problem",
        lambda model, *rest: "no" if model.config.num_hidden_layers == 1 else found(model, *rest),
    )
    assert check(inputs, tmp_path / "out", method="lora")["layers"] == 1


def test_all_layers_are_tried_where_a_tensor_is_as_large_as_they_are_many(tmp_path):
    """Gemma 4's embeddings for each layer."""
    sizes = {"vocab_size_per_layer_input": len(tiny_tokenizer()), "hidden_size_per_layer_input": 8}
    sizes |= {"global_head_dim": 8, "num_global_key_value_heads": 2, "num_kv_shared_layers": 0, "head_dim": 8}
    sizes |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "sliding_window": 16}
    settings = {**SHAPE, **sizes, "vocab_size": len(tiny_tokenizer())}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **settings)).save_pretrained(
        tmp_path / "model"
    )
    assert first_of_each_kind(AutoConfig.from_pretrained(tmp_path / "model")) is not None
    inputs = write_training_inputs(tmp_path / "inputs", tmp_path / "model", packs=2)
    assert check(inputs, tmp_path / "out", method="lora")["layers"] == 4


def test_tokens_that_the_model_has_no_embedding_for_are_refused_by_name(tmp_path):
    """As where somebody added a template's tokens to a tokenizer alone."""
    folder = save_tiny_model(tmp_path / "model", vocab_size=250)
    inputs = write_training_inputs(tmp_path / "inputs", folder, packs=2)
    with pytest.raises(UserError, match=r"hold the token '.*' \(id \d+\), and the model has embeddings for 250 tokens"):
        check(inputs, tmp_path / "out", method="lora")


def test_a_base_that_cannot_be_dequantised_is_refused_before_the_training(tmp_path):
    """Llama 4's experts, which are stored joined."""
    inputs = write_training_inputs(tmp_path / "inputs", saved(tmp_path / "model", "llama4_text", 2), packs=2)
    with pytest.raises(UserError, match=r"merge.base: .*experts.*can't be dequantised; leave merge.base at auto or"):
        check(inputs, tmp_path / "out", method="qlora", merge_base="dequantized")


def test_an_adapter_to_go_on_from_is_tried_with_all_layers(tmp_path):
    from merge_fixture import make_adapter

    folder = save_tiny_model(tmp_path / "model", num_hidden_layers=3)
    inputs = write_training_inputs(tmp_path / "inputs", folder, packs=2)
    make_adapter(folder, tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", inputs["model"] / "adapter")
    record = check(inputs, tmp_path / "out", method="lora", lora_r=4, lora_alpha=8)
    assert record["layers"] == 3
    with pytest.raises(UserError, match=r"train.lora_r is 16, and .* has 4"):
        check(inputs, tmp_path / "other", method="lora", lora_alpha=8)


@pytest.mark.parametrize(
    "names",
    [{"target_modules": r".*layers\.2\..*q_proj"}, {"modules_to_save": ["layers.2.input_layernorm"]}],
    ids=lambda names: next(iter(names)),
)
def test_layers_that_are_named_by_their_place_are_all_there(tmp_path, names):
    folder = save_tiny_model(tmp_path / "model", num_hidden_layers=3)
    inputs = write_training_inputs(tmp_path / "inputs", folder, packs=2)
    assert check(inputs, tmp_path / "out", method="lora", **names)["layers"] == 3


def test_it_goes_before_the_evaluation_of_the_base():
    assert ISOLATION.priority == LENGTHS.priority > EVALUATE.priority
