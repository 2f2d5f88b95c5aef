"""Training: packed = unpacked, dequantised once = NF4, resumed = uninterrupted, and the traps of the libraries."""

import errno
import io
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from adder.core.errors import UserError
from adder.core.files import digest_file, read_json, read_jsonl
from adder.core.progress import Progress
from adder.kernels import labelled_loss
from adder.training import base_model, checkpoints, fit, lora, packed_dataset, trainer
from adder.training.monitoring.preflight_warnings import warnings
from adder.training.packed_dataset import heldout_examples
from adder.training.stage import TrainSettings
from tiny import pack_rows, save_tiny_model, token_row, write_training_inputs
from training_stage import run_training, train_settings

ROOT = Path(__file__).resolve().parents[3]


def settings(**changes) -> TrainSettings:
    values = {"epochs": 2, "learning_rate": 1e-3, "effective_batch_size": 6, "lora_r": 4, "compute_dtype": "float32"}
    return train_settings(**{**values, "eval_samples": 4, "eval_times": 2, **changes})


def collate(rows: list[dict]) -> dict:
    """Packs to a batch, by TRL's own collator, as training does."""
    return DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def gradients_of(model, batches: list[dict]) -> torch.Tensor:
    """Gradient of the summed loss over `batches`, all trainable parameters in one vector."""
    model.zero_grad()
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    for batch in batches:
        labelled_loss.labelled_losses(bare, **batch).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def load(folder: Path, attention: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)


def test_packed_examples_do_not_see_each_other(tiny_model_dir):
    """Loss and gradients of a pack are those of its examples one by one (fp32: sums in another order, 1e-5)."""
    rows = [token_row(i, length) for i, length in enumerate((9, 23, 14, 5))]
    model = load(tiny_model_dir, "adder_segments")
    packed = gradients_of(model, [collate(pack_rows([rows]))])
    single = gradients_of(model, [collate(pack_rows([[row]])) for row in rows])
    assert relative_error(packed, single) < 1e-5
    two_packs = gradients_of(model, [collate(pack_rows([rows[:2], rows[2:]]))])
    assert relative_error(two_packs, single) < 1e-5


def test_packed_examples_see_each_other_with_a_cache(tiny_model_dir):
    """The trap that use_cache=False avoids is real: where this fails, transformers has mended it."""
    rows = [token_row(i, length) for i, length in enumerate((9, 23, 14))]
    batch = collate(pack_rows([rows]))
    model = load(tiny_model_dir, "sdpa").eval()
    plain = {name: batch[name] for name in ("input_ids", "position_ids")}
    isolated = model(**plain, use_cache=False).logits
    assert relative_error(model(**plain, use_cache=True).logits, isolated) > 1e-2


@pytest.mark.parametrize("tied", [True, False])
def test_labelled_loss_is_transformers_loss(tmp_path, tied):
    folder = save_tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    row = token_row(3, 31)
    model = load(folder, "adder_segments")
    batch = collate(pack_rows([[row]]))
    expected = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
    assert torch.allclose(labelled_loss.labelled_losses(model, **batch).mean(), expected, rtol=1e-5)


