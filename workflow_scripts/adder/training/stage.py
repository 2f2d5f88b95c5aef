"""The stage "train": an adapter, or a full model, trained on the packs."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_serializer, model_validator

from adder.core.errors import UserError
from adder.core.file_digests import FileDigests
from adder.core.files import read_json
from adder.core.paths import ADAPTER_FILES, adapter_folder
from adder.core.section import Auto, Section
from adder.core.stage_spec import Memory, StageSpec

LORA_KEYS = (
    "lora_r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora",
    "init_lora_weights", "lora_plus_ratio", "frozen_products",
)  # fmt: skip


# What settings call what an adapter's own configuration says.
ADAPTER_KEYS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "target_modules": "target_modules",
    "modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


class TrainChoices(Section):
    """What decides a training."""

    method: Literal["qlora", "lora", "full"] = "qlora"
    """`qlora`: LoRA on a base quantised to NF4; `lora`: on the 16-bit base; `full`: every weight."""
    epochs: float = Field(default=2.0, gt=0)
    """Passes over the training examples."""
    learning_rate: float = Field(default=1e-4, gt=0, lt=1)
    """Peak learning rate."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    min_lr_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Where the cosine ends, as a share of the peak."""
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises: step k of w has k / w of the peak."""
    weight_decay: float = Field(default=0.01, ge=0, lt=1)
    """AdamW's weight decay."""
    effective_batch_size: int = Field(default=16, ge=1)
    """Examples an optimizer step, counted in examples also when they are packed."""
    micro_batch_size: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Sequences (packs) a forward pass; `auto` takes the fastest number that fits, up to the effective batch."""
    gradient_checkpointing: Auto | bool = "auto"
    """Recompute activations in the backward pass to save memory; `auto` does it in some or all layers where that lets a
    faster batch fit, or any."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    lora_r: int = Field(default=16, ge=1)
    """LoRA rank."""
    lora_alpha: float = Field(default=32, gt=0)
    """LoRA scale: updates are multiplied by lora_alpha / lora_r."""
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the input of each LoRA pair."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get a LoRA pair: names, or a regular expression over their full names; `all-linear` finds them by
    type: every linear layer but the LM head."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules that are trained whole beside the pairs, such as `lm_head`; they are saved with the adapter."""
    use_rslora: bool = False
    """Rank-stabilised LoRA: updates are multiplied by lora_alpha / sqrt(lora_r) (Kalajdzievski 2023,
    arXiv:2312.03732)."""
    use_dora: bool = False
    """DoRA: magnitude and direction of each weight are trained apart (Liu et al. 2024, arXiv:2402.09353). Slower."""
    init_lora_weights: Literal["default", "gaussian", "pissa", "olora", "loftq", "eva"] = "default"
    """How the pairs begin: PEFT's own initialisations, some of which look at the weights or at the data."""
    lora_plus_ratio: float | None = Field(default=None, ge=1, le=100)
    """LoRA+: the B matrices learn at so many times the learning rate (Hayou et al. 2024, arXiv:2402.12354)."""
    neftune_noise_alpha: float | None = Field(default=None, gt=0)
    """NEFTune: noise on the embeddings while training (Jain et al. 2023, arXiv:2310.05914); 5 is usual."""
    loss: Literal["nll", "dft"] = "nll"
    """`nll`: cross-entropy; `dft`: each token's loss weighted by its probability (Wu et al. 2025, arXiv:2508.05629)."""
    seed: int = Field(default=42, ge=0)
    """Seed of the initialisation, the order of examples and dropout."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of the matrix products; `auto` takes what this hardware computes fastest without loss of range."""
    frozen_products: Literal["auto", "bf16", "fp8"] = "auto"
    """Precision of the frozen base's products on a GPU. `fp8` (Ada and later) is faster and coarser; a step on your
    own packs shows by how much. `auto` takes it for hidden sizes from 2,048 on where that is next to nothing."""
    eval_samples: int = Field(default=64, ge=0)
    """Held-out examples for the evaluation loss while training; 0 for none."""
    eval_times: int = Field(default=4, ge=1)
    """How often to take it, evenly spread, the last time at the end."""
    keep: Literal["last", "best"] = "last"
    """Which adapter leaves the training: that of the last step, or of the evaluation that `best_by` likes best."""
    best_by: Literal["loss", "exact_match"] = "loss"
    """What an evaluation is judged by: the held-out loss, or exact matches among the sampled replies."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations in a row that were no better than the best before."""
    samples: int = Field(default=3, ge=0)
    """Held-out prompts that the model replies to at each evaluation, beside the base's reply; 0 for none."""


