"""The trainer: TRL's, with what watches a run. Samples, the best adapter, an early end, whole checkpoints, progress."""

import errno
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from transformers import TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from trl import SFTTrainer

from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.progress import Progress
from adder.core.rng import undisturbed
from adder.kernels.labelled_loss import dft, labelled_losses, supports_training
from adder.training.best_weights import BestWeights
from adder.training.checkpoints import seal
from adder.training.distributed import collectives, fsdp
from adder.training.evaluation_history import best_step, evaluations_since_best, judged
from adder.training.monitoring.doctor import Doctor, explain_nan
from adder.training.packed_dataset import DealtBatches, ReadAhead, WithNothing
from adder.training.sampled_replies import Sampler


class Trainer(SFTTrainer):
    """TRL's trainer, with tokens per second in its log and, on CPUs, the LM head at labelled positions only.

    On a GPU TRL's own fused head does that; on a CPU it would compute the logits of every position. After each
    evaluation `sampler` replies to its prompts and `judge` decides what is kept and whether to go on.

    `step_packs`: packs of an optimizer step, `pack_tokens`: tokens of each pack. Where several processes train, each
    computes its share of a step, and the mean over all labelled tokens of the step is what one process would have.
    """

    def __init__(
        self,
        *args,
        settings: dict,
        step_packs: int,
        pack_tokens: list[int],
        sampler: Sampler,
        judge: "Judge",
        doctor: Doctor,
        **kwargs,
    ):
        self.stop = StopWhenTold()
        super().__init__(*args, callbacks=[self.stop, *kwargs.pop("callbacks"), judge, doctor], **kwargs)
        # Not in DistributedDataParallel: the loss doesn't go through the model's forward, and adding up once a step
        # what the passes of a process have collected is less to send.
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.step_packs, self.pack_tokens = step_packs, pack_tokens
        self.settings, self.sampler, self.judge, self.doctor = settings, sampler, judge, doctor
        self.batches = ReadAhead(iter(()))
        self.tokens = 0
        self.held_out: list[tuple[float, int]] = []  # loss in nats and labelled tokens of each evaluated batch
        self.tokens_logged = 0
        self.clock = time.perf_counter()
        self.idle = 0.0  # seconds since the last log that were not spent on training steps

    def train(self, *args, **kwargs):
        """As TRL's; however it ends, signals mean again what they meant before."""
        self.model.train()  # all of it: a loaded model's modules are not, though the adapter around them is
        try:
            return super().train(*args, **kwargs)
        finally:
            self.stop.release()

    def get_train_dataloader(self):
        """The packs in the order that transformers' trainer has them in, dealt to the processes step by step."""
        passes, micro_batch = self.args.gradient_accumulation_steps, self.args.train_batch_size
        order = RandomSampler(self.train_dataset)
        shape = (self.pack_tokens, self.step_packs, collectives.count(), passes, micro_batch)
        return self._loader(self.train_dataset, DealtBatches(order, *shape))

    def get_eval_dataloader(self, eval_dataset=None):
        """The held-out examples, dealt to the processes."""
        processes, batch = collectives.count(), self.args.eval_batch_size
        tokens = [len(ids) for ids in self.eval_dataset["input_ids"]]
        order = SequentialSampler(self.eval_dataset)
        return self._loader(self.eval_dataset, DealtBatches(order, tokens, processes * batch, processes, 1, batch))

    def _loader(self, rows, batches: DealtBatches) -> DataLoader:
        pin = self.args.dataloader_pin_memory
        loader = DataLoader(WithNothing(rows), batch_sampler=batches, collate_fn=self.data_collator, pin_memory=pin)
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As transformers', of batches that were read ahead."""
        if self.batches.source is not epoch_iterator:
            self.batches = ReadAhead(epoch_iterator)
        return super().get_batch_samples(self.batches, num_batches, device)

    def floating_point_ops(self, inputs):
        """Not counted: transformers' walk through all parameters in each pass is for a figure that nobody reads."""
        return 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of one pass; after the last of a step the processes' gradients become one.

        The parents' is not called: they walk through all modules to set them to training, which takes 7 ms with 32
        layers, and the GPU has nothing to do then. (What else they do is not asked for here; the loss has its share of
        the step already.) Nor has it while batches are put together: the next step's are read once this one's work is
        under way.
        """
        if not model.training:
            model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            self.batches.read(self.args.gradient_accumulation_steps)
            collectives.average_gradients(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        return loss.detach()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the labelled tokens of the whole optimizer step, this micro-batch's part of it.

        Times the number of processes, as TRL has it: over these gradients and logged losses are averaged.
        """
        if model.training:
            self.tokens += inputs["input_ids"].numel()
        bare = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        if return_outputs or not supports_training(bare):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16
        with torch.autocast(self.args.device.type, dtype, enabled=self.args.bf16 or self.args.fp16):
            losses = labelled_losses(bare, **inputs)
        if self.settings["loss"] == "dft" and model.training:
            losses = dft(losses)
        if num_items_in_batch is None:
            return losses.sum() / max(1, losses.numel())
        return collectives.count() * losses.sum() / torch.as_tensor(num_items_in_batch).clamp(min=1)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As TRL's; the batch's loss also enters the mean over all held-out tokens."""
        result = super().prediction_step(model, inputs, *args, **kwargs)
        count = int((inputs["labels"][:, 1:] != -100).sum())
        self.held_out += [(float(result[0]) * count, count)] if count else []
        return result

    def evaluation_loop(self, *args, **kwargs):
        """As TRL's, with the mean over tokens: that of batches would change with how examples are batched."""
        self.held_out = []
        output = super().evaluation_loop(*args, **kwargs)
        nats, tokens = collectives.total(*(sum(column) for column in zip((0.0, 0), *self.held_out, strict=True)))
        output.metrics["eval_loss"] = nats / tokens
        return output

    def evaluate(self, *args, **kwargs):
        """As TRL's, with samples and what follows from both; neither time nor random numbers are the training's."""
        start = time.perf_counter()
        with undisturbed():
            # What is held out is judged by its likelihood, whatever the training minimises.
            trained_on, self.args.loss_type = self.args.loss_type, "nll"
            result = super().evaluate(*args, **kwargs)
            self.args.loss_type = trained_on
            right = self.sampler.sample(self.model, self.state.global_step)
        if right is not None:
            # Of all processes the main one's, though they should be alike: what follows from them must be.
            self.doctor.facts["samples"] = collectives.on_main(self.sampler.describe, self.state.global_step)
            self.log({"exact_match": self.doctor.facts["samples"]["exact_match"]})
        self.judge.weigh(self.model, self.state, self.control)
        self.idle += time.perf_counter() - start
        return result

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _save(self, output_dir=None, state_dict=None):
        """As transformers', for which shards are put together."""
        if fsdp.in_shards(self.model):
            # Not the model's state_dict(): that would let go of gathered weights in the main process alone.
            named = self.model.named_parameters()
            state_dict = fsdp.whole({name: p.detach() for name, p in named if p.requires_grad})
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir):
        """As transformers', in the same files, with whole tensors for shards."""
        if not fsdp.trains_shards(self.model):
            return super()._save_optimizer_and_scheduler(output_dir)
        state = fsdp.whole(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, checkpoint, model=None):
        if not fsdp.trains_shards(self.model):
            return super()._load_from_checkpoint(checkpoint, model)
        state = {}
        for file in Path(checkpoint).glob("*.safetensors"):
            state |= load_file(file)
        fsdp.put(self.model, state)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not fsdp.trains_shards(self.model):
            return super()._load_optimizer_and_scheduler(checkpoint)
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
        fsdp.put_optimizer(self.optimizer.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _save_checkpoint(self, *args, **kwargs):
        """As the trainer's; a full disk ends the run in one sentence, and the checkpoint before stays."""
        start = time.perf_counter()
        try:
            super()._save_checkpoint(*args, **kwargs)
            collectives.wait()  # each process has a file of its own in it
            self.idle += time.perf_counter() - start
        except Exception as error:
            if not _is_write_error(error):
                raise
            free = shutil.disk_usage(self.args.output_dir).free
            raise UserError(
                f"a checkpoint can't be written to {self.args.output_dir} ({error}; {free / 1e9:,.1f} GB free there). "
                "Make room and start again: training continues from the last whole checkpoint"
            ) from error

    def log(self, logs, start_time=None):
        """Add the training speed since the last log: tokens of real examples, in steps alone."""
        if "loss" in logs:
            if not torch.isfinite(torch.tensor(float(logs["loss"]))):
                reasons = explain_nan(self.state.log_history, self.settings, self.doctor.facts["dtype"])
                raise UserError(f"the loss became {logs['loss']} at step {self.state.global_step}: {reasons}")
            self.doctor.facts["skipped_steps"] += self.accelerator.optimizer_step_was_skipped
            now = time.perf_counter()
            seconds = max(now - self.clock - self.idle, 1e-9)
            (tokens,) = collectives.total(self.tokens - self.tokens_logged)
            logs["tokens_per_second"] = round(tokens / seconds, 1)
            self.clock, self.idle, self.tokens_logged = now, 0.0, self.tokens
        super().log(logs, start_time)


class Judge(TrainerCallback):
    """Keeps the weights of the best evaluation, ends a training that no longer gets better, seals checkpoints."""

    def __init__(self, settings: dict, folder: Path):
        self.by, self.keep, self.patience = (settings[name] for name in ("best_by", "keep", "early_stopping"))
        self.best = BestWeights(folder / "best")

    def weigh(self, model: torch.nn.Module, state, control) -> None:
        """After an evaluation: keep its weights if it is the best, stop if none was better for long enough."""
        if self.keep == "best" and best_step(state.log_history, self.by) == state.global_step:
            self.best.keep(model, state.global_step)
        if self.patience and evaluations_since_best(state.log_history, self.by) >= self.patience:
            control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        """Called by the trainer after all files of a checkpoint are written: only a sealed one is continued from."""
        if collectives.is_main():
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            self.best.tidy(best_step(state.log_history, self.by))

    def finish(self, model: torch.nn.Module, state, progress: Progress) -> Choice:
        """Leave the weights in the model that are to leave the stage; say which these are."""
        best, by = best_step(state.log_history, self.by), self.by.replace("_", " ")
        ended = ""
        if state.global_step < state.max_steps:
            ended = (
                f"; stopped early, {evaluations_since_best(state.log_history, self.by)} evaluations after the best, at "
                f"step {state.global_step} of {state.max_steps}"
            )
        if self.keep == "last" or best is None:
            seen = f"the best by {by} was step {best}" if best is not None else "none was evaluated"
            choice = Choice(state.global_step, f"the last step, as set by train.keep; {seen}{ended}")
        else:
            if best != state.global_step:
                self.best.load(model, best)
            choice = Choice(best, f"the best by {by} of {len(judged(state.log_history, self.by))} evaluations{ended}")
        progress.say(f"kept: step {choice.value}, {choice.reason}")
        return choice


class StopWhenTold(TrainerCallback):
    """On SIGTERM, which Slurm sends before a time limit, or a terminal's end: finish the step, write a checkpoint, end.

    The next start continues from it.
    """

    def __init__(self):
        self.told: int | None = None  # the signal's number
        self.before = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Listen, where this thread may; not to what is to be ignored, as under nohup."""
        if threading.current_thread() is threading.main_thread():
            numbers = (n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN)
            self.before = {number: signal.signal(number, self._hear) for number in numbers}

    def _hear(self, number, frame):
        self.told = number

    def on_step_end(self, args, state, control, **kwargs):
        """Ask the trainer for a checkpoint and to stop, in every process at the same step."""
        self.told = int(collectives.largest(self.told or 0)) or None
        if self.told and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def release(self) -> None:
        """Leave the signals as they were."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def on_train_end(self, args, state, control, **kwargs):
        """Tell why there is no adapter."""
        if self.told and state.global_step < state.max_steps:
            raise UserError(
                f"told to stop ({signal.Signals(self.told).name}) at step {state.global_step} of {state.max_steps}; a "
                "checkpoint is written, and the next start continues from it"
            )


class ShowProgress(TrainerCallback):
    """One line with step, loss, speed and time left. `heldout`: over how many rows the held-out loss is taken."""

    def __init__(self, progress: Progress, heldout: int):
        self.progress, self.heldout = progress, heldout
        self.start = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Note where this process starts, which after a kill is not step 0."""
        self.start = (time.perf_counter(), state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the line that the trainer has just logged."""
        logs = logs or {}
        if "eval_loss" in logs:
            rows = f"{self.heldout:,} {'row' if self.heldout == 1 else 'rows'}"
            self.progress.say(
                f"step {state.global_step}/{state.max_steps}, held-out loss {logs['eval_loss']:.4f} over {rows}"
            )
        if "loss" in logs:
            began, first = self.start
            done = max(state.global_step - first, 1)
            left = (time.perf_counter() - began) / done * (state.max_steps - state.global_step)
            self.progress.line(
                f"step {state.global_step}/{state.max_steps}, loss {float(logs['loss']):.4f}, "
                f"{logs['tokens_per_second']:,.0f} tokens/s, roughly {_clock(left)} left",
                last=state.global_step == state.max_steps,
            )


def _is_write_error(error: Exception) -> bool:
    """Whether something could not be written, whichever library says so (torch and safetensors don't raise OSError)."""
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES}
    signs = ("No space left", "File too large", "iostream error", "unexpected pos", "PytorchStreamWriter failed")
    return any(sign in str(error) for sign in signs)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
