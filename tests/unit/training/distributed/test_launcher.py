"""Several processes train one model: the same curve as one, whatever happens. With gloo on the CPU; on GPUs with NCCL.

The GPU tests need two of them: `python3 -m pytest -m gpu tests/unit/training/distributed/test_launcher.py`.
"""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.files import read_json, read_jsonl, write_json
from adder.core.machine import graphics_cards
from adder.core.progress import Progress
from adder.core.stage_spec import Runtime
from adder.training.checkpoints import newest_whole
from adder.training.distributed import launcher
from adder.training.fit import TrainJob
from adder.training.stage import TrainSettings
from adder.training.step_planner import MemoryRanOut, StepPacks
from tiny import save_tiny_model, write_training_inputs
from training_stage import run_training, train_inputs, train_settings


def settings(**changes) -> TrainSettings:
    """Three packs of three examples a step, which two processes can't share evenly; every pack filled anew."""
    values = {"epochs": 24, "learning_rate": 1e-3, "effective_batch_size": 9, "lora_r": 4, "lora_dropout": 0.0}
    values |= {"compute_dtype": "float32", "eval_samples": 7, "eval_times": 3, "samples": 2}
    return train_settings(**{**values, **changes}, reshuffle=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model_dir) -> dict[str, Path]:
    """13 packs: the last step of an epoch has one, and the second process nothing."""
    return write_training_inputs(tmp_path_factory.mktemp("inputs"), tiny_model_dir, packs=13)


@pytest.fixture
def two(monkeypatch):
    """Two processes, also where there is no GPU."""
    monkeypatch.setattr(launcher, "choose_process_count", lambda *_: Choice(2, "for the test"))


class StopsAt(Progress):
    """Sends SIGTERM to the process that it is in when it shows that a step is done."""

    def __init__(self, step: int):
        self.sign = f"step {step}/"
        self.said: list[str] = []

    def line(self, text: str, last: bool = False, left: float | None = None) -> None:
        if text.startswith(self.sign):
            os.kill(os.getpid(), signal.SIGTERM)

    def note(self, text: str) -> None:
        self.say(text)

    def say(self, text: str) -> None:
        self.said.append(text)


def curve(folder: Path, name: str) -> list[float]:
    return [row[name] for row in read_jsonl(folder / "metrics.jsonl") if name in row]


def test_two_processes_that_are_stopped_and_continued_learn_as_one(inputs, tmp_path, two, monkeypatch):
    """QLoRA, begun with all weights in each process and ended in shards, some of whose NF4 bytes are NaN as fp32.

    In fp32 only the order of sums differs: 2e-7 of a loss was seen, and 1e-5 leaves room for other CPUs.
    """
    runtime = {"checkpoints": 2}
    whole, shards = ({"checkpoints": tmp_path / "c", "runtime": runtime | {"sharding": how}} for how in ("ddp", "fsdp"))
    progress = StopsAt(8)
    monkeypatch.setattr(launcher, "POLL", 0.01)  # what it shows reaches it before these quick steps are over
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"told to stop \(SIGTERM\) at step \d+ of 120; a checkpoint is written"):
        run_training(settings(), inputs, tmp_path / "two", progress, **whole)
    assert list((tmp_path / "two").iterdir()) == [] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run_training(settings(), inputs, tmp_path / "two", progress, **shards)
    assert any("continuing from the checkpoint at step" in text for text in progress.said)
    monkeypatch.setattr(launcher, "choose_process_count", lambda *_: Choice(1, "for the test"))
    run_training(settings(), inputs, tmp_path / "one", Progress.silent())
    summaries = {name: read_json(tmp_path / name / "train.json") for name in ("two", "one")}
    assert summaries["two"]["steps"] == summaries["one"]["steps"] == 120
    assert summaries["two"]["effective_batch"] == summaries["one"]["effective_batch"]
    assert summaries["two"]["total_parameters"] == summaries["one"]["total_parameters"]
    for name in ("loss", "eval_loss", "grad_norm"):
        assert curve(tmp_path / "two", name) == pytest.approx(curve(tmp_path / "one", name), rel=1e-5), name
    first, second = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("two", "one"))
    for name, tensor in second.items():
        assert (first[name] - tensor).norm() < 1e-4 * tensor.norm(), name
    assert list(read_jsonl(tmp_path / "two" / "samples.jsonl")) == list(read_jsonl(tmp_path / "one" / "samples.jsonl"))
    plan = read_json(tmp_path / "two" / "plan.json")
    assert plan["processes"]["value"] == 2 and plan["sharding"]["value"] == "fsdp"
    assert plan["nf4_values"]["value"] == "dequantised in each product"


