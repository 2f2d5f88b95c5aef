"""One start of a training, as the only process or as one rank of several: from the base model to saved weights.

`fit` reads as the method does: load the base, add LoRA, fuse it, plan the step, build the trainer, look at the first
pack, optimise, keep the best weights, save.
"""

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from trl.trainer.sft_config import SFTConfig

from adder.core import hardware, precision, text_model
from adder.core.choice import Choice, ChoiceRecord
from adder.core.errors import UserError
from adder.core.files import write_json, write_jsonl
from adder.core.machine import graphics_cards
from adder.core.progress import Progress
from adder.core.rng import undisturbed
from adder.core.stage_spec import Runtime
from adder.kernels import card_support
from adder.kernels.fused_lora import attach as fused_lora
from adder.kernels.trials import decide as trials
from adder.kernels.trials import shapes
from adder.tokenization.token_table import TokenTable
from adder.training import base_model, base_precision, isolation_check, lora, preflight, step_planner
from adder.training.base_model import BaseChoices
from adder.training.base_precision import MatmulChoices
from adder.training.best_weights import KeepBestWeights
from adder.training.callbacks import ShowProgress
from adder.training.checkpoints import newest_whole, step_of
from adder.training.distributed import collectives, fsdp
from adder.training.monitoring import live, trackers
from adder.training.monitoring.live import DoctorCallback
from adder.training.neftune import add_noise
from adder.training.packed_dataset import PackedExamples, RefillPacks, heldout_examples
from adder.training.records import (
    PreflightFigures,
    TrainingFacts,
    TrainInputs,
    TrainRecord,
    metrics_rows,
)
from adder.training.sampled_replies import SHARE, Sampler, choose_prompts, cpu_sample_times
from adder.training.stage import TrainSettings
from adder.training.step_planner import StepChoices, StepPacks
from adder.training.trainer import Trainer
from adder.training.untrained_experts import left_untrained

