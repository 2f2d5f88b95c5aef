"""The merged model is base + adapter, on real files, and a merge that went wrong is caught."""

import dataclasses
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from adder.core.errors import UserError
from adder.core.files import digest_file, read_json, write_json
from adder.core.labels import IGNORE_INDEX
from adder.core.safetensors_layout import shard_files
from adder.merging import run as merging
from adder.merging import weight_deltas
from adder.tokenization.token_table import TokenTable
from adder.training.lora import linear_names
from merge_fixture import make_adapter, make_inputs, reply_in_this_process, run, weights  # noqa: F401 (a fixture)
from tiny import save_tiny_model

pytestmark = pytest.mark.usefixtures("reply_in_this_process")
O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        ({}, {}),
        ({"tie_word_embeddings": False}, {"use_rslora": True}),
        ({"attention_bias": True}, {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"layers.0.mlp.up_proj": 2}}),
        ({}, {"alpha_pattern": {r"layers\.\d\..*_proj": 64}, "target_modules": r".*\.(\w+)_proj"}),
        ({"attention_bias": True}, {"use_dora": True, "use_rslora": True}),
    ],
    ids=["tied", "untied-rslora", "biases-patterns", "expressions", "dora-biases"],
)
def test_merged_logits_are_those_of_base_and_adapter(tmp_path, model, lora):
    base = save_tiny_model(tmp_path / "base", **model)
    inputs = make_inputs(tmp_path / "in", base, **lora)
    run(inputs, tmp_path / "out")
    proof = read_json(tmp_path / "out" / "proof.json")
    assert proof["checked"] and proof["adapted_weights"] == proof["changed_weights"] == 14
    assert 0 <= proof["kl"] < proof["tolerance"] and proof["max_difference"] < 0.05
    assert proof["positions"] == sum(len(ids) for ids in labels_of(inputs))

    # And by plain transformers and PEFT, on a text of our own: much nearer to base + adapter than the base is.
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        apart = plain(ids).logits
        adapted = PeftModel.from_pretrained(plain, inputs["train"] / "adapter")(ids).logits
        found = merged(ids).logits
    assert (found - adapted).abs().max() < 0.05 * (apart - adapted).abs().max()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_an_adapter_on_the_attention_of_a_mixture_of_experts(tmp_path, tiny_model_dir, kind):
    """On disk each expert has matrices of its own; transformers joins them into one tensor as it loads."""
    sizes = {
        "vocab_size": AutoConfig.from_pretrained(tiny_model_dir).vocab_size, "hidden_size": 64, "num_hidden_layers": 2,
        "intermediate_size": 32, "moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 2,
        "max_position_embeddings": 512, "mlp_only_layers": [0],
    }  # fmt: skip
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "base")
    inputs = make_inputs(tmp_path / "in", tmp_path / "base", target_modules=linear_names(model))
    run(inputs, tmp_path / "out", method="qlora", base="dequantized")
    proof = read_json(tmp_path / "out" / "proof.json")
    assert proof["base"]["value"] == "dequantized" and 0 < proof["kl"] < 0.1 * proof["base_kl"]
    before, after = weights(tmp_path / "base"), weights(tmp_path / "out" / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and sum("experts" in name for name in before) >= 4 * 3
    assert sum("self_attn" in name for name in changed) == 8 and not any("experts" in name for name in changed)


def labels_of(inputs):
    table = TokenTable(inputs["tokenize"] / "heldout.arrow")
    return [[label for label in table.labels(row).tolist() if label != IGNORE_INDEX] for row in range(len(table))]


def test_everything_but_the_adapted_weights_is_the_bases_byte_for_byte(tmp_path, tiny_model_dir):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir, target_modules=["q_proj", "down_proj"])
    run(inputs, tmp_path / "out")
    before, after = weights(tiny_model_dir), weights(tmp_path / "out" / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    assert len(changed) == 4 and all("q_proj" in name or "down_proj" in name for name in changed)


def test_a_sharded_base_keeps_its_shards(tmp_path, tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "base")
    inputs = make_inputs(tmp_path / "in", tmp_path / "base")
    run(inputs, tmp_path / "out")
    whole = make_inputs(tmp_path / "in2", tiny_model_dir)
    run(whole, tmp_path / "out2")
    files = shard_files(tmp_path / "out" / "model")
    assert len(files) > 2 and files == shard_files(tmp_path / "base")
    one, other = weights(tmp_path / "out" / "model"), weights(tmp_path / "out2" / "model")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")


def test_what_lies_beside_the_weights(tmp_path, tiny_model_dir):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    write_json(base / "generation_config.json", {"eos_token_id": 0, "pad_token_id": -1, "top_p": 0.8})
    (base / "LICENSE").write_text("free")
    (base / "README.md").write_text("the base's own")
    inputs = make_inputs(tmp_path / "in", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ messages[0]['content'] }}<|im_end|>"
    tokenizer.save_pretrained(inputs["tokenize"] / "tokenizer")
    run(inputs, tmp_path / "out")
    model = tmp_path / "out" / "model"
    generation = read_json(model / "generation_config.json")
    assert generation["eos_token_id"] == [2, 0] and generation["pad_token_id"] == 2 and generation["top_p"] == 0.8
    assert (model / "LICENSE").read_text() == "free"
    assert AutoTokenizer.from_pretrained(model).chat_template == tokenizer.chat_template
    assert not (model / "README.md").exists()  # the model's own card is written with the scores


