"""Attention over packed examples, none of which sees another, without a mask of length × length.

Packed examples lie one behind the other in a single row; `cu_seq_lens_q` (int32, one more than there are examples)
says where each begins: the "varlen" layout of FlashAttention. Registered with transformers under the names that
`choose_attention` picks from. Sliding windows (Mistral's, every other layer of Gemma's) and capped scores (Gemma 2) are
the layer's own: it hands them to its attention function, and they are honoured here, where a kernel can't by computing
example by example.
"""

import functools
import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.nn.attention import flex_attention as flex
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.kernels import families, packed_attention_triton
from adder.kernels.trials.shapes import head_size
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
# The flash kernels' limits: head sizes are multiples of 8, up to 256. Triton's matmuls: 16 at least.
HEAD_SIZE_MULTIPLE, MAX_HEAD_SIZE, MIN_TRITON_HEAD_SIZE = 8, 256, 16
# FlexAttention's blocks of queries and keys, tokens each way.
FLEX_BLOCK = 128
# Examples of up to so many tokens are attended to by plain matmuls in bf16 on a CPU.
MAX_SHORT_TOKENS = 512
# A kernel is used if its results and gradients on small packs are this close to fp32's, as relative norms: 16-bit
# kernels come to 0.003 to 0.006, and attention that sees too much or too little is off by tenths.
MAX_TRIAL_ERROR = 0.03
# Examples' lengths in the packs that a kernel is tried on. Two, since FlexAttention is compiled for the first length
# and again for a second one, which the planner would otherwise measure as a slow step.
TRIAL_LENGTHS = ([150, 3, 260, 97], [150, 3, 260, 97, 300])


def choose_attention(
    config: PreTrainedConfig, dtype: str, device: str, why_not: Callable[..., str | None] | None = None
) -> Choice:
    """Choose the attention to train with on packs; the value is the name to load the model with.

    config: the model's, of its text part if it has several. dtype: the compute dtype. `why_not`: from a kernel's name,
    config and dtype to the reason why it can't be used on this machine, None where it can; by default this is tried.
    """
    apart = "each example of a pack is attended to by itself, so that none sees another"
    if device == "cpu":
        return Choice(SEGMENTS, f"on a CPU {apart}")
    refused = []
    for name in KERNELS:
        why = _unsupported_by_model(name, config) or (why_not or _fails_on_this_gpu)(name, config, dtype)
        if why is None:
            break
        refused.append({"attention": name, "not_used_because": why})
    else:
        name = SEGMENTS
    because = (
        f"; {refused[0]['attention']}, the first choice, isn't used: {refused[0]['not_used_because']}"
        if refused
        else ""
    )
    return Choice(name, KERNELS.get(name, apart) + because, refused)


def _unsupported_by_model(name: str, config: PreTrainedConfig) -> str | None:
    """Why no machine computes such a model's attention by the kernel `name`; None if it can."""
    cap, dropout = getattr(config, "attn_logit_softcapping", None), getattr(config, "attention_dropout", 0)
    size, value_size = head_size(config), getattr(config, "v_head_dim", None)
    if value_size and value_size != size:
        return f"the model's values are of size {value_size} and its queries of {size}, which this kernel can't"
    return unsupported(name, size, cap, dropout)


def unsupported(name: str, head_size: int, cap: float | None, dropout: float) -> str | None:
    """Why the kernel `name` can't compute such attention; None if it can."""
    if name == VARLEN and cap is not None:
        return "the model caps attention scores, which this kernel can't"
    if name != FA2 and dropout:
        return "the model drops attention scores, which this kernel can't"
    if name in {TRITON, FLEX} and head_size < MIN_TRITON_HEAD_SIZE:
        return f"the model's head size is {head_size}, where this kernel takes {MIN_TRITON_HEAD_SIZE} or more"
    if (name in {VARLEN, FA2} and head_size % HEAD_SIZE_MULTIPLE) or head_size > MAX_HEAD_SIZE:
        return f"the model's head size is {head_size}, where this kernel takes multiples of 8 up to 256"
    return None


