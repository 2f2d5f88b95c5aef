"""Attention over packed examples, none of which sees another, without a mask of length × length.

Packed examples lie one behind the other in a single row; `cu_seq_lens_q` (int32, one more than there are examples)
says where each begins. Registered with transformers under the names that `choose` picks from. Sliding windows
(Mistral's, every other layer of Gemma's) and capped scores (Gemma 2) are the layer's own: it hands them to its
attention function, and they are honoured here, where a kernel can't by computing example by example.
"""

import functools
import inspect
import math
from collections.abc import Callable

import torch
from torch.nn.attention import flex_attention as flex
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.kernels import packed_attention_triton
from adder.kernels.triton_utils import triton

# transformers takes every name with "flash" in it for one of its own.
SEGMENTS, TRITON, VARLEN = "adder_segments", "adder_triton", "adder_varlen"
FA2, FLEX = "adder_fa2", "adder_flex"
# In the order in which they are preferred.
KERNELS = {
    TRITON: "Adder's kernel keeps the examples of a pack apart without a mask, and shares keys among grouped heads",
    VARLEN: "torch's varlen flash kernel keeps the examples of a pack apart without a mask",
    FA2: "flash-attn's kernel keeps the examples of a pack apart without a mask",
    FLEX: "FlexAttention keeps the examples of a pack apart, and skips the blocks of the mask that are empty",
}
# The flash kernels' limits: head sizes are multiples of 8, up to 256. Triton's products: 16 numbers at least.
HEAD_STEP, LARGEST_HEAD, SMALLEST_TRITON_HEAD = 8, 256, 16
# FlexAttention's blocks of queries and keys, tokens each way.
BLOCK = 128
# Examples of up to so many tokens are attended to by plain products in bf16 on a CPU.
SHORT = 512
# A kernel is used if its results and gradients on small packs are this close to fp32's, as relative norms: 16-bit
# kernels come to 0.003 to 0.006, and attention that sees too much or too little is off by tenths.
TRUSTED = 0.03


def choose(config, dtype: str, device: str, why_not: Callable[..., str | None] | None = None) -> Choice:
    """Choose the attention to train with on packs; the value is the name to load the model with.

    config: the model's, of its text part if it has several. dtype: the compute dtype. `why_not`: from a kernel's name,
    config and dtype to the reason why it can't be used on this machine, None where it can; by default this is tried.
    """
    apart = "each example of a pack is attended to by itself, so that none sees another"
    if device == "cpu":
        return Choice(SEGMENTS, f"on a CPU {apart}")
    refused = []
    for name in KERNELS:
        why = _unfit(name, config) or (why_not or _fails_here)(name, config, dtype)
        if why is None:
            break
        refused.append({"attention": name, "not_used_because": why})
    else:
        name = SEGMENTS
    because = f"; torch's varlen kernel isn't used: {refused[0]['not_used_because']}" if refused else ""
    return Choice(name, KERNELS.get(name, apart) + because, refused)


def _unfit(name: str, config) -> str | None:
    """Why no machine computes such a model's attention by the kernel `name`; None if it can."""
    cap, dropout = getattr(config, "attn_logit_softcapping", None), getattr(config, "attention_dropout", 0)
    return _beyond(name, _head_size(config), cap, dropout)


