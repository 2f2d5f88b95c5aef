"""What the stages "evaluate" and "judge" leave for later stages and the report: their JSON files, line by line."""

from typing import Any, Literal, NotRequired, TypedDict

from adder.core.choice import ChoiceRecord
from adder.core.intervals import Estimate, Word
from adder.evaluation.json_fields import FieldComparison
from adder.formatting.conversation import Message

Preference = Literal["tuned", "base", "tie"]


class ModelFacts(TypedDict):
    """The evaluated model: its class in transformers, and its parameter count."""

    architecture: str
    parameters: int


class GenerationFacts(TypedDict):
    """How the replies came about.

    seconds: of generation alone. new_tokens: that were computed. truncated: replies cut at max_new_tokens. looped: of
    these, the ones that repeated themselves for so long that the rest was not computed. prompts_cut: prompts that lost
    their beginning, to fit the context. prompts_unlike_training: those that aren't, token for token, what training
    used.
    """

    seconds: float
    new_tokens: int
    truncated: int
    looped: NotRequired[int]
    prompts_cut: int
    prompts_unlike_training: int


class ScoresRecord(TypedDict):
    """scores.json.

    kind: the form in which exact matches are compared. heldout: an intervals.Estimate by the name of each score of
    metrics.SCORES that was measured, and, of JSON replies, under "fields" the FieldScores by field. What is about
    replies is absent where no row has a prompt.
    """

    model: ModelFacts
    kind: str
    metrics: ChoiceRecord
    backend: ChoiceRecord
    heldout: dict[str, Any]
    compute_dtype: ChoiceRecord
    lm_eval_version: str
    kernels: NotRequired[ChoiceRecord]
    max_new_tokens: NotRequired[ChoiceRecord]
    batch_size: NotRequired[ChoiceRecord]
    generation: NotRequired[GenerationFacts]


class SampleRecord(TypedDict):
    """A line of samples.jsonl. Beside these keys stand the reply's own scores, each under its name in metrics.SCORES.

    loss: nats a labelled token, the row's mean. A plain text has no prompt and no reply. new_tokens include the one
    that ends the reply; a truncated one was cut at the limit, a looped one repeats itself up to it.
    fields: of JSON replies.
    """

    id: str
    prompt: list[Message]
    reference: str
    loss: float
    labelled_tokens: int
    group: NotRequired[str]
    reply: str | None
    new_tokens: NotRequired[int]
    truncated: NotRequired[bool]
    looped: NotRequired[bool]
    exact_match: NotRequired[int]
    fields: NotRequired[dict[str, FieldComparison]]


class Pair(TypedDict):
    """A row that both models replied to."""

    id: str
    prompt: list[Message]
    base: str
    tuned: str
    reference: str
    group: NotRequired[str]


class Judgement(Pair):
    """A line of judgements.jsonl: what was preferred with the tuned reply first, then second, and why."""

    first: Preference
    second: Preference
    reasons: list[str]


class JudgeFigures(TypedDict):
    """Wins, losses and ties of the tuned model; inconsistent are ties in which the two orders disagree.

    p: of the sign test.
    """

    pairs: int
    wins: int
    losses: int
    ties: int
    inconsistent: int
    win_rate: Estimate
    p: float
    verdict: Word
    sentence: str


class JudgeRecord(JudgeFigures):
    """judge.json. failed: pairs that the judge left. tokens: "prompt" and "completion", as the judge counts them."""

    model: str
    base_url: str
    criteria: str | None
    failed: int
    tokens: dict[str, int] | None
