"""The weights of the best evaluation so far, kept in a way that a killed run can take up again."""

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adder.core.choice import Choice
from adder.core.files import atomic_write
from adder.core.progress import Progress
from adder.training.checkpoints import PREFIX, seal
from adder.training.distributed import collectives, fsdp
from adder.training.evaluation_history import best_step, evaluations_since_best, judged
from adder.training.stage import TrainSettings

NAME = "best-{}.safetensors"


class BestWeights:
    """Keeps the trained weights of the best evaluation in `folder`, and those that a resumed run may need."""

    def __init__(self, folder: Path):
        self.folder = folder

    def keep(self, model: torch.nn.Module, step: int) -> None:
        """Write the trained weights of `step`, whole or not at all; to be called in every rank."""
        state = trained_state(model)
        if not collectives.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / NAME.format(step)) as partial:
            # Copies: a tied embedding and LM head are one tensor, which safetensors refuses to store under two names.
            save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, partial)

    def tidy(self, needed: int | None) -> None:
        """Remove all but the weights of step `needed`. To be called when a checkpoint is sealed: none is older."""
        for path in (*self.folder.glob("best-*"), *self.folder.glob(".best-*")):
            if needed is None or path.name != NAME.format(needed):
                path.unlink()

    def load(self, model: torch.nn.Module, step: int) -> None:
        """Put the weights of `step` back into the model; to be called in every rank."""
        state = load_file(self.folder / NAME.format(step))
        if hasattr(model, "peft_config"):
            set_peft_model_state_dict(model, state)
        elif fsdp.trains_shards(model):
            fsdp.load_parameters(model, state)
        else:
            model.load_state_dict(state, strict=False)


def trained_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: the adapter, or every weight."""
    if hasattr(model, "peft_config"):
        return get_peft_model_state_dict(model)
    return fsdp.full_tensors({name: parameter.detach() for name, parameter in model.named_parameters()})


class KeepBestWeights(TrainerCallback):
    """Keeps the weights of the best evaluation, ends a training that no longer gets better, seals checkpoints."""

    def __init__(self, settings: TrainSettings, folder: Path):
        self.by, self.keep, self.patience = settings.best_by, settings.keep, settings.early_stopping
        self.best = BestWeights(folder / "best")

    def after_evaluation(self, model: torch.nn.Module, state: TrainerState, control: TrainerControl) -> None:
        """Keep the weights if this evaluation is the best; stop if none was better for long enough."""
        if self.keep == "best" and best_step(state.log_history, self.by) == state.global_step:
            self.best.keep(model, state.global_step)
        if self.patience and evaluations_since_best(state.log_history, self.by) >= self.patience:
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the trainer after all files of a checkpoint are written: only a sealed one is continued from."""
        if collectives.is_main():
            seal(Path(args.output_dir or "") / f"{PREFIX}{state.global_step}")
            self.best.tidy(best_step(state.log_history, self.by))

    def finish(self, model: torch.nn.Module, state: TrainerState, progress: Progress) -> Choice:
        """Leave the weights in the model that are to leave the stage; say which these are."""
        choice = self._choose(state)
        if choice.value != state.global_step:
            self.best.load(model, choice.value)
        progress.say(f"kept: step {choice.value}, {choice.reason}")
        return choice

    def _choose(self, state: TrainerState) -> Choice:
        best, by = best_step(state.log_history, self.by), self.by.replace("_", " ")
        ended = ""
        if state.global_step < state.max_steps:
            ended = (
                f"; stopped early, {evaluations_since_best(state.log_history, self.by)} evaluations after the best, at "
                f"step {state.global_step} of {state.max_steps}"
            )
        if self.keep == "last" or best is None:
            seen = f"the best by {by} was step {best}" if best is not None else "none was evaluated"
            return Choice(state.global_step, f"the last step, as set by train.keep; {seen}{ended}")
        return Choice(best, f"the best by {by} of {len(judged(state.log_history, self.by))} evaluations{ended}")
