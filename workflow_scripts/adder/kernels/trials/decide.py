"""Which families of kernels this process uses: what trials on its card find, once for a model's sizes."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from adder.core.choice import Choice
from adder.core.progress import Progress
from adder.kernels import families
from adder.kernels.trials import kept, process
from adder.kernels.trials.shapes import ModelShapes
from adder.kernels.trials.trial import KernelFamily, Verdict, what_lacks

FOLDER = "kernel_trials"  # below the folder of all results
DECLARED = "adder.kernels.trials.declared:families:"


def decide(
    purpose: str,
    shapes: ModelShapes,
    device: str,
    folder: Path,
    progress: Progress,
    limit: float = process.LIMIT,
    source: str = DECLARED,
) -> Choice:
    """Try the families of kernels, and let this process use those that are right and pay; return which, and why not.

    purpose: "lora", "full" or "inference", what the kernels are for. device: "cuda:0"; "cpu" is for tests. folder: in
    which verdicts are kept. progress: is told one sentence of each family that can't be trusted. limit: seconds that
    a trial may take. What a kernel raises, gets wrong or takes too long over never ends the run.
    """
    families.forget()
    declared = process.find(source + purpose)
    machine = kept.this_machine(device)
    verdicts = kept.load(folder, declared, machine, shapes)
    if left := _left(declared, verdicts, shapes):
        new = _try(declared, left, source + purpose, verdicts, shapes, device, progress.say, limit)
        kept.save(folder, declared, new, machine, shapes)
        verdicts |= new
    process.apply(verdicts.values())
    for family in declared:
        if _counts(verdicts[family.name]):
            progress.note(sentence(family, verdicts[family.name]))
    return _choice(declared, verdicts)


def _left(declared: Iterable[KernelFamily], verdicts: dict[str, Verdict], shapes: ModelShapes) -> list[str]:
    """The families that are to be tried; those that this machine, shapes or a kept verdict exclude get theirs here."""
    left: list[str] = []
    for family in declared:
        if family.name in verdicts:
            continue
        lacking = what_lacks(family, shapes)
        before = verdicts.get(family.after) if family.after else None
        if lacking is not None:
            verdicts[family.name] = Verdict(family.name, "lacking", lacking)
        elif before is not None and (before.used or before.outcome == "unneeded"):
            verdicts[family.name] = Verdict(family.name, "unneeded", "another is preferred, and works")
        else:
            left.append(family.name)
    return left


def _try(
    declared: list[KernelFamily],
    left: list[str],
    source: str,
    known: Mapping[str, Verdict],
    shapes: ModelShapes,
    device: str,
    say: Callable[[str], object],
    limit: float,
) -> dict[str, Verdict]:
    say(f"trying {len(left)} families of kernels on this card, once for this model's sizes")
    try:
        return process.try_in_children(source, left, known, shapes, device, limit)
    except process.NoChild as problem:
        say(f"kernels are tried in this process, since none of their own could use the card ({problem})")
        chosen = [family for family in declared if family.name in left]
        return process.try_one_by_one(chosen, known, shapes, device)


def _counts(verdict: Verdict) -> bool:
    """Whether a family was tried and can't be trusted."""
    return verdict.outcome not in {"used", "lacking", "unneeded"}


def sentence(family: KernelFamily, verdict: Verdict) -> str:
    """Why a family isn't used, for people."""
    return f"{family.title}: the kernels of {family.name} aren't used, {family.instead} instead: a trial {verdict.why}"


def _choice(declared: list[KernelFamily], verdicts: Mapping[str, Verdict]) -> Choice:
    """The choice as plan.json and the report have it; a row for each family."""
    rows = [{"title": family.title, "used": verdicts[family.name].used, **verdicts[family.name].row()}
            for family in declared]  # fmt: skip
    used = [family.name for family in declared if verdicts[family.name].used]
    against = [sentence(family, verdicts[family.name]) for family in declared if _counts(verdicts[family.name])]
    reason = "; ".join(against) or "each was tried on this card with the model's sizes, is right and pays"
    return Choice(", ".join(used) or "none", reason if used or against else _nothing(declared, verdicts), rows)


def _nothing(declared: list[KernelFamily], verdicts: Mapping[str, Verdict]) -> str:
    return "; ".join(dict.fromkeys(f"{verdicts[family.name].why}" for family in declared))
