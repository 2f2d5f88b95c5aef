"""What a machine's cards will be used for, and why not for more, in sentences: for the terminal and the report.

What is known before any trial. Which kernels a card then runs is found out with a model's own sizes (`trials`).
"""

from adder.core import precision
from adder.core.machine import graphics_cards
from adder.core.machine.graphics_cards import Card, Surroundings

# From here on there are flash kernels and Triton's matmuls; fp8 matmuls; and what this project was run on.
MATMULS, FP8, RUN = (8, 0), (8, 9), (9, 0)


def sentences(found: Surroundings) -> list[str]:
    """All there is to say of a machine."""
    cards = graphics_cards.usable(found)
    if not cards:
        why = graphics_cards.obstacle(found)
        return [
            f"no GPU is used: {why}" if why else f"no GPU is here, as far as torch {found.torch} sees",
            cpu_sentence(),
        ]
    kind = graphics_cards.alike(cards)
    lines = [
        f"GPU {card.index}: {card}{', a MIG slice, of whose memory alone is taken' * is_slice(card)}" for card in cards
    ]
    lines.append(with_what(found))
    if len(cards) > len(kind):
        names = ", ".join(str(card.index) for card in kind)
        lines.append(f"several GPUs: training takes those of one kind, {names}: a step waits for its slowest card")
    return [*lines, *(f"{topic}: {text}" for topic, text in of_card(kind[0], found).items())]


def is_slice(card: Card) -> bool:
    """Whether it is a part of a card (MIG)."""
    return " MIG " in card.name


def cpu_sentence() -> str:
    """What a CPU does."""
    choice = precision.compute_dtype("cpu")
    return f"the CPU computes, in {choice.value}: {choice.reason}"


def with_what(found: Surroundings) -> str:
    """Driver and libraries."""
    driver = f"driver {found.driver}, " if found.driver else ""
    triton = f"Triton {found.triton}" if found.triton else "no Triton"
    return f"with {driver}torch {found.torch} built for {found.built_for}, {triton}"


def of_card(card: Card, found: Surroundings) -> dict[str, str]:
    """By topic what a card is used for, and why not for more."""
    dtype = precision.dtype_of_card(card)
    major, minor = card.capability
    amd = (found.built_for or "").startswith("ROCm")
    topics = {"matmuls": f"in {dtype.value}: {dtype.reason}"}
    if card.capability < MATMULS:
        topics["attention"] = (
            "each example of a pack by torch's own kernels: flash kernels and Triton's matmuls begin with compute "
            f"capability 8.0, and this card has {major}.{minor}"
        )
    elif found.triton is None:
        topics["attention"] = "torch's varlen flash kernel, if a trial finds it right; Adder's own needs Triton"
    else:
        topics["attention"] = "Adder's kernel, if a trial finds it right and faster, else the next of four"
    topics["kernels"] = (
        "each family is tried with a model's sizes when that is first trained here, and used where it is right and pays"
        if found.triton
        else "none, since Triton is not installed: torch's own operations compute what they would"
    )
    topics["LoRA"] = "folded into the base's matmuls, where a trial finds that this pays" + (
        "" if found.triton else "; without Triton that is by torch's own operations"
    )
    topics["fp8"] = _fp8(card, found, amd)
    topics["tried"] = _tried(card, amd)
    return topics


def _fp8(card: Card, found: Surroundings, amd: bool) -> str:
    if found.triton is None:
        return "not used: it needs Triton, which is not installed"
    if amd:
        return "tried before it is used; torch's rowwise matmuls of this format are not expected on an AMD card"
    if card.capability < FP8:
        return "not used: the card has no fp8 matmuls, which begin with compute capability 8.9 (Ada, Hopper, Blackwell)"
    return (
        "tried before it is used, with models of hidden size 2,048 and more; NF4 weights that are too large to be held "
        "in fp8 are taken there one at a time"
    )


def _tried(card: Card, amd: bool) -> str:
    if amd:
        return "this project was never run on an AMD card; what fails is left out, and said"
    if card.capability == RUN:
        return "this project was tuned and run on cards of this generation (H100, H200)"
    return "this project was run on H100 and H200 alone: on this card all depends on its trials, which are made first"