def lacks(name: str, dtype: str) -> str | None:
    """What this machine, its card or the compute dtype lacks for the kernel `name`; None where nothing is missing.

    No kernel is tried below compute capability 8.0: flash kernels don't run there, and Triton has given such cards up.
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
    return None


def _fails_on_this_gpu(name: str, config: PreTrainedConfig, dtype: str) -> str | None:
    """Why this machine's GPU doesn't run the kernel, or not rightly; None if it does.

    What `kernels.trials` found, and where nothing was tried yet, what a trial in this process finds.
    """
    lacking = lacks(name, dtype)
    if lacking is not None or families.is_tried(name):
        return lacking or families.why_off(name)
    try:
        error = trial_error(name, config, getattr(torch, dtype), "cuda")
    except Exception as problem:  # compilers and kernels raise what they like
        return f"it failed on a small pack: {type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
    return None if error < MAX_TRIAL_ERROR else f"it was off by {error:.2g} on a small pack"


def trial_error(name: str, config: PreTrainedConfig, dtype: torch.dtype, device: str) -> float:
    """Relative error of a kernel's results and gradients (the worst of all norms) on small packs, against fp32.

    Of the config: heads, their size, cap, and whether there is a window. Leaves torch's global generator alone.
    """
    heads, size, cap = config.num_attention_heads, head_size(config), getattr(config, "attn_logit_softcapping", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    window = getattr(config, "sliding_window", None)
    errors: list[float] = []
    for run in trial_packs(heads, kv_heads, size, cap, bool(window), dtype, device, TRIAL_LENGTHS):
        found, exact = run(ATTENTION_FUNCTIONS[name], dtype), run(segment_attention, torch.float32)
        errors += [((f.float() - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True)]
    return max(errors)


def trial_packs(
    heads: int,
    kv_heads: int,
    size: int,
    cap: float | None,
    has_window: bool,
    dtype: torch.dtype,
    device: str,
    packs: Iterable[list[int]],
) -> Iterator[Callable[[Callable[..., Any], torch.dtype], list[torch.Tensor]]]:
    """Small packs to try attention on: from a function and a dtype to its output and gradients.

    packs: token counts of the examples in each. With and without a window, under autocast as in training.
    """
    generator = torch.Generator().manual_seed(0)

    def random(count: int, tokens: int) -> torch.Tensor:
        """(1, heads, tokens, head size)."""
        return torch.randn(1, count, tokens, size, generator=generator).to(device, dtype)

    for lengths in packs:
        cu_seq_lens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        qkv = [random(count, sum(lengths)) for count in (heads, kv_heads, kv_heads)]
        # Scores of usual size are far below a cap of 50, and don't show it.
        qkv[0] = qkv[0] * (1 if cap is None else 4)
        gradient = random(heads, sum(lengths)).transpose(1, 2)
        for window in (None, 100) if has_window else (None,):
            options = {
                "cu_seq_lens_q": cu_seq_lens,
                "max_length_q": max(lengths),
                "softcap": cap,
                "sliding_window": window,
            }
            yield functools.partial(_output_and_grads, qkv=qkv, gradient=gradient, options=options)


def _output_and_grads(
    function: Callable[..., Any],
    dtype: torch.dtype,
    qkv: list[torch.Tensor],
    gradient: torch.Tensor,
    options: dict[str, Any],
) -> list[torch.Tensor]:
    """An attention function's output and gradients to query, key and value, these in `dtype`.

    Forward is under autocast where `dtype` is the one that `qkv` has already.
    """
    leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
    with torch.autocast(qkv[0].device.type, qkv[0].dtype, enabled=dtype == qkv[0].dtype):
        out = function(None, *leaves, None, **options)[0]
    return [out, *torch.autograd.grad(out, leaves, gradient.to(dtype))]


def _varlen_attn() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _flash_attn() -> Any:
    try:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]  not a dependency
    except ImportError:
        return None
    return flash_attn_varlen_func


T = TypeVar("T")
_BATCH_CACHE = WeakIdKeyDictionary()


def _cached_for_batch(cu_seq_lens: torch.Tensor, key: Hashable, make: Callable[[], T]) -> T:
    """What `make` gives, kept under `key` as long as the batch whose cu_seq_lens these are: all layers share it."""
    kept: dict[Hashable, T] | None = _BATCH_CACHE.get(cu_seq_lens)
    if kept is None:
        kept = _BATCH_CACHE[cu_seq_lens] = {}
    if key not in kept:
        kept[key] = make()
    return kept[key]


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal attention within each example of a packed row; over the rows where nothing is packed.

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
    options = (scaling, dropout, sliding_window, softcap)
    if cu_seq_lens_q is None:
        out = _causal(query, key, value, *options, mask=attention_mask)
    else:
        lengths = _cached_for_batch(cu_seq_lens_q, "lengths", cu_seq_lens_q.diff().tolist)
        examples = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
        out = torch.cat([_causal(q, k, v, *options) for q, k, v in examples], dim=2)
    return out.transpose(1, 2).contiguous(), None


def _refuse_sinks(module: torch.nn.Module, options: dict[str, Any]) -> None:
    if options.get("s_aux") is not None:
        raise UserError(
            f"model.source: {type(module).__name__} has attention sinks, which attention over packed examples can't "
            "compute here; choose a model without"
        )


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    dropout: float,
    window: int | None,
    cap: float | None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of (batch, heads, tokens, head size), the last query at the last key; see segment_attention."""
    queries, keys = query.shape[-2], key.shape[-2]
    causal_only = mask is None and queries == keys and (window is None or keys <= window)
    on_cpu = value.dtype == torch.bfloat16 and value.device.type == "cpu" and value.shape[-1] == query.shape[-1]
    if causal_only and cap is None and not dropout and on_cpu and keys <= MAX_SHORT_TOKENS:
        return ShortAttention.apply(query.to(value.dtype), key.to(value.dtype), value, scale)
    group_size = query.shape[1] // key.shape[1]
    if group_size > 1:
        key, value = key.repeat_interleave(group_size, dim=1), value.repeat_interleave(group_size, dim=1)
    if cap is None and causal_only:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, dropout_p=dropout
        )
    if mask is None:
        position = torch.arange(keys, device=query.device)
        distance = position[keys - queries :, None] - position[None]
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if cap is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, dropout_p=dropout
        )
    scores = (query @ key.transpose(-1, -2)).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = cap * torch.tanh(scores / cap)
    # Finite, not -inf: a padding token sees nothing, and must not become NaN.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.nn.functional.dropout(scores.softmax(-1).to(value.dtype), dropout)
    return weights @ value


