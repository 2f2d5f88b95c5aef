"""Which cards can be used, and one sentence where they can't: by machines as people have them."""

from dataclasses import replace

import pytest
import torch

from adder.core import hardware
from adder.core.errors import UserError
from adder.core.machine import graphics_cards
from adder.core.machine.graphics_cards import Card, Surroundings
from adder.core.progress import Progress
from adder.core.stage_spec import Context, Runtime

T4 = Card(0, "Tesla T4", (7, 5), 15 * 2**30)
RTX_5090 = Card(0, "NVIDIA GeForce RTX 5090", (12, 0), 32 * 2**30)
CUDA = Surroundings("2.13.0+cu128", "CUDA 12.8", driver="570.124.06", triton="3.8.0")
CPU_BUILD = Surroundings("2.13.0+cpu", None)
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
INSUFFICIENT = (
    "Error 35: CUDA driver version is insufficient for CUDA runtime version (cudaErrorInsufficientDriver) Unexpected "
    "error from cudaGetDeviceCount()."
)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (CPU_BUILD, None),
        (replace(CUDA, driver=None, error="Found no NVIDIA driver on your system."), None),
        (
            replace(CPU_BUILD, driver="550.54.15"),
            "torch 2.13.0+cpu is built for CPUs alone; install one",
        ),
        (replace(CPU_BUILD, other="mps"), "Apple's GPU (MPS) can't be used"),
        (replace(CPU_BUILD, other="xpu"), "Intel's GPU (XPU) can't be used"),
        (replace(CUDA, driver="470.57", error=TOO_OLD), "NVIDIA's driver 470.57 is too old for torch 2.13.0+cu128"),
        (replace(CUDA, error=INSUFFICIENT), "install a newer driver, or a torch built for the CUDA version"),
        (replace(CUDA, visible="0", error=TOO_OLD), "is too old for torch"),
        (replace(CUDA, visible=""), "CUDA_VISIBLE_DEVICES is '', which hides every GPU"),
        (replace(CUDA, visible="-1"), "CUDA_VISIBLE_DEVICES is '-1', which hides every GPU; unset it"),
        (replace(CUDA, visible="7"), "CUDA_VISIBLE_DEVICES is '7', which names no GPU that is here"),
        (replace(CUDA, visible="MIG-0a1b", error="No CUDA GPUs are available"), "names no GPU that is here"),
        (replace(CUDA, visible="GPU-ffff", error="No CUDA GPUs are available"), "`nvidia-smi -L` lists"),
        (
            replace(CUDA, error="CUDA initialization: forward compatibility was attempted on non supported HW"),
            "don't fit",
        ),
        (replace(CUDA, error="CUDA unknown error"), "sees no GPU: CUDA unknown error"),
        (replace(CUDA, cards=(RTX_5090,), code_for=("sm_80", "sm_90")), "has no code for NVIDIA GeForce RTX 5090"),
        (replace(CUDA, cards=(T4,), code_for=("sm_75", "sm_80")), None),
    ],
)
def test_what_keeps_a_gpu_from_being_used_is_said(found, words):
    why = graphics_cards.obstacle(found)
    assert why is None if words is None else words in str(why)


@pytest.mark.parametrize(
    ("capability", "code", "has"),
    [
        ((7, 5), ("sm_75", "sm_80"), True),
        ((8, 9), ("sm_80", "sm_90"), True),  # code of one generation runs on its later cards
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_90a",), True),
        ((9, 0), ("sm_80",), False),
        ((12, 0), ("sm_90", "compute_90"), True),  # which the driver translates
        ((12, 1), ("sm_120",), True),
        ((6, 1), ("sm_75", "sm_80", "compute_75"), False),
        ((10, 3), ("sm_100a",), False),
    ],
)
def test_a_card_is_usable_where_torch_has_code_for_it(capability, code, has):
    card = Card(0, "A card", capability, 2**30)
    assert bool(graphics_cards.usable(replace(CUDA, cards=(card,), code_for=code))) is has


def test_amds_cards_are_left_to_rocm():
    card = Card(0, "AMD Instinct MI300X", (9, 4), 192 * 2**30)
    found = Surroundings("2.13.0+rocm6.4", "ROCm 6.4", (card,), code_for=("gfx942",))
    assert graphics_cards.usable(found) == (card,) and graphics_cards.obstacle(found) is None


def test_a_device_follows_from_what_is_found_and_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(graphics_cards, "look", lambda: replace(CUDA, cards=(T4,)))
    assert hardware.device("auto") == hardware.device("cuda") == "cuda" and hardware.why_on_cpu() is None
    monkeypatch.setattr(graphics_cards, "look", lambda: replace(CUDA, error=TOO_OLD))
    assert hardware.device("auto") == hardware.device("cpu") == "cpu"
    with pytest.raises(UserError, match="runtime.device: 'cuda' was asked for.*too old for torch.*use 'auto' or 'cpu'"):
        hardware.device("cuda")
    said: list[str] = []
    progress = Progress.silent()
    monkeypatch.setattr(progress, "note", said.append)
    assert Context(progress, Runtime()).device == "cpu" and Context(progress, Runtime(device="cpu")).device == "cpu"
    assert len(said) == 1 and said[0].startswith("the CPU computes: NVIDIA's driver 570.124.06 is too old")


def test_looking_needs_no_gpu():
    found = graphics_cards.look()
    assert found.torch == torch.__version__ and len(found.cards) == torch.cuda.device_count()


def test_the_drivers_version_is_read(monkeypatch, tmp_path):
    for text, expected in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021", "470.57.02"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build", "570.124.06"),
        ("nothing", None),
    ):
        (tmp_path / "version").write_text(text)
        monkeypatch.setattr(graphics_cards, "DRIVER_FILE", tmp_path / "version")
        graphics_cards.driver_version.cache_clear()
        assert graphics_cards.driver_version() == expected
    graphics_cards.driver_version.cache_clear()


def test_cards_of_one_kind_are_those_with_the_most_memory_together():
    small, large = Card(1, "1080", (6, 1), 8 * 2**30), Card(2, "3090", (8, 6), 24 * 2**30)
    assert graphics_cards.alike((replace(small, index=0), small, large)) == (large,)
    assert graphics_cards.alike(()) == ()


def test_a_cards_screen_takes_memory_of_it(monkeypatch):
    class Properties:
        uuid = "1234-abcd"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for text, margin in (("GPU-1234-abcd, Enabled\nGPU-9, Disabled", 2**30), ("GPU-1234-abcd, Disabled", 0), ("", 0)):
        monkeypatch.setattr(graphics_cards, "_displays", lambda text=text: text)
        assert hardware.display_margin() == margin