def test_a_full_training_that_one_process_began_goes_on_in_shards(inputs, tmp_path, monkeypatch):
    """Weights and AdamW's moments, from a checkpoint and to one, by way of shards; fp32 as above."""
    values = settings(keep="best", epochs=3, method="full", learning_rate=1e-2)
    for name in ("begun", "alone"):
        options = {"checkpoints": tmp_path / f"{name}-c", "runtime": {"checkpoints": 3, "sharding": "fsdp"}}
        (tmp_path / name).mkdir()
        if name == "begun":
            with pytest.raises(UserError, match="told to stop"):
                run_training(values, inputs, tmp_path / name, StopsAt(3), **options)
            monkeypatch.setattr(launcher, "choose_process_count", lambda *_: Choice(2, "for the test"))
        run_training(values, inputs, tmp_path / name, Progress.silent(), **options)
        monkeypatch.undo()
    summary, plan = (read_json(tmp_path / "begun" / f"{name}.json") for name in ("train", "plan"))
    assert summary["resumed_from"] >= 3 and plan["sharding"]["value"] == "fsdp"
    assert 3 < summary["kept"]["value"] < summary["steps"]  # the best weights come back into the shards
    for name in ("loss", "eval_loss", "grad_norm"):
        assert curve(tmp_path / "begun", name) == pytest.approx(curve(tmp_path / "alone", name), rel=1e-5), name
    files = [path.name for path in sorted((tmp_path / "alone" / "model").iterdir())]
    assert files == [path.name for path in sorted((tmp_path / "begun" / "model").iterdir())]
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("begun", "alone")]
    moments = [
        torch.load(newest_whole(tmp_path / f"{name}-c") / "optimizer.pt")["state"] for name in ("begun", "alone")
    ]
    assert weights[0].keys() == weights[1].keys() and moments[0].keys() == moments[1].keys()
    for name, tensor in weights[1].items():  # in 16 bits: one unit in the last place
        assert tensor.dtype == torch.bfloat16 and torch.allclose(weights[0][name], tensor, rtol=2**-7), name
    for number, moment in moments[1].items():
        assert torch.allclose(moments[0][number]["exp_avg_sq"], moment["exp_avg_sq"], rtol=1e-3, atol=1e-12), number


def job(folder: Path, folders: dict[str, Path], processes: int) -> TrainJob:
    """A training on the CPU."""
    return TrainJob(
        settings=settings(),
        inputs=train_inputs(folders),
        out=folder,
        checkpoints=folder / "c",
        results=folder,
        runtime=Runtime(),
        device="cpu",
        threads=1,
        step_packs=StepPacks(3, "three"),
        processes=Choice(processes, "for the test"),
    )


