"""Attention over packed examples, none of which sees another, without a mask of length × length.

Packed examples lie one behind the other in a single row; `cu_seq_lens_q` (int32, one more than there are examples)
says where each begins. Registered with transformers under the name that `implementation` returns. Sliding windows
(Mistral's, every other layer of Gemma's) and capped scores (Gemma 2) are the layer's own: it hands them to its
attention function, and they are honoured here, where the kernel can't by computing example by example.
"""

import inspect

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from adder.errors import UserError

SEGMENTS = "adder_segments"
VARLEN = "adder_varlen"
# The flash kernel's limits: head sizes are multiples of 8, up to 256.
HEAD_STEP, LARGEST_HEAD = 8, 256


def implementation(device: str, dtype: str) -> str:
    """Return the name of the attention to load the model with for training on packs.

    CPU: one sdpa call an example. CUDA: torch's own varlen flash kernel where it runs (16-bit, Ampere or later, torch
    2.11 on); "sdpa" with transformers' block-diagonal mask elsewhere.
    """
    if device == "cpu":
        return SEGMENTS
    capable = torch.cuda.get_device_capability() >= (8, 0) and dtype in {"bfloat16", "float16"}
    return VARLEN if capable and _varlen_attn() is not None else "sdpa"


def _varlen_attn():
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def without_kernel(config, dropout: float | None = None) -> str | None:
    """Why a model's layers can't use the varlen kernel and are computed example by example; None where they can.

    config: the text model's. dropout: of attention scores, by default the configuration's.
    """
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps attention scores, which the varlen kernel can't"
    if size % HEAD_STEP or size > LARGEST_HEAD:
        return f"its heads have {size} numbers, where the varlen kernel takes multiples of 8 up to 256"
    if getattr(config, "attention_dropout", 0) if dropout is None else dropout:
        return "it drops attention scores, which the varlen kernel can't"
    return None


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
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    options = {"scale": scaling, "dropout": dropout, "window": sliding_window, "cap": softcap}
    if cu_seq_lens_q is None:
        out = _causal(query, key, value, mask=attention_mask, **options)
    else:
        sizes = cu_seq_lens_q.diff().tolist()
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


def varlen_attention(
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
    """As segment_attention, by torch's varlen flash kernel; query, key and value in 16 bit on a CUDA device.

    What the kernel can't do is left to segment_attention: capped scores, dropout, odd head sizes (`without_kernel`).
    """
    size = query.shape[-1]
    if cu_seq_lens_q is None or softcap is not None or dropout or size % HEAD_STEP or size > LARGEST_HEAD:
        own = {"cu_seq_lens_q": cu_seq_lens_q, "sliding_window": sliding_window, "softcap": softcap}
        return segment_attention(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **own, **kwargs
        )
    _refuse_sinks(module, kwargs)
    groups = query.shape[1] // key.shape[1]
    options = {"scale": scaling, "window_size": (-1 if sliding_window is None else sliding_window - 1, 0)}
    if groups > 1 and "enable_gqa" in inspect.signature(_varlen_attn()).parameters:
        options["enable_gqa"] = True  # torch 2.13 asks for it; older ones take grouped heads as they are
    # With fp32 weights under autocast the rotary embedding leaves queries and keys in fp32.
    q, k, v = (x.transpose(1, 2)[0].to(value.dtype) for x in (query, key, value))
    out = _varlen_attn()(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **options)
    return out.unsqueeze(0), None


def _mask(*args, **kwargs):
    """No mask for packed rows, which reach the model without one; transformers' sdpa mask for padded batches."""
    if kwargs.get("attention_mask") is None:
        return None
    return sdpa_mask(*args, **kwargs)


for _name, _function in ((SEGMENTS, segment_attention), (VARLEN, varlen_attention)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _mask)
