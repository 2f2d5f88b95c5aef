"""What watches a training from the outside: the end that a signal asks for, and the line of progress."""

import signal
import threading
import time
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adder.core.errors import UserError
from adder.core.progress import Progress
from adder.training.distributed import collectives


class StopOnSignal(TrainerCallback):
    """On SIGTERM, which Slurm sends before a time limit, or a terminal's end: finish the step, write a checkpoint, end.

    The next start continues from it.
    """

    def __init__(self) -> None:
        self.received: int | None = None  # the signal's number
        self.before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen, where this thread may; not to what is to be ignored, as under nohup."""
        if threading.current_thread() is threading.main_thread():
            numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._note) for number in numbers}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the trainer for a checkpoint and to stop, in every rank at the same step."""
        self.received = int(collectives.all_reduce_max(self.received or 0)) or None
        if self.received and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def release(self) -> None:
        """Leave the signals as they were."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell why there is no adapter."""
        if self.received and state.global_step < state.max_steps:
            raise UserError(
                f"told to stop ({signal.Signals(self.received).name}) at step {state.global_step} of "
                f"{state.max_steps}; a checkpoint is written, and the next start continues from it"
            )


class ShowProgress(TrainerCallback):
    """One line with step, loss, speed and time left. `heldout`: over how many rows the held-out loss is taken."""

    def __init__(self, progress: Progress, heldout: int):
        self.progress, self.heldout = progress, heldout
        self.began, self.first_step = time.perf_counter(), 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where this process starts, which after a kill is not step 0."""
        self.began, self.first_step = time.perf_counter(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the line that the trainer has just logged."""
        logs = logs or {}
        if "eval_loss" in logs:
            rows = f"{self.heldout:,} {'row' if self.heldout == 1 else 'rows'}"
            self.progress.say(
                f"step {state.global_step}/{state.max_steps}, held-out loss {logs['eval_loss']:.4f} over {rows}"
            )
        if "loss" in logs:
            done = max(state.global_step - self.first_step, 1)
            left = (time.perf_counter() - self.began) / done * (state.max_steps - state.global_step)
            self.progress.line(
                f"step {state.global_step}/{state.max_steps}, loss {float(logs['loss']):.4f}, "
                f"{logs['tokens_per_second']:,.0f} tokens/s",
                last=state.global_step == state.max_steps,
                left=left,
            )