def test_the_same_inputs_give_the_same_bytes(tmp_path, tiny_model_dir):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir)
    for name in ("one", "two"):
        run(inputs, tmp_path / name)
    digests = [
        {path.name: digest_file(path) for path in sorted((tmp_path / name).rglob("*")) if path.is_file()}
        for name in ("one", "two")
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.norm.weight", lambda w: w * 1.01, "model.norm.weight isn't its base's"),
        ("model.layers.1.mlp.up_proj.weight", lambda w: w.roll(1, 0), "up_proj.weight isn't base"),
        ("model.layers.0.self_attn.q_proj.weight", lambda w: w * float("nan"), "aren't finite"),
    ],
)
def test_one_wrong_tensor_is_caught_and_nothing_is_left(tmp_path, tiny_model_dir, monkeypatch, name, change, message):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir)
    right = merging.merge_weights

    def wrong(base, deltas, target, context):
        right(base, deltas, target, context)
        tensors = load_file(target / "model.safetensors")
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, target / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(merging, "merge_weights", wrong)
    with pytest.raises(UserError, match=message):
        run(inputs, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("factor", [0.5, 2.0, -1.0, 0.0])
def test_a_wrong_scale_fails_the_proof(tmp_path, tiny_model_dir, monkeypatch, factor):
    # The weights then are what our own arithmetic expects: only PEFT's logits can tell.
    inputs = make_inputs(tmp_path / "in", tiny_model_dir, size=0.1)
    right = weight_deltas._scale
    monkeypatch.setattr(weight_deltas, "_scale", lambda *arguments: factor * right(*arguments))
    with pytest.raises(UserError, match="isn't base \\+ adapter.*merge.tolerance|the training changed nothing"):
        run(inputs, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_tolerance_is_enforced(tmp_path, tiny_model_dir):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir)
    with pytest.raises(UserError, match="allowed are 1e-12"):
        run(inputs, tmp_path / "out", tolerance=1e-12)


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_an_adapter_that_changes_nothing_is_refused(tmp_path, tiny_model_dir, base):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir, size=0.0)
    with pytest.raises(UserError, match="the training changed nothing: none of 14 adapted weights differs"):
        run(inputs, tmp_path / "out", base=base)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"modules_to_save": ["embed_tokens"]},
            "one tensor for its embedding and its LM head.*embed_tokens.weight alone",
        ),
        ({"modules_to_save": ["lm_head"]}, "one tensor for its embedding and its LM head.*lm_head.weight alone"),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, "and model.embed_tokens.weight in different values"),
        ({"init_lora_weights": "pissa"}, "a start that changes the base's weights"),
        ({"trainable_token_indices": [3]}, "trained tokens"),
        ({"target_parameters": ["mlp.up_proj.weight"], "target_modules": ["q_proj"]}, "such as those of experts"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "only LoRA pairs of linear layers"),
        ({"target_modules": ["lm_head"]}, "lm_head.*only LoRA pairs of linear layers"),
    ],
)
def test_what_cannot_be_merged_is_refused_with_the_reason(tmp_path, tiny_model_dir, lora, message):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir, **lora)
    with pytest.raises(UserError, match=message):
        run(inputs, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("model", "names", "whole"),
    [
        ({"tie_word_embeddings": False}, ["lm_head"], {"lm_head.weight"}),
        ({"tie_word_embeddings": False}, ["embed_tokens"], {"model.embed_tokens.weight"}),
        ({}, ["embed_tokens"], {"model.embed_tokens.weight"}),
        ({}, ["model.norm", "1.input_layernorm"], {"model.norm.weight", "model.layers.1.input_layernorm.weight"}),
        ({"attention_bias": True}, ["0.self_attn.o_proj"], {f"{O_PROJ}.weight", f"{O_PROJ}.bias"}),
    ],
    ids=["head", "embedding", "both as one", "norms", "a linear layer with its bias"],
)  # fmt: skip
def test_modules_trained_whole_take_the_place_of_the_bases(tmp_path, model, names, whole):
    base = save_tiny_model(tmp_path / "base", **model)
    inputs = make_inputs(
        tmp_path / "in", base, modules_to_save=names, target_modules=["q_proj"], ensure_weight_tying=not model
    )
    run(inputs, tmp_path / "out")
    proof = read_json(tmp_path / "out" / "proof.json")
    assert proof["checked"] and proof["kl"] < proof["tolerance"] and proof["adapted_weights"] == 2 + len(whole)
    before, after = weights(base), weights(tmp_path / "out" / "model")
    trained = weights(inputs["train"] / "adapter")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if "q_proj" not in name} == {name for name in whole if not name.endswith("bias")}
    for name in whole:
        wanted = trained[f"base_model.model.{name}"]
        assert torch.allclose(after[name].float(), wanted, rtol=2**-7)


