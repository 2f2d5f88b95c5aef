"""Advice: both sides of every rule; what is shipped gets none."""

from pathlib import Path

import pytest
import yaml

from adder.training.monitoring import advice
from adder.workflow.settings import load
from training_stage import train_settings, training_facts

ROOT = Path(__file__).resolve().parents[4]
EMBEDDED = 134_515_008  # SmolLM2-135M
LLAMA = 8_030_261_248


def advise(parameters: int = LLAMA, examples: int = 10_000, **changes) -> list[str]:
    settings = train_settings(**changes)
    per_epoch = -(-examples // settings.effective_batch_size)
    steps = max(1, round(per_epoch * settings.epochs))
    facts = training_facts(parameters=parameters, examples=examples, steps=steps, steps_per_epoch=per_epoch)
    return advice.advise(settings, facts)


def about(lines: list[str]) -> list[str]:
    """The settings that the lines are about."""
    return [line.removeprefix("train.").partition(":")[0] for line in lines]


@pytest.mark.parametrize(
    ("name", "parameters", "examples"),
    [
        ("config.yaml", EMBEDDED, 620),
        ("examples/learning-rate-sweep.yaml", EMBEDDED, 620),
        ("examples/snips.yaml", EMBEDDED, 1_200),
        ("examples/llama-3.1-8b-24gb.yaml", LLAMA, 10_000),
        ("examples/qwen2.5-1.5b-t4.yaml", 1_543_714_304, 10_000),
    ],
)
def test_what_is_shipped_is_usual(name, parameters, examples):
    for settings in load(yaml.safe_load((ROOT / "config" / name).read_text())).values():
        given = settings.train.model_dump(exclude_unset=True, exclude={"max_examples"})
        assert advise(parameters, examples, **given) == []


def test_the_defaults_are_usual():
    assert advise() == []


@pytest.mark.parametrize(
    ("method", "parameters", "usual", "outside"),
    [
        # Adder's own default at 135 M; Hu et al.'s GPT-2
        ("qlora", EMBEDDED, [1.5e-3, 4e-4, 2e-4], [1e-2, 1e-5]),
        ("lora", 355_000_000, [2e-4], [1e-2]),
        # Schulman et al. 2025 at 1, 3, 8 and 70 B; Dettmers et al. 2023 at 7, 13 and 65 B
        ("lora", 1_236_000_000, [1e-3, 1e-4], [5e-3, 1e-6]),
        ("qlora", 3_213_000_000, [1e-3], [5e-3]),
        ("qlora", LLAMA, [1e-4, 2e-4, 3e-4, 1e-3], [1.5e-3, 1e-5]),
        ("qlora", 13_000_000_000, [2e-4], [2e-3]),
        ("qlora", 65_000_000_000, [1e-4, 3e-4], [1e-3, 5e-6]),
        # SmolLM2's recipes; Llama 2 at 7 and 70 B
        ("full", EMBEDDED, [1e-3, 2e-5], [3e-3, 1e-6]),
        ("full", 1_711_000_000, [3e-4, 2e-5], [1e-3, 1e-7]),
        ("full", 6_738_000_000, [2e-5], [1e-4, 1e-7]),
        ("full", 70_000_000_000, [2e-5], [1e-4]),
    ],
)
def test_learning_rates_by_method_and_size(method, parameters, usual, outside):
    for rate in usual:
        assert advise(parameters, method=method, learning_rate=rate) == [], rate
    for rate in outside:
        (line,) = advise(parameters, method=method, learning_rate=rate)
        assert line.startswith(f"train.learning_rate: {rate:.1e}; usual: ") and method in line, rate


def test_the_embedded_models_rate_is_too_much_for_eight_billion():
    (line,) = advise(learning_rate=1.5e-3)
    assert line == (
        "train.learning_rate: 1.5e-03; usual: 3e-05 to 1e-03 for method qlora with 8.03 B parameters; "
        "the loss may rise or never settle "
        "(Dettmers et al. 2023 took 2e-4 for 7 and 13 B, Schulman et al. 2025 3e-4 to 1e-3 for 8 B)"
    )


def test_a_rate_for_lora_under_full_training_is_recognised():
    (line,) = advise(method="full", learning_rate=2e-4)
    assert "that is a rate for LoRA" in line


@pytest.mark.parametrize(
    ("examples", "batch", "named"),
    [
        (10_000, 16, False),
        (20_000, 128, False),
        (10_000, 8, True),  # 16 would still make 1,250 steps
        (100_000, 256, True),
        (620, 4, False),  # 155 steps: a batch of 16 would leave 39
        (620, 32, True),  # 20 steps
        (50, 4, False),  # few, but no batch makes more of them
        (1_200, 8, False),
    ],
)
def test_batches_in_proportion_to_the_data(examples, batch, named):
    lines = advise(EMBEDDED, examples, epochs=1, learning_rate=1e-3, effective_batch_size=batch)
    assert about(lines) == (["effective_batch_size"] if named else [])


def test_a_batch_that_leaves_few_steps_is_told_a_better_one():
    (line,) = advise(examples=2_000, epochs=1, effective_batch_size=64)
    assert "here 16" in line and "32 steps" in line


@pytest.mark.parametrize(
    ("examples", "epochs", "named"),
    [
        (1_000, 15, False),  # LIMA
        (1_000, 20, True),
        (10_000, 3, False),
        (10_000, 8, True),
        (27_540, 2, False),  # Llama 2
        (50_000, 6, True),
        (10_000, 0.5, True),
        (1_000_000, 0.5, False),
    ],
)
def test_epochs_by_the_size_of_the_data(examples, epochs, named):
    assert about(advise(examples=examples, epochs=epochs)) == (["epochs"] if named else [])


@pytest.mark.parametrize(("ratio", "named"), [(0.0, True), (0.02, True), (0.03, False), (0.1, False), (0.2, True)])
def test_warm_up(ratio, named):
    lines = advise(warmup_ratio=ratio)
    assert about(lines) == (["warmup_ratio"] if named else [])
    assert ratio < 0.1 or not named or "250 of 1,250 steps" in lines[0]


@pytest.mark.parametrize(("decay", "named"), [(0.0, True), (0.01, False), (0.1, False), (0.3, True)])
def test_weight_decay(decay, named):
    assert about(advise(weight_decay=decay)) == (["weight_decay"] if named else [])
    full = advise(method="full", learning_rate=2e-5, weight_decay=decay)
    assert about(full) == (["weight_decay"] if named else [])


def test_each_line_says_what_is_usual_why_and_who_says_so():
    settings = {"learning_rate": 0.4, "effective_batch_size": 512, "epochs": 50}
    lines = advise(**settings, warmup_ratio=0.5, weight_decay=0.9)
    assert about(lines) == ["learning_rate", "effective_batch_size", "epochs", "warmup_ratio", "weight_decay"]
    for line in lines:
        given, usual, why = line.split("; ", 2)
        assert given.startswith("train.") and usual.startswith("usual: ") and "\n" not in line
        assert any(f"et al. {year}" in why or "& Hutter 2019" in why for year in range(2017, 2026))
