"""Attention over packs: what transformers' eager attention gives each example alone, windows and capped scores too."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from adder.core.errors import UserError
from adder.kernels import labelled_loss, packed_attention
from adder.kernels.fused_lora import attach
from fused_lora_cases import LENGTHS, WIDER, batch_of, family, step, with_adapter, worst_error
from tiny import token_row

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
    model = family(name, dtype, **WINDOWED.get(name, {}) | changes)
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
    attach.attach(model)
    fused = step(model, batch_of(*EXAMPLES))
    assert fused[0] == pytest.approx(expected[0], rel=1e-5) and worst_error(fused[1], expected[1]) < 2e-5


@pytest.mark.parametrize("scale", [None, 0.3])
def test_short_examples_by_plain_matmuls_are_torchs_attention(scale):
    """Output and gradients: in fp32 to the order of sums, in bf16 with a worst error below that of torch's kernel."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, n, 90, 16, generator=generator).bfloat16() for n in (6, 2, 2)]
    gradient = torch.randn(2, 6, 90, 16, generator=generator).bfloat16()

    def torchs(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )

    def short(*rows):
        return packed_attention.ShortAttention.apply(*rows, scale)

    def errors(function, dtype, exact=None):
        leaves = [x.to(dtype).requires_grad_() for x in rows]
        out = function(*leaves)
        found = [x.float() for x in (out, *torch.autograd.grad(out, leaves, gradient.to(dtype)))]
        return [((f - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True)] if exact else found

    exact = errors(torchs, torch.float32)
    assert max(errors(short, torch.float32, exact)) < 1e-5
    theirs, ours = errors(torchs, torch.bfloat16, exact), errors(short, torch.bfloat16, exact)
    assert max(ours) < max(theirs)
    with torch.autocast("cpu", torch.bfloat16):
        assert errors(short, torch.bfloat16, exact) == ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_may_be_of_another_size_than_queries(dtype):
    """As in DeepSeek's latent attention: packed as alone by torch's own, in 16 bit to its rounding."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, 24, n, generator=generator).to(dtype) for n in (24, 24, 16))
    ends = torch.tensor([0, 9, 24], dtype=torch.int32)
    for name in (packed_attention.SEGMENTS, packed_attention.TRITON, packed_attention.VARLEN):
        function = packed_attention.ATTENTION_FUNCTIONS[name]
        found = function(None, query, key, value, None, cu_seq_lens_q=ends, max_length_q=15)[0]
        parts = zip(*(x.float().split([9, 15], 2) for x in (query, key, value)), strict=True)
        alone = [torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True) for part in parts]
        expected = torch.cat(alone, 2).transpose(1, 2)
        assert found.shape == (1, 24, 4, 16)
        assert (found.float() - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.03)


def test_gpu_kernels_are_refused_where_values_are_of_another_size():
    sizes = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    config = SimpleNamespace(**vars(shape()), **sizes, v_head_dim=128)
    choice = packed_attention.choose_attention(config, "bfloat16", "cuda", why_not=lambda *_: None)
    assert (
        choice.value == packed_attention.SEGMENTS and "values are of size 128 and its queries of 192" in choice.reason
    )
    config.v_head_dim = 192
    choice = packed_attention.choose_attention(config, "bfloat16", "cuda", why_not=lambda *_: None)
    assert choice.value == packed_attention.TRITON


def test_bf16_packs_on_a_cpu_take_plain_matmuls_for_short_examples_only(monkeypatch):
    seen = []
    monkeypatch.setattr(
        packed_attention.ShortAttention, "apply", lambda query, *_: seen.append(query.shape[2]) or query
    )
    query, key = torch.randn(1, 4, 700, 8), torch.randn(1, 2, 700, 8)
    ends = torch.tensor([0, 100, 620, 700], dtype=torch.int32)
    for dtype, options in ((torch.bfloat16, {}), (torch.float32, {}), (torch.bfloat16, {"sliding_window": 90}),
                           (torch.bfloat16, {"softcap": 5.0}), (torch.bfloat16, {"dropout": 0.1})):  # fmt: skip
        rows = (x.to(dtype) for x in (query, key, key))
        packed_attention.segment_attention(None, *rows, None, cu_seq_lens_q=ends, **options)
    assert seen == [100, 80, 80]


@pytest.mark.parametrize("name", WINDOWED)
def test_window_and_cap_are_in_the_losses(name):
    """What the test above compares, to 1e-5, would differ without them: by several times that at least (Gemma 3)."""
    plain = {"sliding_window": 512} | ({"attn_logit_softcapping": None} if name == "Gemma2" else {})
    with_both, without = model_of(name, "adder_segments"), model_of(name, "adder_segments", **plain)
    values = [
        labelled_loss.labelled_losses(model, **batch_of(*EXAMPLES)).sum().item() for model in (with_both, without)
    ]
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
    first, second = (labelled_loss.labelled_losses(model.train(), **batch_of(*EXAMPLES)).sum().item() for _ in range(2))
    assert first != second
    first, second = (labelled_loss.labelled_losses(model.eval(), **batch_of(*EXAMPLES)).sum().item() for _ in range(2))
    assert first == second


def shape(**changes) -> SimpleNamespace:
    """What `choose` and `error_on_trial` read of a configuration."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return SimpleNamespace(**sizes | changes)


@pytest.mark.parametrize(
    ("changes", "missing", "name", "word"),
    [
        ({}, "", "adder_triton", "Adder's kernel"),
        ({}, "adder_triton", "adder_varlen", "isn't here"),
        ({}, "adder_triton adder_varlen", "adder_fa2", "isn't here"),
        ({}, "adder_triton adder_varlen adder_fa2", "adder_flex", "isn't here"),
        ({}, "adder_triton adder_varlen adder_fa2 adder_flex", "adder_segments", "isn't here"),
        ({"head_dim": 20}, "", "adder_triton", "Adder's kernel"),
        ({"head_dim": 20}, "adder_triton", "adder_flex", "isn't here"),
        ({"head_dim": 512}, "", "adder_segments", "head size is 512"),
        ({"head_dim": None, "hidden_size": 36}, "", "adder_segments", "head size is 9"),
        ({"attn_logit_softcapping": 50.0}, "", "adder_triton", "Adder's kernel"),
        ({"attn_logit_softcapping": 50.0}, "adder_triton", "adder_fa2", "isn't here"),
        ({"attn_logit_softcapping": 50.0}, "adder_triton adder_fa2", "adder_flex", "isn't here"),
        ({"attention_dropout": 0.1}, "", "adder_fa2", "drops"),
        ({"attention_dropout": 0.1}, "adder_fa2", "adder_segments", "drops"),
    ],
)
def test_the_first_kernel_that_fits_is_chosen_with_the_reason_why_not_another(changes, missing, name, word):
    choice = packed_attention.choose_attention(
        shape(**changes), "bfloat16", "cuda", lambda kernel, *_: "it isn't here" if kernel in missing.split() else None
    )
    assert choice.value == name and word in choice.reason
    assert all(row["not_used_because"] for row in choice.alternatives)


@pytest.mark.parametrize(
    ("capability", "dtype", "trial", "name", "word"),
    [
        ((9, 0), "bfloat16", 0.004, "adder_triton", "Adder's kernel"),
        ((9, 0), "bfloat16", 0.2, "adder_segments", "off by 0.2 on a small pack"),
        (
            (9, 0),
            "bfloat16",
            RuntimeError("no kernel image\nfor this"),
            "adder_segments",
            "RuntimeError: no kernel image",
        ),
        ((9, 0), "float32", None, "adder_segments", "in 16 bit, not in float32"),
        ((7, 5), "float16", None, "adder_segments", "this card (7.5)"),
    ],
)
def test_a_kernel_is_used_where_a_small_pack_shows_that_it_is_right(monkeypatch, capability, dtype, trial, name, word):
    """None: nothing may be tried, since on an old card Triton can end the process."""

    def tried(*_):
        assert trial is not None
        if isinstance(trial, Exception):
            raise trial
        return trial

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(packed_attention, "_flash_attn", lambda: "there")
    monkeypatch.setattr(packed_attention, "_varlen_attn", lambda: "there")
    monkeypatch.setattr(packed_attention, "triton", "there")
    monkeypatch.setattr(packed_attention, "trial_error", tried)
    choice = packed_attention.choose_attention(shape(), dtype, "cuda")
    assert choice.value == name and word in choice.reason


def without(*names: str):
    """segment_attention that forgets some of what it is told."""
    return lambda *tensors, **options: packed_attention.segment_attention(*tensors, **options | dict.fromkeys(names))


def test_the_trial_finds_what_a_kernel_leaves_out(monkeypatch):
    """bf16 example by example comes to a third of the bound, as kernels do; each omission is beyond it."""
    config = shape(attn_logit_softcapping=50.0, sliding_window=4096)
    for names, right in (((), True), (("cu_seq_lens_q",), False), (("sliding_window",), False), (("softcap",), False)):
        monkeypatch.setitem(packed_attention.ATTENTION_FUNCTIONS, "made_up", without(*names))
        before = torch.random.get_rng_state()
        error = packed_attention.trial_error("made_up", config, torch.bfloat16, "cpu")
        assert (
            (error < packed_attention.MAX_TRIAL_ERROR / 2) if right else (error > packed_attention.MAX_TRIAL_ERROR)
        ), (names, error)
        assert torch.equal(before, torch.random.get_rng_state())


def test_a_cpu_computes_example_by_example():
    choice = packed_attention.choose_attention(shape(), "bfloat16", "cpu")
    assert choice.value == "adder_segments" and not choice.alternatives


@pytest.mark.parametrize("window", [None, 5, 40, 200])
def test_blocks_hold_what_the_mask_says(window):
    """Every pair of blocks: listed as partial where some see some, as full where all see all, as neither elsewhere."""
    lengths = (9, 200, 3, 300, 127, 1, 260)
    tokens, ends = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    mask = packed_attention.flex_block_mask(ends, tokens, window)
    wide = mask.shape[-1]
    assert wide % packed_attention.FLEX_BLOCK == 0 and 0 <= wide - tokens < packed_attention.FLEX_BLOCK
    example = torch.tensor(
        [i for i, n in enumerate(lengths) for _ in range(n)] + [100 + i for i in range(wide - tokens)]
    )
    at = torch.arange(wide)
    far = at[:, None] - at
    expected = (example[:, None] == example) & (far >= 0) & (far < (window or wide))
    assert torch.equal(flex.create_mask(mask.mask_mod, 1, 1, wide, wide, device="cpu")[0, 0], expected)
    count = wide // packed_attention.FLEX_BLOCK
    seen = expected.view(count, packed_attention.FLEX_BLOCK, count, packed_attention.FLEX_BLOCK).sum((1, 3))
    partial, full = torch.zeros(count, count, dtype=torch.bool), torch.zeros(count, count, dtype=torch.bool)
    lists = [(partial, mask.kv_num_blocks, mask.kv_indices), (full, mask.full_kv_num_blocks, mask.full_kv_indices)]
    for dense, counts, indices in lists:
        for row in range(count):
            dense[row, indices[0, 0, row, : counts[0, 0, row]].long()] = True
    assert torch.equal(full, seen == packed_attention.FLEX_BLOCK**2)
    assert torch.equal(partial, (seen > 0) & ~full)


@pytest.mark.parametrize(("window", "cap"), [(None, None), (40, None), (None, 2.0)])
def test_flex_attention_is_attention_example_by_example(monkeypatch, window, cap):
    """Uncompiled and forward, which is what a CPU has of it; fp32, to the order of sums."""
    monkeypatch.setattr(packed_attention, "_compiled_flex", lambda: flex.flex_attention)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, 300, 16, generator=generator) for n in (4, 2, 2))
    ends = torch.tensor([0, 130, 133, 300], dtype=torch.int32)
    options = {"cu_seq_lens_q": ends, "max_length_q": 167, "sliding_window": window, "softcap": cap, "scaling": 0.3}
    with torch.no_grad():
        expected = packed_attention.segment_attention(None, query, key, value, None, **options)[0]
        found = packed_attention.ATTENTION_FUNCTIONS["adder_flex"](None, query, key, value, None, **options)[0]
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)


