"""The trainer: TRL's, with what watches a run. Samples, the best weights, an early end, whole checkpoints, progress."""

import errno
import math
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from adder.core.errors import UserError
from adder.core.labels import IGNORE_INDEX
from adder.core.rng import undisturbed
from adder.kernels.labelled_loss import dft, labelled_losses, supports_training
from adder.training.base_model import bare_model
from adder.training.best_weights import KeepBestWeights
from adder.training.callbacks import StopOnSignal
from adder.training.distributed import collectives, fsdp
from adder.training.monitoring.live import why_not_a_number
from adder.training.packed_dataset import DealtBatches, ReadAhead, WithEmptyPack
from adder.training.sampled_replies import Sampler
from adder.training.stage import TrainSettings


def warm_from_first_step(scheduler: LRScheduler, warmup: int) -> None:
    """Let step k of `warmup` steps have the rate k / warmup of the peak; the scheduler has made no step yet."""
    assert isinstance(scheduler, LambdaLR)
    scheduler.lr_lambdas = [partial(_rate, rate, warmup) for rate in scheduler.lr_lambdas]
    for group, peak, rate in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = peak * rate(0)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def _rate(rate: Callable[[int], float], warmup: int, done: int) -> float:
    return (done + 1) / warmup if done < warmup else rate(done)


