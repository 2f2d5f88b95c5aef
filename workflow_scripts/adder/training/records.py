"""What the train stage reads and writes: its inputs, the rows of its files, the facts that the report judges by.

Light to import: the report reads these without torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired, Required, TypedDict

from adder.core.choice import ChoiceRecord


@dataclass(frozen=True)
class TrainInputs:
    """The folders of the stages that a training reads."""

    lengths: Path
    tokenize: Path
    model: Path

    @property
    def base(self) -> Path:
        """The base model."""
        return self.model / "model"

    @property
    def packed(self) -> Path | None:
        """The base's 4-bit weights as they came, where they came so."""
        folder = self.model / "packed"
        return folder if folder.is_dir() else None

    @property
    def adapter(self) -> Path | None:
        """The adapter to go on from, where there is one."""
        folder = self.model / "adapter"
        return folder if folder.is_dir() else None

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, with its chat template."""
        return self.tokenize / "tokenizer"

    @property
    def train_tokens(self) -> Path:
        """Token table of the training examples."""
        return self.tokenize / "train.arrow"

    @property
    def heldout_tokens(self) -> Path:
        """Token table of the held-out examples."""
        return self.tokenize / "heldout.arrow"


class MetricsRow(TypedDict, total=False):
    """A row of metrics.jsonl, as the trainer logs it: of a step (with `loss`), or of an evaluation at a step."""

    step: Required[int]
    epoch: float
    loss: float
    """Mean over the step's labelled tokens, nats."""
    grad_norm: float | None
    """Before clipping."""
    learning_rate: float
    tokens_per_second: float
    skipped_step: int
    """1 where the fp16 scaler skipped the step; else it isn't there."""
    eval_loss: float
    """Mean over the held-out examples' labelled tokens, nats."""
    exact_match: float
    """Share of the sampled replies that are right."""


class SampleRow(TypedDict):
    """A row of samples.jsonl: a held-out prompt and the model's reply to it after `step`; step 0 is the base."""

    step: int
    id: str
    prompt: str
    reference: str
    reply: str
    exact_match: float
    finished: bool


@dataclass(frozen=True)
class TrainingFacts:
    """What doctor and advice judge a training by, beside its curves and settings. A 0 is not judged by.

    ln_vocabulary: loss of blind guessing, nats. parameters: parameter count of the base. labelled_share: of the tokens.
    dtype: of the matmuls, "float32", "bfloat16" or "float16". steps: planned optimizer steps. effective_batch: examples
    a step. tokens_per_step: of an average step. base_loss: of the untrained model on the first pack, nats; None before
    it is known. reply_tokens: mean length of the references of the sampled replies; None without any.
    """

    ln_vocabulary: float
    parameters: int
    trainable_parameters: int
    labelled_share: float
    dtype: str
    examples: int
    epochs: float
    steps: int
    steps_per_epoch: int
    effective_batch: float
    tokens_per_step: float
    base_loss: float | None = None
    reply_tokens: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As train.json has them."""
        return asdict(self)


class PackPiece(TypedDict):
    """A stretch of a pack's text all of which carries loss (1), or none of it (0), and the example it belongs to."""

    text: str
    loss: int
    example: int


# "from" is a keyword, so this one can't be written as a class.
ShownPack = TypedDict("ShownPack", {"pieces": list[PackPiece], "from": int, "tokens": int})
ShownPack.__doc__ = """A pack as text, from its token `from` on; `tokens`: of the whole pack."""


class DiskRoom(TypedDict):
    """Room that something takes on its disk, and what was free there before training."""

    needed_bytes: int
    free_bytes: int


class PreflightFigures(TypedDict):
    """What a look at the first pack measured: `preflight` of train.json.

    untrained_tokens: control tokens of the pack whose embeddings nobody has trained, and this run doesn't either.

    Losses in nats; `gradient_norm` over all trained layers, of which there are `layers`; `seconds` of the one pass, and
    from it those of all steps.
    """

    batch: ShownPack
    tokens: int
    labelled: int
    labelled_share: float
    base_loss: float
    ln_vocabulary: float
    trainable_parameters: int
    gradient_norm: float
    layers: int
    layers_without_gradient: list[str]
    untrained_tokens: list[str]
    disk: dict[str, DiskRoom]
    seconds: float
    estimated_seconds: int


class EffectiveBatch(TypedDict):
    """Examples a step: those asked for, those that there are on average, and in how many packs."""

    asked: int
    mean_examples: float
    packs: int


class TrainRecord(TypedDict):
    """train.json. Losses in nats a token, speeds in tokens of real examples a second."""

    steps: int
    planned_steps: int
    epochs: float
    tokens_per_epoch: int
    tokens_per_second: float
    first_loss: float
    final_loss: float
    eval_loss: float | None
    effective_batch: EffectiveBatch
    trainable_parameters: int
    total_parameters: int
    resumed_from: int | None
    kept: ChoiceRecord
    facts: dict[str, Any]
    """As TrainingFacts."""
    preflight: PreflightFigures
    peak_gpu_memory_bytes: NotRequired[int]


class TrainSummary(TypedDict, total=False):
    """The figures of a training that its stage's record repeats."""

    steps: int
    final_loss: float
    eval_loss: float | None
    tokens_per_second: float
    peak_gpu_memory_bytes: int


def metrics_rows(history: Sequence[Mapping[str, Any]]) -> list[MetricsRow]:
    """The rows of metrics.jsonl out of a trainer's log."""
    wanted = MetricsRow.__annotations__
    rows = [{name: row[name] for name in wanted if name in row} for row in history]
    return [row for row in rows if row.keys() & {"loss", "eval_loss", "exact_match"}]  # pyright: ignore[reportReturnType] - rows by their keys
