"""Which precision the frozen base's matmuls have: 16 bits, or fp8 after a step on the user's own packs has tried it.

`auto` takes fp8 only where all of these hold:
- it can be had: `lacks` says what is missing;
- it is faster: the hidden size is at least LEAST_WIDTH;
- it changes little: over a few packs, before training, the loss is within LOSS_TOLERANCE of bf16's and the gradient of
  the adapter points where bf16's does, with a cosine of at least LEAST_COSINE.
Where `fp8` is set the same step is made, and what it finds is only said.

The other side of the comparison is PEFT's own layers, which read the base's own weights: NF4 ones, dequantised in each
matmul, or 16-bit ones. So fp8 weights and 16-bit copies of NF4 weights, two bytes a number either way, are never held
at once: with an 8B model NF4's 6 GB and 14 GB in fp8, or in 16 bits if fp8 isn't taken. In both steps all layers
recompute, so that a step takes little more (by count some 6 GB for 8,192 tokens). Where fp8 weights would take too much
of the free memory, as those of an 8B model do on a card of 24 GB, NF4 ones stay in NF4 and go to fp8 a layer at a time,
in memory that all layers share (by count 0.6 GB), and others aren't made; where a step runs out of memory fp8 isn't
taken.

B is zero before training (by most initialisations), and with it the gradient of A, so it is B's that are compared.
Both are made of the same activations and gradients of outputs: nothing that fp8 changes is missing from B's.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from adder.core import hardware
from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.labels import IGNORE_INDEX
from adder.core.rng import undisturbed
from adder.kernels import families, tiles
from adder.kernels.fused_lora import attach as fused_lora
from adder.kernels.fused_lora.weights import is_4bit
from adder.kernels.labelled_loss import mean_loss
from adder.kernels.trials.trial import in_words
from adder.kernels.triton_utils import triton
from adder.training.base_model import bare_model
from adder.training.packed_dataset import PackedExamples
from adder.training.preflight import as_in_training

# Share of the free memory that weights in fp8 may take where fp8 is set; `auto` leaves as much room to activations as
# it does beside 16-bit values (fused_lora.HELD_SHARE).
FP8_SHARE = 0.6
# Hidden size from which on fp8 is taken to be faster: what products gain grows with its square, what quantising and
# adding LoRA's share cost grows with it, and small products wait for launches anyhow. At 4,096 a step takes three
# quarters of its time in bf16 (README); 2,048 was not timed.
LEAST_WIDTH = 2048
# Nats a token: a hundredth more or less perplexity.
LOSS_TOLERANCE = 0.01
# At most 2 % of the square of the gradient in fp8 (1 - 0.99²) then points elsewhere than bf16's. The noise that the
# choice of examples gives a gradient is as large as the gradient itself at the critical batch size, and larger below
# it (McCandlish et al. 2018, arXiv:1812.06162).
LEAST_COSINE = 0.99
# Tokens of the packs that are tried, about: a second or two for an 8B model on an H100, by its speeds in training.
TRIED_TOKENS = 8192


class MatmulChoices(NamedTuple):
    """Precision of the frozen base's matmuls, "bf16" (the model's own 16 bits) or "fp8", and how LoRA is computed."""

    frozen_products: Choice
    lora_products: Choice


@dataclass(frozen=True)
class Parity:
    """A step in fp8 beside the same in bf16: losses in nats a token, gradients of all LoRA pairs as one vector.

    tokens: that carry loss. compared: "B", or "A and B" where A's gradients are not all zero. lowest_cosine: among the
    kinds of layer, with its name (that of k_proj in every layer together, say).
    """

    tokens: int
    loss: float
    reference_loss: float
    gradient_cosine: float
    gradient_norm_ratio: float
    compared: Literal["B", "A and B"]
    lowest_cosine: float
    lowest_layer: str

    @property
    def loss_difference(self) -> float:
        """What fp8 adds to the loss."""
        return self.loss - self.reference_loss

    @property
    def within(self) -> bool:
        """Whether both are within the tolerances."""
        return abs(self.loss_difference) <= LOSS_TOLERANCE and self.gradient_cosine >= LEAST_COSINE


def attach_fused_lora(
    model: PeftModel,
    dtype: str,
    wanted: Literal["auto", "bf16", "fp8"],
    packs: PackedExamples,
    kept: Choice | None = None,
) -> MatmulChoices:
    """Fuse LoRA into the base's matmuls (see kernels.fused_lora), in the precision that is set or found to be best.

    `wanted`: train.frozen_products. `kept`: what an earlier start of the same training chose, which holds where it
    still can be had. The precision has the figures of the comparison as alternatives. The model's parameters and all
    random numbers stay as they were. Raises UserError where fp8 is set and can't be had.
    """
    share = fused_lora.HELD_SHARE if wanted == "auto" else FP8_SHARE
    missing = lacks(model, dtype, share)
    hold = fp8_bytes(model) <= share * hardware.free_memory("cuda")
    if wanted == "fp8" and missing:
        raise UserError(f"train.frozen_products: 'fp8' needs {missing}; use 'bf16' or 'auto'")
    choice = None if missing else kept
    against = _reason_against(model, wanted, missing)
    if choice is None and against:
        choice = Choice("bf16", against)
    in_16_bits = choice is not None and choice.value == "bf16"
    fused = fused_lora.attach_where_it_pays(model, dtype, "bf16") if in_16_bits else _attach_fp8(model, dtype, hold)
    if choice is None:
        choice = _tried(model, wanted, packs, fused)
        if choice.value == "bf16":
            fused_lora.detach(model)
            torch.cuda.empty_cache()  # what fp8 held is free for 16-bit values
            fused = fused_lora.attach_where_it_pays(model, dtype, "bf16")
    return MatmulChoices(choice, fused)


def _attach_fp8(model: PeftModel, dtype: str, hold: bool) -> Choice:
    """Fused in fp8; PEFT's own layers, with what was raised, where making the weights fails."""
    try:
        return fused_lora.attach_where_it_pays(model, dtype, "fp8", hold)
    except Exception as problem:  # of kernels and drivers, which raise what they like
        fused_lora.detach(model)
        return Choice("PEFT", in_words(problem))


