"""Products in fp8: exact to what e4m3 allows, and harmless to a tiny training. test_frozen_products.py has the choice.

A number in e4m3 is off by 2.6 % in the mean square, a product of two matrices of them by 3.7 %. Gradients have passed
through a dozen, and nothing is worse for them than random weights as large as these: cosines of 0.93 to 0.99 were seen,
0.9 is asked for.
"""

import copy

import pytest
import torch

from adder.kernels import fp8
from adder.kernels.fused_lora import attach, autograd_functions
from adder.kernels.rope import apply_rope
from fp8_cases import SHAPE, cosine
from fused_lora_cases import FAMILIES, LENGTHS, batch_of, errors, family, on_gpu, step, with_adapter, worst_error

TWO_ROUNDINGS = 0.045


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def test_quantised_rows_use_the_whole_range():
    x = torch.randn(9, 200) * torch.logspace(-8, 8, 9)[:, None]
    rows = fp8.quantise(x)
    assert rows.values.float().abs().amax(-1).eq(fp8.FP8_MAX).all()
    assert (rows.dequantised() - x).norm(dim=-1).div(x.norm(dim=-1)).max() < 0.035
    assert torch.equal(fp8.quantise(torch.zeros(2, 16)).dequantised(), torch.zeros(2, 16))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_product_is_off_by_two_roundings(direction):
    weight = torch.randn(96, 256) * torch.logspace(-2, 2, 96)[:, None]
    side = getattr(fp8.Fp8Weight(weight), direction)
    matrix = weight if direction == "forward" else weight.t()
    x = torch.randn(50, matrix.shape[1])
    assert off(fp8.matmul(fp8.quantise(x), side, torch.float32), x @ matrix.t()) < TWO_ROUNDINGS


def test_weights_take_two_bytes_a_number():
    assert fp8.Fp8Weight(torch.randn(64, 32)).nbytes == 2 * 64 * 32 + 4 * (64 + 32)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_in_the_same_direction(name):
    model = with_adapter(family(name, **SHAPE))
    batch = batch_of(9, 23, 14)
    expected_loss, expected = step(model, batch)
    report = attach.attach(model, precision="fp8")
    assert report["fp8"] > 0 and report["decoder_layers"] == FAMILIES[name][1] and not report["left_to_peft"], report
    found_loss, found = step(model, batch)
    assert found_loss == pytest.approx(expected_loss, rel=0.03) and found_loss != expected_loss
    assert cosine(found, expected) > 0.9


def test_lora_s_own_share_is_not_in_fp8():
    """With W = 0 there is nothing for fp8 to round: outputs and gradients stay what they were (to fp32 rounding)."""
    model = with_adapter(family("Llama", **SHAPE))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" in name:
                parameter.zero_()
    batch = batch_of(9, 23)
    expected_loss, expected = step(model, batch)
    attach.attach(model, precision="fp8")
    found_loss, found = step(model, batch)
    assert found_loss == pytest.approx(expected_loss, rel=1e-6)
    assert worst_error(found, expected) < 1e-4


def launches_of_lora_swiglu_fp8(monkeypatch) -> list:
    """A list that grows by one with each forward pass of an MLP that lora_swiglu_fp8 makes."""
    calls, run = [], autograd_functions.lora_swiglu_fp8
    monkeypatch.setattr(autograd_functions, "lora_swiglu_fp8", lambda *args: calls.append(1) or run(*args))
    return calls


@pytest.mark.parametrize(
    "modules",
    [["gate_proj", "up_proj", "down_proj"], ["gate_proj", "down_proj"], ["up_proj"], ["q_proj"]],
    ids=["all", "gate and down", "up", "none"],
)
def test_an_mlp_without_the_share_in_gate_up_is_the_same(modules, monkeypatch):
    """To fp32 rounding, and what that moves across a boundary of fp8's."""
    model = with_adapter(family("Llama", **SHAPE, mlp_bias=True), target_modules=modules)
    attach.attach(model, precision="fp8")
    batch, calls = batch_of(9, 23), launches_of_lora_swiglu_fp8(monkeypatch)
    found = step(model, batch)
    assert len(calls) == 2
    monkeypatch.setattr(autograd_functions, "MAX_FUSED_RANK", -1)
    expected = step(model, batch)
    assert len(calls) == 2
    assert found[0] == pytest.approx(expected[0], rel=1e-4) and worst_error(found[1], expected[1]) < 5e-3