Model = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class TrainJob:
    """A training as each of its processes is given it.

    out: folder of the results. checkpoints: one that outlives a kill. results: where trackers' files go. device: "cuda"
    or "cpu". threads: CPU threads of each process. step_packs: packs of an optimizer step. processes: how many train.
    """

    settings: TrainSettings
    inputs: TrainInputs
    out: Path
    checkpoints: Path
    results: Path
    runtime: Runtime
    device: str
    threads: int
    step_packs: StepPacks
    processes: Choice


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that was chosen for a training, with reasons: what plan.json has."""

    compute_dtype: Choice
    base: BaseChoices
    step: StepChoices
    sharding: Choice | None = None
    matmuls: MatmulChoices | None = None
    lora_pairs: Choice | None = None
    kernels: Choice | None = None
    machine: Choice | None = None

    def named(self) -> dict[str, Choice]:
        """The choices that were made, by name."""
        found = {
            **self.step.named(),
            "compute_dtype": self.compute_dtype,
            "machine": self.machine,
            "kernels": self.kernels,
            "attention": self.base.attention,
            "nf4_weights": self.base.nf4_weights,
            "nf4_values": self.base.nf4_values,
            "lora_pairs": self.lora_pairs,
            "sharding": self.sharding,
            "frozen_products": self.matmuls and self.matmuls.frozen_products,
            "lora_products": self.matmuls and self.matmuls.lora_products,
        }
        if self.matmuls is not None and any(
            done["held"] is not None for done in self.matmuls.lora_products.alternatives
        ):
            found["nf4_values"] = None  # fusing chose anew, and says what
        return {name: choice for name, choice in found.items() if choice is not None}

    def record(self) -> dict[str, ChoiceRecord]:
        """plan.json."""
        return {name: choice.to_dict() for name, choice in self.named().items()}


@dataclass(frozen=True)
class EarlierStart:
    """What an earlier start of the same training left: its last whole checkpoint, and how it computed a step."""

    checkpoint: Path | None
    step: StepChoices | None

    @property
    def steps(self) -> int | None:
        """Optimizer steps that are done, None for a training that begins."""
        return step_of(self.checkpoint) if self.checkpoint else None


def fit(job: TrainJob, progress: Progress) -> None:
    """Train, from the last whole checkpoint where there is one, and write the stage's files.

    Raises step_planner.MemoryRanOut when another start, by the plan that is then kept, can go on; UserError for a
    set-up that can't work and when the loss stops being a number.
    """
    settings, inputs = job.settings, job.inputs
    hardware.use_threads(job.threads)
    if job.device == "cuda":
        hardware.prepare_gpu()
    compute_dtype = precision.compute_dtype(job.device, settings.compute_dtype)
    dtype: str = compute_dtype.value
    packs = load_packs(inputs, settings)
    weights = (settings.method == "qlora" and inputs.packed) or inputs.base
    came = " as it came in 4 bit" if weights == inputs.packed else ""
    progress.say(f"loading the base model{came} for {settings.method} on {job.device} in {dtype}")
    set_seed(settings.seed)
    sharding = _choose_sharding(job)
    sharded = sharding is not None and sharding.value == "fsdp"
    kernels = _try_kernels(job, weights, dtype, sharded, progress)
    model, base = base_model.load(weights, settings.method, dtype, job.device, sharded)
    earlier = collectives.call_on_main(_earlier_start, job.checkpoints)
    matmuls, pairs = None, None
    if settings.method != "full":
        model = lora.add_adapter(model, settings, inputs.adapter)
        pairs = left_untrained(model)
    elif inputs.adapter:
        model = lora.merge_first(model, inputs.adapter)
    if not sharded:
        base = _isolate(model, base, packs, dtype, False, progress)
    if settings.method != "full":
        assert isinstance(model, PeftModel)
        lora.initialise(model, packs, settings)
        if not sharded:
            matmuls = _fuse_lora(job, model, dtype, packs, earlier)
            matmuls = _check_fused(model, matmuls, packs, dtype, progress)
    if settings.neftune_noise_alpha:
        add_noise(model, settings.neftune_noise_alpha)
    if sharded:
        fsdp.shard(model, job.device)
        base = _isolate(model, base, packs, dtype, True, progress)

    step = _plan_step(job, model, packs, dtype, sharded, earlier, progress)
    step = replace(step, frozen_products=matmuls.frozen_products if matmuls else step.frozen_products)
    collectives.call_on_main(step_planner.save_choices, step, job.checkpoints)
    step_planner.apply_checkpointing(model, step.plan.checkpointing)
    plan = TrainingPlan(compute_dtype, base, step, sharding, matmuls, pairs, kernels, _machine(job))

    trainer, doctor, facts = _build_trainer(job, model, packs, plan, earlier, progress)
    try:
        figures = _look_first(job, trainer, packs, plan, facts, earlier, progress)
        facts = replace(facts, base_loss=figures["base_loss"])
        doctor.findings.facts = facts
        _optimise(trainer, earlier, progress)
    except torch.OutOfMemoryError as error:
        raise _fall_back(job, step, model, trainer.state.global_step) from error
    doctor.conclude(trainer.state.log_history)
    peak = collectives.all_reduce_max(torch.cuda.max_memory_allocated() if job.device == "cuda" else 0)
    kept = trainer.best.finish(trainer.trained, trainer.state, progress)
    lora.save(trainer.trained, inputs, job.out)
    if collectives.is_main():
        record = _record(job, trainer, packs, earlier, kept, facts, figures)
        if job.device == "cuda":
            record["peak_gpu_memory_bytes"] = int(peak)
        _write(job.out, trainer, plan, record)


def load_packs(inputs: TrainInputs, settings: TrainSettings) -> PackedExamples:
    """The packs to train on."""
    return PackedExamples(inputs.train_tokens, inputs.lengths / "packs.parquet", settings.seed, settings.reshuffle)


# The model ------------------------------------------------------------------------------------------------------------


def _machine(job: TrainJob) -> Choice:
    """What computes, and why not more, as `adder machine` says it."""
    found = graphics_cards.look()
    if job.device == "cpu":
        why = [card_support.cpu_sentence()]
        if job.runtime.device != "auto":
            why.append(f"runtime.device is {job.runtime.device}")
        elif against := graphics_cards.obstacle(found):
            why.append(against)
        return Choice("CPU", "; ".join(why))
    return Choice(str(graphics_cards.card(torch.cuda.current_device())), "; ".join(card_support.sentences(found)))


def _try_kernels(job: TrainJob, weights: Path, dtype: str, sharded: bool, progress: Progress) -> Choice | None:
    """Let this process use the kernels that a trial found to be right on its card; None on a CPU, which has none."""
    if job.device == "cpu":
        return None
    settings = job.settings
    wants_fp8 = settings.frozen_products != "bf16" and not sharded
    qlora = settings.method == "qlora"
    lora = {"rank": settings.lora_r, "dropout": settings.lora_dropout, "four_bit": qlora, "fp8": wants_fp8}
    config = text_model.read_config(weights)
    sizes = shapes.of_config(config, dtype, **(lora if settings.method != "full" else {}))
    purpose = "full" if settings.method == "full" else "lora"
    device, folder = f"cuda:{torch.cuda.current_device()}", job.results / trials.FOLDER
    choice = collectives.call_on_main(trials.decide, purpose, sizes, device, folder, progress)
    if not collectives.is_main():  # whose card may be another
        trials.decide(purpose, sizes, device, folder, progress)
    return choice


def _choose_sharding(job: TrainJob) -> Choice | None:
    """How several GPUs hold the model; None for one process."""
    if job.processes.value == 1:
        return None
    return collectives.call_on_main(
        fsdp.choose_sharding, job.runtime.sharding, job.settings, job.inputs.base, job.device
    )


def _isolate(
    model: Model, base: BaseChoices, packs: PackedExamples, dtype: str, sharded: bool, progress: Progress
) -> BaseChoices:
    """As isolation_check.choose_isolation, by the first pack; says when packs can't be computed at once."""
    longest = packs.longest_example()
    attention = isolation_check.choose_isolation(model, packs.pack(0), dtype, base.attention, sharded, longest)
    if attention is not base.attention:
        progress.say(f"attention: {attention.value}: {attention.reason}")
    return replace(base, attention=attention)