@pytest.mark.parametrize(
    ("kinds", "error", "text"),
    [
        ({1: "failed", 0: "user"}, UserError, "a mistake of 0"),  # the sentence for the user, whoever was first
        ({1: "failed", 0: "failed"}, RuntimeError, "failed of 1"),  # of two, the one that the other's is due to
        ({1: "memory", 0: "failed"}, MemoryRanOut, "memory of 1"),
        ({0: "done"}, RuntimeError, "was killed"),
    ],
)
def test_what_one_of_the_processes_ended_with_is_how_the_training_ends(
    monkeypatch, inputs, tmp_path, kinds, error, text
):
    def run(folder: Path, processes: int, threads: int, progress: Progress) -> bool:
        for age, (number, kind) in enumerate(kinds.items()):
            path = folder / f"outcome-{number}.json"
            write_json(path, {"kind": kind, "text": f"{'a mistake' if kind == 'user' else kind} of {number}"})
            os.utime(path, ns=(age, age))
        return False

    monkeypatch.setattr(launcher, "_run", run)
    with pytest.raises(error, match=text):
        launcher.fit_in_processes(job(tmp_path, inputs, 2), Progress.silent())


def cards(*names: str) -> tuple[graphics_cards.Card, ...]:
    kinds = {"H200": ((9, 0), 141), "3090": ((8, 6), 24), "1080": ((6, 1), 8)}
    of = [(index, name, *kinds[name]) for index, name in enumerate(names)]
    return tuple(graphics_cards.Card(index, name, capability, size * 2**30) for index, name, capability, size in of)


@pytest.mark.parametrize(
    ("wanted", "packs", "number", "why"),
    [
        ("auto", 16, 4, "each of the 4 GPUs here"),
        (2, 16, 2, "as set by runtime.gpus"),
        (1, 16, 1, "one of the 4 GPUs here, as set"),
        ("auto", 3, 3, "an optimizer step has no more packs"),
    ],
)
def test_every_gpu_that_there_are_packs_for_is_used(monkeypatch, wanted, packs, number, why):
    monkeypatch.setattr(graphics_cards, "visible_cards", lambda: cards("H200", "H200", "H200", "H200"))
    choice = launcher.choose_process_count(wanted, "cuda", packs)
    assert choice.value == number and why in choice.reason


def test_more_gpus_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr(graphics_cards, "visible_cards", lambda: cards("H200", "H200", "H200", "H200"))
    with pytest.raises(UserError, match="runtime.gpus: 8 were asked for, and torch sees 4 here"):
        launcher.choose_process_count(8, "cuda", 16)
    with pytest.raises(UserError, match="runtime.gpus: 2 were asked for, but training runs on the CPU"):
        launcher.choose_process_count(2, "cpu", 16)


@pytest.mark.parametrize(
    ("names", "wanted", "number", "chosen", "why"),
    [
        (("3090", "3090", "1080"), "auto", 2, [0, 1], "2 of the 3 GPUs here, of one kind (3090"),
        (("1080", "3090", "3090"), "auto", 2, [1, 2], "and 1080 (8 GiB, compute capability 6.1) would be that"),
        (("3090", "1080"), "auto", 1, [0], "1 of the 2 GPUs here"),
        (("3090", "3090", "1080"), 3, 3, [0, 1, 2], "of several kinds"),
    ],
)
def test_of_unequal_gpus_those_of_one_kind_train(monkeypatch, names, wanted, number, chosen, why):
    monkeypatch.setattr(graphics_cards, "visible_cards", lambda: cards(*names))
    choice = launcher.choose_process_count(wanted, "cuda", 16)
    assert choice.value == number and why in choice.reason
    assert launcher.chosen_cards(number, cards(*names)) == chosen


def test_chosen_cards_are_named_as_they_were():
    assert launcher.visible_devices([1, 2], None) == "1,2"
    assert launcher.visible_devices([1, 2], "GPU-a, GPU-b,GPU-c") == "GPU-b,GPU-c"
    assert launcher.visible_devices([0, 2], "3,5,7") == "3,7"


