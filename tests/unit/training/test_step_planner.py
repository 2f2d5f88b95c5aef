"""The plan of a step: the fastest that fits, found without touching the model, kept, and left when memory runs out."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.files import digest_file, read_json, read_jsonl
from adder.core.progress import Progress
from adder.kernels import labelled_loss
from adder.training import base_model, lora, step_planner, trainer
from adder.training.checkpoints import newest_whole
from adder.training.stage import TrainSettings
from adder.training.step_planner import CHECKPOINTING, StepChoices, StepPlan, Trial, Trials
from tiny import save_tiny_model, write_training_inputs
from training_stage import run_training, train_settings

PACKS = [[100, 100, 100]] * 40  # three examples each
LEVELS = list(CHECKPOINTING)
KEPT = {"none": 1.0, "every 4th layer": 0.78, "every 2nd layer": 0.55, "all layers": 0.1, step_planner.OFFLOADED: 0.03}
TIME = {"none": 1.0, "every 4th layer": 1.12, "every 2nd layer": 1.25, "all layers": 1.5, step_planner.OFFLOADED: 2.0}
GB = 10**9


ONE = Choice(1, "one process")
NAMES = ("micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")


def settings(**changes) -> TrainSettings:
    return train_settings(**{"effective_batch_size": 48, **changes})


def choose(values: TrainSettings, device: str, levels: list[str], try_plan) -> StepChoices:
    """The choices of one process over PACKS."""
    per_step = step_planner.step_packs(values, PACKS)
    return step_planner.choose_step(values, PACKS, per_step, device, levels, try_plan, ONE)


def values_of(choices: StepChoices) -> tuple:
    return tuple(getattr(choices, name).value for name in NAMES)


class Card:
    """A made-up GPU: memory of weights and of a pack's activations, seconds of a launch and of a pack."""

    def __init__(self, room: float, weights: float = 6, pack: float = 5.5, launch: float = 0.0, seconds: float = 0.15):
        self.room, self.weights, self.pack, self.launch, self.seconds = room, weights, pack, launch, seconds
        self.tried: list[tuple[int, str]] = []

    def __call__(self, plan: StepPlan) -> Trial:
        self.tried.append((plan.micro_batch, plan.checkpointing))
        peak = self.weights + self.pack * plan.micro_batch * KEPT[plan.checkpointing]
        if peak > self.room / (1 - 0.08):
            return Trial(plan, fits=False)  # as after an out-of-memory error: nothing is known
        seconds = self.launch + self.seconds * plan.micro_batch * TIME[plan.checkpointing]
        speed = plan.micro_batch * 300 / seconds
        return Trial(plan, peak <= self.room, int(peak * GB), speed, int(self.room * GB))


def chosen(card: Card, **changes) -> tuple:
    return values_of(choose(settings(**changes), "cuda", LEVELS, card))


def test_with_room_nothing_is_recomputed_and_one_larger_batch_shows_that_it_gains_nothing():
    card = Card(room=70)
    assert chosen(card) == (2, 8, False)  # 48 examples: 16 packs; of two as fast the one in fewer passes
    assert card.tried == [(1, "none"), (2, "none")]


def test_the_batch_grows_as_long_as_that_is_faster():
    assert chosen(Card(room=1000, launch=1.0)) == (16, 1, False)


def test_recomputing_is_taken_where_the_larger_batch_that_it_allows_is_faster():
    """Launches cost as much as a pack here, and only one pack fits with everything kept."""
    card = Card(room=12.5, launch=0.5)
    micro, accumulation, checkpointing = chosen(card)
    assert (micro * accumulation, checkpointing) == (16, True) and micro > 1
    assert ("none" not in {level for size, level in card.tried if size > 2}) and (1, "none") in card.tried


def test_recomputing_as_little_as_needed_where_one_pack_does_not_fit():
    """5.5 GB a pack with everything kept: 24 GB hold two beside 6 GB of weights, 10.5 GB only with half recomputed."""
    assert chosen(Card(room=24)) == (2, 8, False)
    assert chosen(Card(room=10.5)) == (1, 16, "every 4th layer")
    assert chosen(Card(room=9.5)) == (1, 16, "every 2nd layer")
    assert chosen(Card(room=7)) == (1, 16, True)
    assert chosen(Card(room=6.3)) == (1, 16, step_planner.OFFLOADED)


