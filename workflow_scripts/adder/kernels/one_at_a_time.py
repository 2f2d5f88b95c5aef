"""Packs for models that can't keep the examples of one apart: each example goes through the layers by itself."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from adder.kernels.labelled_loss import backbone

BOUNDARIES = "cu_seq_lens_q"
# What TRL's collator says of a pack's examples; none of it is needed for one that comes alone.
ABOUT_EXAMPLES = (BOUNDARIES, "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "position_ids")


def compute_one_at_a_time(model: PreTrainedModel) -> None:
    """From now on `model` computes each example of a pack by itself, and no layer is told of boundaries.

    model: with a backbone that gives `last_hidden_state`. Batches without boundaries stay as they are.
    """
    inner = backbone(model)
    waiting: list[torch.Tensor] = []  # boundaries that reached the model, whose forward may not pass them on

    def keep_boundaries(
        module: torch.nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        boundaries = inputs.get(BOUNDARIES)
        waiting[:] = [] if boundaries is None else [boundaries]
        return args, inputs if boundaries is None else _without_boundaries(inputs)

    if inner is not model:
        model.register_forward_pre_hook(keep_boundaries, with_kwargs=True)
    inner.forward = _example_by_example(inner.forward, waiting)


def _example_by_example(forward: Callable[..., Any], waiting: list[torch.Tensor]) -> Callable[..., Any]:
    def examples_apart(*args: Any, **inputs: Any) -> Any:
        boundaries = inputs.get(BOUNDARIES)
        if boundaries is None and waiting:
            boundaries = waiting.pop()
        if boundaries is None:
            return forward(*args, **inputs)
        lengths: list[int] = boundaries.diff().tolist()
        positional = [_split(value, lengths) for value in args]
        named = {name: _split(value, lengths) for name, value in _without_boundaries(inputs).items()}
        outputs = [
            forward(*(parts[n] for parts in positional), **{name: parts[n] for name, parts in named.items()})
            for n in range(len(lengths))
        ]
        # A new output of the same kind: what else the first one has (a cache, router logits) is of its example alone.
        return type(outputs[0])(last_hidden_state=torch.cat([o.last_hidden_state for o in outputs], dim=1))

    return examples_apart


def _without_boundaries(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in ABOUT_EXAMPLES}


def _split(value: Any, lengths: list[int]) -> Sequence[Any]:
    """An input for each example: tensors of shape (1, tokens, ...) cut, all else as it is."""
    is_row = isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[1] == sum(lengths)
    return value.split(lengths, 1) if is_row else [value] * len(lengths)
