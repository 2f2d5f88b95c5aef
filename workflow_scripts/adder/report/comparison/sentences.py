"""The comparison of runs in words: which run to use, how sure that is, what else bears on the choice."""

from collections.abc import Sequence

from adder.evaluation.metrics import SCORES
from adder.report.comparison.facts import Comparison, Difference, RankedRun, RunCost
from adder.report.formatting import NO_BREAK, duration, number
from adder.report.sections.evaluation_section import write_score


def sentence(found: Comparison) -> str:
    """Which run to use and how sure that is."""
    word, best = found.verdict.word, found.runs[0]
    if word == "one":
        return f"{best.name} is the only run. {best.verdict['sentence']}"
    if word == "refused":
        return "Use none of them: every run lost more than it may in a task that guards against forgetting."
    return _sure(found) if word == "best" else _unsure(found)


def advice(found: Comparison) -> list[str]:
    """What else bears on the choice: cost, how many rows would tell, the base, guards that failed, different rows."""
    runs, verdict = {run.name: run for run in found.runs}, found.verdict
    best, lines = runs[verdict.run], []
    if verdict.tied:
        lines += _equals(found)
    elif verdict.word == "can't tell":
        score = "highest" if SCORES[found.metric].better == "higher" else "lowest"
        lines.append(f"{best.name} has the {score} score of them, so take it if nothing else decides.")
        if verdict.needed_n:
            rows = float(f"{verdict.needed_n:.1e}")  # more digits would pretend to a precision that it hasn't
            lines.append(f"About {rows:,.0f} held-out rows would be needed to tell it from {verdict.rivals[0]}.")
    if verdict.word in ("can't tell", "best"):
        lines.append(_cost([best, *(runs[name] for name in verdict.rivals)], runs[verdict.cheapest]))
        if all(run.verdict["verdict"] != "better" for run in runs.values()):
            lines.append("No run is surely better than its base.")
        lines.append(f"{best.name} against its base: {best.verdict['sentence']}")
    left_out = [run.name for run in runs.values() if run.refused]
    if left_out and verdict.word != "refused":
        lines.append(f"Ruled out, for losing more than it may in a guarded task: {listed(left_out)}.")
    if found.rows is None:
        lines.append(
            "The runs were not evaluated on the same held-out rows. Those that differ in them are compared as "
            "independent samples, which can tell less, and part of a difference may be the rows' own."
        )
    return lines


def listed(names: Sequence[str]) -> str:
    """Names as a list in words; of more than four the first three."""
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} other runs"
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def change(value: float, metric: str, unit: bool = True, signed: bool = True) -> str:
    """A difference of scores; of shares in percentage points."""
    share = SCORES[metric].is_share
    value = (round(100 * value, 1) if share else value) + 0.0  # no minus before a zero
    text = (f"{value:.1f}" if share else number(value)).replace("-", "−")
    return ("+" if signed and value > 0 else "") + text + (f"{NO_BREAK}points" if share and unit else "")


def spent(cost: RunCost) -> str:
    """Time, and price where one is known, in words."""
    return duration(cost.seconds) + ("" if cost.price is None else f", {money(cost)}")


def money(cost: RunCost) -> str:
    """A price with its currency, or "" where none is known."""
    return "" if cost.price is None else f"{cost.price:.2f}{NO_BREAK}{cost.currency}"


def lower(name: str) -> str:
    """A score's name within a sentence: abbreviations keep their capitals."""
    return name if any(letter.isupper() for letter in name[1:]) else name[0].lower() + name[1:]


