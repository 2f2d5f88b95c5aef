"""Rules of thumb for training settings: what is usual, why, and who says so. Advice, not law: nothing is refused.

The ranges are wide enough that a value outside is worth a second look, not that one inside is right. Sources:

- Hu et al. 2021, LoRA, arXiv:2106.09685 (GPT-2 of 355 M parameters: rate 2e-4, weight decay 0.01)
- Dettmers et al. 2023, QLoRA, arXiv:2305.14314 (rate 2e-4 to 13 B and 1e-4 above, batch 16, warm-up 3 %)
- Schulman et al. 2025, LoRA Without Regret, doi:10.64434/tml.20250929 (LoRA's best rate is ten times that of full
  fine-tuning; LoRA bears large batches less well), and the same laboratory's sweep in tinker-cookbook's
  hyperparam_utils.py (best LoRA rates: 1e-3 at 1 and 3 B, 3e-4 to 1e-3 at 8 B, 3e-4 at 70 B)
- SmolLM2's recipes in alignment-handbook (full fine-tuning, rate 1e-3 at 135 M and 360 M, warm-up 10 %)
- Touvron et al. 2023, Llama 2, arXiv:2307.09288 (full fine-tuning, rate 2e-5, weight decay 0.1, batch 64, 2 epochs)
- Loshchilov & Hutter 2019, AdamW, arXiv:1711.05101
- Goyal et al. 2017, arXiv:1706.02677 (warm-up); Zhou et al. 2023, LIMA, arXiv:2305.11206 (1,000 examples, 15 epochs);
  Muennighoff et al. 2023, arXiv:2305.16264 (up to four passes are worth nearly as much as new data)
- Adder's own runs, QLoRA of SmolLM2-135M: 480 examples at 4e-4, 800 at 1e-3, the embedded default's 620 at 1.5e-3 all
  learnt well; in the last the loss fell from 3.2 to 0.15 in 30 steps and to 0.01 in 100
"""

import math

from adder.training.records import TrainingFacts
from adder.training.stage import TrainSettings

# (parameters below, lowest usual peak rate, highest, source). Larger models take smaller rates.
LORA_RATES = (
    (1e9, 1e-4, 3e-3, "Hu et al. 2021 trained 355 M parameters at 2e-4, Adder's own runs 135 M at up to 1.5e-3"),
    (4e9, 5e-5, 2e-3, "Schulman et al. 2025 found 1e-3 best for Llama-3.2 of 1 and 3 B"),
    (20e9, 3e-5, 1e-3, "Dettmers et al. 2023 took 2e-4 for 7 and 13 B, Schulman et al. 2025 3e-4 to 1e-3 for 8 B"),
    (math.inf, 2e-5, 5e-4, "Dettmers et al. 2023 took 1e-4 for 33 and 65 B, Schulman et al. 2025 found 3e-4 for 70 B"),
)
FULL_RATES = (
    (1e9, 1e-5, 1e-3, "SmolLM2's recipe took 1e-3 for 135 M and 360 M"),
    (4e9, 5e-6, 3e-4, "a tenth of LoRA's rate, Schulman et al. 2025; SmolLM2's recipe for 1.7 B took 3e-4"),
    (20e9, 2e-6, 5e-5, "Touvron et al. 2023 took 2e-5 for Llama 2; a tenth of LoRA's rate, Schulman et al. 2025"),
    (math.inf, 1e-6, 3e-5, "Touvron et al. 2023 took 2e-5 for Llama 2 up to 70 B"),
)
# (examples below, most usual epochs, source)
EPOCHS = (
    (2_000, 15, "Zhou et al. 2023 took 15 for 1,000 examples"),
    (20_000, 5, "Muennighoff et al. 2023: up to 4 passes are worth nearly as much as new data"),
    (math.inf, 4, "Touvron et al. 2023 took 2 for 27,540 examples; Muennighoff et al. 2023: up to 4"),
)
BATCH = (16, 128)
ENOUGH_STEPS = 100
WARMUP = (0.03, 0.1)
WEIGHT_DECAY = (0.01, 0.1)


def usual_rate(method: str, parameters: int) -> tuple[float, float, str]:
    """Lowest and highest usual peak learning rate for `method` ("qlora", "lora", "full") and size, and the source."""
    table = FULL_RATES if method == "full" else LORA_RATES
    return next((low, high, source) for below, low, high, source in table if parameters < below)


def most_epochs(examples: int) -> tuple[int, str]:
    """The most passes that are usual over so many examples, and the source."""
    return next((most, source) for below, most, source in EPOCHS if examples < below)