class Trainer(SFTTrainer):
    """TRL's trainer, with tokens per second in its log and, on CPUs, the LM head at labelled positions only.

    On a GPU TRL's own fused head does that; on a CPU it would compute the logits of every position. After each
    evaluation `sampler` replies to its prompts and `best` decides what is kept and whether to go on.

    `step_packs`: packs of an optimizer step, `pack_tokens`: tokens of each pack. Where several processes train, each
    computes its share of a step, and the mean over all labelled tokens of the step is what one process would have.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: SFTConfig,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        processing_class: PreTrainedTokenizerBase,
        optimizer: torch.optim.Optimizer | None,
        callbacks: list[TrainerCallback],
        settings: TrainSettings,
        step_packs: int,
        pack_tokens: list[int],
        sampler: Sampler,
        best: KeepBestWeights,
    ):
        self.stop = StopOnSignal()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            optimizers=(optimizer, None),
            callbacks=[self.stop, *callbacks],
        )
        # Not in DistributedDataParallel: the loss doesn't go through the model's forward, and adding up once a step
        # what the passes of a rank have collected is less to send.
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.packs, self.heldout = train_dataset, eval_dataset
        self.step_packs, self.pack_tokens = step_packs, pack_tokens
        self.settings, self.sampler, self.best = settings, sampler, best
        self.batches: ReadAhead[Any] = ReadAhead(iter(()))
        self.tokens = 0
        self.heldout_losses: list[tuple[float, int]] = []  # nats and labelled tokens of each evaluated batch
        self.tokens_logged = 0
        self.clock = time.perf_counter()
        self.idle = 0.0  # seconds since the last log that were not spent on training steps

    @property
    def trained(self) -> PreTrainedModel | PeftModel:
        """The model that is trained."""
        model = self.model
        assert isinstance(model, PreTrainedModel | PeftModel)
        return model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's; however it ends, signals mean again what they meant before."""
        self.clock = time.perf_counter()  # what came before is no part of the first step
        self.trained.train()  # all of it: a loaded model's modules are not, though the adapter around them is
        try:
            return super().train(*args, **kwargs)
        finally:
            self.stop.release()

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """As transformers', but step k of w warm-up steps has the rate k / w: with theirs, (k - 1) / w, a run's first
        step does nothing, and a run of one step ends as it began.
        """
        is_new = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if is_new:
            warm_from_first_step(scheduler, self.args.get_warmup_steps(num_training_steps))
        return scheduler

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The packs in the order that transformers' trainer has them in, dealt to the processes step by step."""
        passes, micro_batch = self.args.gradient_accumulation_steps, self.args.train_batch_size
        shape = (self.pack_tokens, self.step_packs, collectives.world_size(), passes, micro_batch)
        return self._loader(self.packs, DealtBatches(RandomSampler(_sized(self.packs)), *shape))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The held-out examples, dealt to the ranks."""
        assert self.heldout is not None
        processes, batch = collectives.world_size(), self.args.eval_batch_size
        tokens = [len(ids) for ids in self.heldout["input_ids"]]
        order = SequentialSampler(_sized(self.heldout))
        return self._loader(self.heldout, DealtBatches(order, tokens, processes * batch, processes, 1, batch))

    def _loader(self, rows: Dataset, batches: DealtBatches) -> DataLoader[Any]:
        pin = self.args.dataloader_pin_memory
        loader = DataLoader(WithEmptyPack(rows), batch_sampler=batches, collate_fn=self.data_collator, pin_memory=pin)
        return self.accelerator.prepare(loader)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """As transformers', of batches that were read ahead."""
        if self.batches.source is not epoch_iterator:
            self.batches = ReadAhead(epoch_iterator)
        return super().get_batch_samples(self.batches, num_batches, device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: transformers' walk through all parameters in each pass is for a figure that nobody reads."""
        return 0

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of one pass; after the last of a step the ranks' gradients become one.

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
            collectives.all_reduce_mean_gradients(p for p in self.trained.parameters() if p.requires_grad)
        return loss.detach()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Mean loss over the labelled tokens of the whole optimizer step, this micro-batch's part of it.

        Times the number of processes, as TRL has it: over these gradients and logged losses are averaged.
        """
        if model.training:
            self.tokens += inputs["input_ids"].numel()
        bare = bare_model(self.trained)
        if return_outputs or not supports_training(bare):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16
        with torch.autocast(self.args.device.type, dtype, enabled=self.args.bf16 or self.args.fp16):
            losses = labelled_losses(bare, **inputs)
        if self.settings.loss == "dft" and model.training:
            losses = dft(losses)
        if num_items_in_batch is None:
            return losses.sum() / max(1, losses.numel())
        return collectives.world_size() * losses.sum() / torch.as_tensor(num_items_in_batch).clamp(min=1)

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As TRL's; the batch's loss also enters the mean over all held-out tokens."""
        result = super().prediction_step(model, inputs, *args, **kwargs)
        count = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
        loss = result[0]
        assert loss is not None  # the batch has labels
        self.heldout_losses += [(float(loss) * count, count)] if count else []
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As TRL's, with the mean over tokens: that of batches would change with how examples are batched."""
        self.heldout_losses = []
        output = super().evaluation_loop(*args, **kwargs)
        sums = (sum(column) for column in zip((0.0, 0), *self.heldout_losses, strict=True))
        nats, tokens = collectives.all_reduce_sum(*sums)
        assert output.metrics is not None
        output.metrics["eval_loss"] = nats / tokens
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As TRL's, with samples and what follows from both; neither time nor random numbers are the training's."""
        start = time.perf_counter()
        with undisturbed():
            # What is held out is judged by its likelihood, whatever the training minimises.
            arguments = self.args
            assert isinstance(arguments, SFTConfig)
            trained_on, arguments.loss_type = arguments.loss_type, "nll"
            result = super().evaluate(*args, **kwargs)
            arguments.loss_type = trained_on
            step = self.state.global_step
            right = self.sampler.sample(self.trained, step, last=step >= self.state.max_steps)
        if right is not None:
            # Of all ranks the main one's, though they should be alike: what follows from them must be.
            self.log({"exact_match": collectives.call_on_main(float, right)})
        self.best.after_evaluation(self.trained, self.state, self.control)
        self.idle += time.perf_counter() - start
        return result

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As transformers', for which shards are put together."""
        if fsdp.is_sharded(self.trained):
            # Not the model's state_dict(): that would let go of gathered weights in rank 0 alone.
            named = self.trained.named_parameters()
            state_dict = fsdp.full_tensors({name: p.detach() for name, p in named if p.requires_grad})
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As transformers', in the same files, with full tensors for shards."""
        if not fsdp.trains_shards(self.trained):
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        state = fsdp.full_tensors(optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not fsdp.trains_shards(self.trained):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        state: dict[str, torch.Tensor] = {}
        for file in Path(resume_from_checkpoint).glob("*.safetensors"):
            state |= load_file(file)
        fsdp.load_parameters(self.trained, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not fsdp.trains_shards(self.trained):
            return super()._load_optimizer_and_scheduler(checkpoint)
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
        optimizer: Any = self.optimizer  # accelerate's, around torch's own
        scheduler: Any = self.lr_scheduler
        fsdp.load_optimizer(optimizer.optimizer, state)
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As the trainer's; a full disk ends the run in one sentence, and the checkpoint before stays."""
        start = time.perf_counter()
        try:
            super()._save_checkpoint(*args, **kwargs)
            collectives.barrier()  # each rank has a file of its own in it
            self.idle += time.perf_counter() - start
        except Exception as error:
            if not _is_write_error(error):
                raise
            free = shutil.disk_usage(self.args.output_dir or ".").free
            raise UserError(
                f"a checkpoint can't be written to {self.args.output_dir} ({error}; {free / 1e9:,.1f} GB free there). "
                "Make room and start again: training continues from the last whole checkpoint"
            ) from error

    @property
    def dtype(self) -> str:
        """That of the matmuls."""
        return "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else "float32"

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add the training speed since the last log: tokens of real examples, in steps alone."""
        if "loss" in logs:
            if not math.isfinite(float(logs["loss"])):
                reasons = why_not_a_number(self.state.log_history, self.settings, self.dtype)
                raise UserError(f"the loss became {logs['loss']} at step {self.state.global_step}: {reasons}")
            if self.accelerator.optimizer_step_was_skipped:
                logs["skipped_step"] = 1
            now = time.perf_counter()
            seconds = max(now - self.clock - self.idle, 1e-9)
            (tokens,) = collectives.all_reduce_sum(self.tokens - self.tokens_logged)
            logs["tokens_per_second"] = round(tokens / seconds, 1)
            self.clock, self.idle, self.tokens_logged = now, 0.0, self.tokens
        super().log(logs, start_time)


def _sized(rows: Dataset) -> Any:
    """The rows as a sampler takes them: it asks for nothing but their number."""
    return rows


def _is_write_error(error: Exception) -> bool:
    """Whether something could not be written, whichever library says so (torch and safetensors don't raise OSError)."""
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES}
    signs = ("No space left", "File too large", "iostream error", "unexpected pos", "PytorchStreamWriter failed")
    return any(sign in str(error) for sign in signs)