def _earlier_start(folder: Path) -> EarlierStart:
    """What is in the folder of the checkpoints; without a checkpoint nothing but the plan is kept of it."""
    checkpoint, step = newest_whole(folder), step_planner.load_choices(folder)
    if checkpoint is None:
        shutil.rmtree(folder, ignore_errors=True)
    return EarlierStart(checkpoint, step)


def _fuse_lora(
    job: TrainJob, model: PeftModel, dtype: str, packs: PackedExamples, earlier: EarlierStart
) -> MatmulChoices:
    """As base_precision.attach_fused_lora; every rank takes what the main one found."""
    wanted, kept = job.settings.frozen_products, earlier.step and earlier.step.frozen_products
    if job.device == "cpu":
        if wanted == "fp8":
            raise UserError("train.frozen_products: 'fp8' needs a GPU; use 'bf16' or 'auto'")
        return MatmulChoices(Choice(dtype, "as all matmuls on this CPU"), fused_lora.attach_on_cpu(model, dtype))
    choices = collectives.call_on_main(base_precision.attach_fused_lora, model, dtype, wanted, packs, kept)
    if collectives.is_main():
        return choices
    return base_precision.attach_fused_lora(model, dtype, wanted, packs, choices.frozen_products)


def _check_fused(
    model: PeftModel, matmuls: MatmulChoices, packs: PackedExamples, dtype: str, progress: Progress
) -> MatmulChoices:
    """The same choices where the fused layers compute packs rightly too; else PEFT's own layers, and it is said."""
    if matmuls.lora_products.value == "PEFT":
        return matmuls
    wrong = isolation_check.problem(model, packs.pack(0), dtype)
    if wrong is None:
        return matmuls
    fused_lora.detach(model)
    reason = f"LoRA isn't fused into the base's products, since with it {wrong}"
    progress.say(reason)
    return MatmulChoices(Choice("bf16", "fp8 products are those of fused LoRA"), Choice("PEFT", reason))


# The step -------------------------------------------------------------------------------------------------------------