class ShortAttention(torch.autograd.Function):
    """Causal attention of (batch, heads, tokens, head size) by plain matmuls, for short examples in bf16 on a CPU.

    Forward and backward of ten examples of 100 tokens, 9 heads over 3 of size 64, one core with AVX512-BF16: 11 ms,
    where torch's flash kernel takes 35 (two of 512 tokens: 46 and 57), with smaller errors, since scores are fp32 here
    too. In fp32 the kernel itself takes 17 ms, and plain matmuls 15.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Give (batch, heads, tokens, head size)."""
        batch, kv_heads, tokens, head_size = key.shape
        ctx.scale = head_size**-0.5 if scale is None else scale
        with torch.autocast("cpu", enabled=False):
            rows, keys = query.float().reshape(batch * kv_heads, -1, head_size), key.float().flatten(0, 1)
            scores = _scaled(rows, keys.transpose(1, 2), ctx.scale)
            scores.view(batch * kv_heads, -1, tokens, tokens).add_(_causal_bias()[:tokens, :tokens])
            weights = scores.softmax(-1).to(value.dtype)
            out = (weights @ value.flatten(0, 1)).view(query.shape)
        ctx.save_for_backward(query, key, value, weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients to query, key and value."""
        query, key, value, weights = ctx.saved_tensors
        grad, rows = (x.reshape(weights.shape[0], -1, x.shape[-1]) for x in (grad, query))
        d_weights = grad @ value.flatten(0, 1).transpose(1, 2)
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        d_query = _scaled(d_scores, key.flatten(0, 1), ctx.scale).view(query.shape)
        d_key = _scaled(d_scores.transpose(1, 2), rows, ctx.scale).view(key.shape)
        return d_query, d_key, (weights.transpose(1, 2) @ grad).view(value.shape), None


def _scaled(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · a @ b, for batches of matrices."""
    return torch.baddbmm(a.new_zeros(1), a, b, beta=0, alpha=scale)


@functools.cache
def _causal_bias() -> torch.Tensor:
    """-inf above the diagonal, 0 elsewhere: (MAX_SHORT_TOKENS, MAX_SHORT_TOKENS), fp32."""
    return torch.full((MAX_SHORT_TOKENS, MAX_SHORT_TOKENS), -math.inf).triu(1)


def _for_packs(
    name: str, kernel: Callable[..., torch.Tensor]
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """segment_attention's like that computes packs by `kernel`, and what that can't do by segment_attention."""

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query, key and value in 16 bit on a CUDA device; see segment_attention."""
        other_values = value.shape[-1] != query.shape[-1]
        if cu_seq_lens_q is None or other_values or unsupported(name, query.shape[-1], softcap, dropout):
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


def _tokens_first(x: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, head size) of (1, heads, tokens, head size); a view whose gradient is one too, unlike x[0]'s."""
    return x.transpose(1, 2).squeeze(0)


def _run_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    longest: int | None,
    scale: float | None,
    dropout: float,
    window: int | None,
    cap: float | None,
) -> torch.Tensor:
    tokens, size = query.shape[2:]

    def schedule(*layout: Any) -> torch.Tensor:
        """The batch's blocks, for all layers."""
        return _cached_for_batch(
            cu_seq_lens, layout, lambda: packed_attention_triton.block_schedule(cu_seq_lens, tokens, *layout)
        )

    rows = (_tokens_first(x) for x in (query, key, value))
    scale = size**-0.5 if scale is None else scale
    return packed_attention_triton.PackedAttention.apply(*rows, schedule, scale, window, cap).unsqueeze(0)


def _run_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    longest: int | None,
    scale: float | None,
    dropout: float,
    window: int | None,
    cap: float | None,
) -> torch.Tensor:
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    kernel = _varlen_attn()
    if query.shape[1] > key.shape[1] and "enable_gqa" in inspect.signature(kernel).parameters:
        options["enable_gqa"] = True  # torch 2.13 asks for it; older ones take grouped heads as they are
    rows = (_tokens_first(x) for x in (query, key, value))
    return kernel(*rows, cu_seq_lens, cu_seq_lens, longest, longest, **options).unsqueeze(0)