def _sure(found: Comparison) -> str:
    """The best run is better than all others by more than chance."""
    metric, best, others = found.metric, found.runs[0], found.runs[1:]
    next_best = next((run for run in others if not run.refused), None)
    score = f"its {lower(SCORES[metric].label)} of {write_score(metric, best.score['value'])}"
    if next_best is None:
        return f"Use {best.name}, with {score}: all others lost more than they may in a guarded task."
    difference = next_best.against_best
    assert difference and difference.ci95, "of a run that is surely worse the interval is known"
    ends = [change(end, metric, unit=False, signed=False) for end in sorted(map(abs, difference.ci95))]
    by = change(abs(difference.value), metric, signed=False)
    side = "above" if SCORES[metric].better == "higher" else "below"
    name = f"the next, {next_best.name}" if len(others) > 1 else next_best.name
    how = f"{by} {side} that of {name} (95 % interval {ends[0]} to {ends[1]})"
    if not difference.paired:
        return f"Use {best.name}: {score} is {how}, more than chance explains, but on different held-out rows."
    among = f" of the {len(found.runs)} runs" if len(others) > 1 else ""
    return f"Use {best.name}: {score} is surely the best{among}, {how}, {_on_rows(found)}."


def _unsure(found: Comparison) -> str:
    """The best can't be told from its rivals."""
    metric, runs, rivals = found.metric, {run.name: run for run in found.runs}, found.verdict.rivals
    best, nearest = runs[found.verdict.run], runs[rivals[0]]
    own = f"{lower(SCORES[metric].label)} is {write_score(metric, best.score['value'])}"
    if found.verdict.same_model == rivals:
        return f"{listed([best.name, *rivals])} are one and the same model: {own}, {_on_rows(found)}."
    scores = " and ".join(write_score(metric, run.score["value"]) for run in (best, nearest))
    of_which = f" for {nearest.name}" if len(rivals) > 1 else ""
    which = f"{lower(SCORES[metric].label)} is {scores}{of_which}"
    if found.verdict.tied:
        which = f"{own} for {listed([best.name, *found.verdict.tied])} alike"
    doubt = _doubt(nearest.against_best or Difference(value=0.0), metric, len(runs))
    return f"Can't tell {best.name} from {listed(rivals)}: {which}, {_on_rows(found)}, and {doubt}."


def _doubt(difference: Difference, metric: str, runs: int) -> str:
    """Why a difference doesn't count."""
    if not difference.comparable:
        return "the runs split the same replies into different numbers of tokens, so a loss per token can't decide"
    if difference.ci95 is None:
        return "there are no scores row by row to say how large a difference chance makes"
    low, high = (-end for end in reversed(difference.ci95))
    if not difference.matters:
        return f"a difference of {change(abs(difference.value), metric, signed=False)} is too small to matter"
    if low <= 0 <= high:
        unit = " points" if SCORES[metric].is_share else ""
        ends = f"{change(low, metric, unit=False)} to {change(high, metric, unit=False)}{unit}"
        return f"the 95 % interval of the difference, {ends}, leaves it open"
    return f"among {runs} runs a difference as small as this could come up by chance"


def _equals(found: Comparison) -> list[str]:
    """Which of the runs that share the best score to take, and which of them are one model."""
    verdict, runs = found.verdict, {run.name: run for run in found.runs}
    names, same = [verdict.run, *verdict.tied], [verdict.run, *verdict.same_model]
    either = "either" if len(names) == 2 else "any of them"
    if len({spent(runs[name].cost) for name in names}) > 1:
        either = f"{verdict.run}, which took the least time"
    models = f"The merged models of {listed(same)} are the same, byte for byte"
    if same == names:
        return [f"{models}, so take {either}."]
    lines = [f"{models}."] if len(same) > 1 else []
    return [*lines, f"{listed(names)} score the same, so take {either} if nothing else decides."]


def _cost(asked: Sequence[RankedRun], cheapest: RankedRun) -> str:
    """What the best run cost beside the cheapest of those in question, `asked`, of which it is the first."""
    best = asked[0]
    if len(asked) > 1 and len({spent(run.cost) for run in asked}) == 1:
        return f"{listed([run.name for run in asked])} took {spent(best.cost)} each."
    if cheapest is best:
        of_them = " of them" if len(asked) > 1 else ""
        return f"{best.name} took {spent(best.cost)}, no more than any other{of_them}."
    return f"{cheapest.name} cost less: {spent(cheapest.cost)}; {best.name} took {spent(best.cost)}."


def _on_rows(found: Comparison) -> str:
    same = found.rows is not None
    return f"on the same {found.rows:,} held-out rows" if same else "not on the same held-out rows"
