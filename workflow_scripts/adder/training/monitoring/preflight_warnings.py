"""What looks wrong in the figures of the look before the first step, in sentences. Nothing here stops a training."""

from collections.abc import Mapping

from adder.core.choice import ChoiceRecord
from adder.training.layer_names import listed
from adder.training.records import PreflightFigures

# A model that knows nothing loses ln(vocabulary) nats a token; one more is worse than guessing by a factor of e.
MARGIN = 1.0
LEAST_LABELLED = 0.01


def warnings(figures: PreflightFigures, plan: Mapping[str, ChoiceRecord]) -> list[str]:
    """One sentence for each thing that looks wrong; none for a sound set-up. `plan`: plan.json."""
    checks = (
        _guessing(figures),
        _unreached(figures),
        _untrained(figures),
        _hardly_labelled(figures),
        _coarse(plan),
        _left_unquantised(plan),
        _left_untrained(plan),
    )
    return [sentence for sentence in checks if sentence]


def _guessing(figures: PreflightFigures) -> str | None:
    loss, uniform = figures["base_loss"], figures["ln_vocabulary"]
    if loss <= uniform + MARGIN:
        return None
    return (
        f"the base's loss on the first pack is {loss:.2f}, worse than guessing (ln of the vocabulary is "
        f"{uniform:.2f}): the tokenizer or the chat template is not this model's"
    )


def _unreached(figures: PreflightFigures) -> str | None:
    dead = figures["layers_without_gradient"]
    if not dead:
        return None
    return (
        f"{len(dead)} of {figures['layers']} trained layers get no gradient from the first pack: {listed(dead)}; "
        "they learn nothing unless other packs reach them (an expert that no token was sent to)"
    )


def _untrained(figures: PreflightFigures) -> str | None:
    tokens = figures.get("untrained_tokens") or []
    if not tokens:
        return None
    return (
        f"the base was never trained on control tokens of this chat template: the embeddings of {listed(tokens)} are "
        "zero, equal or the mean of all, and this method leaves them so; take a template of tokens that the base "
        "knows (tokenize.chat_template), or train.method: full"
    )


def _hardly_labelled(figures: PreflightFigures) -> str | None:
    share = figures["labelled_share"]
    if share >= LEAST_LABELLED:
        return None
    return (
        f"{figures['labelled']} of the first pack's {figures['tokens']:,} tokens carry loss "
        f"({100 * share:.2f} %): nearly all computing goes into prompts; shorten them, or look at tokenize.loss_on"
    )


def _coarse(plan: Mapping[str, ChoiceRecord]) -> str | None:
    """Where matmuls are in fp8 that no comparison found harmless."""
    choice = plan.get("frozen_products")
    if choice is None or choice["value"] != "fp8" or any(row.get("within") for row in choice["alternatives"]):
        return None
    return f"train.frozen_products: fp8, {choice['reason']}"


def _left_unquantised(plan: Mapping[str, ChoiceRecord]) -> str | None:
    choice = plan.get("nf4_weights")
    if choice is None or choice["value"] == "as they came":
        return None
    return f"train.method: qlora, but {choice['reason']}"


def _left_untrained(plan: Mapping[str, ChoiceRecord]) -> str | None:
    choice = plan.get("lora_pairs")
    return None if choice is None else f"train.target_modules: {choice['reason']}"


def time_in_words(seconds: float, steps: int) -> str:
    """Roughly how long the steps take: whatever else the machine did during the one pass is in it."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            words = f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
            break
    else:
        words = f"{max(1, round(seconds))} seconds"
    return f"roughly {words} for {steps:,} steps, by the time of one pack; evaluations and checkpoints not counted"