def _run_flash_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    longest: int | None,
    scale: float | None,
    dropout: float,
    window: int | None,
    cap: float | None,
) -> torch.Tensor:
    options: dict[str, Any] = {"softmax_scale": scale, "dropout_p": dropout, "softcap": cap or 0.0, "causal": True}
    options["window_size"] = (-1 if window is None else window - 1, 0)
    rows = (_tokens_first(x) for x in (query, key, value))
    return _flash_attn()(*rows, cu_seq_lens, cu_seq_lens, longest, longest, **options).unsqueeze(0)


def _run_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    longest: int | None,
    scale: float | None,
    dropout: float,
    window: int | None,
    cap: float | None,
) -> torch.Tensor:
    tokens, group_size = query.shape[2], query.shape[1] // key.shape[1]
    blocks = _cached_for_batch(cu_seq_lens, window, lambda: flex_block_mask(cu_seq_lens, tokens, window))
    rows = [torch.nn.functional.pad(x, (0, 0, 0, blocks.shape[-1] - tokens)).contiguous() for x in (query, key, value)]
    for x in rows:
        torch._dynamo.mark_static(x, [1, 3])  # only lengths change, whatever other models this process has seen
    ratio = 1.0 if scale is None else scale * query.shape[-1] ** 0.5
    score = _flex_score_mod(None if math.isclose(ratio, 1) else ratio, cap, query.device)
    out = _compiled_flex()(*rows, score_mod=score, block_mask=blocks, enable_gqa=group_size > 1)
    return out[:, :, :tokens].transpose(1, 2).contiguous()


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    # Each of full and sliding layers, training and evaluation, first and other lengths is a compilation of its own.
    # Uncompiled, FlexAttention would compute every score: "fullgraph" makes an error of that.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex.flex_attention, fullgraph=True)