def test_loss_and_gradients_on_the_real_model(embedded_model_dir):
    """Packed = unpacked where behaviour matters: 30 layers, 9 heads over 3 key-value heads (fp32, 1e-4)."""
    rows = [token_row(i, length, vocabulary=40_000) for i, length in enumerate((12, 40, 25))]
    model = load(embedded_model_dir, "adder_segments")
    model = lora.add_adapter(model, settings(lora_dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    packed = gradients_of(model, [collate(pack_rows([rows]))])
    single = gradients_of(model, [collate(pack_rows([[row]])) for row in rows])
    assert relative_error(packed, single) < 1e-4


def quantised(folder: Path, dtype: str = "float32"):
    """The model in NF4 with its values not held dequantised, LoRA on top with B not zero."""
    chosen = base_model.choose_nf4_values
    base_model.choose_nf4_values = lambda *args: base_model.Choice("dequantised in each product", "test")
    try:
        model, _ = base_model.load(folder, "qlora", dtype, "cpu")
    finally:
        base_model.choose_nf4_values = chosen
    torch.manual_seed(0)
    model = lora.add_adapter(model, settings(lora_dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def test_an_evaluation_leaves_the_gradients_as_they_were(tiny_model_dir):
    """bitsandbytes repacks NF4 weights in a forward without gradients on AVX512-BF16 CPUs: gradients were garbage."""
    model = quantised(tiny_model_dir, "bfloat16")
    layers = base_model.four_bit_layers(model)
    assert len(layers) == 14
    # On CPUs without that instruction set the defect does not show, so the flag itself is part of the test.
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers.values())
    batch = collate(pack_rows([[token_row(1, 40), token_row(2, 25)]]))
    with torch.autocast("cpu", torch.bfloat16):
        before = gradients_of(model, [batch])
        with torch.no_grad():
            model.eval()(input_ids=batch["input_ids"], use_cache=False)
            model.train()
        after = gradients_of(model, [batch])
    assert torch.equal(before, after)


def test_values_dequantised_once_give_the_same_gradients(tiny_model_dir):
    """Holding NF4 values is the same QLoRA: fp32, both multiply by the same numbers (1e-5 for the order of sums)."""
    batch = collate(pack_rows([[token_row(1, 40), token_row(2, 25)]]))
    model = quantised(tiny_model_dir)
    expected = gradients_of(model, [batch])
    base_model.hold_dequantised(model.get_base_model(), torch.float32)
    assert not base_model.four_bit_layers(model)
    assert relative_error(gradients_of(model, [batch]), expected) < 1e-5


def test_quantisation_is_nf4_with_double_quantisation(tiny_model_dir):
    for layer in base_model.four_bit_layers(quantised(tiny_model_dir)).values():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model_dir):
    return write_training_inputs(tmp_path_factory.mktemp("inputs"), tiny_model_dir)


def run(inputs, out: Path, **changes) -> dict:
    out.mkdir()
    run_training(settings(**changes), inputs, out, Progress.silent())
    return read_json(out / "train.json")


def adapter_digests(folder: Path) -> dict:
    return {p.name: digest_file(p) for p in sorted((folder / "adapter").iterdir())}


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_every_method_trains_and_writes_what_it_should(inputs, tmp_path, method):
    out = tmp_path / "out"
    out.mkdir()
    values = settings(epochs=4, learning_rate=1e-2, method=method)
    run_training(values, inputs, out, Progress.silent())
    summary = read_json(out / "train.json")
    assert summary["final_loss"] < summary["first_loss"]
    rows = list(read_jsonl(out / "metrics.jsonl"))
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, summary["steps"] + 1))
    assert all({"learning_rate", "grad_norm", "tokens_per_second"} <= row.keys() for row in rows if "loss" in row)
    assert len([row for row in rows if "eval_loss" in row]) == 2
    assert summary["effective_batch"] == {"asked": 6, "mean_examples": 6.0, "packs": 2}
    plan = read_json(out / "plan.json")
    assert "nf4_weights" not in plan  # every matrix is one of a linear layer
    assert plan["compute_dtype"]["value"] == "float32" and all(choice["reason"] for choice in plan.values())
    if method == "full":
        assert AutoModelForCausalLM.from_pretrained(out / "model").dtype == torch.bfloat16
    else:
        config = read_json(out / "adapter" / "adapter_config.json")
        assert config["target_modules"] == sorted(
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        )
        assert config["base_model_name_or_path"] == "tiny"


def test_the_same_settings_give_the_same_adapter(inputs, tmp_path):
    for name in ("one", "two"):
        run(inputs, tmp_path / name)
    assert adapter_digests(tmp_path / "one") == adapter_digests(tmp_path / "two")


