"""How many packs a forward pass and how many an optimizer step, for the effective batch that was asked for."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from adder.choice import Choice
from adder.errors import UserError

# On a CPU, products with this many rows run at full speed; more only takes memory.
CPU_TOKENS = 1024
# Share of a GPU's memory that a probe must leave: fragmentation and longer-lived buffers come on top of one step.
HEADROOM = 0.08


def choose_batch(
    settings: dict, seq_lengths: Sequence[Sequence[int]], device: str, fits: Callable[[int, bool], bool]
) -> dict[str, Choice]:
    """Choose micro_batch_size (packs a forward pass), gradient_accumulation_steps and gradient_checkpointing.

    `seq_lengths`: token counts of the examples in each pack. `fits(micro, checkpointing)`: whether a forward and
    backward pass over the `micro` longest packs fits in memory. Raises UserError if nothing fits.
    """
    per_step, sentence = packs_per_step(settings["effective_batch_size"], seq_lengths)
    wanted, checkpointing = settings["micro_batch_size"], settings["gradient_checkpointing"]
    if wanted != "auto":
        sizes = [min(wanted, per_step)]
        per_step = max(1, round(per_step / sizes[0])) * sizes[0]
    elif device == "cpu":
        longest = max(map(sum, seq_lengths))
        sizes = [max(size for size in divisors(per_step) if size == 1 or size * longest <= CPU_TOKENS)]
    else:
        sizes = divisors(per_step)[::-1]
    tries = [(size, on) for on in ([False, True] if checkpointing == "auto" else [checkpointing]) for size in sizes]
    for size, on in tries:
        # A CPU's memory is not probed: running out of it ends the process instead of raising.
        if device == "cpu" or fits(size, on):
            break
    else:
        raise UserError(
            f"not even {tries[-1][0]} pack of {max(map(sum, seq_lengths))} tokens fits in this GPU's memory"
            f"{' with gradient checkpointing' if tries[-1][1] else ''}; lower lengths.max_seq_length or train.lora_r"
            f"{'' if settings['method'] == 'qlora' else ', or use train.method: qlora'}"
        )
    if wanted != "auto":
        why = "as set"
    elif device == "cpu":
        why = f"about {CPU_TOKENS:,} tokens a forward pass keep a CPU's cores busy"
    else:
        why = "the most that a trial step with the longest packs found room for"
    steps = per_step // size
    return {
        "micro_batch_size": Choice(size, f"{packs_in_words(size)} a forward pass: {why}"),
        "gradient_accumulation_steps": Choice(steps, sentence + (f", in {steps} forward passes" if steps > 1 else "")),
        "gradient_checkpointing": Choice(on, _checkpointing_reason(on, checkpointing, device)),
    }


def packs_per_step(effective_batch: int, seq_lengths: Sequence[Sequence[int]]) -> tuple[int, str]:
    """Return how many packs hold about `effective_batch` examples, at least one, and the sentence that says so."""
    per_pack = sum(map(len, seq_lengths)) / len(seq_lengths)
    packs = min(len(seq_lengths), max(1, round(effective_batch / per_pack)))
    return packs, (
        f"{effective_batch} examples a step were asked for and a pack holds {per_pack:.1f} on average: "
        f"{packs_in_words(packs)} with {packs * per_pack:.1f} examples a step"
    )


def packs_in_words(number: int) -> str:
    """ "1 pack", "2 packs"."""
    return f"{number} pack" if number == 1 else f"{number} packs"


def divisors(number: int) -> list[int]:
    """Divisors of a whole number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _checkpointing_reason(on: bool, wanted: str | bool, device: str) -> str:
    if wanted != "auto":
        return "as set"
    if on:
        return "without it not even one pack fits in memory"
    return "memory is not short on a CPU at this size" if device == "cpu" else "the activations fit in memory"


class MemoryProbe:
    """Call with (micro batch, checkpointing): does a forward and backward pass over the longest packs fit the GPU?"""

    def __init__(self, model: torch.nn.Module, seq_lengths: list[np.ndarray], dtype: str, device: str):
        self.model, self.seq_lengths, self.dtype, self.device = model, seq_lengths, dtype, device

    def __call__(self, micro: int, checkpointing: bool) -> bool:
        """Run one step on made-up tokens and tell whether it left the headroom."""
        lengths = sorted(self.seq_lengths, key=sum, reverse=True)[:micro]
        flat = [int(length) for pack in lengths for length in pack]
        batch = _batch(flat, self.model.config.get_text_config().vocab_size, self.device)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
        self.model.train()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            with torch.autocast(self.device, getattr(torch, self.dtype), enabled=self.dtype != "float32"):
                loss = self.model(**batch, use_cache=False).loss
            loss.backward()
            free, total = torch.cuda.mem_get_info()
            # What other programs hold is not ours to plan with.
            room = free + torch.cuda.memory_reserved()
            return torch.cuda.max_memory_reserved() <= room - HEADROOM * total
        except torch.OutOfMemoryError:
            return False
        finally:
            loss = None  # noqa: F841 - frees the graph
            self.model.zero_grad(set_to_none=True)
            if checkpointing:
                self.model.gradient_checkpointing_disable()
            torch.cuda.empty_cache()


def _batch(lengths: list[int], vocabulary: int, device: str) -> dict:
    tokens = torch.randint(0, vocabulary, (1, sum(lengths)), device=device)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    return {
        "input_ids": tokens,
        "labels": tokens,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].to(device),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
