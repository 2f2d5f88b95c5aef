"""Weights are merged block by block: every byte that nothing adapts stays, and one wrong byte is found."""

import errno
import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from adder.core.errors import UserError
from adder.core.progress import Progress
from adder.core.safetensors_layout import layout
from adder.core.stage_spec import Context, Runtime
from adder.merging import streamed_merge
from adder.merging.streamed_merge import ChangedBlock, check_weights, merge_weights
from adder.merging.weight_deltas import BiasDelta, LoraDelta, Replacement, read_adapter
from merge_fixture import SILENT

WIDE = "layers.0.wide.weight"


def write_base(folder: Path, dtype=torch.bfloat16, rows=700) -> Path:
    """Tensors of several shapes and dtypes, one of them larger than a few blocks."""
    folder.mkdir()
    torch.manual_seed(3)
    tensors = {
        WIDE: torch.randn(rows, 1024).to(dtype),
        "layers.0.tall.weight": torch.randn(3000, 5).to(dtype),
        "layers.0.tall.bias": torch.randn(3000).to(dtype),
        "norm.weight": torch.randn(77).to(dtype),
        "counts": torch.arange(9),
        "scales": torch.randn(3, 3, dtype=torch.float64),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt", "made by": "a test"})
    return folder


def some_deltas(rows=700) -> dict:
    torch.manual_seed(4)
    return {
        WIDE: LoraDelta(0.05 * torch.randn(8, 1024), torch.randn(rows, 8), 0.5, False),
        "layers.0.tall.weight": LoraDelta(0.1 * torch.randn(2, 5), torch.randn(3000, 2), 1.0, False, torch.rand(3000)),
        "layers.0.tall.bias": BiasDelta(torch.randn(3000)),
    }


def merged(base, deltas, target, device=None, context=SILENT):
    target.mkdir()
    merge_weights(base, deltas, target, context, device)
    return (target / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_those_of_plain_arithmetic(tmp_path, dtype):
    """Within one step of the dtype of the exact sum, and as near as fp32 gets where nothing is rounded."""
    base, deltas = write_base(tmp_path / "base", dtype), some_deltas()
    merged(base, deltas, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    step = torch.finfo(dtype).eps
    for name, delta in deltas.items():
        exact = before[name].double()
        if isinstance(delta, BiasDelta):
            exact = exact + delta.value.double()
        else:
            exact = exact + delta.scale * delta.b.double() @ delta.a.double()
        if getattr(delta, "magnitude", None) is not None:
            exact = exact * (delta.magnitude.double() / exact.norm(dim=1))[:, None]
        # fp32 sums of eight products of about one are off by a few times 1e-7.
        assert bool(((after[name].double() - exact).abs() <= step * exact.abs() + 2e-6).all())
        assert after[name].dtype == dtype
    for name in before.keys() - deltas.keys():
        assert torch.equal(before[name], after[name])


def test_the_number_of_threads_changes_no_byte(tmp_path):
    base, deltas = write_base(tmp_path / "base"), some_deltas()
    found = [
        merged(base, deltas, tmp_path / str(threads), context=Context(Progress.silent(), Runtime(threads=threads)))
        for threads in (1, 2, 5)
    ]
    assert found[0] == found[1] == found[2] != (base / "model.safetensors").read_bytes()


def test_header_and_all_that_nothing_adapts_keep_their_bytes(tmp_path):
    base, deltas = write_base(tmp_path / "base"), some_deltas()
    after, before = merged(base, deltas, tmp_path / "out"), (base / "model.safetensors").read_bytes()
    plan = layout(base / "model.safetensors")
    assert after[: plan.begin] == before[: plan.begin] and b'"made by":"a test"' in after[: plan.begin]
    for tensor in plan.tensors:
        same = after[tensor.start : tensor.stop] == before[tensor.start : tensor.stop]
        assert same == (tensor.name not in deltas)


def test_blocks_cover_a_file_once_and_in_order(tmp_path):
    base, deltas = write_base(tmp_path / "base"), some_deltas()
    plan = layout(base / "model.safetensors")
    found = list(streamed_merge.blocks(plan, deltas))
    assert found[0].start == 0 and found[-1].stop == plan.size
    assert all(one.stop == other.start for one, other in itertools.pairwise(found))
    assert sum(isinstance(block, ChangedBlock) and block.tensor.name == WIDE for block in found) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_far_below_the_size_of_a_file(tmp_path):
    """A file of 400 MB, all of it adapted: less than 60 MB more memory than before, for two threads' blocks."""
    tensors = {f"layers.{i}.weight": torch.zeros(12_500, 4000, dtype=torch.bfloat16) for i in range(4)}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    del tensors
    pair = LoraDelta(torch.randn(16, 4000), torch.randn(12_500, 16), 1.0, False)
    deltas = {f"layers.{i}.weight": pair for i in range(4)}
    (tmp_path / "out").mkdir()
    before = reset_peak_memory()
    merge_weights(tmp_path / "base", deltas, tmp_path / "out", SILENT)
    check_weights(tmp_path / "base", tmp_path / "out", deltas, SILENT)
    assert peak_memory() - before < 60e6


def reset_peak_memory() -> int:
    """Make Linux forget the process's largest resident set; return the present one in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_files_are_copied_also_where_the_system_can_not_do_it_itself(tmp_path, monkeypatch):
    base, deltas = write_base(tmp_path / "base"), some_deltas()
    wanted = merged(base, deltas, tmp_path / "one")

    def refuse(*_):
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    assert merged(base, deltas, tmp_path / "other") == wanted


def test_a_full_disk_is_no_mere_warning(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    base = write_base(tmp_path / "base")
    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space left"):
        merged(base, some_deltas(), tmp_path / "out")


def test_nothing_is_written_when_a_change_does_not_fit(tmp_path):
    base = write_base(tmp_path / "base")
    cases = {
        "shape \\(700, 1000\\)": {WIDE: LoraDelta(torch.zeros(1, 1000), torch.zeros(700, 1), 1.0, False)},
        "layers.9.weight.*as a tensor of its own": {"layers.9.weight": Replacement(torch.zeros(1))},
        "counts of the base is I64": {"counts": Replacement(torch.zeros(9))},
    }
    for number, (message, deltas) in enumerate(cases.items()):
        with pytest.raises(UserError, match=message):
            merged(base, deltas, tmp_path / str(number))
        assert not list((tmp_path / str(number)).iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_that_the_dtype_can_not_hold_is_refused(tmp_path, dtype):
    base = write_base(tmp_path / "base", dtype)
    for number, value in enumerate([float("nan"), float("inf"), float("-inf"), 3.4e38]):
        deltas = {"norm.weight": BiasDelta(torch.full((77,), 0.0).index_fill(0, torch.tensor(5), value))}
        with pytest.raises(UserError, match="norm.weight: base \\+ adapter holds numbers that aren't finite"):
            merged(base, deltas, tmp_path / str(number))


def test_one_wrong_byte_is_found_wherever_it_is(tmp_path):
    base, deltas = write_base(tmp_path / "base"), some_deltas()
    right = merged(base, deltas, tmp_path / "out")
    found = check_weights(base, tmp_path / "out", deltas, SILENT)
    size = len(right)
    assert found["files"] == [{"name": "model.safetensors", "bytes": size, "changed": 3}]
    assert found["bytes_read_back"] == size and found["adapted_weights"] == found["changed_weights"] == 3
    assert 0.5 < found["changed_share"] < 1
    plan = layout(base / "model.safetensors")
    for tensor in plan.tensors:
        message = "isn't base \\+ adapter|aren't finite" if tensor.name in deltas else "though nothing adapts it"
        for place in (tensor.start, (tensor.start + tensor.stop) // 2, tensor.stop - 1):
            wrong = bytearray(right)
            wrong[place] ^= 1
            (tmp_path / "out" / "model.safetensors").write_bytes(wrong)
            with pytest.raises(UserError, match=f"{tensor.name}.*({message})"):
                check_weights(base, tmp_path / "out", deltas, SILENT)
    wrong = right.replace(b"a test", b"a tesT")
    (tmp_path / "out" / "model.safetensors").write_bytes(wrong)
    with pytest.raises(UserError, match="the header isn't its base's"):
        check_weights(base, tmp_path / "out", deltas, SILENT)


def test_a_missing_rounding_is_found(tmp_path):
    """The sum rounded to nearest is finite and close, and still not what was asked for."""
    base, deltas = write_base(tmp_path / "base"), some_deltas()
    merged(base, deltas, tmp_path / "out")
    path, pair = tmp_path / "out" / "model.safetensors", deltas[WIDE]
    nearest = (load_file(base / path.name)[WIDE].float() + pair.scale * pair.b @ pair.a).bfloat16()
    tensor = next(tensor for tensor in layout(path).tensors if tensor.name == WIDE)
    with path.open("r+b") as file:
        file.seek(tensor.start)
        file.write(nearest.view(torch.uint8).numpy().tobytes())
    with pytest.raises(UserError, match=f"{WIDE} isn't base"):
        check_weights(base, tmp_path / "out", deltas, SILENT)


class Experts(torch.nn.Module):
    """A mixture whose experts are linear layers in a list, with biases."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(16, 3)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        return sum(self.gate(x)[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({}, 4),
        ({"bias": "lora_only"}, 8),
        ({"bias": "all", "target_modules": ["experts.1"]}, 5),
        ({"lora_bias": True}, 8),
        ({"use_dora": True, "bias": "lora_only", "use_rslora": True}, 8),
    ],
)
def test_experts_and_biases_as_peft_merges_them(tmp_path, options, changed):
    """A real PEFT adapter on linear experts: fp32 results equal merge_and_unload's within fp32's rounding, 1e-6."""
    torch.manual_seed(0)
    model = Experts()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["gate", "experts.0", "experts.1", "experts.2"], **options}
    adapted = get_peft_model(model, LoraConfig(**config))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    deltas = read_adapter(tmp_path / "adapter")
    merged(tmp_path / "base", deltas, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    check = check_weights(tmp_path / "base", tmp_path / "out", deltas, SILENT)
    wanted = adapted.merge_and_unload().state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    assert check["changed_weights"] == changed


def test_a_trained_bias_that_the_base_lacks_is_refused(tmp_path):
    base = write_base(tmp_path / "base")
    with pytest.raises(UserError, match=f"{WIDE.replace('weight', 'bias')}.*as a tensor of its own"):
        merged(base, {WIDE.replace("weight", "bias"): BiasDelta(torch.zeros(700))}, tmp_path / "out")


def test_the_header_reader_agrees_with_safetensors(tmp_path):
    base = write_base(tmp_path / "base")
    path = base / "model.safetensors"
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    plan = layout(path)
    tensors = load_file(path)
    assert {tensor.name: tensor.shape for tensor in plan.tensors} == {k: tuple(v.shape) for k, v in tensors.items()}
    assert plan.size == path.stat().st_size and {t.name: t.dtype for t in plan.tensors}["scales"] == "F64"
    assert plan.tensors[-1].stop == plan.size and header["__metadata__"]["made by"] == "a test"


def test_where_sums_are_made():
    by_rank = {rank: {"w": LoraDelta(torch.zeros(rank, 1), torch.zeros(1, rank), 1.0, False)} for rank in (16, 512)}

    def choice(rank, device, threads):
        context = Context(Progress.silent(), Runtime(threads=threads))
        context.__dict__["device"] = device  # a GPU that isn't here
        return streamed_merge.sums_device(by_rank[rank], context)

    assert choice(512, "cpu", 1) == "cpu"
    assert [choice(rank, "cuda", 16) for rank in by_rank] == ["cpu", "cuda"]
    assert choice(16, "cuda", 2) == "cuda"


@pytest.mark.gpu
def test_a_gpu_makes_the_same_sums_within_a_step(tmp_path):
    """fp32 sums may differ in their last bit, and then a few weights in 100,000 are rounded the other way."""
    base, deltas = write_base(tmp_path / "base"), some_deltas()
    merged(base, deltas, tmp_path / "cpu", device="cpu")
    merged(base, deltas, tmp_path / "gpu", device="cuda")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("cpu", "gpu"))
    for name in one:
        gap = (one[name].double() - other[name].double()).abs()
        assert bool((gap <= 2**-7 * one[name].double().abs() + 1e-6).all())
        assert float((gap > 0).double().mean()) < 1e-3