def _head_size(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _beyond(name: str, size: int, cap: float | None, dropout: float) -> str | None:
    if name == VARLEN and cap is not None:
        return "the model caps attention scores, which this kernel can't"
    if name != FA2 and dropout:
        return "the model drops attention scores, which this kernel can't"
    if name in {TRITON, FLEX} and size < SMALLEST_TRITON_HEAD:
        return f"the model's heads have {size} numbers, where this kernel takes {SMALLEST_TRITON_HEAD} or more"
    if name in {VARLEN, FA2} and size % HEAD_STEP or size > LARGEST_HEAD:
        return f"the model's heads have {size} numbers, where this kernel takes multiples of 8 up to 256"
    return None


def _fails_here(name: str, config, dtype: str) -> str | None:
    """Why this machine's GPU doesn't run the kernel, or not rightly; None if it does.

    FlexAttention is not tried below compute capability 8.0: there Triton may end the process, which no test survives.
    """
    capability = torch.cuda.get_device_capability()
    if dtype not in {"bfloat16", "float16"}:
        return f"it computes in 16 bit, not in {dtype}"
    if capability < (8, 0):
        return f"it needs compute capability 8.0, which this card ({capability[0]}.{capability[1]}) hasn't"
    if name == TRITON and triton is None:
        return "Triton is not installed"
    if name == VARLEN and _varlen_attn() is None:
        return f"torch {torch.__version__} has none"
    if name == FA2 and _flash_attn() is None:
        return "flash-attn isn't installed"
    try:
        error = error_on_trial(name, config, getattr(torch, dtype), "cuda")
    except Exception as problem:  # compilers and kernels raise what they like
        return f"it failed on a small pack: {type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
    return None if error < TRUSTED else f"it was off by {error:.2g} on a small pack"


def error_on_trial(name: str, config, dtype: torch.dtype, device: str) -> float:
    """Relative error of a kernel's results and gradients (the worst of all norms) on small packs, against fp32.

    Of the config: heads, their size, cap, and whether there is a window. Two lengths, with and without window, under
    autocast as in training: FlexAttention is compiled for each of these and again for a second length, which the
    planner would otherwise measure as a slow step. Leaves torch's random numbers alone.
    """
    heads, size, cap = config.num_attention_heads, _head_size(config), getattr(config, "attn_logit_softcapping", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    generator, errors = torch.Generator().manual_seed(0), []

    def random(count: int, tokens: int) -> torch.Tensor:
        """(1, heads, tokens, head size)."""
        return torch.randn(1, count, tokens, size, generator=generator).to(device, dtype)

    for lengths in ([150, 3, 260, 97], [150, 3, 260, 97, 300]):
        ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        rows = [random(count, sum(lengths)) for count in (heads, groups, groups)]
        # Scores of usual size are far below a cap of 50, and don't show it.
        rows[0] = rows[0] * (1 if cap is None else 4)
        gradient = random(heads, sum(lengths)).transpose(1, 2)
        for window in (None, 100) if getattr(config, "sliding_window", None) else (None,):
            options = {"cu_seq_lens_q": ends, "max_length_q": 300, "softcap": cap, "sliding_window": window}

            def results(function: Callable, kind: torch.dtype, rows=rows, gradient=gradient, options=options) -> list:
                """Output and gradients to query, key and value."""
                leaves = [x.detach().to(kind).requires_grad_() for x in rows]
                with torch.autocast(device, dtype, enabled=kind == dtype):
                    out = function(None, *leaves, None, **options)[0]
                return [out, *torch.autograd.grad(out, leaves, gradient.to(kind))]

            pairs = zip(results(FUNCTIONS[name], dtype), results(segment_attention, torch.float32), strict=True)
            errors += [((found.float() - exact).norm() / exact.norm()).item() for found, exact in pairs]
    return max(errors)


def _varlen_attn():
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _flash_attn():
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


_KEPT = WeakIdKeyDictionary()


def _once(ends: torch.Tensor, key, make: Callable):
    """What `make` gives, kept under `key` as long as the batch whose `ends` these are: all layers share it."""
    kept = _KEPT.setdefault(ends, {})
    if key not in kept:
        kept[key] = make()
    return kept[key]


def segment_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    cu_seq_lens_q=None,
    sliding_window=None,
    softcap=None,
    **kwargs,
):
    """Causal attention within each example of a packed row; over whole rows where nothing is packed.

    query: (1, heads, tokens, head size); key and value: (1, key-value heads, tokens, head size). Returns (1, tokens,
    heads, head size) and None, as transformers' attention functions do. `sliding_window`: a token sees itself and so
    many less one before it. `softcap`: scores s become softcap · tanh(s / softcap). Raises UserError for attention
    sinks, which nothing here computes.
    """
    _refuse_sinks(module, kwargs)
    own = sliding_window is not None or softcap is not None
    if cu_seq_lens_q is None and (not own or attention_mask is not None) and softcap is None:
        # A mask that is there has the window in it.
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    options = {"scale": scaling, "dropout": dropout, "window": sliding_window, "cap": softcap}
    if cu_seq_lens_q is None:
        out = _causal(query, key, value, mask=attention_mask, **options)
    else:
        sizes = _once(cu_seq_lens_q, "sizes", cu_seq_lens_q.diff().tolist)
        parts = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
        out = torch.cat([_causal(*part, **options) for part in parts], dim=2)
    return out.transpose(1, 2).contiguous(), None


def _refuse_sinks(module, options: dict) -> None:
    if options.get("s_aux") is not None:
        raise UserError(
            f"model.source: {type(module).__name__} has attention sinks, which attention over packed examples can't "
            "compute here; choose a model without"
        )


def _causal(query, key, value, scale, dropout, window, cap, mask=None):
    """Attention of (batch, heads, tokens, head size), the last query at the last key; see segment_attention."""
    queries, keys = query.shape[-2], key.shape[-2]
    plain = mask is None and queries == keys and (window is None or keys <= window)
    on_cpu = value.dtype == torch.bfloat16 and value.device.type == "cpu"
    if plain and cap is None and not dropout and on_cpu and keys <= SHORT:
        return ShortAttention.apply(query.to(value.dtype), key.to(value.dtype), value, scale)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if cap is None and plain:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, dropout_p=dropout
        )
    if mask is None:
        at = torch.arange(keys, device=query.device)
        distance = at[keys - queries :, None] - at[None]
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if cap is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, dropout_p=dropout
        )
    scores = (query @ key.transpose(-1, -2)).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = cap * torch.tanh(scores / cap)
    # A number, not -inf: a padding token sees nothing, and must not become NaN.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.nn.functional.dropout(scores.softmax(-1).to(value.dtype), dropout)
    return weights @ value


