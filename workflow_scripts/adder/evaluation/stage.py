"""The stages "evaluate" and "judge": a model's loss and replies on the held-out rows, and what a judge says of them."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from adder.core.file_digests import FileDigests
from adder.core.secrets import refuse_secrets
from adder.core.section import Auto, Section
from adder.core.stage_spec import Memory, StageSpec
from adder.evaluation.metrics import metric_names
from adder.evaluation.tasks.stage import EvaluationTask

if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[metric_names()]  # pydantic refuses any other name, and the JSON schema lists them


class EvaluateSettings(Section):
    """What decides a model's scores on the held-out rows."""

    max_samples: int | None = Field(default=None, ge=2)
    """Evaluate only so many held-out rows."""
    max_new_tokens: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Longest reply in tokens; `auto` is just above the longest training reply."""
    batch_size: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Replies generated at once."""
    metrics: Auto | list[MetricName] = "auto"
    """How replies are scored; `auto` goes by what the references look like."""
    backend: Literal["auto", "hf", "vllm"] = "auto"
    """What generates: transformers, or vLLM; `auto` takes vLLM where it is installed and there is a GPU."""


class JudgeSettings(Section):
    """A model behind an OpenAI-compatible interface that compares replies, blind and in both orders; off unless set."""

    base_url: str = Field(pattern="^https?://")
    """Where the interface is, such as `https://api.openai.com/v1` or `http://localhost:8000/v1`."""
    model: str = Field(min_length=1)
    """Name of the judging model."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the key; `null` for none."""
    max_samples: int = Field(default=50, ge=2)
    """How many held-out prompts it judges."""
    criteria: str | None = Field(default=None, min_length=1)
    """What a good reply is, in your words."""


class Evaluate(EvaluateSettings):
    """Evaluation of base and merged model, on the held-out rows and beyond."""

    tasks: list[EvaluationTask] = Field(default_factory=list)
    """Tasks beyond the held-out rows, before and after training."""
    judge: JudgeSettings | None = None
    """Let another model compare the replies of base and tuned."""


def _judge_identity(settings: JudgeSettings, where: str, digests: FileDigests) -> dict[str, object]:
    refuse_secrets(settings.base_url, f"{where}.base_url")
    return settings.model_dump(mode="json")


EVALUATE = StageSpec(
    name="evaluate",
    rule="evaluate_model",
    run="adder.evaluation.run",
    settings=EvaluateSettings,
    section="evaluate",
    message="Evaluating on the held-out rows",
    result=lambda found: (
        (f"exact match {100 * found['exact_match']:.1f} %, " if "exact_match" in found else "")
        + f"loss {found['loss']:.3g}"
    ),
    reads={
        "model": ("model/",),
        "tokenize": ("heldout.arrow", "tokenizer/", "tokenize.json"),
        "format": ("heldout.parquet",),
    },
    variants={"base": {"model": "model"}, "tuned": {"model": "merge"}},
    shows={"evaluate": "scores.json", "samples": "samples.jsonl"},
    gpu=True,
    threads=None,
    minutes=240,
    memory=Memory(base_mb=8000, bytes_per_parameter=2.0),
)
JUDGE = StageSpec(
    name="judge",
    rule="judge_replies",
    run="adder.evaluation.judge",
    settings=JudgeSettings,
    section="evaluate.judge",
    message="Letting a model judge the replies",
    result=lambda found: f"wins {100 * found['win_rate']:.0f} % of the pairs: {found['verdict']}",
    reads={"evaluate_base": ("samples.jsonl",), "evaluate_tuned": ("samples.jsonl",)},
    identity=_judge_identity,
    continued="*.json",
    shows={"judge": "judge.json", "judgements": "judgements.jsonl"},
    local=True,  # the judge is elsewhere: compute nodes need no network
    minutes=120,
)
