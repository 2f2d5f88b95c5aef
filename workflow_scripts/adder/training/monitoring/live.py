"""What is said on the terminal while training: advice, warnings, diagnoses, and why a loss is no number.

All that is said here is judged anew by the report, from what training writes. None of it decides anything, so this
module is no part of what a training is made of (see workflow.code_digest); nothing else of training may import doctor,
symptoms, advice or preflight_warnings.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adder.core.choice import ChoiceRecord
from adder.core.progress import Progress
from adder.training.monitoring.advice import advise
from adder.training.monitoring.doctor import Findings, explain_nan, in_a_line, is_due
from adder.training.monitoring.preflight_warnings import time_in_words, warnings
from adder.training.monitoring.symptoms import Diagnosis
from adder.training.records import PreflightFigures, SampleRow, TrainingFacts, metrics_rows
from adder.training.stage import TrainSettings


def say_advice(settings: TrainSettings, facts: TrainingFacts, progress: Progress) -> None:
    """Say what is unusual about the settings."""
    for line in advise(settings, facts):
        progress.say(f"advice: {line}")


def say_preflight(
    figures: PreflightFigures, plan: Mapping[str, ChoiceRecord], facts: TrainingFacts, progress: Progress
) -> None:
    """Say what looked wrong on the first pack, and roughly how long the training will take. `plan`: plan.json."""
    for warning in warnings(figures, plan):
        progress.say(f"warning: {warning}")
    progress.say(time_in_words(figures["estimated_seconds"], facts.steps))


def why_not_a_number(history: Sequence[Mapping[str, Any]], settings: TrainSettings, dtype: str) -> str:
    """Why the loss has stopped being a number, and what to change; `history`: the trainer's log before that step."""
    return explain_nan(metrics_rows(history), settings, dtype)


class DoctorCallback(TrainerCallback):
    """Looks at every evaluation and about a hundred times a run, and says what is new.

    `samples`: the replies sampled so far; the list may grow as training goes. What was said before a kill is worked out
    again from the trainer's history, and not said again.
    """

    def __init__(self, facts: TrainingFacts, settings: TrainSettings, samples: Sequence[SampleRow], progress: Progress):
        self.samples, self.progress = samples, progress
        self.findings = Findings(facts, settings)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Catch up with the history of a run that continues; look at the set-up."""
        rows = metrics_rows(state.log_history)
        self.findings = Findings(self.findings.facts, self.findings.settings)
        if rows:
            self.findings.replay(rows, self.samples)
        self._say(self.findings.look(rows, self.samples))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the history, which holds this row already, when it is time."""
        last = metrics_rows(state.log_history[-1:])
        if last and is_due(last[0], self.findings.facts.steps):
            self._say(self.findings.look(metrics_rows(state.log_history), self.samples))

    def conclude(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Look once more at the whole of a finished run (`state.log_history`), its last evaluation included."""
        known = {one["name"] for one in self.findings.diagnoses}
        found = self.findings.conclude(metrics_rows(history), self.samples)
        self._say([one for one in found if one["name"] not in known])

    def _say(self, diagnoses: Sequence[Diagnosis]) -> None:
        for one in diagnoses:
            self.progress.note(in_a_line(one))