# On two GPUs ----------------------------------------------------------------------------------------------------------

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def wide_inputs(tmp_path_factory) -> dict[str, Path]:
    """A model whose heads suit the kernels, and the 13 packs."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("wide")
    return write_training_inputs(folder / "inputs", save_tiny_model(folder / "model", **shape), packs=13)


METHODS = [("qlora", "ddp"), ("qlora", "fsdp"), ("lora", "fsdp"), ("full", "ddp"), ("full", "fsdp")]


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize(("method", "how"), METHODS)
def test_two_gpus_learn_as_one(wide_inputs, tmp_path, method, how):
    """bf16 over other batches: 1 % of a loss, and 10 % of a gradient's norm, of which two apart would miss 30 %."""
    values = settings(compute_dtype="bfloat16", epochs=4, keep="best", method=method)
    for name, gpus in (("two", 2), ("one", 1)):
        (tmp_path / name).mkdir()
        runtime = {"checkpoints": 2, "gpus": gpus, "sharding": how}
        run_training(values, wide_inputs, tmp_path / name, Progress.silent(), runtime=runtime)
    plans = {name: read_json(tmp_path / name / "plan.json") for name in ("two", "one")}
    assert plans["two"]["processes"]["value"] == 2 and plans["two"]["sharding"]["value"] == how
    if (method, how) == ("qlora", "ddp"):
        assert plans["two"]["lora_products"]["value"] == plans["one"]["lora_products"]["value"] == "folded"
    for name, rel in (("loss", 0.01), ("eval_loss", 0.01), ("grad_norm", 0.1)):
        assert curve(tmp_path / "two", name) == pytest.approx(curve(tmp_path / "one", name), rel=rel), name
    summary = read_json(tmp_path / "two" / "train.json")
    assert summary["final_loss"] < summary["first_loss"] and summary["peak_gpu_memory_bytes"] > 0


@pytest.mark.gpu
@two_gpus
def test_a_training_that_two_gpus_began_goes_on_with_one(wide_inputs, tmp_path):
    """Full training in shards: its checkpoint is an ordinary one. 1 % of a loss, as above."""
    values = settings(compute_dtype="bfloat16", epochs=12, method="full")
    for name in ("begun", "alone"):
        (tmp_path / name).mkdir()
        options = {"checkpoints": tmp_path / f"{name}-c", "runtime": {"checkpoints": 3, "sharding": "fsdp"}}
        if name == "begun":
            with pytest.raises(UserError, match="told to stop"):
                both = options | {"runtime": options["runtime"] | {"gpus": 2}}
                run_training(values, wide_inputs, tmp_path / name, StopsAt(8), **both)
        run_training(values, wide_inputs, tmp_path / name, Progress.silent(), **options)
    assert read_json(tmp_path / "begun" / "train.json")["resumed_from"] >= 8
    assert curve(tmp_path / "begun", "loss") == pytest.approx(curve(tmp_path / "alone", "loss"), rel=0.01)


@pytest.mark.gpu
@two_gpus
def test_memory_that_runs_out_on_one_of_two_gpus_leads_both_to_a_smaller_plan(wide_inputs, tmp_path, monkeypatch):
    """The second asks for 160 GiB when its first step is done."""
    hook = tmp_path / "sitecustomize.py"
    failed = tmp_path / "failed"
    hook.write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from adder.training.distributed import collectives\n"
        "    average = collectives.all_reduce_mean_gradients\n"
        "    def fail(parameters):\n"
        f"        if not os.path.exists({str(failed)!r}):\n"
        f"            open({str(failed)!r}, 'w').close()\n"
        "            import torch\n"
        "            torch.empty(160 * 2**30, dtype=torch.uint8, device='cuda')\n"
        "        average(parameters)\n"
        "    collectives.all_reduce_mean_gradients = fail\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    said = StopsAt(-1)
    out = tmp_path / "out"
    out.mkdir()
    values = settings(compute_dtype="bfloat16", epochs=2, effective_batch_size=12, micro_batch_size=2)
    run_training(values, wide_inputs, out, said, runtime={"gpus": 2})
    plan = read_json(out / "plan.json")
    assert plan["micro_batch_size"]["value"] == 1 and plan["memory_fallback"]["reason"] in said.said