def test_reading_batches_ahead_changes_nothing(inputs, tmp_path, monkeypatch):
    """With several passes a step, a shorter last one and packs that are filled anew each epoch."""
    values = {"effective_batch_size": 9, "micro_batch_size": 1, "reshuffle": True, "epochs": 3}
    ahead = run(inputs, tmp_path / "ahead", **values)
    monkeypatch.setattr(packed_dataset.ReadAhead, "read", lambda self, number: None)
    assert run(inputs, tmp_path / "not", **values)["steps"] == ahead["steps"] > 3
    assert adapter_digests(tmp_path / "ahead") == adapter_digests(tmp_path / "not")


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_the_whole_model_is_in_training_mode_while_it_trains(inputs, tmp_path, monkeypatch, method):
    """Also after an evaluation, of which there are three; a model as it is loaded is not."""
    modes, losses = [], trainer.labelled_losses

    def watched(model, *args, **kwargs):
        modes.append({module.training for module in model.modules()})
        return losses(model, *args, **kwargs)

    monkeypatch.setattr(trainer, "labelled_losses", watched)
    (tmp_path / "out").mkdir()
    run_training(
        settings(epochs=4, eval_times=3, samples=0, method=method), inputs, tmp_path / "out", Progress.silent()
    )
    by_third = [modes[start : start + 9] for start in (0, 9, 18)]
    assert by_third == 3 * [8 * [{True}] + [{False}]]


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_samples_and_evaluations_disturb_nothing(inputs, tmp_path, method):
    """With dropout on, so that a single random number drawn by a look at the model would show."""
    values = {"lora_dropout": 0.1} if method == "qlora" else {}
    folders = {name: tmp_path / name for name in ("looked", "not")}
    looks = {"looked": {"samples": 3, "eval_times": 3}, "not": {"samples": 0, "eval_samples": 0}}
    for name, folder in folders.items():
        folder.mkdir()
        run_training(settings(**values, **looks[name], method=method), inputs, folder, Progress.silent())
    made = [
        {path.name: digest_file(path) for path in sorted((folder / kind).glob("*.safetensors"))}
        for folder in folders.values()
        for kind in ("adapter" if method == "qlora" else "model",)
    ]
    assert made[0] == made[1] and made[0]


def test_the_held_out_loss_does_not_change_with_the_batch(inputs, tmp_path, monkeypatch):
    """The mean over tokens, as the finished model's own: batches of examples of unlike lengths weigh as they should."""
    found = []
    for size in (1, 3, 8):
        monkeypatch.setattr(fit, "eval_batch_size", lambda *_, size=size: size)
        found.append(run(inputs, tmp_path / str(size), eval_samples=8)["eval_loss"])
    assert max(found) - min(found) < 1e-5  # fp32 sums in another order


def test_sampled_replies_stand_beside_the_bases_and_the_reference(inputs, tmp_path):
    summary = run(inputs, tmp_path / "out", samples=3, eval_times=2)
    rows = list(read_jsonl(tmp_path / "out" / "samples.jsonl"))
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    steps = {row["step"] for row in rows}
    assert 0 in steps and summary["steps"] in steps and len(steps) == 3
    for step in steps:
        assert len({row["id"] for row in rows if row["step"] == step}) == 3
    assert all(row["prompt"] and row["reference"] and row["exact_match"] in (0, 1) for row in rows)
    curves = list(read_jsonl(tmp_path / "out" / "metrics.jsonl"))
    assert [row["step"] for row in curves if "exact_match" in row] == sorted(steps - {0})


def too_fast(inputs: dict[str, Path], folder: Path, **changes) -> dict:
    """A rate at which the held-out rows soon get worse and worse."""
    values = {"epochs": 6, "learning_rate": 0.3, "lr_scheduler": "constant", "eval_times": 9, "samples": 0}
    return run(inputs, folder, **{**values, **changes})


def eval_losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in read_jsonl(folder / "metrics.jsonl") if "eval_loss" in row}


