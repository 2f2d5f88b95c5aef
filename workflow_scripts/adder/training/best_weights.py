"""The weights of the best evaluation so far, kept in a way that a killed run can take up again."""

import shutil
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from adder.training.distributed import collectives, fsdp

NAME = "best-{}.safetensors"


class BestWeights:
    """Keeps the trained weights of the best evaluation in `folder`, and those that a resumed run may need."""

    def __init__(self, folder: Path):
        self.folder = folder

    def keep(self, model: torch.nn.Module, step: int) -> None:
        """Write the trained weights of `step`, whole or not at all; to be called in every process."""
        state = trained(model)
        if not collectives.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / NAME.format(step)
        partial = target.with_suffix(".partial")
        # Copies: a tied embedding and LM head are one tensor, which safetensors refuses to store under two names.
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, partial)
        partial.replace(target)

    def tidy(self, needed: int | None) -> None:
        """Remove all but the weights of step `needed`. To be called when a checkpoint is sealed: none is older."""
        for path in self.folder.glob("best-*"):
            if needed is None or path.name != NAME.format(needed):
                path.unlink()

    def load(self, model: torch.nn.Module, step: int) -> None:
        """Put the weights of `step` back into the model; to be called in every process."""
        state = load_file(self.folder / NAME.format(step))
        if hasattr(model, "peft_config"):
            set_peft_model_state_dict(model, state)
        elif fsdp.trains_shards(model):
            fsdp.put(model, state)
        else:
            model.load_state_dict(state, strict=False)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: the adapter, or every weight."""
    if hasattr(model, "peft_config"):
        return get_peft_model_state_dict(model)
    return fsdp.whole({name: parameter.detach() for name, parameter in model.named_parameters()})
