"""A weight's shape, and how alike two tensors are, for the tests of fp8."""

import torch

# The tiny models of fused_lora_cases, with sizes that suit fp8 matmuls: 16 divides each.
SHAPE = {"hidden_size": 64, "intermediate_size": 144}


def cosine(found: dict, expected: dict) -> float:
    a, b = (torch.cat([grads[name].flatten() for name in sorted(grads)]) for grads in (found, expected))
    return (a @ b / (a.norm() * b.norm())).item()