def test_the_best_adapter_is_kept_when_asked_for(inputs, tmp_path):
    last, best = (too_fast(inputs, tmp_path / keep, keep=keep) for keep in ("last", "best"))
    losses = eval_losses(tmp_path / "best")
    wanted = min(losses, key=lambda step: (losses[step], step))
    assert losses == eval_losses(tmp_path / "last") and wanted != max(losses)
    assert (last["kept"]["value"], best["kept"]["value"]) == (max(losses), wanted)
    assert f"the best by loss was step {wanted}" in last["kept"]["reason"]
    # The weights that were kept are those that gave the loss: the run that ends there is the same up to then.
    model = AutoModelForCausalLM.from_pretrained(inputs["model"] / "model", dtype=torch.float32)
    found = {}
    for keep in ("last", "best"):
        adapted = PeftModel.from_pretrained(model, tmp_path / keep / "adapter")
        packs = heldout_examples(inputs["tokenize"] / "heldout.arrow", 4)
        with torch.no_grad():
            parts = [labelled_loss.labelled_losses(adapted.get_base_model(), **collate([row])) for row in packs]
        found[keep] = float(torch.cat(parts).mean())
        model = adapted.unload()
    # LoRA on the fp32 base instead of NF4, so only about the same.
    assert found["best"] < found["last"] and found["best"] == pytest.approx(losses[wanted], abs=0.1)


def test_a_training_that_gets_no_better_is_stopped(inputs, tmp_path):
    summary = too_fast(inputs, tmp_path / "out", early_stopping=2, keep="best")
    losses = eval_losses(tmp_path / "out")
    best = min(losses, key=lambda step: (losses[step], step))
    steps = sorted(losses)
    assert summary["steps"] == steps[steps.index(best) + 2] < summary["planned_steps"]
    assert (
        summary["kept"]["value"] == best and "stopped early, 2 evaluations after the best" in summary["kept"]["reason"]
    )


def test_progress_says_over_how_many_rows_the_loss_is_and_that_times_are_rough(inputs, tmp_path):
    stream = io.StringIO()
    (tmp_path / "out").mkdir()
    run_training(settings(eval_samples=3), inputs, tmp_path / "out", Progress("train", stream))
    shown = stream.getvalue()
    assert re.search(r"^train: step (\d+)/\1, held-out loss \d\.\d{4} over 3 rows$", shown, re.MULTILINE)
    assert re.search(r"^train: roughly \S+ seconds for \d+ steps, by the time of one pack; ", shown, re.MULTILINE)
    assert re.search(r"^train: step \d+/\d+, loss \S+, \S+ tokens/s, roughly 0:00 left$", shown, re.MULTILINE)


def test_a_terminal_that_goes_away_does_not_end_a_training():
    lost = []

    class Gone(io.StringIO):
        def write(self, text):
            lost.append(text)
            raise OSError(errno.EIO, "Input/output error")

    progress = Progress("train", Gone())
    progress.say("step 1")
    progress.line("step 2", last=True)
    assert lost == ["train: step 1\n", "train: step 2\n"]


def test_qlora_says_once_that_experts_in_one_tensor_stay_unquantised(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 512}
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    MixtralForCausalLM(MixtralConfig(vocab_size=vocabulary, **sizes)).save_pretrained(folder)
    mixture, stream = write_training_inputs(tmp_path / "inputs", folder), io.StringIO()
    for method in ("qlora", "lora"):
        (tmp_path / method).mkdir()
        run_training(settings(method=method), mixture, tmp_path / method, Progress("train", stream))
    # Of a layer 12,288 numbers in the attention's matrices (and 256 in the router) and 73,728 in the experts'.
    told = "of the numbers in the layers' matrices 86% stay in float32 (0.00059 GB, 8 times what NF4 would take): "
    assert stream.getvalue().count(f"train: warning: train.method: qlora, but {told}") == 1
    plan = read_json(tmp_path / "qlora" / "plan.json")
    assert plan["nf4_weights"]["value"] == "14% of the matrices" and told in plan["nf4_weights"]["reason"]
    assert any(told in line for line in warnings(read_json(tmp_path / "qlora" / "train.json")["preflight"], plan))
    assert "nf4_weights" not in read_json(tmp_path / "lora" / "plan.json")


def test_target_modules_that_fit_nothing_are_refused(inputs, tmp_path):
    with pytest.raises(UserError, match=r"train.target_modules.*nothing_here.*called down_proj, gate_proj"):
        run(inputs, tmp_path / "out", target_modules=["nothing_here"])


