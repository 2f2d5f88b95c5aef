"""The planner on a real card, and on smaller ones that a cap on the allocator stands for: run with `pytest -m gpu`.

With `-s` each simulated card's plan is printed.
"""

import json
import time
from pathlib import Path

import bitsandbytes
import pyarrow as pa
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adder.core import hardware
from adder.core.choice import Choice
from adder.core.files import read_json, read_jsonl, write_table
from adder.core.progress import Progress
from adder.kernels import labelled_loss, packed_attention
from adder.kernels.fused_lora import attach
from adder.training import base_model, lora, step_planner, trainer
from adder.training.stage import TrainSettings
from adder.training.step_planner import CHECKPOINTING, Packs, StepChoices, StepPlan, Trials
from tiny import save_tiny_model, token_row, write_tokens, write_training_inputs
from training_stage import run_training, train_settings

pytestmark = pytest.mark.gpu
SETTINGS = {
    "effective_batch_size": 16,
    "micro_batch_size": "auto",
    "gradient_checkpointing": "auto",
    "method": "qlora",
}
# Llama-3.1-8B's shape.
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
}
PACKS = [[300, 700, 500, 548]] * 48


@pytest.fixture
def cap(monkeypatch):
    """Set a memory limit in 10^9 bytes; afterwards the whole card is there again."""

    def limit(gigabytes: float) -> None:
        monkeypatch.setenv("ADDER_MEMORY_LIMIT_GB", str(gigabytes))
        torch.cuda.empty_cache()
        hardware.prepare_gpu()

    yield limit
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)


def settings(**changes) -> TrainSettings:
    return train_settings(lora_dropout=0.0, **changes)


def choose(values: TrainSettings, packs: Packs, model: torch.nn.Module, trials: Trials) -> StepChoices:
    """The choices of one process."""
    levels = step_planner.supported_checkpointing(model, "cuda")
    per_step = step_planner.step_packs(values, packs)
    return step_planner.choose_step(values, packs, per_step, "cuda", levels, trials, Choice(1, "one process"))


def llama_8b(dtype: torch.dtype, kernel: str) -> torch.nn.Module:
    """Llama-3.1-8B's shape in NF4 with random weights, each layer quantised as soon as it is made."""
    config = LlamaConfig(**SHAPE, use_cache=False, attn_implementation=kernel)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype) * 0.02

    for name, bare in list(model.named_modules()):
        if isinstance(bare, torch.nn.Linear) and name != "lm_head":
            linear = bitsandbytes.nn.Linear4bit(
                bare.in_features,
                bare.out_features,
                bias=False,
                compute_dtype=dtype,
                quant_type="nf4",
                compress_statistics=True,
                device="meta",
            )
            values = random(bare.out_features, bare.in_features)
            linear.weight = bitsandbytes.nn.Params4bit(
                values, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear.cuda())
        elif type(bare).__name__ == "LlamaRMSNorm":
            bare.weight = torch.nn.Parameter(torch.ones(4096, device="cuda", dtype=dtype), requires_grad=False)
    for module in (model.model.embed_tokens, model.lm_head):
        module.weight = torch.nn.Parameter(random(SHAPE["vocab_size"], SHAPE["hidden_size"]), requires_grad=False)
    with torch.device("cuda"):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


@pytest.mark.parametrize(("gigabytes", "dtype"), [(16, "float16"), (24, "bfloat16"), (80, "bfloat16")])
def test_an_8b_model_is_planned_for_a_smaller_card_and_stays_within_it(cap, gigabytes, dtype):
    """16 GB as on a T4: fp16, example by example, PEFT's products. Steps over other shapes stay below the limit."""
    cap(min(gigabytes, torch.cuda.mem_get_info()[1] / 1e9))
    t4 = gigabytes == 16
    kernel = (
        packed_attention.SEGMENTS
        if t4
        else packed_attention.choose_attention(LlamaConfig(**SHAPE), dtype, "cuda").value
    )
    model = lora.add_adapter(llama_8b(getattr(torch, dtype), kernel), settings())
    products = "PEFT" if t4 else attach.attach_where_it_pays(model, dtype).reason
    torch.cuda.empty_cache()
    start = time.perf_counter()
    trials = Trials(model, PACKS, dtype, "cuda")
    choices = choose(settings(effective_batch_size=64), PACKS, model, trials)
    seconds = time.perf_counter() - start
    plan = choices.plan
    print(f"\n{gigabytes} GB, {dtype}, {products}: planned in {seconds:.1f} s: {plan}")
    for row in choices.micro_batch_size.alternatives:
        print(json.dumps(row))
    print(choices.micro_batch_size.reason, "|", choices.gradient_checkpointing.reason, flush=True)
    assert seconds < 60
    step_planner.apply_checkpointing(model, plan.checkpointing)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    torch.cuda.reset_peak_memory_stats()
    for pack in ([2048], [300, 700, 500, 548], [64] * 32, [1000, 500, 400], [2000]):
        batch = step_planner.made_up(pack * plan.micro_batch, SHAPE["vocab_size"], "cuda")
        with step_planner.fused_head(trials.bare), torch.autocast("cuda", getattr(torch, dtype)):
            value = -model(**batch, fused_lm_head=True).log_probs.mean()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.cuda.max_memory_reserved() <= hardware.total_memory("cuda")
    attach.detach(model)


