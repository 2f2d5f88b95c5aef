"""The trainer: modes, batches read ahead, evaluations that disturb nothing, a full disk."""

import resource

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler

from adder.core.errors import UserError
from adder.core.files import digest_file, read_jsonl
from adder.core.progress import Progress
from adder.training import checkpoints, fit, packed_dataset, trainer
from tiny import write_training_inputs
from training_stage import adapter_digests, run_training, small_settings, train_small


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model_dir):
    return write_training_inputs(tmp_path_factory.mktemp("inputs"), tiny_model_dir)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
def test_step_k_of_w_warm_up_steps_has_the_rate_k_of_w(name):
    def rates(warmup, steps, is_ours):
        optimizer = torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (1.0, 4.0)])
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        if is_ours:
            trainer.warm_from_first_step(scheduler, warmup)
        found = []
        for _ in range(steps):
            found.append([group["lr"] for group in optimizer.param_groups])
            assert scheduler.get_last_lr() == found[-1]
            optimizer.step()
            scheduler.step()
        return found

    ours, theirs = rates(4, 10, True), rates(4, 10, False)
    assert ours[:4] == [[k / 4, k] for k in (1, 2, 3, 4)]
    assert ours[4:] == theirs[4:]
    assert rates(1, 1, True) == [[1.0, 4.0]] and rates(1, 1, False) == [[0.0, 0.0]]
    assert rates(0, 3, True) == rates(0, 3, False)


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_a_run_of_one_step_trains(inputs, tmp_path, method):
    values = {"eval_samples": 0, "samples": 0, "method": method, "effective_batch_size": 1000, "warmup_ratio": 0.05}
    train_small(inputs, tmp_path / "one", epochs=1, **values)
    rows = [row for row in read_jsonl(tmp_path / "one" / "metrics.jsonl") if "loss" in row]
    assert [row["learning_rate"] for row in rows] == [small_settings(**values).learning_rate]
    if method == "qlora":
        weights = load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors")
        assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def test_reading_batches_ahead_changes_nothing(inputs, tmp_path, monkeypatch):
    """With several passes a step, a shorter last one and packs that are filled anew each epoch."""
    values = {"effective_batch_size": 9, "micro_batch_size": 1, "reshuffle": True, "epochs": 3}
    ahead = train_small(inputs, tmp_path / "ahead", **values)
    monkeypatch.setattr(packed_dataset.ReadAhead, "read", lambda self, number: None)
    assert train_small(inputs, tmp_path / "not", **values)["steps"] == ahead["steps"] > 3
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
        small_settings(epochs=4, eval_times=3, samples=0, method=method), inputs, tmp_path / "out", Progress.silent()
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
        run_training(small_settings(**values, **looks[name], method=method), inputs, folder, Progress.silent())
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
        found.append(train_small(inputs, tmp_path / str(size), eval_samples=8)["eval_loss"])
    assert max(found) - min(found) < 1e-5  # fp32 sums in another order


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
            run_training(small_settings(), inputs, out, Progress.silent(), **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert checkpoints.newest_whole(tmp_path / "c") is not None