@functools.cache
def _flex_score_mod(ratio: float | None, cap: float | None, device: torch.device) -> Callable[..., torch.Tensor] | None:
    """What becomes of a score in FlexAttention: times `ratio`, capped.

    The factors are in a tensor, as is the mask's window: Python's own would be compiled in, one by one.
    """
    factors = torch.tensor([ratio or 1.0, cap or 0.0], device=device)

    def scaled(
        score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        return score * factors[0]

    def capped(
        score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        return factors[1] * torch.tanh(score * factors[0] / factors[1])

    return capped if cap is not None else scaled if ratio is not None else None


def flex_block_mask(cu_seq_lens: torch.Tensor, tokens: int, window: int | None) -> flex.BlockMask:
    """FlexAttention's mask for causal attention within each example of a packed row, and within `window` if given.

    cu_seq_lens: int32 (examples + 1,), the last one `tokens`. The row is padded to a multiple of FLEX_BLOCK; padding
    sees itself alone. Made from the blocks' corners, since torch's create_block_mask would hold tokens × tokens values.
    """
    block_count = -(-tokens // FLEX_BLOCK)
    position = torch.arange(block_count * FLEX_BLOCK, dtype=cu_seq_lens.dtype, device=cu_seq_lens.device)
    example = torch.bucketize(position, cu_seq_lens[1:], right=True) + (position - tokens + 1).clamp(min=0)
    first, last = example[::FLEX_BLOCK], example[FLEX_BLOCK - 1 :: FLEX_BLOCK]
    block = torch.arange(block_count, device=cu_seq_lens.device)
    blocks_before = block[:, None] - block  # blocks from a key's up to a query's
    any_visible = (blocks_before >= 0) & (last >= first[:, None])
    full = (blocks_before > 0) & (first == last[:, None])
    window_tensor = None
    if window is not None:
        any_visible &= blocks_before * FLEX_BLOCK - (FLEX_BLOCK - 1) < window
        full &= blocks_before * FLEX_BLOCK + (FLEX_BLOCK - 1) < window
        window_tensor = torch.full((1,), window, dtype=cu_seq_lens.dtype, device=cu_seq_lens.device)

    def visible(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Whether query q sees key k."""
        seen = (q >= k) & (example[q] == example[k])
        return seen if window_tensor is None else seen & (q - k < window_tensor[0])

    def block_lists(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many key blocks each query block has, and which, those first."""
        order = dense.int().argsort(dim=-1, descending=True, stable=True)
        return dense.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]

    return flex.BlockMask.from_kv_blocks(
        *block_lists(any_visible & ~full), *block_lists(full), BLOCK_SIZE=FLEX_BLOCK, mask_mod=visible
    )


def _mask_for_packs(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """No mask for packed rows, which reach the model without one; transformers' sdpa mask for padded batches."""
    if kwargs.get("attention_mask") is None:
        return None
    return sdpa_mask(*args, **kwargs)


varlen_attention = _for_packs(VARLEN, _run_varlen)
ATTENTION_FUNCTIONS = {
    SEGMENTS: segment_attention,
    TRITON: _for_packs(TRITON, _run_triton),
    VARLEN: varlen_attention,
    FA2: _for_packs(FA2, _run_flash_attn),
    FLEX: _for_packs(FLEX, _run_flex),
}
for _name, _function in ATTENTION_FUNCTIONS.items():
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _mask_for_packs)
