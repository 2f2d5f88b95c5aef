"""Attention over packed examples, none of which sees another, without a mask of length × length.

Packed examples lie one behind the other in a single row; `cu_seq_lens_q` (int32, one more than there are examples)
says where each begins. Registered with transformers under the name that `implementation` returns.
"""

import inspect

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

SEGMENTS = "adder_segments"
VARLEN = "adder_varlen"


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


def segment_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs):
    """Causal attention within each example of a packed row; transformers' sdpa where nothing is packed.

    query: (1, heads, tokens, head size); key and value: (1, key-value heads, tokens, head size). Returns (1, tokens,
    heads, head size) and None, as transformers' attention functions do.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    sizes = cu_seq_lens_q.diff().tolist()
    parts = [
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        for q, k, v in zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def varlen_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **kwargs
):
    """As segment_attention, by torch's varlen flash kernel; query, key and value in 16 bit on a CUDA device."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    groups = query.shape[1] // key.shape[1]
    options = {"scale": scaling, "window_size": (-1, 0)}
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