def lacks(model: PeftModel, dtype: str, share: float) -> str | None:
    """What fp8 matmuls need and don't have here; None where they can be had.

    `dtype`: of the other matmuls. `share`: of the free memory that the weights in fp8 may take.
    """
    card = tiles.card_of(torch.device("cuda", torch.cuda.current_device()))
    if not tiles.may_have_fp8(card):
        kind = "AMD's" if card.vendor == "amd" else "NVIDIA's"
        found = f"{card.capability[0]}.{card.capability[1]}"
        return f"an NVIDIA GPU of compute capability 8.9 or later (Ada); this one is {kind}, {found}"
    if card.capability < (9, 0) and not families.is_tried("fp8"):
        return "a trial of its kernels on this card, which wasn't made"
    if dtype != "bfloat16":
        return f"train.compute_dtype: bfloat16, not {dtype}"
    if triton is None:
        return "Triton, which is not installed here"
    if why := families.why_off("fp8"):
        return f"kernels that can be trusted on this card, and of these it is said: {why}"
    needed, free = fp8_bytes(model), hardware.free_memory("cuda")
    if needed > share * free and not _all_4bit(model):
        return f"{needed / 2**30:.1f} GiB for the weights, at most {share:.0%} of the {free / 2**30:.1f} free"
    return None


def _bases(model: PeftModel) -> list[torch.nn.Linear]:
    """The linear layers that have LoRA."""
    layers = [m.get_base_layer() for m in model.get_base_model().modules() if isinstance(m, LoraLayer)]
    return [layer for layer in layers if isinstance(layer, torch.nn.Linear)]


def fp8_bytes(model: PeftModel) -> int:
    """What the weights under LoRA take in fp8, in both directions."""
    return 2 * sum(base.in_features * base.out_features for base in _bases(model))


def _all_4bit(model: PeftModel) -> bool:
    """Whether these weights are all in 4 bits, and can be taken to fp8 one at a time."""
    return all(is_4bit(base) for base in _bases(model))


def _reason_against(model: PeftModel, wanted: str, missing: str | None) -> str | None:
    """Why fp8 isn't even tried; None where it is."""
    if wanted == "bf16":
        return "as set"
    if missing:
        return f"as train.compute_dtype says, since fp8 needs {missing}"
    width = model.config.get_text_config().hidden_size
    if wanted == "auto" and width < LEAST_WIDTH:
        return f"products as small as these gain nothing in fp8: hidden size {width:,}, where {LEAST_WIDTH:,} is needed"
    return None


def _tried(model: PeftModel, wanted: str, packs: PackedExamples, fused: Choice) -> Choice:
    """The choice after a step with the fp8 matmuls that `fused` tells of."""
    if fused.value != "folded, fp8":
        return Choice("bf16", f"nothing here can be multiplied in fp8: {fused.reason}")
    numbers = _some_packs(packs)
    try:
        found = parity(model, _batch(packs, numbers, model.device))
    except torch.OutOfMemoryError:
        why = "there was not enough memory to compare it with bf16"
        return Choice("fp8", f"as set; {why}") if wanted == "fp8" else Choice("bf16", f"fp8 isn't taken: {why}")
    except UserError:
        raise
    except Exception as problem:  # of kernels and libraries, at sizes that no trial had
        return Choice("bf16", f"fp8 isn't taken, since a step in it failed: {in_words(problem)}")
    within = found.within
    if wanted == "fp8":
        verdict = "as set" if within else "as set, though it changes more than auto would allow"
    else:
        verdict = "faster, and it changes little" if within else "fp8 would be faster, but it changes too much"
    value = "fp8" if within or wanted == "fp8" else "bf16"
    return Choice(value, f"{verdict}: {_in_words(found, len(numbers))}", _rows(found))