def _plan_step(
    job: TrainJob,
    model: Model,
    packs: PackedExamples,
    dtype: str,
    sharded: bool,
    earlier: EarlierStart,
    progress: Progress,
) -> StepChoices:
    """How a step is computed: as an earlier start did, if as many processes take part, else as is found best."""
    before, processes = earlier.step, job.processes
    if before is not None and before.processes.value == processes.value:
        return before
    if before is not None:
        begun = before.processes.value
        progress.say(f"begun with {begun} GPUs, goes on with {processes.value}: planning anew")
    levels = step_planner.supported_checkpointing(model, job.device)
    if sharded:
        return step_planner.choose_step_untried(job.settings, job.step_packs, levels, processes)
    least = None
    if job.device == "cuda":  # of cards that may differ
        least = int(-collectives.all_reduce_max(-hardware.total_memory("cuda")))
    trials = step_planner.Trials(model, packs.seq_lengths, dtype, job.device, least)
    collectives.call_on_main(trials.warm_up)
    return collectives.call_on_main(
        step_planner.choose_step,
        job.settings,
        packs.seq_lengths,
        job.step_packs,
        job.device,
        levels,
        trials,
        processes,
    )


def _fall_back(job: TrainJob, step: StepChoices, model: Model, done: int) -> step_planner.MemoryRanOut:
    """Keep the next smaller plan for another start. Raises UserError where there is none."""
    checkpoint = newest_whole(job.checkpoints)
    levels = step_planner.supported_checkpointing(model, job.device)
    fallen = step_planner.fall_back(step, levels, done, step_of(checkpoint) if checkpoint else 0)
    step_planner.save_choices(fallen, job.checkpoints)
    assert fallen.memory_fallback is not None
    return step_planner.MemoryRanOut(fallen.memory_fallback.reason)


# The trainer ----------------------------------------------------------------------------------------------------------


def _build_trainer(
    job: TrainJob,
    model: Model,
    packs: PackedExamples,
    plan: TrainingPlan,
    earlier: EarlierStart,
    progress: Progress,
) -> tuple[Trainer, DoctorCallback, TrainingFacts]:
    settings, inputs, dtype = job.settings, job.inputs, plan.compute_dtype.value
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(inputs.tokenizer)
    heldout = heldout_examples(inputs.heldout_tokens, settings.eval_samples)
    arguments = training_arguments(job, plan.step, packs.seq_lengths, heldout, dtype)
    sampler = Sampler(
        choose_prompts(inputs.heldout_tokens, settings.samples),
        tokenizer,
        dtype,
        job.checkpoints / "samples.jsonl",
        earlier.steps or 0,
        progress,
        _sampling_seconds(job, plan.step, packs.seq_lengths, arguments.max_steps),
    )
    facts = _facts(job, model, packs.seq_lengths, dtype, arguments.max_steps, sampler.reply_tokens)
    if job.device == "cpu" and settings.best_by != "exact_match":
        tokens = facts.tokens_per_step * facts.steps
        sampler.times = cpu_sample_times(tokens, sampler.limit, facts.steps, int(arguments.eval_steps or 1))
    live.say_advice(settings, facts, progress)
    best = KeepBestWeights(settings, job.checkpoints)
    doctor = DoctorCallback(facts, settings, sampler.rows, progress)
    callbacks: list[TrainerCallback] = [
        RefillPacks(packs),
        ShowProgress(progress, len(heldout or ())),
        *_trackers(job, progress),
        best,
        doctor,
    ]
    trainer = Trainer(
        model,
        arguments,
        train_dataset=packs.dataset(),
        eval_dataset=heldout,
        processing_class=tokenizer,
        optimizer=lora.create_optimizer(model, arguments, settings),
        callbacks=callbacks,
        settings=settings,
        step_packs=job.step_packs.packs,
        pack_tokens=[int(pack.sum()) for pack in packs.seq_lengths],
        sampler=sampler,
        best=best,
    )
    if settings.method != "full":
        lora.keep_fp32(trainer.trained)  # TRL casts a quantised model's adapter to bf16
    collectives.broadcast_parameters(p for p in trainer.trained.parameters() if p.requires_grad)
    return trainer, doctor, facts


def _sampling_seconds(
    job: TrainJob, step: StepChoices, seq_lengths: list[NDArray[np.int32]], steps: int
) -> float | None:
    """Seconds that sampled replies may take; None where training's own aren't known, or replies decide what is kept."""
    speed = step_planner.planned_speed(step)
    if speed is None or job.settings.best_by == "exact_match":
        return None
    tokens = int(sum(pack.sum() for pack in seq_lengths)) / steps_per_epoch(job, seq_lengths) * steps
    return SHARE * tokens / (speed * job.processes.value)