def advise(settings: TrainSettings, facts: TrainingFacts) -> list[str]:
    """One line for each setting of section `train` that lies outside what is usual; none for a usual set-up.

    Of the facts it takes parameters (of the base model), examples (to train on), steps and steps_per_epoch.
    """
    rules = (_learning_rate, _batch, _epochs, _warmup, _weight_decay)
    return [line for rule in rules if (line := rule(settings, facts))]


def _learning_rate(settings: TrainSettings, facts: TrainingFacts) -> str | None:
    rate, method = settings.learning_rate, settings.method
    low, high, source = usual_rate(method, facts.parameters)
    if low <= rate <= high:
        return None
    why = "the run may end before it has learnt anything" if rate < low else "the loss may rise or never settle"
    lora = usual_rate("lora", facts.parameters)
    if method == "full" and high < rate <= lora[1]:
        why = "that is a rate for LoRA, which takes ten times more"
    return _line(
        f"train.learning_rate: {rate:.1e}",
        f"{low:.0e} to {high:.0e} for method {method} with {_in_words(facts.parameters)} parameters",
        why,
        source,
    )


def _batch(settings: TrainSettings, facts: TrainingFacts) -> str | None:
    """Batches of 16 to 128, in proportion to the data: with few examples, enough steps matter more."""
    batch, seen = settings.effective_batch_size, facts.examples * settings.epochs
    name = f"train.effective_batch_size: {batch}"
    usual = f"{BATCH[0]} to {BATCH[1]}"
    if batch > BATCH[1]:
        why = "LoRA learns less from the same examples in large batches"
        if settings.method == "full":
            why = "fewer, larger steps learn less from the same examples"
        return _line(name, usual, why, "Schulman et al. 2025; Touvron et al. 2023 took 64")
    smaller = max(4, 2 ** int(math.log2(max(seen / ENOUGH_STEPS, 1))))
    if facts.steps < ENOUGH_STEPS and 2 * smaller <= batch:
        return _line(
            name,
            f"as many as leave about {ENOUGH_STEPS} steps, here {smaller}",
            f"{facts.steps} steps, {facts.steps_per_epoch} an epoch, are few to learn in",
            "the embedded default took 100 steps to a loss of 0.01; Schulman et al. 2025 on large batches",
        )
    if batch < BATCH[0] and seen / BATCH[0] >= ENOUGH_STEPS:
        return _line(
            name,
            usual,
            f"{BATCH[0]} examples a step would still make {seen / BATCH[0]:,.0f} steps, each less noisy and cheaper",
            "Dettmers et al. 2023 took 16",
        )
    return None


def _epochs(settings: TrainSettings, facts: TrainingFacts) -> str | None:
    epochs, examples = settings.epochs, facts.examples
    most, source = most_epochs(examples)
    name = f"train.epochs: {epochs:g}"
    if epochs > most:
        return _line(name, f"up to {most} for {examples:,} examples", "more passes learn them by heart", source)
    # Of very many examples a part can be enough.
    if epochs < 1 and examples < EPOCHS[1][0]:
        unused = round(examples * (1 - epochs))
        return _line(name, f"1 to {most} for {examples:,} examples", f"{unused:,} of them are never seen", source)
    return None


def _warmup(settings: TrainSettings, facts: TrainingFacts) -> str | None:
    ratio = settings.warmup_ratio
    if WARMUP[0] <= ratio <= WARMUP[1]:
        return None
    why = "the first steps, taken while AdamW's averages are still rough, can throw the weights about"
    if ratio > WARMUP[1]:
        why = f"{ratio * facts.steps:,.0f} of {facts.steps:,} steps are taken below the rate that you chose"
    return _line(
        f"train.warmup_ratio: {ratio:g}", "0.03 to 0.1", why, "Goyal et al. 2017; Dettmers et al. 2023 took 0.03"
    )


def _weight_decay(settings: TrainSettings, facts: TrainingFacts) -> str | None:
    decay = settings.weight_decay
    if WEIGHT_DECAY[0] <= decay <= WEIGHT_DECAY[1]:
        return None
    why = "nothing keeps unused weights small"
    if decay > WEIGHT_DECAY[1]:
        why = "what is learnt is pulled back to zero as fast"
    if decay < WEIGHT_DECAY[0] and settings.method != "full":
        why += ", which matters little for a short LoRA run"
    source = "Loshchilov & Hutter 2019; Hu et al. 2021 took 0.01, Touvron et al. 2023 0.1"
    return _line(f"train.weight_decay: {decay:g}", "0.01 to 0.1", why, source)


def _line(given: str, usual: str, why: str, source: str) -> str:
    return f"{given}; usual: {usual}; {why} ({source})"


def _in_words(parameter_count: float) -> str:
    """135e6 as "135 M", 8.03e9 as "8 B"."""
    return f"{parameter_count / 1e9:.3g} B" if parameter_count >= 1e9 else f"{parameter_count / 1e6:.3g} M"