def _in_words(found: Parity, packs: int) -> str:
    which = "B (those of A are zero at first)" if found.compared == "B" else found.compared
    return (
        f"before training {packs} of the packs, {found.tokens:,} tokens that carry loss, have a loss of "
        f"{found.loss:.4f} nats in fp8 and {found.reference_loss:.4f} in bf16 "
        f"({found.loss_difference:+z.4f}, at most {LOSS_TOLERANCE} either way is allowed), and the gradients of "
        f"{which} a cosine of {found.gradient_cosine:.4f} to bf16's (at least {LEAST_COSINE})"
    )


def _rows(found: Parity) -> list[dict[str, Any]]:
    """The comparison as a table: bf16, fp8, and what is allowed."""
    shown = ("loss", "loss_difference", "gradient_cosine", "gradient_norm_ratio", "lowest_cosine", "lowest_layer")
    share = abs(found.loss_difference) / found.reference_loss
    return [
        {"products": "bf16", "loss": found.reference_loss},
        {
            "products": "fp8",
            **{name: getattr(found, name) for name in shown},
            "loss_difference_share": share,
            "within": found.within,
        },
        {"products": "allowed", "loss_difference": LOSS_TOLERANCE, "gradient_cosine": LEAST_COSINE},
    ]


def _some_packs(packs: PackedExamples) -> list[int]:
    """Numbers of packs of about TRIED_TOKENS tokens together, evenly spaced from the first on."""
    sizes = [int(pack.sum()) for pack in packs.seq_lengths]
    count = min(len(sizes), max(1, TRIED_TOKENS // max(sizes)))
    return np.linspace(0, len(sizes) - 1, count).round().astype(int).tolist()


def _batch(packs: PackedExamples, numbers: list[int], device: torch.device) -> dict[str, Any]:
    """Packs as one row, as TRL's collator joins them in training."""
    joined = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([packs.pack(n) for n in numbers])
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in joined.items()}


def parity(model: PeftModel, batch: dict[str, Any]) -> Parity:
    """Compare a step by the attached layers with the same step by PEFT's own: does fp8 change where training goes?

    batch: what `labelled_loss.labelled_losses` takes. Dropout is off and all layers recompute; nothing is stepped, no
    gradient is left behind. Raises UserError where there is no gradient to compare.
    """
    loss, found = _step(model, batch)
    with fused_lora.suspended(model):
        reference, expected = _step(model, batch)
    kinds: dict[str, list[str]] = {}
    for name, gradient in expected.items():
        if gradient.any():
            kinds.setdefault(_kind(name), []).append(name)
    if not kinds:
        raise UserError(
            "train.frozen_products: the packs give the adapter no gradient to compare fp8 with bf16 by, and nothing to "
            "learn from; look at tokenize.loss_on, lengths.truncate and train.target_modules"
        )
    names = [name for own in kinds.values() for name in own]
    cosines = {kind: _cosine(_vector(found, own), _vector(expected, own)) for kind, own in kinds.items()}
    lowest = min(cosines, key=lambda kind: cosines[kind])
    all_found, all_expected = _vector(found, names), _vector(expected, names)
    return Parity(
        tokens=int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()),
        loss=loss,
        reference_loss=reference,
        gradient_cosine=_cosine(all_found, all_expected),
        gradient_norm_ratio=(all_found.norm() / all_expected.norm()).item(),
        compared="B" if all("lora_B" in name for name in names) else "A and B",
        lowest_cosine=cosines[lowest],
        lowest_layer=lowest,
    )


def _step(model: PeftModel, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and all LoRA gradients, fp32 by name."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
    device = model.device.type
    with undisturbed(), as_in_training(model, model.supports_gradient_checkpointing):
        with torch.enable_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = mean_loss(bare_model(model), batch)
        gradients = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    return loss.item(), {name: gradient.float() for name, gradient in zip(named, gradients, strict=True)}


def _kind(name: str) -> str:
    """ "model.layers.0.self_attn.q_proj.lora_A.default.weight" is of kind "q_proj"."""
    return name.split(".lora_")[0].rpartition(".")[2]


def _vector(gradients: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in names])


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()
