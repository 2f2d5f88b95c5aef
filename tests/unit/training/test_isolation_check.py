"""The check before training: packs computed rightly at once, or one example at a time, or refused; by architecture."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.files import read_json
from adder.core.progress import Progress
from adder.kernels import packed_attention
from adder.kernels.fused_lora import attach
from adder.training import isolation_check
from adder.training.base_model import bare_model, has_experts
from adder.training.isolation_check import FULL, HALF, Differences, choose_isolation, measure, problem, verdict
from architectures import APART, ARCHITECTURES, AT_ONCE, SHAPE, table, tiny_architecture
from fused_lora_cases import family, with_adapter
from tiny import tiny_tokenizer, write_training_inputs
from training_stage import run_training, train_settings

ROOT = Path(__file__).resolve().parents[3]
LENGTHS = (43, 71, 29)
IDS = np.random.default_rng(0).integers(3, SHAPE["vocab_size"], sum(LENGTHS))
PACK = {"input_ids": IDS, "labels": IDS, "seq_lengths": np.array(LENGTHS)}
SOUND = Differences(unseen=0.0, unseen_mean=0.0, later=None, alone=0.0, gradient=0.0, eager=0.0)


def adapted(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes):
    """With LoRA pairs, B not zero so that A has a gradient too, in fp32 as in training."""
    model = tiny_architecture(name, dtype, device, **changes)
    linear = [k.rpartition(".")[2] for k, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    # No pairs on routers and, with PEFT, on a mamba mixer's output; GPT-2 has no torch.nn.Linear.
    left = {"lm_head", "embed_out", "out_proj", "router", "gate", "modality_router"}
    wanted = sorted(name for name in {*linear} - left if not name.isdigit()) or ["c_attn"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=wanted, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in key:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.05).to(device)
    return model


def attention_of(model) -> Choice:
    return Choice(bare_model(model).config._attn_implementation, "it is the model's")


def right(found: Differences) -> bool:
    """In fp32: nothing but rounding."""
    sizes = (found.unseen, found.later or 0.0, found.alone, found.eager, found.gradient)
    return all(size < 2e-5 for size in sizes)


def test_every_architecture_is_tried():
    assert {*AT_ONCE, *APART} == set(ARCHITECTURES)


def test_the_page_about_models_says_what_is_tested():
    assert table() in (ROOT / "docs" / "models.md").read_text()


@pytest.mark.parametrize("name", AT_ONCE)
def test_packs_are_computed_at_once_where_that_is_right(name):
    model = adapted(name)
    attention = attention_of(model)
    assert choose_isolation(model, PACK, "float32", attention) is attention
    assert bare_model(model).config._attn_implementation == attention.value
    assert right(measure(model, PACK, "float32"))


@pytest.mark.parametrize("name", APART)
def test_one_example_at_a_time_where_packs_at_once_would_be_wrong(name):
    model = adapted(name)
    before = problem(model, PACK, "float32")
    assert before
    choice = choose_isolation(model, PACK, "float32", attention_of(model))
    assert choice.value.endswith("one example at a time") and before in choice.reason
    assert right(measure(model, PACK, "float32"))


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2", "stablelm", "recurrent_gemma", "bloom", "deepseek_v3"])
def test_bf16_leads_to_the_same_choice(name):
    """DeepSeek's values are of another size than its queries, which short examples in bf16 once failed on."""
    model = adapted(name, torch.bfloat16)
    attention = attention_of(model)
    choice = choose_isolation(model, PACK, "bfloat16", attention)
    assert (choice is attention) == (name in AT_ONCE)


def test_stablelm_sees_its_neighbours_and_recurrent_states_run_on():
    for name in ("stablelm", "jamba"):
        found = measure(adapted(name), PACK, "float32")
        assert found.unseen > 0.1 and found.gradient > 0.1 and found.later < 1e-5
        assert "other examples of its pack" in verdict(found, FULL, False)