@pytest.mark.parametrize("changes", [{"rank_pattern": {"down_proj": 65}}, {"lora_dropout": 0.3}])
def test_an_mlp_beyond_the_kernel_takes_several(changes, monkeypatch):
    model = with_adapter(family("Llama", **SHAPE), **changes).train()
    attach.attach(model, precision="fp8")
    calls = launches_of_lora_swiglu_fp8(monkeypatch)
    step(model, batch_of(9, 23))
    assert not calls
    model.eval()
    step(model, batch_of(9, 23))
    assert bool(calls) == ("lora_dropout" in changes)


@pytest.mark.parametrize(("name", "launches"), [("Qwen2", 2), ("SmolLM3", 1), ("Qwen3", 0)])
def test_queries_and_keys_turned_by_the_launch_that_adds_are_the_same(name, launches, monkeypatch):
    """Which is left out where a layer has no rotation, or a norm before it."""
    model = with_adapter(family(name, **SHAPE), target_modules=["q_proj", "v_proj"])
    attach.attach(model, precision="fp8")
    batch, calls = batch_of(9, 23), []
    found = step(model, batch)

    def in_two(y, low_rank, b, bias, cos, sin, size, turned):
        calls.append(1)
        fp8.add_lora(y, low_rank, b, None, bias)
        heads = y.unflatten(1, (-1, size))[:, :turned]
        apply_rope(heads, cos, sin)

    monkeypatch.setattr(autograd_functions, "add_lora_and_rope", in_two)
    expected = step(model, batch)
    assert len(calls) == launches
    assert found[0] == pytest.approx(expected[0], rel=1e-4) and worst_error(found[1], expected[1]) < 5e-3


def test_ranks_dropout_and_biases_go_with_fp8():
    model = with_adapter(family("Qwen2", **SHAPE), r=2, rank_pattern={"k_proj": 5, "down_proj": 9}, lora_dropout=0.3)
    model.train()
    exact = copy.deepcopy(model)
    attach.attach(exact)
    attach.attach(model, precision="fp8")
    results = []
    for each in (exact, model):
        torch.manual_seed(4)  # the same masks
        results.append(step(each, batch_of(9, 23)))
    assert results[1][0] == pytest.approx(results[0][0], rel=0.03) and cosine(results[1][1], results[0][1]) > 0.9


def test_checkpointing_in_fp8_changes_nothing():
    model = with_adapter(family("Llama", **SHAPE), lora_dropout=0.3).train()
    attach.attach(model, precision="fp8")
    torch.manual_seed(3)
    plain = step(model, batch_of(9, 23))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    torch.manual_seed(3)
    again = step(model, batch_of(9, 23))
    assert again[0] == plain[0] and worst_error(again[1], plain[1]) < 1e-5


def test_sizes_that_fp8_cannot_multiply_stay_in_16_bits():
    model = with_adapter(family("Llama", intermediate_size=136))
    batch = batch_of(9, 23)
    report = attach.attach(model, precision="fp8")
    assert report["fp8"] == 6 and report["decoder_layers"] == 2
    assert report["reasons"] == {"fp8 matmuls need sizes that 16 divides": 2}  # down_proj's inputs
    assert torch.isfinite(torch.tensor(step(model, batch)[0]))


