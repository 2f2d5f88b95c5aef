"""The registry of scores on the held-out rows. Light to import: the workflow is parsed with it.

A score is one decorated function. What the settings allow, what `auto` takes, the report's and the model card's words,
and the tables in docs/ follow from it. The first paragraph of the function's docstring is what the report tells a
reader who has never seen the score. The order here is the report's.

To add one, write a function of reference and reply under `@reply_score`, and a test of it; heavy libraries are imported
inside functions.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypedDict, TypeVar

from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.evaluation import text_overlap_metrics
from adder.evaluation.json_fields import FieldComparison, count_fields
from adder.evaluation.reference_forms import FORMS, choose_kind, is_match, parse_object


class ScoredRow(TypedDict):
    """What ratio scores are made from: a line of samples.jsonl."""

    loss: float  # nats a labelled token, the row's mean
    labelled_tokens: int
    fields: dict[str, FieldComparison]  # only where the references are JSON objects


class Parts(Protocol):
    """Numerator and denominator of one row."""

    __name__: str

    def __call__(self, row: ScoredRow, /) -> tuple[float, float]:
        """(numerator, denominator) of `row`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score of a model on the held-out rows.

    name: its key in scores.json and metrics.json, and, of a reply score, in samples.jsonl.
    label: what tables call it.
    spoken: what it is called within a sentence.
    is_share: whether it is 0 to 1, which people see in per cent.
    unit: what is counted, such as "nats per token"; empty for a share and for a bare number.
    better: which way is better.
    meaning: what it is, as a fragment of a sentence.
    hub: what the Hugging Face hub calls it.
    smallest_difference: below which a difference between two models doesn't matter, unless the settings say otherwise.
    """

    name: str
    label: str
    spoken: str
    is_share: bool
    unit: str
    better: Literal["higher", "lower"]
    meaning: str
    hub: str
    smallest_difference: float


@dataclass(frozen=True, kw_only=True)
class ReplyScore(Score):
    """A share that each reply has by itself; the model's is their mean.

    of_reply: (reference, reply) to 0 to 1.
    zero_or_one: whether it is always one of the two, so that the mean is a proportion.
    form: what references must be for it, a name of FORMS; None for anything.
    auto: whether `auto` takes it where the references are free text.
    """

    of_reply: Callable[[str, str], float]
    zero_or_one: bool
    form: str | None
    auto: bool


@dataclass(frozen=True, kw_only=True)
class RatioScore(Score):
    """A sum over the rows by another sum over the rows.

    parts: numerator and denominator of a row.
    of_replies: whether only rows with a reply have it; else plain texts have it too.
    form: as of a ReplyScore.
    exponential_of: the score that this one is e to the power of.
    """

    parts: Parts
    of_replies: bool
    form: str | None
    exponential_of: str | None


ANSWERS = {"final_answer": "answer", "final_answer_comma": "answer, with decimal commas"}
SMALLEST_DIFFERENCE = 0.01  # a point, or a hundredth of a nat, which is a percent of a perplexity
SCORES: dict[str, ReplyScore | RatioScore] = {}
OfReply = TypeVar("OfReply", bound=Callable[[str, str], float])
OfRow = TypeVar("OfRow", bound=Parts)


def reply_score(
    label: str,
    *,
    spoken: str | None = None,
    hub: str | None = None,
    zero_or_one: bool = False,
    form: str | None = None,
    auto: bool = False,
    smallest_difference: float = SMALLEST_DIFFERENCE,
) -> Callable[[OfReply], OfReply]:
    """Register a function of (reference, reply) as a score that bears its name."""

    def register(function: OfReply) -> OfReply:
        name = function.__name__
        SCORES[name] = ReplyScore(
            name=name,
            label=label,
            spoken=spoken or label,
            is_share=True,
            unit="",
            better="higher",
            meaning=_meaning(function),
            hub=hub or name,
            smallest_difference=smallest_difference,
            of_reply=function,
            zero_or_one=zero_or_one,
            form=form,
            auto=auto,
        )
        return function

    return register


def ratio_score(
    label: str,
    *,
    spoken: str | None = None,
    unit: str | None = None,
    better: Literal["higher", "lower"] = "higher",
    hub: str | None = None,
    of_replies: bool = True,
    form: str | None = None,
    exponential_of: str | None = None,
    smallest_difference: float = SMALLEST_DIFFERENCE,
) -> Callable[[OfRow], OfRow]:
    """Register a function of a row, to (numerator, denominator), as a score that bears its name.

    Without a unit it is a share.
    """

    def register(function: OfRow) -> OfRow:
        name = function.__name__
        SCORES[name] = RatioScore(
            name=name,
            label=label,
            spoken=spoken or label,
            is_share=unit is None,
            unit=unit or "",
            better=better,
            meaning=_meaning(function),
            hub=hub or name,
            smallest_difference=smallest_difference,
            parts=function,
            of_replies=of_replies,
            form=form,
            exponential_of=exponential_of,
        )
        return function

    return register


def _meaning(function: Callable[..., object]) -> str:
    """The first paragraph of a docstring, as a fragment of a sentence."""
    text = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split()).rstrip(".")
    return text[:1].lower() + text[1:]


@reply_score("Exact match", spoken="exact match", zero_or_one=True)
def exact_match(reference: str, reply: str, kind: str = "text") -> int:
    """Replies that say what their reference says: the same text, or of JSON the same data, of a worked answer the
    same number.

    1 or 0; `kind` is the form in which they are compared, a name of FORMS.
    """
    return int(is_match(kind, reference, reply))


@ratio_score("Field F1", spoken="field F1", hub="f1", form="json")
def field_f1(row: ScoredRow) -> tuple[float, float]:
    """Values inside the JSON: harmonic mean of how many of the given ones are right and how many of the expected ones
    were given.
    """
    right, found, expected = count_fields(row["fields"])
    return 2 * right, found + expected


@reply_score("Valid JSON", spoken="the share of valid JSON", zero_or_one=True, form="json")
def json_valid(reference: str, reply: str) -> int:
    """Replies that are a JSON object at all."""
    return int(parse_object(reply) is not None)


@reply_score("ROUGE-L", hub="rouge", auto=True)
def rouge_l(reference: str, reply: str) -> float:
    """Words that reply and reference have in common in the same order (F-measure, mean over replies)."""
    return text_overlap_metrics.rouge_l(reference, reply)


@reply_score("chrF", auto=True)
def chrf(reference: str, reply: str) -> float:
    """Letter sequences that reply and reference have in common (F2 score, mean over replies)."""
    return text_overlap_metrics.chrf(reference, reply)


@ratio_score("Held-out loss", spoken="held-out loss", unit="nats per token", better="lower", of_replies=False)
def loss(row: ScoredRow) -> tuple[float, float]:
    """How surprised the model is by a token of the references: the mean negative log-likelihood."""
    return row["loss"] * row["labelled_tokens"], row["labelled_tokens"]


@ratio_score("Perplexity", spoken="perplexity", unit="", better="lower", of_replies=False, exponential_of="loss")
def perplexity(row: ScoredRow) -> tuple[float, float]:
    """The same as a number of equally likely tokens to choose from: e to the power of the loss."""
    return loss(row)


def metric_names() -> tuple[str, ...]:
    """The values of `evaluate.metrics`: reply scores for any reference, and forms that exact_match goes by."""
    first, *others = _for_any_reference()
    return first, *(name for name in FORMS if name != "text"), *others


def _for_any_reference() -> list[str]:
    return [name for name, score in SCORES.items() if isinstance(score, ReplyScore) and score.form is None]


def choose_metrics(references: Sequence[str], wanted: Literal["auto"] | Sequence[str] = "auto") -> Choice:
    """Choose how replies are scored: a list of `metric_names`.

    exact_match is always there; with "json" it compares objects, with "final_answer" what stands behind "####", and
    with "final_answer_comma" so too, where numbers have decimal commas. Raises UserError where a metric is asked for
    that a reference has no form for.
    """
    if wanted == "auto":
        kind = choose_kind(references)
        if kind == "json":
            return Choice(["exact_match", "json"], "every reference is a JSON object")
        if kind in ANSWERS:
            return Choice(["exact_match", kind], f'every reference ends in "#### {ANSWERS[kind]}"')
        for_text = [name for name, score in SCORES.items() if isinstance(score, ReplyScore) and score.auto]
        return Choice(["exact_match", *for_text], "the references are free text")
    for name in wanted:
        odd = next((text for text in references if name in FORMS and FORMS[name].read(text) is None), None)
        if odd is not None:
            raise UserError(
                f"evaluate.metrics: {name!r} needs {FORMS[name].words} as each reference, but one is {odd[:80]!r}; "
                "leave it out"
            )
    return Choice(list(dict.fromkeys(["exact_match", *wanted])), "as set")


def kind_of(metrics: Sequence[str]) -> str:
    """What exact_match compares under these metrics: a name of FORMS."""
    return next((name for name in FORMS if name in metrics), "text")


def score_reply(metrics: Sequence[str], reference: str, reply: str) -> dict[str, float]:
    """Score one reply, 0 to 1 each, by the chosen metrics (see `choose_metrics`)."""
    kind = kind_of(metrics)
    scores: dict[str, float] = {"exact_match": exact_match(reference, reply, kind)}
    for name, score in SCORES.items():
        if isinstance(score, ReplyScore) and name != "exact_match" and (name in metrics or score.form == kind):
            scores[name] = score.of_reply(reference, reply)
    return scores


def smallest_differences() -> dict[str, float]:
    """The smallest difference that matters, by score, unless settings say otherwise; `task` is for shares in tasks.

    A score that is another one's exponential goes by that one's.
    """
    own = {
        name: score.smallest_difference
        for name, score in SCORES.items()
        if isinstance(score, ReplyScore) or not score.exponential_of
    }
    return {**own, "task": SMALLEST_DIFFERENCE}