class ShortAttention(torch.autograd.Function):
    """Causal attention of (batch, heads, tokens, head size) by plain products, for short examples in bf16 on a CPU.

    Forward and backward of ten examples of 100 tokens, 9 heads over 3 of 64 numbers, one core with AVX512-BF16: 11 ms,
    where torch's flash kernel takes 35 (two of 512 tokens: 46 and 57), with smaller errors, since scores are fp32 here
    too. In fp32 the kernel itself takes 17 ms, and plain products 15.
    """

    @staticmethod
    def forward(ctx, query, key, value, scale):
        """Give (batch, heads, tokens, head size)."""
        batch, groups, tokens, size = key.shape
        ctx.scale = size**-0.5 if scale is None else scale
        with torch.autocast("cpu", enabled=False):
            rows, keys = query.float().reshape(batch * groups, -1, size), key.float().flatten(0, 1)
            scores = _scaled(rows, keys.transpose(1, 2), ctx.scale)
            scores.view(batch * groups, -1, tokens, tokens).add_(_future()[:tokens, :tokens])
            weights = scores.softmax(-1).to(value.dtype)
            out = (weights @ value.flatten(0, 1)).view(query.shape)
        ctx.save_for_backward(query, key, value, weights)
        return out

    @staticmethod
    def backward(ctx, gradient):
        """Gradients to query, key and value."""
        query, key, value, weights = ctx.saved_tensors
        gradient, rows = (x.reshape(weights.shape[0], -1, x.shape[-1]) for x in (gradient, query))
        to_weights = gradient @ value.flatten(0, 1).transpose(1, 2)
        to_scores = torch.ops.aten._softmax_backward_data(to_weights, weights, -1, weights.dtype)
        to_query = _scaled(to_scores, key.flatten(0, 1), ctx.scale).view(query.shape)
        to_key = _scaled(to_scores.transpose(1, 2), rows, ctx.scale).view(key.shape)
        return to_query, to_key, (weights.transpose(1, 2) @ gradient).view(value.shape), None