def test_a_base_whose_loss_is_no_number_is_not_trained(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("inf")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    broken = write_training_inputs(tmp_path / "inputs", folder)
    with pytest.raises(UserError, match="preflight: the loss of the untrained model on the first pack is nan"):
        run(broken, tmp_path / "out")


STOPPED = """
import json, os, signal, sys
from pathlib import Path
from adder.training import trainer
from training_stage import run_training, train_settings
at, name, values, inputs, out, checkpoints = json.loads(sys.argv[1])
signal.signal(getattr(signal, name), signal.SIG_DFL)  # under nohup a closed terminal is ignored
def stop(self, *args, **kwargs):
    if self.state.global_step >= at:
        os.kill(os.getpid(), getattr(signal, name))
    return step(self, *args, **kwargs)
step, trainer.Trainer.training_step = trainer.Trainer.training_step, stop
Path(out).mkdir()
inputs = {name: Path(path) for name, path in inputs.items()}
runtime = {"checkpoints": 3}
run_training(train_settings(**values), inputs, Path(out), checkpoints=Path(checkpoints), runtime=runtime)
"""


def stopped_at(
    step: int, signal: str, values: TrainSettings, inputs: dict[str, Path], folder: Path
) -> subprocess.CompletedProcess:
    """Train in a process that sends itself a signal when step `step` begins."""
    paths = {name: str(path) for name, path in inputs.items()}
    chosen = values.model_dump(mode="json")
    arguments = json.dumps([step, signal, chosen, paths, str(folder / "out"), str(folder / "c")])
    paths = [str(ROOT / "workflow_scripts"), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-c", STOPPED, arguments], env=environment, capture_output=True, text=True)


def test_a_run_killed_ten_times_at_any_moment_ends_with_the_same_adapter(tmp_path):
    """During a step, a checkpoint write, an evaluation and the final save; tests/faults.py makes fifty."""
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "faults.py"), "10"], capture_output=True, text=True, cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert re.search(r"^10 kills .*'step': \d.*every adapter the same", process.stdout, re.MULTILINE), process.stdout


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGHUP"])
def test_told_to_stop_it_writes_a_checkpoint_that_the_next_start_continues(inputs, tmp_path, signal):
    values = settings(epochs=20, lora_dropout=0.1)
    process = stopped_at(7, signal, values, inputs, tmp_path)
    assert process.returncode == 1 and f"told to stop ({signal}) at step 8 of" in process.stderr
    assert checkpoints.newest_whole(tmp_path / "c").name == "checkpoint-8"
    for name, options in (("out", {"checkpoints": tmp_path / "c", "runtime": {"checkpoints": 3}}), ("whole", {})):
        (tmp_path / name).mkdir(exist_ok=True)
        run_training(values, inputs, tmp_path / name, Progress.silent(), **options)
    assert read_json(tmp_path / "out" / "train.json")["resumed_from"] == 8
    assert adapter_digests(tmp_path / "out") == adapter_digests(tmp_path / "whole")


def test_a_full_disk_is_named_and_leaves_the_last_checkpoint(inputs, tmp_path, monkeypatch):
    """A limit on the size of files stands for the disk: the second checkpoint's optimizer state doesn't fit."""
    written = trainer.Trainer._save_optimizer_and_scheduler

    def save(self, folder):
        if self.state.global_step > 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        written(self, folder)

    monkeypatch.setattr(trainer.Trainer, "_save_optimizer_and_scheduler", save)
    out = tmp_path / "out"
    out.mkdir()
    try:
        with pytest.raises(UserError, match=r"a checkpoint can't be written to .*/c .*GB free there.*start again"):
            options = {"checkpoints": tmp_path / "c", "runtime": {"checkpoints": 3}}
            run_training(settings(), inputs, out, Progress.silent(), **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert checkpoints.newest_whole(tmp_path / "c") is not None


def test_a_damaged_checkpoint_is_not_continued_from(tmp_path):
    for step in (2, 4, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("whole")
        checkpoints.seal(folder)
    assert checkpoints.newest_whole(tmp_path).name == "checkpoint-10"
    (tmp_path / "checkpoint-10" / "weights").write_text("cut o")
    (tmp_path / "checkpoint-4" / "seal.json").unlink()
    assert checkpoints.newest_whole(tmp_path).name == "checkpoint-2"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