def test_leaks_are_found_in_models_that_have_hardly_learnt_anything_too():
    """Whose predictions hardly depend on what they see, so that a leak moves losses by thousandths of a nat."""
    for name, factor in (("stablelm", 0.2), ("jamba", 0.35)):  # with less, Jamba's state moves no loss at all
        model = adapted(name)
        for parameter in model.parameters():
            parameter.data *= factor
        assert measure(model, PACK, "float32").unseen < 5e-3
        assert "other examples of its pack" in problem(model, PACK, "float32")


def test_attention_without_a_causal_mask_is_found():
    for name in ("bloom", "xglm", "gpt_neox_japanese"):
        model = adapted(name)
        assert attention_of(model).value == "eager"
        isolation_check.set_attention(bare_model(model), packed_attention.SEGMENTS)
        assert "when tokens behind it do" in problem(model, PACK, "float32")


def test_attention_that_is_not_the_models_own_is_found():
    """Attention by another scale is causal and keeps examples apart."""

    def other_scale(module, *tensors, scaling=None, **options):
        return packed_attention.segment_attention(module, *tensors, scaling=1.0, **options)

    packed_attention.AttentionInterface.register("other_scale", other_scale)
    packed_attention.AttentionMaskInterface.register("other_scale", packed_attention._mask_for_packs)
    model = adapted("llama")
    bare_model(model).set_attn_implementation("other_scale")
    assert "eager attention" in problem(model, PACK, "float32")
    assert choose_isolation(model, PACK, "float32", Choice("other_scale", "")).value == "sdpa, one example at a time"


def test_a_head_that_is_not_the_models_own_is_found():
    """Logits that are scaled or capped by a name which nothing here knows."""
    model = adapted("recurrent_gemma")
    bare_model(model).config.final_logit_softcapping = None
    assert "the architecture's own forward" in problem(model, PACK, "float32")


def test_what_is_never_right_is_refused_with_architecture_and_reason():
    """A model that sees the future however it is computed."""
    model = adapted("llama")
    for layer in bare_model(model).model.layers:
        layer.register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))
    with pytest.raises(UserError, match="LlamaForCausalLM can't be trained rightly here.*tokens behind it"):
        choose_isolation(model, PACK, "float32", attention_of(model))


def test_encoders_and_heads_that_are_more_than_a_matrix_are_refused():
    sizes = {key: value for key, value in SHAPE.items() if key != "head_dim"}
    for name, why in (("roberta", "when tokens behind it do"), ("modernbert-decoder", "own forward pass")):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes), attn_implementation="eager")
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        with pytest.raises(UserError, match=f"{type(model).__name__} can't be trained rightly here.*{why}"):
            choose_isolation(model, PACK, "float32", attention_of(model))


def test_shards_are_refused_where_only_one_at_a_time_is_right():
    model = adapted("stablelm")
    with pytest.raises(UserError, match="StableLmForCausalLM.*runtime.sharding: ddp"):
        choose_isolation(model, PACK, "float32", attention_of(model), sharded=True)


def test_verdict_by_each_difference():
    assert verdict(SOUND, FULL, False) is None and verdict(SOUND, HALF, True) is None
    nan = float("nan")
    for change in ({"unseen": 0.03}, {"alone": 0.3}, {"gradient": 0.3}, {"eager": 0.3}, {"eager": nan}, {"alone": nan}):
        assert verdict(replace(SOUND, **change), HALF, False)
    assert "behind it" in verdict(replace(SOUND, unseen=0.03, later=0.03), HALF, False)
    # What experts round is no leak; what is more than that is.
    rounded = replace(SOUND, unseen=0.3, unseen_mean=0.05, later=0.3, alone=0.05, eager=0.05)
    assert verdict(rounded, HALF, True) is None
    assert verdict(replace(rounded, unseen_mean=0.2), HALF, True)


