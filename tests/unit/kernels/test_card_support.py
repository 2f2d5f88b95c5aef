"""What is said of machines as people have them."""

import re

import pytest

from adder.core.machine.graphics_cards import Card, Surroundings
from adder.kernels import card_support

GIB = 2**30
CARDS = {
    "T4": ("Tesla T4", (7, 5), 15),
    "3090": ("NVIDIA GeForce RTX 3090", (8, 6), 24),
    "4090": ("NVIDIA GeForce RTX 4090", (8, 9), 24),
    "5090": ("NVIDIA GeForce RTX 5090", (12, 0), 32),
    "A100": ("NVIDIA A100-SXM4-80GB", (8, 0), 80),
    "H100": ("NVIDIA H100 80GB HBM3", (9, 0), 80),
    "MIG": ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", (9, 0), 10),
    "MI300": ("AMD Instinct MI300X", (9, 4), 192),
}


def machine(*names: str, built_for="CUDA 12.8", triton: str | None = "3.8.0") -> Surroundings:
    cards = tuple(
        Card(index, name, capability, size * GIB)
        for index, (name, capability, size) in enumerate(CARDS[name] for name in names)
    )
    return Surroundings("2.13.0", built_for, cards, driver="570.124.06", triton=triton)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("T4", ("in float16", "gradient scaler", "each example of a pack by torch's own", "no fp8 matmuls", "alone")),
        ("3090", ("in bfloat16", "attention: Adder's kernel", "fp8: not used: the card has no fp8 matmuls")),
        ("4090", ("in bfloat16", "fp8: tried before it is used", "taken there one at a time")),
        ("5090", ("compute capability 12.0", "fp8: tried before", "all depends on its trials")),
        ("A100", ("compute capability 8.0", "fp8: not used")),
        ("H100", ("fp8: tried before", "tuned and run on cards of this generation")),
        ("MIG", ("a MIG slice",)),
    ],
)
def test_each_card_has_its_sentences(name, words):
    text = "\n".join(card_support.sentences(machine(name)))
    assert all(word in text for word in words), text
    assert "with driver 570.124.06, torch 2.13.0 built for CUDA 12.8, Triton 3.8.0" in text
    assert not re.search(r"  |\bNone\b|;;|\.\.", text)


def test_amds_card_is_said_to_be_untried():
    text = "\n".join(card_support.sentences(machine("MI300", built_for="ROCm 6.4")))
    assert "never run on an AMD card" in text and "fp8: tried before it is used" in text


def test_without_triton_torch_computes():
    text = "\n".join(card_support.sentences(machine("4090", triton=None)))
    assert "kernels: none, since Triton is not installed" in text and "fp8: not used: it needs Triton" in text


def test_of_unequal_cards_those_of_one_kind_are_named():
    lines = card_support.sentences(machine("T4", "3090", "3090"))
    assert lines[:3] == [
        "GPU 0: Tesla T4 (15 GiB, compute capability 7.5)",
        "GPU 1: NVIDIA GeForce RTX 3090 (24 GiB, compute capability 8.6)",
        "GPU 2: NVIDIA GeForce RTX 3090 (24 GiB, compute capability 8.6)",
    ]
    assert "several GPUs: training takes those of one kind, 1, 2: a step waits for its slowest card" in lines
    assert any("matmuls: in bfloat16: NVIDIA GeForce RTX 3090" in line for line in lines)


def test_without_a_gpu_the_cpu_computes_and_it_is_said_why():
    lines = card_support.sentences(Surroundings("2.13.0+cpu", None))
    assert lines[0] == "no GPU is here, as far as torch 2.13.0+cpu sees" and lines[1].startswith("the CPU computes, in")
    lines = card_support.sentences(Surroundings("2.13.0+cpu", None, driver="550.54.15"))
    assert lines[0].startswith("no GPU is used: an NVIDIA driver (550.54.15) is here, but torch")