def _scaled(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · a @ b, for batches of matrices."""
    return torch.baddbmm(a.new_zeros(1), a, b, beta=0, alpha=scale)


@functools.cache
def _future() -> torch.Tensor:
    return torch.full((SHORT, SHORT), -math.inf).triu(1)


def _over_packs(name: str, kernel: Callable) -> Callable:
    """segment_attention's like that computes packs by `kernel`, and what that can't do by segment_attention."""

    def attention(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=None,
        dropout=0.0,
        cu_seq_lens_q=None,
        max_length_q=None,
        sliding_window=None,
        softcap=None,
        **kwargs,
    ):
        """query, key and value in 16 bit on a CUDA device; see segment_attention."""
        if cu_seq_lens_q is None or _beyond(name, query.shape[-1], softcap, dropout):
            own = {"cu_seq_lens_q": cu_seq_lens_q, "sliding_window": sliding_window, "softcap": softcap}
            return segment_attention(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **own, **kwargs
            )
        _refuse_sinks(module, kwargs)
        # With fp32 weights under autocast the rotary embedding leaves queries and keys in fp32.
        query, key = query.to(value.dtype), key.to(value.dtype)
        options = {"scale": scaling, "dropout": dropout, "window": sliding_window, "cap": softcap}
        return kernel(query, key, value, cu_seq_lens_q, max_length_q, **options), None

    return attention


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, head size) of (1, heads, tokens, head size); a view whose gradient is one too, unlike x[0]'s."""
    return x.transpose(1, 2).squeeze(0)


def _by_triton(query, key, value, ends, longest, scale, window, cap, **beyond):
    tokens, size = query.shape[2:]

    def listed(*layout) -> torch.Tensor:
        """The batch's blocks, for all layers."""
        return _once(ends, layout, lambda: packed_attention_triton.block_list(ends, tokens, *layout))

    rows = (_rows(x) for x in (query, key, value))
    scale = size**-0.5 if scale is None else scale
    return packed_attention_triton.PackedAttention.apply(*rows, listed, scale, window, cap).unsqueeze(0)


def _by_varlen(query, key, value, ends, longest, scale, window, **beyond):
    options = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    kernel = _varlen_attn()
    if query.shape[1] > key.shape[1] and "enable_gqa" in inspect.signature(kernel).parameters:
        options["enable_gqa"] = True  # torch 2.13 asks for it; older ones take grouped heads as they are
    rows = (_rows(x) for x in (query, key, value))
    return kernel(*rows, ends, ends, longest, longest, **options).unsqueeze(0)


def _by_flash_attn(query, key, value, ends, longest, scale, dropout, window, cap):
    options = {"softmax_scale": scale, "dropout_p": dropout, "softcap": cap or 0.0, "causal": True}
    options["window_size"] = (-1 if window is None else window - 1, 0)
    rows = (_rows(x) for x in (query, key, value))
    return _flash_attn()(*rows, ends, ends, longest, longest, **options).unsqueeze(0)


def _by_flex(query, key, value, ends, longest, scale, window, cap, **beyond):
    tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
    blocks = _once(ends, window, lambda: block_mask(ends, tokens, window))
    rows = [torch.nn.functional.pad(x, (0, 0, 0, blocks.shape[-1] - tokens)).contiguous() for x in (query, key, value)]
    for x in rows:
        torch._dynamo.mark_static(x, (1, 3))  # only lengths change, whatever other models this process has seen
    ratio = 1.0 if scale is None else scale * query.shape[-1] ** 0.5
    score = _score(None if math.isclose(ratio, 1) else ratio, cap, query.device)
    out = _compiled_flex()(*rows, score_mod=score, block_mask=blocks, enable_gqa=groups > 1)
    return out[:, :, :tokens].transpose(1, 2).contiguous()


@functools.cache
def _compiled_flex() -> Callable:
    # Each of full and sliding layers, training and evaluation, first and other lengths is a compilation of its own.
    # Uncompiled, FlexAttention would compute every score: "fullgraph" makes an error of that.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex.flex_attention, fullgraph=True)


@functools.cache
def _score(ratio: float | None, cap: float | None, device: torch.device) -> Callable | None:
    """What becomes of a score in FlexAttention: times `ratio`, capped.

    The numbers are in a tensor, as is the mask's window: Python's own would be compiled in, one by one.
    """
    numbers = torch.tensor([ratio or 1.0, cap or 0.0], device=device)

    def scaled(score, batch, head, q, k):
        return score * numbers[0]

    def capped(score, batch, head, q, k):
        return numbers[1] * torch.tanh(score * numbers[0] / numbers[1])

    return capped if cap is not None else scaled if ratio is not None else None


def block_mask(ends: torch.Tensor, tokens: int, window: int | None) -> flex.BlockMask:
    """FlexAttention's mask for causal attention within each example of a packed row, and within `window` if given.

    ends: int32 (examples + 1,), the last one `tokens`. The row is padded to whole blocks; padding sees itself alone.
    Made from the blocks' corners, since torch's create_block_mask would hold tokens × tokens numbers.
    """
    count = -(-tokens // BLOCK)
    at = torch.arange(count * BLOCK, dtype=ends.dtype, device=ends.device)
    example = torch.bucketize(at, ends[1:], right=True) + (at - tokens + 1).clamp(min=0)
    first, last = example[::BLOCK], example[BLOCK - 1 :: BLOCK]
    block = torch.arange(count, device=ends.device)
    below = block[:, None] - block  # blocks from a key's up to a query's
    shared = (below >= 0) & (last >= first[:, None])
    whole = (below > 0) & (first == last[:, None])
    if window is not None:
        shared &= below * BLOCK - (BLOCK - 1) < window
        whole &= below * BLOCK + (BLOCK - 1) < window
        reach = torch.full((1,), window, dtype=ends.dtype, device=ends.device)

    def visible(batch, head, q, k):
        """Whether query q sees key k."""
        seen = (q >= k) & (example[q] == example[k])
        return seen if window is None else seen & (q - k < reach[0])

    def listed(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many key blocks each query block has, and which, those first."""
        order = dense.int().argsort(dim=-1, descending=True, stable=True)
        return dense.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]

    return flex.BlockMask.from_kv_blocks(*listed(shared & ~whole), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=visible)


def _mask(*args, **kwargs):
    """No mask for packed rows, which reach the model without one; transformers' sdpa mask for padded batches."""
    if kwargs.get("attention_mask") is None:
        return None
    return sdpa_mask(*args, **kwargs)


varlen_attention = _over_packs(VARLEN, _by_varlen)
FUNCTIONS = {
    SEGMENTS: segment_attention,
    TRITON: _over_packs(TRITON, _by_triton),
    VARLEN: varlen_attention,
    FA2: _over_packs(FA2, _by_flash_attn),
    FLEX: _over_packs(FLEX, _by_flex),
}
for _name, _function in FUNCTIONS.items():
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _mask)