class Train(TrainChoices):
    """Training."""

    max_examples: int | None = Field(default=None, ge=1)
    """Train on only so many of the training examples, spread over the data and the same ones every time."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.init_lora_weights == "loftq" and self.method != "qlora":
            raise ValueError("init_lora_weights: loftq makes up for quantisation, so it needs method: qlora")
        if self.init_lora_weights in ("pissa", "olora") and self.method == "qlora":
            raise ValueError(
                f"init_lora_weights: {self.init_lora_weights} changes the base's weights, so it needs method: lora"
            )
        if (self.keep == "best" or self.early_stopping) and not self.eval_samples:
            raise ValueError("keep: best and early_stopping judge by evaluations, so they need eval_samples above 0")
        if self.best_by == "exact_match" and not self.samples:
            raise ValueError("best_by: exact_match counts sampled replies, so it needs samples above 0")
        return self

    @model_validator(mode="after")
    def _lora_needs_lora(self) -> Self:
        given = sorted(set(LORA_KEYS) & self.model_fields_set)
        if self.method == "full" and given:
            them = "them" if len(given) > 1 else "it"
            raise ValueError(
                f"method: full trains every weight, so {', '.join(given)} would have no effect; remove {them}"
            )
        return self


class TrainSettings(TrainChoices):
    """What decides the trained weights, beside the packs."""

    reshuffle: bool
    """Fill the packs anew in each epoch; see `lengths`."""
    adapter: str | None = None
    """The adapter to go on from; see `model`."""


def _identity(settings: TrainSettings, where: str, digests: FileDigests) -> dict[str, object]:
    """The settings alone: the adapter is part of the stage "model". One in a folder is held against them at once."""
    folder = settings.adapter and adapter_folder(settings.adapter, digests.root)
    if folder:
        refuse_mismatch(read_json(folder / ADAPTER_FILES[0]), settings, str(settings.adapter))
    return settings.model_dump(mode="json", exclude={"adapter"})


def refuse_mismatch(config: Mapping[str, Any], settings: TrainChoices, adapter: str) -> None:
    """Raise UserError where settings and an adapter to go on from say different things; one sentence a difference.

    config: its adapter_config.json. What names the model's layers is compared where settings do so by name.
    """
    kind = str(config.get("peft_type")).upper()
    if kind != "LORA":
        raise UserError(f"model.adapter: {adapter} is of the kind {kind}, and only LoRA adapters can be gone on from")
    if settings.method == "full":
        return  # merged first, whatever it is like
    found = {name: config.get(key) for name, key in ADAPTER_KEYS.items()}
    wanted = {name: getattr(settings, name) for name in ADAPTER_KEYS}
    if wanted["target_modules"] == "all-linear":  # known when the model is loaded
        del found["target_modules"]
    problems = [
        f"model.adapter: train.{name} is {_written(wanted[name])}, and {adapter} has {_written(value)}"
        for name, value in found.items()
        if _comparable(value) != _comparable(wanted[name])
    ]
    if settings.init_lora_weights != "default":
        problems.append(f"model.adapter: train.init_lora_weights has no effect where pairs begin as {adapter}'s")
    others = [
        key for key in ("bias", "trainable_token_indices", "target_parameters", "layer_replication") if config.get(key)
    ]
    others = [key for key in others if config[key] != "none"]
    if others:
        problems.append(f"model.adapter: {adapter} has {', '.join(others)}, which can't be gone on from")
    if problems:
        raise UserError("\n".join(problems))


def _comparable(value: Any) -> Any:
    return sorted(value) if value and isinstance(value, list) else value or None


def _written(value: Any) -> str:
    return f"[{', '.join(map(str, sorted(value)))}]" if isinstance(value, list) else str(value).lower()


TRAIN = StageSpec(
    name="train",
    rule="train_adapter",
    run="adder.training.run",
    settings=TrainSettings,
    section="train",
    takes={"reshuffle": "lengths.reshuffle", "adapter": "model.adapter"},
    identity=_identity,
    message="Training",
    result=lambda found: (
        f"{found['steps']:,} steps at {found['tokens_per_second']:,.0f} tokens/s; loss {found['final_loss']:.3g}"
        + (f", held out {found['eval_loss']:.3g}" if found["eval_loss"] is not None else "")
    ),
    reads={
        "lengths": ("packs.parquet",),
        "tokenize": ("train.arrow", "heldout.arrow", "tokenizer/"),
        "model": ("model/", "packed/", "adapter/", "source.json"),
    },
    continued="checkpoint-*/seal.json",
    shows={"train": "train.json", "plan": "plan.json", "curve": "metrics.jsonl", "sampled": "samples.jsonl"},
    gpu=True,
    several_gpus=True,
    threads=None,
    minutes=1440,
    memory=Memory(base_mb=8000, bytes_per_parameter=2.0),
)


class IsolationSettings(Section):
    """What decides how a model computes packs: how it is loaded, and what of it is trained."""

    method: Literal["qlora", "lora", "full"]
    """How it is trained; see `train`."""
    lora_r: int
    """LoRA rank; see `train`."""
    lora_alpha: float
    """LoRA scale; see `train`."""
    target_modules: str | list[str]
    """Modules that get a LoRA pair; see `train`."""
    modules_to_save: list[str]
    """Modules that are trained whole; see `train`."""
    use_rslora: bool
    """Rank-stabilised LoRA; see `train`."""
    use_dora: bool
    """DoRA; see `train`."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"]
    """Precision of the matrix products; see `train`."""
    adapter: str | None = None
    """The adapter to go on from; see `model`."""
    merge_base: Literal["auto", "original", "dequantized"] = "auto"
    """Which weights are merged into; see `merge`."""

    @field_serializer("merge_base")
    def _only_what_may_be_refused(self, given: str) -> str:
        """The original weights are there whatever the model is: to choose them is no other question."""
        return given if given == "dequantized" else "auto"


def _isolation_identity(settings: IsolationSettings, where: str, digests: FileDigests) -> dict[str, object]:
    """Rank and scale change nothing of what is tried; an adapter to go on from must have just these."""
    own = {"adapter"} if settings.adapter else {"adapter", "lora_r", "lora_alpha"}
    return settings.model_dump(mode="json", exclude=own)


ISOLATION = StageSpec(
    name="isolation",
    rule="check_isolation",
    run="adder.training.early_check",
    settings=IsolationSettings,
    section="train",
    takes={"adapter": "model.adapter", "merge_base": "merge.base"},
    identity=_isolation_identity,
    message="Trying packs on the model, before anything long runs",
    result=lambda found: f"no example sees another ({str(found['attention']['value']).replace('_', ' ')})",
    reads={
        "lengths": ("packs.parquet",),
        "tokenize": ("train.arrow",),
        "model": ("model/", "packed/", "adapter/"),
    },
    gpu=True,
    threads=None,
    minutes=30,
    priority=1,
    memory=Memory(base_mb=8000, bytes_per_parameter=2.0),
)