def test_detach_restores_what_was_before_fp8():
    model = with_adapter(family("Llama", **SHAPE))
    before = step(model, batch_of(9, 23))
    weights = {name: p.clone() for name, p in model.named_parameters()}
    attach.attach(model, precision="fp8")
    assert all(p.is_contiguous() and torch.equal(p, weights[name]) for name, p in model.named_parameters())
    attach.detach(model)
    after = step(model, batch_of(9, 23))
    assert after[0] == before[0] and worst_error(after[1], before[1]) == 0


def test_training_in_fp8_ends_where_training_ends():
    """Twenty steps of AdamW on one batch: the losses lie on top of each other, to 2 % of where they began."""
    batch, losses = batch_of(9, 23, 14), {}
    for products in ("bf16", "fp8"):
        model = with_adapter(family("Llama", **SHAPE))
        attach.attach(model, precision=precision)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses[products] = []
        for _ in range(20):
            losses[products].append(step(model, batch)[0])
            optimizer.step()
    assert losses["bf16"][-1] < 0.5 * losses["bf16"][0]
    assert losses["fp8"] == pytest.approx(losses["bf16"], abs=0.02 * losses["bf16"][0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma"])
def test_fp8_on_a_gpu_is_its_reference(name):
    """bf16 and fp8 on the tensor cores against the same fp8 numbers multiplied in fp32 on the CPU.

    What fp8 takes away is the same in both; what is left between them is bf16's own error and the few values that
    round to the neighbour when their bf16 input differs in its last bit.
    """
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 matmuls need compute capability 9.0")
    sizes = {"intermediate_size": 1408}
    batch = batch_of(*LENGTHS, device="cuda")
    exact = step(on_gpu(name, torch.float32, "sdpa", **sizes), batch)
    model = on_gpu(name, torch.bfloat16, "adder_varlen", **sizes)
    report = attach.attach(model, precision="fp8")
    assert report["decoder_layers"] == 4 and report["fp8"] == 16, report
    with torch.autocast("cuda", torch.bfloat16):
        found = step(model, batch)
    slow = on_gpu(name, torch.float32, "sdpa", **sizes).cpu()
    slow.get_base_model().set_attn_implementation("adder_segments")
    attach.attach(slow, precision="fp8")
    reference = step(slow, batch_of(*LENGTHS))
    reference = reference[0], {name: grad.cuda() for name, grad in reference[1].items()}
    fast, slow = errors(found, exact), errors(reference, exact)
    print(name, {part: (round(fast[part], 4), round(slow[part], 4)) for part in fast})
    assert fast["loss"] < slow["loss"] + 0.01
    assert fast["all"] < 1.3 * slow["all"] + 0.02


def test_remembered_values_serve_what_they_were_made_of_alone():
    x, rows = torch.randn(4, 32), object()
    fp8.cache_fp8(x, rows)
    assert fp8.quantise_cached(x.view(2, 2, 32).view(4, 32)) is rows  # as autograd hands it on
    assert fp8.quantise_cached(x) is not rows  # only once
    fp8.cache_fp8(x, rows)
    assert fp8.quantise_cached(x.clone()) is not rows
    fp8.cache_fp8(x, rows)
    x += 1
    assert fp8.quantise_cached(x) is not rows
    fp8.cache_fp8(x, rows)
    assert fp8.quantise_cached(x[:2]) is not rows and fp8.quantise_cached(x) is not rows
    fp8.cache_fp8(x.clone(), rows)  # which is gone at once, and x may come to lie where it lay
    assert fp8.quantise_cached(x) is not rows


def test_gradients_are_quantised_where_they_are_written(monkeypatch):
    """All but the last layer's, which comes from elsewhere, and (without kernels) those of gate and up."""
    model = with_adapter(family("Llama", **SHAPE))
    attach.attach(model, precision="fp8")
    loss, widths, quantise = model(**batch_of(9, 23)).loss, [], fp8.quantise
    monkeypatch.setattr(fp8, "quantise", lambda x: widths.append(x.shape[-1]) or quantise(x))
    loss.backward()
    config = model.config
    assert widths == [config.hidden_size] + config.num_hidden_layers * [2 * config.intermediate_size]