def middling(dtype: str, **shape) -> torch.nn.Module:
    """A model of 400 million weights, of which activations are what takes memory."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "max_position_embeddings": 8192}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 8000}
    config = LlamaConfig(**{**sizes, **heads, **shape}, use_cache=False)
    config._attn_implementation = packed_attention.choose_attention(config, dtype, "cuda").value
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    return lora.add_adapter(model, settings(method="lora"))


def test_less_memory_recomputes_more_and_every_trial_is_an_alternative(cap):
    model = middling("bfloat16")
    packs = [[4000, 4000]] * 16
    found = []
    for gigabytes in (60, 8, 3.5):
        cap(gigabytes)
        trials = Trials(model, packs, "bfloat16", "cuda")
        choices = choose(settings(), packs, model, trials)
        rows = choices.micro_batch_size.alternatives
        fitting = [row for row in rows if row["fits"]]
        plan, fastest = choices.plan, max(fitting, key=lambda row: row["tokens_per_second"])
        best = next(
            r for r in fitting if (r["micro_batch"], r["checkpointing"]) == (plan.micro_batch, plan.checkpointing)
        )
        assert best["checkpointing"] == fastest["checkpointing"]
        assert best["tokens_per_second"] * step_planner.GAIN >= fastest["tokens_per_second"] - 1  # they are rounded
        assert best["peak_memory_bytes"] <= (1 - step_planner.HEADROOM["cuda"]) * gigabytes * 1e9
        print(f"\n{gigabytes} GB:", *map(json.dumps, rows), sep="\n", flush=True)
        found.append(list(CHECKPOINTING).index(choices.plan.checkpointing))
    assert found == sorted(found) and found[0] == 0 and found[-1] > 0


@pytest.mark.parametrize("fold", [False, True])
def test_trials_leave_model_and_random_numbers_as_they_were(tmp_path, fold):
    model, _ = base_model.load(save_tiny_model(tmp_path / "model"), "qlora", "bfloat16", "cuda")
    model = lora.add_adapter(model, train_settings(lora_dropout=0.1))
    if fold:
        attach.attach(model)

    def state() -> dict:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, layer in base_model.four_bit_layers(model).items():
            tensors |= {f"{name}.absmax": layer.weight.quant_state.absmax}
        return {
            "tensors": {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()},
            "modes": [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()],
            "forwards": {name for name, module in model.named_modules() if "forward" in module.__dict__},
            "gradients": [parameter.grad for parameter in model.parameters()],
        }

    before, drawn = state(), torch.cuda.get_rng_state()
    trials = Trials(model, [[30, 20]] * 8, "bfloat16", "cuda")
    choose(settings(), [[30, 20]] * 8, model, trials)
    for level in CHECKPOINTING:
        assert trials(StepPlan(2, 2, level)).fits
    after = state()
    assert all(torch.equal(before["tensors"][name], after["tensors"][name]) for name in before["tensors"])
    assert {name: before[name] for name in before if name != "tensors"} == {
        name: after[name] for name in after if name != "tensors"
    }
    assert torch.equal(drawn, torch.cuda.get_rng_state())


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("level", [level for level in CHECKPOINTING if level != "none"])
def test_recomputing_and_offloading_change_no_gradient(level, fold):
    """Same kernels over same numbers; flash attention sums its backward in no fixed order, so 1 % in bf16."""
    model = middling("bfloat16", hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    if fold:
        attach.attach(model)
    batch = step_planner.made_up([300, 211], 8000, "cuda")

    def gradients() -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            value = labelled_loss.labelled_losses(model.train().get_base_model(), **batch).mean()
        value.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    expected = gradients()
    step_planner.apply_checkpointing(model, level)
    assert ((gradients() - expected).norm() / expected.norm()).item() < 0.01


def long_inputs(folder: Path) -> dict[str, Path]:
    """Training inputs whose 24 packs of two examples have 2,000 tokens each."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "max_position_embeddings": 2048}
    inputs = write_training_inputs(folder / "inputs", save_tiny_model(folder / "model", **shape))
    rows = [token_row(i, 1000) for i in range(48)]
    write_tokens(inputs["tokenize"] / "train.arrow", rows)
    table = {
        "rows": [[2 * i, 2 * i + 1] for i in range(24)],
        "starts": [[0, 0]] * 24,
        "seq_lengths": [[1000, 1000]] * 24,
    }
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in table])
    write_table(inputs["lengths"] / "packs.parquet", pa.table(table, schema=schema))
    return inputs


def test_a_card_that_gets_smaller_in_mid_run_is_trained_on_to_the_end(tmp_path, cap, monkeypatch):
    """From step 7 on only 60 % of what the steps before took is there: the allocator itself runs out of memory."""
    inputs = long_inputs(tmp_path)
    computed, seen = trainer.Trainer.training_step, []

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 7 and not seen:
            seen.append(self.args.per_device_train_batch_size)
            cap(0.6 * torch.cuda.max_memory_reserved() / 1e9)
        return computed(self, *args, **kwargs)

    cap(40)
    monkeypatch.setattr(trainer.Trainer, "training_step", training_step)
    values = settings(epochs=4, effective_batch_size=16, micro_batch_size=8, learning_rate=1e-3, samples=0)
    said, progress = [], Progress.silent()
    progress.say = said.append
    out = tmp_path / "out"
    out.mkdir()
    torch.cuda.reset_peak_memory_stats()
    run_training(
        values,
        inputs,
        out,
        progress,
        checkpoints=tmp_path / "c",
        runtime={"checkpoints": 3},
    )
    plan, summary = read_json(out / "plan.json"), read_json(out / "train.json")
    assert seen == [8] and plan["micro_batch_size"]["value"] < 8
    assert plan["memory_fallback"]["alternatives"][0]["step"] == 8
    assert plan["memory_fallback"]["reason"] in said
    assert summary["resumed_from"] and summary["effective_batch"]["packs"] == 8
    steps = [row["step"] for row in read_jsonl(out / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, summary["planned_steps"] + 1))
    assert summary["final_loss"] < summary["first_loss"]
