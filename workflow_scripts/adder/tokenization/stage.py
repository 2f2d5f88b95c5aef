"""The stage "tokenize": conversations to token ids, and labels where the assistant speaks."""

from typing import Literal

from pydantic import Field, JsonValue

from adder.core.file_digests import FileDigests
from adder.core.section import Section
from adder.core.stage_spec import Memory, StageSpec

LossOn = Literal["assistant", "last", "all"]
NAMED_TEMPLATES = ("chatml", "plain")  # chat templates of Adder's own, in chat_template.py


class TokenizeSettings(Section):
    """Conversations to tokens and the mask that says which of them carry loss."""

    chat_template: str | None = None
    """A Jinja file, or the name of one of Adder's templates (`chatml`, `plain`), instead of the model's own."""
    loss_on: LossOn = "assistant"
    """Which tokens carry loss: all replies, the last reply of each conversation, or everything."""
    template_variables: dict[str, JsonValue] = Field(default_factory=dict)
    """Variables of the chat template and their values, such as `{enable_thinking: false}`: the same ones in training,
    evaluation and tasks, and the defaults of the merged model's template."""
    max_rejected: float = Field(default=0.1, ge=0, le=1)
    """Share of conversations that the template or tokenizer can't hold, above which the run stops; of either split."""


def _identity(settings: TokenizeSettings, where: str, digests: FileDigests) -> dict[str, object]:
    """A chat template of the user's counts by its content."""
    template = settings.chat_template
    if template and template not in NAMED_TEMPLATES:
        template = digests.of_named(template, f"{where}.chat_template")
    return {**settings.model_dump(mode="json"), "chat_template": template}


TOKENIZE = StageSpec(
    name="tokenize",
    rule="tokenize_data",
    run="adder.tokenization.run",
    settings=TokenizeSettings,
    section="tokenize",
    message="Turning conversations into tokens",
    result=lambda found: (
        f"{found['counts']['train']['tokens']:,} tokens to train on, {found['counts']['train']['labelled']:,} with loss"
        + (f"; {found['rejected']:,} conversations left out" if found["rejected"] else "")
    ),
    reads={"format": ("train.parquet", "heldout.parquet"), "model": ("model/",)},
    identity=_identity,
    shows={"tokenize": "tokenize.json"},
    threads=None,
    memory=Memory(base_mb=4000),
)