def test_layers_share_what_a_batch_needs_once_and_the_next_batch_has_its_own():
    ends, made = torch.tensor([0, 2, 5]), []
    for _ in range(2):
        packed_attention._cached_for_batch(ends, "sizes", lambda: made.append(1))
    packed_attention._cached_for_batch(ends, "blocks", lambda: made.append(1))
    packed_attention._cached_for_batch(ends.clone(), "sizes", lambda: made.append(1))
    assert len(made) == 3
    kept = len(packed_attention._BATCH_CACHE)
    del ends
    assert len(packed_attention._BATCH_CACHE) == kept - 1


def test_attention_sinks_are_refused():
    q = torch.randn(1, 2, 5, 8)
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    for function in (packed_attention.segment_attention, packed_attention.varlen_attention):
        with pytest.raises(UserError, match="attention sinks"):
            function(torch.nn.Linear(1, 1), q, q, q, None, cu_seq_lens_q=ends, max_length_q=3, s_aux=torch.ones(2))


def test_the_kernels_get_window_and_cap(monkeypatch):
    """A token sees `sliding_window` tokens, itself among them: flash attention counts those before it."""
    seen = []

    def varlen(q, k, v, *rest, scale, window_size, enable_gqa=False):
        seen.append(window_size)
        return torch.zeros_like(q)

    def flash(q, k, v, *rest, softmax_scale, dropout_p, softcap, causal, window_size):
        assert causal
        seen.append((*window_size, softcap, dropout_p))
        return torch.zeros_like(q)

    monkeypatch.setattr(packed_attention, "_varlen_attn", lambda: varlen)
    monkeypatch.setattr(packed_attention, "_flash_attn", lambda: flash)
    q, ends = torch.randn(1, 2, 5, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    options = {"cu_seq_lens_q": ends, "max_length_q": 3}
    for window in (None, 4):
        packed_attention.varlen_attention(None, q, q, q, None, **options, sliding_window=window)
    by_flash = packed_attention.ATTENTION_FUNCTIONS["adder_fa2"]
    by_flash(None, q, q, q, None, **options)
    out, _ = by_flash(None, q, q, q, None, **options, sliding_window=4, softcap=50.0, dropout=0.1)
    assert seen == [(-1, 0), (3, 0), (-1, 0, 0.0, 0.0), (3, 0, 50.0, 0.1)]
    assert out.shape == (1, 5, 2, 8)


def gpu_step(model, *batches: dict) -> tuple[float, torch.Tensor]:
    """The batches' summed loss, and all gradients as one vector."""
    model.cuda().zero_grad()
    value = 0.0
    for batch in batches:
        one = labelled_loss.labelled_losses(model, **batch).sum()
        one.backward()
        value += one.item()
    return value, torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "kernel"),
    [(name, kernel) for name in WINDOWED for kernel in ("adder_triton", "adder_varlen")]
    + [("Llama", "adder_triton")]
    + [(name, kernel) for name in ("Llama", "Gemma2", "Mistral") for kernel in ("adder_segments", "adder_fa2")]
    + [(name, "adder_flex") for name in ("Llama", "Gemma2", "Mistral", "Phi3")],
)
def test_packed_is_unpacked_eager_on_a_gpu(name, kernel, dtype):
    """16-bit loss and gradients of a pack against fp32 eager ones of its examples apart: no further off than eager
    attention in 16 bit is, with half as much again for the two ways to add up."""
    if kernel != "adder_segments" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the kernel needs compute capability 8.0")
    if kernel == "adder_fa2" and packed_attention._flash_attn() is None:
        pytest.skip("flash-attn isn't installed")
    sizes = WIDER | {"intermediate_size": 1408, "num_hidden_layers": 2}
    sizes |= {"sliding_window": 40} if name in WINDOWED else {}
    if name == "Gemma2":
        sizes |= {"query_pre_attn_scalar": 64}
    values = model_of(name, "eager", dtype, **sizes).state_dict()

    def result(kernel: str, dtype: torch.dtype, *batches: dict) -> tuple[float, torch.Tensor]:
        model = model_of(name, kernel, dtype, **sizes)
        model.load_state_dict(values)
        return gpu_step(model, *batches)

    apart = one_by_one(LENGTHS, "cuda")
    exact, eager = result("eager", torch.float32, *apart), result("eager", dtype, *apart)
    packed = result(kernel, dtype, batch_of(*LENGTHS, device="cuda"))
    off = [
        [abs(found[0] / exact[0] - 1), ((found[1] - exact[1]).norm() / exact[1].norm()).item()]
        for found in (packed, eager)
    ]
    print(name, kernel, dtype, off)
    assert off[0][0] < 1.5 * off[1][0] + 0.001
    assert off[0][1] < 1.5 * off[1][1] + 0.003


@pytest.mark.gpu
def test_a_card_from_ampere_on_serves_plain_and_capped_scores_and_odd_heads():
    """By Adder's kernel, after the trial on this card."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    for changes in ({"head_dim": 128}, {"head_dim": 256, "attn_logit_softcapping": 50.0}, {"head_dim": 100}):
        for dtype in ("bfloat16", "float16"):
            choice = packed_attention.choose_attention(shape(**changes, sliding_window=4096), dtype, "cuda")
            assert choice.value == "adder_triton", choice