def _trackers(job: TrainJob, progress: Progress) -> list[TrainerCallback]:
    names = list[str](job.runtime.report_to) if collectives.is_main() else []
    return trackers.callbacks(names, job.results, job.checkpoints.name, job.settings.model_dump(mode="json"), progress)


def training_arguments(
    job: TrainJob, step: StepChoices, seq_lengths: list[NDArray[np.int32]], heldout: Dataset | None, dtype: str
) -> SFTConfig:
    """The settings as TRL's trainer takes them; `dtype`: of the matmuls."""
    settings, runtime, device = job.settings, job.runtime, job.device
    micro: int = step.micro_batch_size.value
    per_epoch = steps_per_epoch(job, seq_lengths)
    steps = max(1, round(settings.epochs * per_epoch))
    scheduler, options = settings.lr_scheduler, {}
    if scheduler == "cosine" and settings.min_lr_ratio:
        scheduler, options = "cosine_with_min_lr", {"min_lr_rate": settings.min_lr_ratio}
    arguments = SFTConfig(
        output_dir=str(job.checkpoints),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=eval_batch_size(micro, seq_lengths, heldout),
        gradient_accumulation_steps=step.gradient_accumulation_steps.value,
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup" if scheduler == "constant" else scheduler,
        lr_scheduler_kwargs=options,
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=device == "cpu",
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        gradient_checkpointing=False,  # the planner has set the layers that recompute
        optim="adamw_torch_fused" if device == "cuda" else "adamw_torch",
        loss_type=settings.loss,
        router_aux_loss_coef=0.0,  # the loss is that of the tokens; with it Mixtral's generate fails on the way
        padding_free=True,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        eval_strategy="steps" if heldout is not None else "no",
        eval_steps=max(1, -(-steps // settings.eval_times)),
        save_strategy="steps" if runtime.checkpoints else "no",
        save_steps=max(1, steps // (runtime.checkpoints + 1)),
        save_total_limit=runtime.save_total_limit,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        dataloader_pin_memory=device == "cuda",
        # Else a batch that is read ahead would wait for all work that the GPU has been given.
        accelerator_config={"non_blocking": device == "cuda"},
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # a process has one GPU, whatever it sees
    return arguments


def steps_per_epoch(job: TrainJob, seq_lengths: list[NDArray[np.int32]]) -> int:
    """Optimizer steps in one pass over the packs."""
    return -(-len(seq_lengths) // job.step_packs.packs)


def eval_batch_size(micro: int, seq_lengths: list[NDArray[np.int32]], heldout: Dataset | None) -> int:
    """As many of the longest held-out examples as have the tokens of a training batch, for which there is room."""
    if heldout is None:
        return 1
    longest = len(heldout[0]["input_ids"])
    return max(1, micro * max(int(pack.sum()) for pack in seq_lengths) // longest)


def _facts(
    job: TrainJob,
    model: Model,
    seq_lengths: list[NDArray[np.int32]],
    dtype: str,
    steps: int,
    reply_tokens: float | None,
) -> TrainingFacts:
    """What doctor and advice judge by, as far as it is known before the first step."""
    table = TokenTable(job.inputs.train_tokens)
    examples, tokens = sum(map(len, seq_lengths)), int(sum(pack.sum() for pack in seq_lengths))
    per_step = job.step_packs.packs
    return TrainingFacts(
        ln_vocabulary=math.log(model.config.get_text_config().vocab_size),
        parameters=base_model.parameter_count(model),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        labelled_share=int(table.column("labelled").sum()) / max(1, int(table.column("tokens").sum())),
        dtype=dtype,
        examples=examples,
        epochs=job.settings.epochs,
        steps=steps,
        steps_per_epoch=steps_per_epoch(job, seq_lengths),
        effective_batch=round(per_step * examples / len(seq_lengths), 2),
        tokens_per_step=tokens / len(seq_lengths) * per_step,
        reply_tokens=reply_tokens,
    )


# Training -------------------------------------------------------------------------------------------------------------


def _look_first(
    job: TrainJob,
    trainer: Trainer,
    packs: PackedExamples,
    plan: TrainingPlan,
    facts: TrainingFacts,
    earlier: EarlierStart,
    progress: Progress,
) -> PreflightFigures:
    """Look at the first pack before the first step, and say what is seen."""
    tokenizer = trainer.processing_class
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    files = job.inputs.base.glob("*.safetensors")
    disk = preflight.DiskNeeds(
        checkpoints=job.checkpoints,
        save_total_limit=job.runtime.save_total_limit if job.runtime.checkpoints else 0,
        results=job.out,
        base_bytes=(size := sum(file.stat().st_size for file in files)),
        copies=preflight.merged_copies(size, job.settings.method, job.device, plan.compute_dtype.value),
    )
    figures = preflight.check(
        trainer.trained,
        tokenizer,
        packs.pack(0),
        job.settings,
        plan.compute_dtype.value,
        plan.step.plan.checkpointing != "none",
        facts,
        disk,
    )
    left = max(0, facts.steps - (earlier.steps or 0))
    speed = step_planner.planned_speed(plan.step)
    if speed is None:
        figures["estimated_seconds"] = round(figures["estimated_seconds"] * left / facts.steps)
    else:
        figures["estimated_seconds"] = round(facts.tokens_per_step * left / (speed * job.processes.value))
    live.say_preflight(figures, plan.record(), replace(facts, steps=left), progress)
    return figures


def _optimise(trainer: Trainer, earlier: EarlierStart, progress: Progress) -> None:
    """All steps, from the last checkpoint on, with an evaluation at the end."""
    if earlier.checkpoint is None:
        with undisturbed():
            trainer.sampler.sample(trainer.trained, 0)
    else:
        progress.say(f"continuing from the checkpoint at step {earlier.steps}")
    if not collectives.is_main():
        torch.manual_seed(trainer.args.seed + collectives.rank())  # dropout of its own
    trainer.train(resume_from_checkpoint=earlier.checkpoint and str(earlier.checkpoint))
    if trainer.args.eval_strategy != "no" and not _evaluated_last(trainer.state):
        trainer.evaluate()
    trackers.close_all()


def _evaluated_last(state: TrainerState) -> bool:
    return any("eval_loss" in row and row["step"] == state.global_step for row in state.log_history)


# What it leaves -------------------------------------------------------------------------------------------------------


def _record(
    job: TrainJob,
    trainer: Trainer,
    packs: PackedExamples,
    earlier: EarlierStart,
    kept: Choice,
    facts: TrainingFacts,
    figures: PreflightFigures,
) -> TrainRecord:
    rows = metrics_rows(trainer.state.log_history)
    losses = [row["loss"] for row in rows if "loss" in row]
    evals = [row["eval_loss"] for row in rows if "eval_loss" in row]
    speeds = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    return TrainRecord(
        steps=trainer.state.global_step,
        planned_steps=trainer.state.max_steps,
        epochs=round(trainer.state.epoch or 0.0, 3),
        tokens_per_epoch=int(sum(pack.sum() for pack in packs.seq_lengths)),
        tokens_per_second=speeds[len(speeds) // 2],
        first_loss=losses[0],
        final_loss=sum(losses[-10:]) / len(losses[-10:]),
        eval_loss=evals[-1] if evals else None,
        effective_batch={
            "asked": job.settings.effective_batch_size,
            "mean_examples": facts.effective_batch,
            "packs": job.step_packs.packs,
        },
        trainable_parameters=sum(p.numel() for p in trainer.trained.parameters() if p.requires_grad),
        total_parameters=base_model.parameter_count(trainer.trained),
        resumed_from=earlier.steps,
        kept=kept.to_dict(),
        facts=facts.to_dict(),
        preflight=figures,
    )


def _write(out: Path, trainer: Trainer, plan: TrainingPlan, record: TrainRecord) -> None:
    write_jsonl(out / "metrics.jsonl", metrics_rows(trainer.state.log_history))
    write_jsonl(out / "samples.jsonl", trainer.sampler.rows)
    write_json(out / "plan.json", plan.record())
    write_json(out / "train.json", record)
