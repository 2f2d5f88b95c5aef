"""Attention over packs: what transformers' eager attention gives each example alone, windows and capped scores too."""

from types import SimpleNamespace

import pytest
import torch
from test_folded_lora import LENGTHS, WIDER, batch_of, family, step, with_adapter, worst_error
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from adder import attention, folded_lora, loss
from adder.errors import UserError
from tiny import pack_rows, token_row

# Windows shorter than the examples, and a cap low enough to bend the scores: each shows when it is left out.
WINDOWED = {
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "Gemma2": {"sliding_window": 4, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    "Gemma3Text": {
        "sliding_window": 4,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Phi3": {"sliding_window": 4},
}
EXAMPLES = (9, 23, 14)


def model_of(name: str, kernel: str, dtype=torch.float32, **changes):
    """The same random weights whatever the attention."""
    model = family(name, dtype, **WINDOWED[name] | changes)
    model.set_attn_implementation(kernel)
    return model


def one_by_one(lengths, device: str = "cpu") -> list[dict]:
    """Each example as a row of its own, as anyone would hand it to transformers."""
    rows = [token_row(i, length) for i, length in enumerate(lengths)]
    return [
        {
            "input_ids": torch.tensor([row["input_ids"]], device=device),
            "labels": torch.tensor([row["labels"]]).to(device),
        }
        for row in rows
    ]


@pytest.mark.parametrize("name", WINDOWED)
def test_packed_is_unpacked_eager(name):
    """fp32: losses to 1e-5 of each other, every gradient to 2e-5, which is the order of sums."""
    expected = step(with_adapter(model_of(name, "eager")), *one_by_one(EXAMPLES))
    model = with_adapter(model_of(name, "adder_segments"))
    found = step(model, batch_of(*EXAMPLES))
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert worst_error(found[1], expected[1]) < 2e-5
    apart = step(model, *one_by_one(EXAMPLES))
    assert apart[0] == pytest.approx(expected[0], rel=1e-5) and worst_error(apart[1], expected[1]) < 2e-5
    folded_lora.attach(model)
    folded = step(model, batch_of(*EXAMPLES))
    assert folded[0] == pytest.approx(expected[0], rel=1e-5) and worst_error(folded[1], expected[1]) < 2e-5


@pytest.mark.parametrize("name", WINDOWED)
def test_window_and_cap_are_in_the_numbers(name):
    """What the test above compares, to 1e-5, would differ without them: by several times that at least (Gemma 3)."""
    plain = {"sliding_window": 512} | ({"attn_logit_softcapping": None} if name == "Gemma2" else {})
    with_both, without = model_of(name, "adder_segments"), model_of(name, "adder_segments", **plain)
    values = [loss.labelled_losses(model, **batch_of(*EXAMPLES)).sum().item() for model in (with_both, without)]
    assert abs(values[0] / values[1] - 1) > 5e-5


@pytest.mark.parametrize("name", WINDOWED)
def test_padded_rows_and_a_cache_keep_window_and_cap(name):
    ids, mask = torch.randint(3, 300, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = 0
    options = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        models = [model_of(name, kernel).eval() for kernel in ("eager", "adder_segments")]
        logits = [model(**options).logits[:, 5:] for model in models]
        assert torch.allclose(*logits, atol=1e-4, rtol=1e-4)
        more = {"max_new_tokens": 8, "do_sample": False, "use_cache": True}
        assert torch.equal(*(model.generate(**options, **more) for model in models))


def test_dropout_of_scores_drops():
    """A configuration that asks for it gets it on packs; evaluation is without."""
    model = model_of("Mistral", "adder_segments", attention_dropout=0.5)
    first, second = (loss.labelled_losses(model.train(), **batch_of(*EXAMPLES)).sum().item() for _ in range(2))
    assert first != second
    first, second = (loss.labelled_losses(model.eval(), **batch_of(*EXAMPLES)).sum().item() for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, None),
        ({"head_dim": 20}, "20 numbers"),
        ({"head_dim": 512}, "512 numbers"),
        ({"head_dim": None, "hidden_size": 72}, "18 numbers"),
        ({"attn_logit_softcapping": 50.0}, "caps"),
        ({"attention_dropout": 0.1}, "drops"),
    ],
)
def test_the_reason_why_a_kernel_is_not_used(changes, word):
    config = SimpleNamespace(**{"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16} | changes)
    reason = attention.without_kernel(config)
    assert (word in reason) if word else reason is None


def test_attention_sinks_are_refused():
    q = torch.randn(1, 2, 5, 8)
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    for function in (attention.segment_attention, attention.varlen_attention):
        with pytest.raises(UserError, match="attention sinks"):
            function(torch.nn.Linear(1, 1), q, q, q, None, cu_seq_lens_q=ends, max_length_q=3, s_aux=torch.ones(2))


def test_the_kernel_gets_the_window(monkeypatch):
    """A token sees `sliding_window` tokens, itself among them: flash attention counts those before it."""
    seen = []

    def kernel(q, k, v, *rest, scale, window_size, enable_gqa=False):
        seen.append(window_size)
        return torch.zeros_like(q)

    monkeypatch.setattr(attention, "_varlen_attn", lambda: kernel)
    q, ends = torch.randn(1, 2, 5, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    for window in (None, 4):
        attention.varlen_attention(None, q, q, q, None, cu_seq_lens_q=ends, max_length_q=3, sliding_window=window)
    assert seen == [(-1, 0), (3, 0)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", WINDOWED)
def test_packed_is_unpacked_eager_on_a_gpu(name):
    """bf16 gradients of a pack by the kernel against fp32 eager ones of its examples apart: no further off than eager
    attention in bf16 is, with half as much again for the two ways to add up."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the varlen kernel needs compute capability 8.0")
    sizes = WIDER | {"intermediate_size": 1408, "num_hidden_layers": 2, "sliding_window": 40}
    if name == "Gemma2":
        sizes |= {"query_pre_attn_scalar": 64}
    values = model_of(name, "eager", torch.bfloat16, **sizes).state_dict()

    def gradients(kernel: str, dtype: torch.dtype, *batches: dict) -> torch.Tensor:
        model = model_of(name, kernel, dtype, **sizes)
        model.load_state_dict(values)
        model.cuda().zero_grad()
        for batch in batches:
            loss.labelled_losses(model, **batch).sum().backward()
        return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])

    apart = one_by_one(LENGTHS, "cuda")
    exact = gradients("eager", torch.float32, *apart)
    eager = gradients("eager", torch.bfloat16, *apart)
    rows = [token_row(i, length) for i, length in enumerate(LENGTHS)]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(pack_rows([rows]))
    batch = {k: v.cuda() if hasattr(v, "cuda") else v for k, v in batch.items()}
    packed = gradients("adder_varlen", torch.bfloat16, batch)
    off = [((found - exact).norm() / exact.norm()).item() for found in (packed, eager)]
    print(name, [round(value, 4) for value in off])
    assert off[0] < 1.5 * off[1] + 0.003