def test_a_head_stored_a_second_time_stays_the_embedding(tmp_path, tiny_model_dir):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    inputs = make_inputs(tmp_path / "in", base, **options)
    run(inputs, tmp_path / "out")
    after = weights(tmp_path / "out" / "model")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], tensors["lm_head.weight"])


def test_a_wrong_length_fails_the_proof(tmp_path, tiny_model_dir, monkeypatch):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir, size=0.1, use_dora=True)
    right = weight_deltas.LoraDelta.apply

    def undirected(self, weight, first=0):
        return right(dataclasses.replace(self, magnitude=None), weight, first)

    monkeypatch.setattr(weight_deltas.LoraDelta, "apply", undirected)
    with pytest.raises(UserError, match="isn't base \\+ adapter"):
        run(inputs, tmp_path / "out")


def test_an_adapter_of_another_model_is_refused(tmp_path, tiny_model_dir):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir, adapter=False)
    make_adapter(save_tiny_model(tmp_path / "wide", intermediate_size=256), inputs["train"] / "adapter")
    with pytest.raises(UserError, match="shape"):
        run(inputs, tmp_path / "out")
    shutil.rmtree(inputs["train"] / "adapter")
    make_adapter(save_tiny_model(tmp_path / "deep", num_hidden_layers=3), inputs["train"] / "adapter")
    with pytest.raises(UserError, match="model.layers.2.*another model"):
        run(inputs, tmp_path / "out2")


def test_a_fully_trained_model_is_taken_as_it_is(tmp_path, tiny_model_dir):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir, adapter=False)
    save_tiny_model(inputs["train"] / "model", seed=5)
    kept = {path.name: path.read_bytes() for path in (inputs["train"] / "model").iterdir()}
    run(inputs, tmp_path / "out")
    proof = read_json(tmp_path / "out" / "proof.json")
    assert proof["checked"] and proof["method"] == "full"
    one, other = weights(inputs["train"] / "model"), weights(tmp_path / "out" / "model")
    assert all(torch.equal(one[name], other[name]) for name in one)
    # Files of the train stage may be linked, never written into.
    assert kept == {path.name: path.read_bytes() for path in (inputs["train"] / "model").iterdir()}
    assert read_json(tmp_path / "out" / "model" / "generation_config.json")["eos_token_id"] == [2]


def test_a_full_training_that_changed_nothing_is_refused(tmp_path, tiny_model_dir):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir, adapter=False)
    shutil.copytree(tiny_model_dir, inputs["train"] / "model")
    with pytest.raises(UserError, match="the training changed nothing"):
        run(inputs, tmp_path / "out")


def test_a_diverged_full_training_is_refused(tmp_path, tiny_model_dir):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir, adapter=False)
    trained = save_tiny_model(inputs["train"] / "model")
    tensors = load_file(trained / "model.safetensors")
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, trained / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="model.norm.weight holds numbers that aren't finite"):
        run(inputs, tmp_path / "out")


def test_the_reason_has_ordinary_numbers_without_powers_of_ten():
    weights = {"changed_weights": 2, "adapted_weights": 2, "bytes_read_back": 9, "unchanged_weights": 0}
    predictions = {
        "reloaded": {"tied": None}, "kl": 1.84e-6, "base_kl": 3.249, "top_token_agreement": 1.0,
        "positions": 70, "loading": {"reason": "on a CPU"},
    }  # fmt: skip
    reason = merging._reason(weights, None, predictions, 0.001)
    assert "1.8e-06 nats a token apart (allowed 0.001; the base is 3.2 apart)" in reason