def test_windows_longer_than_the_pieces_are_tried_where_an_example_is_longer_than_one(monkeypatch):
    """A kernel that forgets the window is right on short pieces, and found on a long one."""

    def no_window(module, *tensors, sliding_window=None, **options):
        return packed_attention.segment_attention(module, *tensors, **options)

    packed_attention.AttentionInterface.register("no_window", no_window)
    packed_attention.AttentionMaskInterface.register("no_window", packed_attention._mask_for_packs)
    model = adapted("mistral", sliding_window=140)
    ids = np.random.default_rng(1).integers(3, SHAPE["vocab_size"], 250)
    assert isolation_check.window_of(bare_model(model)) == 140
    assert problem(model, PACK, "float32", longest=ids) is None
    bare_model(model).set_attn_implementation("no_window")
    assert problem(model, PACK, "float32") is None
    assert problem(model, PACK, "float32", longest=ids[:147]) is None  # no example is longer
    found = problem(model, PACK, "float32", longest=ids)
    assert found is not None and "beyond its window of 140 tokens" in found
    monkeypatch.setattr(isolation_check, "CPU_PRODUCTS", 0)
    assert problem(model, PACK, "float32", longest=ids) is None


def test_positions_that_the_longest_of_a_pack_decides_are_computed_one_example_at_a_time():
    """Pieces are too short to show it: with Phi-3's 128k kinds the other frequencies begin at 4,097 tokens."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    ids = np.random.default_rng(1).integers(3, SHAPE["vocab_size"], 250)
    for longest in (ids[:200], ids):
        model = adapted("phi3", rope_parameters=rope, original_max_position_embeddings=200)
        before = attention_of(model)
        found = isolation_check.choose_isolation(model, PACK, "float32", before, longest=longest)
        if len(longest) <= 200:
            assert found == before
        else:
            assert "more than 200 tokens" in found.reason and found.value.endswith("one example at a time")


def test_fused_layers_are_tried_against_the_models_own():
    """Fused layers that compute something else, in packs and alone alike, would not be found by comparing these."""
    model = with_adapter(family("Llama"))
    ids = np.random.default_rng(0).integers(3, 60, sum(LENGTHS))
    pack = {"input_ids": ids, "labels": ids, "seq_lengths": np.array(LENGTHS)}
    attach.attach(model)
    assert problem(model, pack, "float32") is None
    groups = attach._groups(model)

    def off(*args, inner, **inputs):
        return inner(*args, **inputs) * (1.0 if groups[0].suspended else 1.2)

    for layer in bare_model(model).model.layers:
        layer.forward = partial(off, inner=layer.forward)
    found = problem(model, pack, "float32")
    assert found is not None and "the architecture's own forward" in found


def test_windows_are_known_by_the_configuration():
    sizes = {"gemma2": 16, "llama": None, "gpt_oss": 16, "recurrent_gemma": 64}
    assert {name: isolation_check.window_of(tiny_architecture(name)) for name in sizes} == sizes
    config = Qwen2Config(**SHAPE, use_sliding_window=False, sliding_window=32)
    assert isolation_check.window_of(SimpleNamespace(config=config)) is None


def test_the_check_leaves_no_trace():
    model = adapted("llama")
    model.train()
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    attention = bare_model(model).config._attn_implementation
    torch.manual_seed(3)
    expected = torch.randn(3), np.random.default_rng(0).random()
    torch.manual_seed(3)
    measure(model, PACK, "float32")
    assert torch.equal(torch.randn(3), expected[0])
    assert all(module.training for module in model.modules())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert bare_model(model).config._attn_implementation == attention


def test_pieces_are_of_two_examples_or_of_one_in_halves():
    long = {"input_ids": np.arange(400), "labels": np.arange(400), "seq_lengths": np.array([300, 5, 95])}
    assert [len(piece) for piece in isolation_check.pieces_of(long)] == [128, 95]
    single = {"input_ids": np.arange(41), "labels": np.arange(41), "seq_lengths": np.array([41])}
    assert [piece.tolist() for piece in isolation_check.pieces_of(single)] == [[*range(20)], [*range(20, 41)]]
    short = {"input_ids": np.arange(3), "labels": np.arange(3), "seq_lengths": np.array([3])}
    assert [len(piece) for piece in isolation_check.pieces_of(short)] == [8, 8]


def test_other_tails_have_other_tokens_of_the_piece():
    piece = np.array([7, 9, 7, 8, 9, 7])
    found = isolation_check.with_other_tail(piece)
    assert found[:3].tolist() == [7, 9, 7] and (found[3:] != piece[3:]).all() and {*found} <= {7, 8, 9}
    assert isolation_check.with_other_tail(np.array([4, 4, 4, 4])).tolist() == [4, 4, 3, 3]
    assert isolation_check.with_other_tail(np.array([0, 0])).tolist() == [0, 1]


def test_full_training_compares_the_smaller_weights(monkeypatch):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    monkeypatch.setattr(isolation_check, "COMPARED_VALUES", 32 * 48)
    chosen = isolation_check.compared_parameters(model)
    assert chosen and max(parameter.numel() for parameter in chosen) == 32 * 48
    monkeypatch.setattr(isolation_check, "COMPARED_IN_ALL", 4000)
    assert sum(parameter.numel() for parameter in isolation_check.compared_parameters(model)) <= 4000


def test_experts_are_known_by_the_configuration():
    assert has_experts(tiny_architecture("mixtral"))
    dense = SimpleNamespace(config=LlamaConfig(**SHAPE))
    assert not has_experts(dense)


def test_a_run_says_in_one_sentence_that_it_goes_without_packs_at_once(tmp_path, capsys):
    """Through the stage: what StableLM learns from packs is what it learns from their examples one by one."""
    folder = tmp_path / "model"
    model = tiny_architecture("stablelm")
    model.resize_token_embeddings(len(tiny_tokenizer()))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    inputs = write_training_inputs(tmp_path / "inputs", folder, packs=2)
    settings = train_settings(
        method="lora", epochs=1, effective_batch_size=6, compute_dtype="float32", eval_samples=2, samples=0
    )
    run_training(settings, inputs, tmp_path / "out", Progress())
    said = [line for line in capsys.readouterr().err.splitlines() if "one example at a time" in line]
    assert len(said) == 1 and "StableLmForCausalLM" in said[0] and "other examples of its pack" in said[0]
    plan = read_json(tmp_path / "out" / "plan.json")
    assert plan["attention"]["value"] == "sdpa, one example at a time"
    assert plan["attention"]["alternatives"][0]["attention"] == packed_attention.SEGMENTS


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2", "deepseek_v3", "stablelm", "jamba", "bloom", "gpt_oss"])
def test_a_gpus_kernels_lead_to_the_same_choice(name):
    """In bf16, by the attention that a GPU is given; a dense model's tokens see nothing that they must not."""
    # Heads of the least size that kernels take; DeepSeek's have sizes of their own.
    changes = {} if name == "deepseek_v3" else {"hidden_size": 64, "head_dim": 16}
    model = adapted(name, torch.bfloat16, "cuda", **changes)
    attention = attention_of(model)
    assert name != "llama" or attention.value == packed_attention.TRITON
    choice = choose_isolation(model, PACK, "bfloat16", attention)
    assert (choice is attention) == (name in AT_ONCE)
    found = measure(model, PACK, "bfloat16")
    assert verdict(found, HALF, has_experts(bare_model(model))) is None
    assert found.unseen == 0 or has_experts(bare_model(model))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_fused_layers_pass_on_a_gpu_in_either_precision(precision):
    """fp8's rows have scales of their own, so that tokens see nothing of one another by way of these either."""
    model = with_adapter(family("Llama", torch.bfloat16, hidden_size=128, intermediate_size=256, head_dim=32)).cuda()
    bare_model(model).set_attn_implementation(packed_attention.TRITON)
    fused = attach.attach_where_it_pays(model, "bfloat16", precision)
    assert fused.value == ("folded" if precision == "bf16" else "folded, fp8")
    ids = np.random.default_rng(0).integers(3, 60, sum(LENGTHS))
    found = measure(model, {"input_ids": ids, "labels": ids, "seq_lengths": np.array(LENGTHS)}, "bfloat16")
    assert verdict(found, HALF, False) is None and found.unseen == 0
