"""The tables of scores in docs/evaluation.md, made from their registry."""

from adder.evaluation.metrics import SCORES, ReplyScore
from adder.evaluation.reference_forms import FORMS


def table() -> str:
    """Return a Markdown table of all scores: name in files, what people see, when there is one, better way, meaning."""
    rows = [
        f"| `{name}` | {score.label} | {_asked_by(name)} | {score.better} | {score.meaning} |"
        for name, score in SCORES.items()
    ]
    return "| score | called | where | better | what it is |\n|---|---|---|---|---|\n" + "\n".join(rows)


def _asked_by(name: str) -> str:
    score = SCORES[name]
    if score.form is not None:
        return f"each reference is {FORMS[score.form].words}, or `{score.form}`"
    if isinstance(score, ReplyScore) and name != "exact_match":
        return f"free text, or `{name}`" if score.auto else f"`{name}`"
    return "always"