def test_what_the_line_through_two_trials_rules_out_is_not_tried():
    card = Card(room=20, launch=1.0)
    choices = choose(settings(), "cuda", LEVELS, card)
    assert (4, "none") not in card.tried
    row = next(row for row in choices.micro_batch_size.alternatives if row["micro_batch"] == 4)
    assert row == {
        "micro_batch": 4,
        "checkpointing": "none",
        "tokens_per_second": None,
        "peak_memory_bytes": 28 * GB,
        "fits": False,
    }


def test_every_trial_is_an_alternative_and_the_reason_compares():
    choice = choose(settings(), "cuda", LEVELS, Card(room=70)).micro_batch_size
    assert [row["micro_batch"] for row in choice.alternatives] == [1, 2]
    assert choice.alternatives[0]["tokens_per_second"] == 2000 and choice.alternatives[0]["fits"]
    assert "the fastest of 2 plans that fit" in choice.reason and "2,000 tokens/s" in choice.reason


def test_of_plans_that_two_timings_hardly_tell_apart_the_one_in_fewer_passes_is_taken():
    def trial(micro: int, speed: float, level: str = "none") -> step_planner.Trial:
        return step_planner.Trial(step_planner.StepPlan(micro, 16 // micro, level), True, GB, speed, 70 * GB)

    def taken(*trials: step_planner.Trial) -> int:
        return step_planner._best(list(trials)).plan.micro_batch

    assert taken(trial(1, 1000), trial(2, 990)) == 2 and taken(trial(1, 1000), trial(2, 970)) == 1
    assert taken(trial(2, 1000), trial(4, 995, "all layers")) == 2
    near = [trial(1, 1000), trial(2, 990)]
    assert "as fast as any (within 2 %) of 2 plans" in step_planner._size_reason(near[1], near, "cuda")


def test_nothing_fits_is_one_clear_error():
    with pytest.raises(UserError, match="not even 1 pack of 300 tokens fits .* lower lengths.max_seq_length"):
        chosen(Card(room=3))
    with pytest.raises(UserError, match="not even 4 packs .*use train.method: qlora"):
        chosen(Card(room=10), micro_batch_size=4, gradient_checkpointing=False, method="lora")


def test_set_values_are_kept():
    card = Card(room=70)
    assert chosen(card, micro_batch_size=2, gradient_checkpointing=True) == (2, 8, True)
    assert card.tried == [(2, "all layers")]
    choices = choose(settings(micro_batch_size=2, gradient_checkpointing=True), "cuda", LEVELS, Card(room=70))
    assert choices.gradient_checkpointing.reason == "as set" and "as set" in choices.micro_batch_size.reason


def test_a_size_that_is_set_recomputes_no_more_than_it_must():
    assert chosen(Card(room=20), micro_batch_size=4) == (4, 4, "every 2nd layer")


def test_slow_trials_end_the_search(monkeypatch):
    clock = iter(range(0, 10_000, 15))
    monkeypatch.setattr(step_planner.time, "perf_counter", lambda: next(clock))
    card = Card(room=1000, launch=1.0)
    chosen(card)
    assert card.tried == [(1, "none"), (2, "none")]


def test_ladder_skips_neighbours_and_keeps_the_largest():
    assert step_planner.ladder([1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60]) == [1, 2, 3, 5, 10, 15, 30, 60]
    assert step_planner.ladder([1, 2, 3, 4]) == [1, 2, 4]
    assert step_planner.ladder([]) == []


# On a CPU -------------------------------------------------------------------------------------------------------------


def test_on_a_cpu_the_largest_batch_of_enough_tokens_is_taken_untimed():
    def trial(plan):
        return Trial(plan, fits=True, peak_memory_bytes=1)

    choices = choose(settings(effective_batch_size=18), "cpu", LEVELS, trial)
    assert values_of(choices) == (3, 2, False)


def test_on_a_cpu_without_room_the_batch_shrinks_before_layers_are_recomputed():
    found = []
    for most in (2, 0.5):

        def trial(plan, most=most):
            return Trial(plan, fits=plan.micro_batch * KEPT[plan.checkpointing] <= most, peak_memory_bytes=1)

        choices = choose(settings(effective_batch_size=18), "cpu", LEVELS, trial)
        found.append(values_of(choices))
    assert found == [(2, 3, False), (3, 2, True)]


@pytest.fixture(scope="module")
def deep_model_dir(tmp_path_factory) -> Path:
    """Eight layers, so that each level of checkpointing is another."""
    return save_tiny_model(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=8)


def quantised(folder: Path, held: bool, monkeypatch) -> torch.nn.Module:
    """A model in NF4, with its values held dequantised or not, and a pair that isn't zero."""
    value = "dequantised once" if held else "dequantised in each product"
    monkeypatch.setattr(base_model, "choose_nf4_values", lambda *args: Choice(value, "test"))
    model, _ = base_model.load(folder, "qlora", "float32", "cpu")
    torch.manual_seed(0)
    model = lora.add_adapter(model, train_settings(lora_r=4, lora_dropout=0.1))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def state_of(model: torch.nn.Module) -> dict:
    """Bytes of every parameter and buffer, of NF4's scales too, with gradients, modes and flags."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, layer in base_model.four_bit_layers(model).items():
        state = layer.weight.quant_state
        tensors |= {f"{name}.absmax": state.absmax, f"{name}.nested": state.state2.absmax}
    return {
        "tensors": {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "modes": {name: (m.training, getattr(m, "gradient_checkpointing", None)) for name, m in model.named_modules()},
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        "forwards": {name for name, module in model.named_modules() if "forward" in module.__dict__},
    }


@pytest.mark.parametrize("held", [True, False])
def test_trials_leave_model_and_random_numbers_as_they_were(deep_model_dir, held, monkeypatch):
    model = quantised(deep_model_dir, held, monkeypatch).eval()
    before = state_of(model)
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    trials = Trials(model, PACKS, "float32", "cpu")
    for level in step_planner.supported_checkpointing(model, "cpu"):
        assert trials(StepPlan(2, 2, level)).fits
    # What a trial on a GPU does beside counting: TRL's head over the model, a backward pass.
    with step_planner._as_before(model, "every 2nd layer"), step_planner.fused_head(trials.bare):
        losses = model(**step_planner.made_up([20, 12], 300, "cpu"), fused_lm_head=True).log_probs
        losses.mean().backward()
        assert any(parameter.grad is not None for parameter in model.parameters())
    assert state_of(model) == before
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert after[:2] == generators[:2] and torch.equal(after[2], generators[2])


def test_counted_memory_falls_with_what_is_recomputed(deep_model_dir, monkeypatch):
    model = quantised(deep_model_dir, True, monkeypatch)
    trials = Trials(model, PACKS, "float32", "cpu")
    found = [
        trials(StepPlan(1, 1, level)).peak_memory_bytes for level in step_planner.supported_checkpointing(model, "cpu")
    ]
    assert found == sorted(found, reverse=True) and found[-1] < 0.5 * found[0]
    later = trials.later
    one, two = (trials(StepPlan(size, 1)).peak_memory_bytes - later for size in (1, 2))
    assert two == pytest.approx(2 * one, rel=1e-6)
    assert later == 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_too_little_main_memory_is_an_error_and_not_a_kill(deep_model_dir, monkeypatch):
    model = quantised(deep_model_dir, True, monkeypatch)
    monkeypatch.setattr(step_planner.hardware, "free_memory", lambda device: 100_000)
    trials = Trials(model, PACKS, "float32", "cpu")
    with pytest.raises(UserError, match="not even 1 pack of 300 tokens fits in this machine's memory with gradient"):
        choose(settings(), "cpu", step_planner.supported_checkpointing(model, "cpu"), trials)


@pytest.mark.parametrize("level", ["every 4th layer", "every 2nd layer", "all layers"])
def test_recomputing_some_layers_changes_no_gradient(deep_model_dir, level, monkeypatch):
    """The very numbers: what is recomputed is the same product of the same numbers; dropout is drawn again."""
    model = quantised(deep_model_dir, True, monkeypatch)
    batch = dict(step_planner.made_up([30, 21], 300, "cpu"))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        labelled_loss.labelled_losses(model.train().get_base_model(), **batch).mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    expected = gradients()
    step_planner.apply_checkpointing(model, level)
    flags = [layer.gradient_checkpointing for layer in model.get_base_model().model.layers]
    every = CHECKPOINTING[level].get("every_n_layers", 1)
    assert flags == [number % every == 0 for number in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(), strict=True))
    step_planner.apply_checkpointing(model, "none")
    assert not model.is_activation_checkpointing


# Kept for the next start, and left when memory runs out ---------------------------------------------------------------


def test_a_plan_is_read_as_it_was_written(tmp_path):
    for level in CHECKPOINTING:
        value = step_planner.SETTING.get(level, level)
        choices = StepChoices(ONE, Choice(2, "a", [{"x": 1}]), Choice(3, "b"), Choice(value, "c"))
        step_planner.save_choices(choices, tmp_path)
        assert step_planner.load_choices(tmp_path) == choices and choices.plan == StepPlan(2, 3, level)
    assert step_planner.load_choices(tmp_path / "none") is None


def test_the_next_smaller_plan_is_the_same_step():
    plan, seen = StepPlan(6, 2), []
    while plan is not None:
        seen.append((plan.micro_batch, plan.accumulation, plan.checkpointing))
        plan = step_planner.smaller(plan, ["none", "every 2nd layer", "all layers"])
    sizes = [(6, 2), (4, 3), (3, 4), (2, 6), (1, 12)]
    assert seen == [(*size, "none") for size in sizes] + [(1, 12, "every 2nd layer"), (1, 12, "all layers")]


def test_no_smaller_plan_is_an_error():
    choices = StepChoices(ONE, Choice(1, ""), Choice(4, ""), Choice(True, ""))
    with pytest.raises(UserError, match="memory ran out in step 8 with 1 pack .* nothing smaller is left"):
        step_planner.fall_back(choices, ["none", "all layers"], 7, 0)


def values(**changes) -> TrainSettings:
    """Training settings with chance in them: dropout, shuffled packs."""
    found = {"epochs": 2, "learning_rate": 1e-3, "effective_batch_size": 12, "lora_r": 4, "compute_dtype": "float32"}
    found |= {"eval_samples": 4, "eval_times": 2, "lora_dropout": 0.1, **changes}
    return train_settings(**found, reshuffle=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model_dir):
    return write_training_inputs(tmp_path_factory.mktemp("inputs"), tiny_model_dir, packs=20)


def start(inputs: dict, folder: Path, said: list[str] | None = None, **changes) -> dict:
    """A start of the training stage with checkpoints in `folder`/c; what the plan says."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    progress = Progress.silent()
    if said is not None:
        progress.say = said.append
    run_training(values(**changes), inputs, out, progress, checkpoints=folder / "c", runtime={"checkpoints": 3})
    return read_json(out / "plan.json")


def digests(folder: Path) -> dict:
    return {path.name: digest_file(path) for path in sorted((folder / "out" / "adapter").iterdir())}


def full_at(monkeypatch, step: int, largest: int, before=None) -> list[int]:
    """From optimizer step `step` (counted from 0) on, a forward pass over more than `largest` packs finds no memory."""
    computed, seen = trainer.Trainer.training_step, []

    def training_step(self, *args, **kwargs):
        micro = self.args.per_device_train_batch_size
        if self.state.global_step >= step and micro > largest:
            seen.append(micro)
            if before:
                before()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return computed(self, *args, **kwargs)

    monkeypatch.setattr(trainer.Trainer, "training_step", training_step)
    return seen


def test_out_of_memory_goes_on_from_the_checkpoint_with_a_smaller_plan(inputs, tmp_path, monkeypatch):
    """Byte for byte what a run makes that continues from that checkpoint with the smaller batch."""
    at = tmp_path / "at"
    seen = full_at(monkeypatch, 7, largest=2, before=lambda: shutil.copytree(tmp_path / "one" / "c", at / "c"))
    said: list[str] = []
    plan = start(inputs, tmp_path / "one", said)
    assert seen == [4]
    checkpoint = newest_whole(at / "c")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 0 < step <= 7
    assert [plan[name]["value"] for name in NAMES] == [2, 2, False]
    fall = plan["memory_fallback"]
    assert "memory ran out in step 8 with 4 packs" in fall["reason"] and f"checkpoint of step {step}" in fall["reason"]
    assert fall["alternatives"] == [{"step": 8, "continued_from": step, "micro_batch": 4, "checkpointing": "none"}]
    assert fall["reason"] in said and f"continuing from the checkpoint at step {step}" in said
    summary = read_json(tmp_path / "one" / "out" / "train.json")
    steps = [row["step"] for row in read_jsonl(tmp_path / "one" / "out" / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, summary["planned_steps"] + 1)) and summary["effective_batch"]["packs"] == 4

    choices = step_planner.load_choices(at / "c")
    assert choices.plan == StepPlan(4, 1)
    smaller = replace(choices, micro_batch_size=Choice(2, "test"), gradient_accumulation_steps=Choice(2, "test"))
    step_planner.save_choices(smaller, at / "c")
    start(inputs, at)
    assert digests(at) == digests(tmp_path / "one")


def test_out_of_memory_before_the_first_checkpoint_begins_anew(inputs, tmp_path, monkeypatch):
    seen = full_at(monkeypatch, 0, largest=1)
    plan = start(inputs, tmp_path / "fell")
    assert seen == [4, 2]  # twice too large
    assert [row["micro_batch"] for row in plan["memory_fallback"]["alternatives"]] == [4, 2]
    assert "from the start" in plan["memory_fallback"]["reason"]
    start(inputs, tmp_path / "small", micro_batch_size=1)
    assert digests(tmp_path / "fell") == digests(tmp_path / "small")


def test_a_continued_run_keeps_the_plan_that_it_began_with(inputs, tmp_path, monkeypatch):
    """Another batch would be chosen now, as after a trial with other timings; the adapter is that of one go."""
    start(inputs, tmp_path / "whole")

    class Killed(Exception):
        pass

    def killed(self, *args, **kwargs):
        if self.state.global_step == 7:
            raise Killed
        return computed(self, *args, **kwargs)

    computed = trainer.Trainer.training_step
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer.Trainer, "training_step", killed)
        start(inputs, tmp_path / "cut")
    monkeypatch.setattr(step_planner, "CPU_TOKENS", 1)
    plan = start(inputs, tmp_path / "cut")
    assert plan["micro_batch_size"]["value"] == 4
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    whole = read_json(tmp_path / "whole" / "out" / "plan.json")
    assert all(plan[name] == whole[name] for name in NAMES)


def test_a_trial_is_timed_once_its_steps_are_no_faster_any_more(monkeypatch):
    """Compiling kernels takes seconds of a first step, or of the first with another level of checkpointing."""
    trials = object.__new__(step_planner.Trials)
    trials.fastest = 0.0
    steps = iter([4.0, 0.5, 0.21, 0.2, 9.9])
    monkeypatch.setattr(trials, "_seconds", lambda lengths: next(steps), raising=False)
    assert trials._settled_seconds([100]) == 0.2 and trials.fastest == 500
    steps = iter([3.0, 0.4, 0.4])  # far slower than the trial before: something was compiled
    assert trials._settled_seconds([100]) == 0.4
    steps = iter([2.5])  # as fast as the one before, and long: its own timing
    assert trials._settled_seconds([1000]) == 2.5


def test_the_speed_of_the_plan_that_is_used_is_told():
    made = choose(settings(), "cuda", LEVELS, Card(40))
    plan = made.plan
    (row,) = [
        row for row in made.micro_batch_size.alternatives if row["micro_batch"] == plan.micro_batch and row["fits"]
    ]
    assert step_planner.planned_speed(made) == row["tokens_per_second"] > 0
    other = replace(made, gradient_checkpointing=Choice(not made.gradient_checkpointing.value, "as set"))
    assert step_planner.planned_speed(other) is None
