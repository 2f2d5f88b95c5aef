"""Train on the packs: adapter (or full model), curves, and the plan that data and hardware led to."""

import gc
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, set_seed
from trl import SFTConfig

from adder import adapter, base_model, frozen_products, hardware, planner, preflight, trackers
from adder.advice import advise
from adder.checkpoints import newest_whole
from adder.choice import Choice
from adder.doctor import Doctor
from adder.files import write_json, write_jsonl
from adder.neftune import add_noise
from adder.progress import Progress
from adder.randomness import undisturbed
from adder.sampling import Sampler, choose_prompts
from adder.tokens import TokenTable
from adder.trainer import Judge, ShowProgress, Trainer
from adder.training_data import PackedExamples, RefillPacks, heldout_examples


def run(
    settings: dict,
    inputs: dict[str, Path],
    out: Path,
    progress: Progress,
    checkpoints: Path | None = None,
    runtime: dict | None = None,
) -> dict:
    """Train; write `adapter/` (`model/` for method full), metrics.jsonl, samples.jsonl, plan.json, train.json to `out`.

    `checkpoints`: a directory that outlives a kill; training continues from the last whole checkpoint in it, by the
    plan that it began with. Where memory runs out, it goes on from there with a smaller plan. `runtime`: {checkpoints,
    save_total_limit, report_to, results}, of the machine; trackers write below `results`. Raises UserError for a set-up
    that can't work, when the loss stops being a number and when memory runs out with the smallest plan.
    """
    folder = checkpoints or out / "checkpoints"
    while True:
        try:
            summary = _train(settings, inputs, out, progress, folder, runtime or {})
            break
        except planner.MemoryRanOut as error:
            progress.say(str(error))
        trackers.close_all()
        gc.collect()  # what is left of the training that failed, before the model is loaded anew
        torch.cuda.empty_cache()
    if checkpoints is None:
        shutil.rmtree(folder, ignore_errors=True)
    return {name: summary[name] for name in ("steps", "final_loss", "eval_loss", "tokens_per_second")}


def _train(settings: dict, inputs: dict[str, Path], out: Path, progress: Progress, folder: Path, runtime: dict) -> dict:
    """One start, from `folder`'s last whole checkpoint where there is one; return what train.json holds.

    Raises planner.MemoryRanOut when another start, by the plan that `folder` then holds, can go on.
    """
    hardware.use_threads()
    device = hardware.device()
    if device == "cuda":
        hardware.prepare_gpu()
    plan = {"compute_dtype": hardware.compute_dtype(device, settings["compute_dtype"])}
    dtype = plan["compute_dtype"].value
    packs = PackedExamples(
        inputs["tokenize"] / "train.arrow",
        inputs["lengths"] / "packs.parquet",
        settings["seed"],
        settings["reshuffle"],
    )
    seq_lengths = packs.seq_lengths
    progress.say(f"loading the base model for {settings['method']} on {device} in {dtype}")
    set_seed(settings["seed"])
    model, choices = base_model.load(inputs["model"] / "model", settings["method"], dtype, device)
    plan |= choices
    step_plan = planner.load(folder)
    if settings["method"] != "full":
        model = adapter.add_adapter(model, settings)
        adapter.initialise(model, packs, settings)
        if device == "cuda":
            kept = (step_plan or {}).get("frozen_products")
            plan |= frozen_products.attach(model, dtype, settings["frozen_products"], packs, kept)
    if settings["neftune_noise_alpha"]:
        add_noise(model, settings["neftune_noise_alpha"])

    newest = newest_whole(folder)
    resumed_from = newest and int(newest.name.removeprefix("checkpoint-"))
    if newest is None:
        shutil.rmtree(folder, ignore_errors=True)
    levels = planner.supported(model, device)
    if step_plan is None:
        trials = planner.Trials(model, seq_lengths, dtype, device)
        step_plan = planner.choose(settings, seq_lengths, device, levels, trials)
    if "frozen_products" in plan:
        step_plan["frozen_products"] = plan["frozen_products"]  # outlives a kill too
    planner.save(step_plan, folder)
    planner.apply(model, planner.of(step_plan).checkpointing)
    plan |= step_plan

    tokenizer = AutoTokenizer.from_pretrained(inputs["tokenize"] / "tokenizer")
    heldout = heldout_examples(inputs["tokenize"] / "heldout.arrow", settings["eval_samples"])
    arguments = _arguments(settings, plan, seq_lengths, heldout, device, dtype, folder, runtime)
    facts = _facts(model, inputs, settings, plan, arguments, seq_lengths) | {"results": out}
    advice = advise(settings, facts)
    for line in advice:
        progress.say(f"advice: {line}")
    watchers = trackers.callbacks(
        runtime.get("report_to", []), Path(runtime.get("results", out)), folder.name, settings, progress
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=packs.dataset(),
        eval_dataset=heldout,
        processing_class=tokenizer,
        optimizers=(adapter.create_optimizer(model, arguments, settings), None),
        callbacks=[RefillPacks(packs), ShowProgress(progress), *watchers],
        settings=settings,
        sampler=Sampler(
            choose_prompts(inputs["tokenize"] / "heldout.arrow", settings["samples"]),
            tokenizer,
            dtype,
            folder / "samples.jsonl",
            resumed_from or 0,
            progress,
        ),
        judge=Judge(settings, folder),
        doctor=Doctor(facts, settings, progress),
    )
    if settings["method"] != "full":
        adapter.keep_fp32(trainer.model)  # TRL casts a quantised model's adapter to bf16
    try:
        seen = _check(trainer, packs, plan, progress)
        _optimise(trainer, newest, progress)
    except torch.OutOfMemoryError as error:
        checkpoint = newest_whole(folder)
        continued_from = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
        step_plan = planner.fall_back(step_plan, levels, trainer.state.global_step, continued_from)
        planner.save(step_plan, folder)
        raise planner.MemoryRanOut(step_plan["memory_fallback"].reason) from error
    kept = trainer.judge.finish(trainer.model, trainer.state, progress)

    summary = {
        **_summary(trainer, settings, plan, seq_lengths, resumed_from),
        "kept": kept.to_dict(),
        "preflight": seen,
        "diagnoses": trainer.doctor.conclude(trainer.state.log_history),
        "advice": advice,
    }
    adapter.save(trainer.model, inputs, out, settings["method"])
    write_jsonl(out / "metrics.jsonl", _metrics(trainer.state.log_history))
    write_jsonl(out / "samples.jsonl", trainer.sampler.rows)
    write_json(out / "plan.json", {name: choice.to_dict() for name, choice in plan.items()})
    write_json(out / "train.json", summary)
    return summary


def _check(trainer: Trainer, packs: PackedExamples, plan: dict[str, Choice], progress: Progress) -> dict:
    """Look before the first step, and say what is seen."""
    seen = preflight.check(
        trainer.model, trainer.processing_class, packs.pack(0), trainer.settings, plan, trainer.doctor.facts
    )
    if "frozen_products" in plan:
        seen["warnings"] += frozen_products.warnings(plan["frozen_products"])
    for warning in seen["warnings"]:
        progress.say(f"warning: {warning}")
    progress.say(seen["estimate"])
    trainer.doctor.facts["base_loss"] = seen["base_loss"]
    return seen


def _optimise(trainer: Trainer, newest: Path | None, progress: Progress) -> None:
    """All steps, from the checkpoint `newest` on, with an evaluation at the end."""
    if newest is None:
        with undisturbed():
            trainer.sampler.sample(trainer.model, 0)
    else:
        progress.say(f"continuing from the checkpoint at step {newest.name.removeprefix('checkpoint-')}")
    trainer.train(resume_from_checkpoint=newest and str(newest))
    if trainer.args.eval_strategy != "no" and not _evaluated_last(trainer.state):
        trainer.evaluate()
    trackers.close_all()


def _facts(
    model: torch.nn.Module, inputs: dict, settings: dict, plan: dict, arguments: SFTConfig, seq_lengths: list
) -> dict:
    """What doctor, advice and preflight judge by."""
    table = TokenTable(inputs["tokenize"] / "train.arrow")
    parameters = list(model.parameters())
    examples, tokens = sum(map(len, seq_lengths)), int(sum(pack.sum() for pack in seq_lengths))
    per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    files = (inputs["model"] / "model").glob("*.safetensors")
    return {
        "ln_vocabulary": math.log(model.config.get_text_config().vocab_size),
        "parameters": sum(_numbers(parameter) for parameter in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "labelled_share": int(table.column("labelled").sum()) / max(1, int(table.column("tokens").sum())),
        "dtype": plan["compute_dtype"].value,
        "skipped_steps": 0,  # by the fp16 scaler; counted as training goes
        "examples": examples,
        "epochs": settings["epochs"],
        "steps": arguments.max_steps,
        "steps_per_epoch": -(-len(seq_lengths) // per_step),
        "effective_batch": round(per_step * examples / len(seq_lengths), 2),
        "tokens_per_step": tokens / len(seq_lengths) * per_step,
        "checkpoints": arguments.output_dir,
        "save_total_limit": arguments.save_total_limit if arguments.save_strategy != "no" else 0,
        "base_bytes": sum(file.stat().st_size for file in files),
    }


def _arguments(settings, plan, seq_lengths, heldout, device, dtype, folder, runtime) -> SFTConfig:
    checkpoint_count = runtime.get("checkpoints", 10)
    accumulation = plan["gradient_accumulation_steps"].value
    micro = plan["micro_batch_size"].value
    per_epoch = -(-len(seq_lengths) // (micro * accumulation))
    steps = max(1, round(settings["epochs"] * per_epoch))
    scheduler, options = settings["lr_scheduler"], {}
    if scheduler == "cosine" and settings["min_lr_ratio"]:
        scheduler, options = "cosine_with_min_lr", {"min_lr_rate": settings["min_lr_ratio"]}
    return SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=_eval_batch(micro, seq_lengths, heldout),
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant_with_warmup" if scheduler == "constant" else scheduler,
        lr_scheduler_kwargs=options,
        warmup_steps=settings["warmup_ratio"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_grad_norm"],
        seed=settings["seed"],
        data_seed=settings["seed"],
        use_cpu=device == "cpu",
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        gradient_checkpointing=False,  # the planner has set the layers that recompute
        optim="adamw_torch_fused" if device == "cuda" else "adamw_torch",
        loss_type=settings["loss"],
        padding_free=True,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        eval_strategy="steps" if heldout is not None else "no",
        eval_steps=max(1, -(-steps // settings["eval_times"])),
        save_strategy="steps" if checkpoint_count else "no",
        save_steps=max(1, steps // (checkpoint_count + 1)),
        save_total_limit=runtime.get("save_total_limit", 2),
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        dataloader_pin_memory=device == "cuda",
    )


def _eval_batch(micro: int, seq_lengths: list[np.ndarray], heldout: Dataset | None) -> int:
    """As many of the longest held-out examples as have the tokens of a training batch, for which there is room."""
    if heldout is None:
        return 1
    longest = len(heldout[0]["input_ids"])
    return max(1, micro * max(int(pack.sum()) for pack in seq_lengths) // longest)


def _evaluated_last(state) -> bool:
    return any("eval_loss" in row and row["step"] == state.global_step for row in state.log_history)


def _metrics(history: list[dict]) -> list[dict]:
    wanted = ("step", "epoch", "loss", "eval_loss", "exact_match", "learning_rate", "grad_norm", "tokens_per_second")
    rows = [{name: row[name] for name in wanted if name in row} for row in history]
    return [row for row in rows if row.keys() & {"loss", "eval_loss", "exact_match"}]


def _summary(
    trainer: Trainer, settings: dict, plan: dict[str, Choice], seq_lengths: list[np.ndarray], resumed_from: int | None
) -> dict:
    rows = _metrics(trainer.state.log_history)
    losses = [row["loss"] for row in rows if "loss" in row]
    evals = [row["eval_loss"] for row in rows if "eval_loss" in row]
    speeds = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    parameters = list(trainer.model.parameters())
    per_step = plan["micro_batch_size"].value * plan["gradient_accumulation_steps"].value
    examples = sum(map(len, seq_lengths))
    return {
        "steps": trainer.state.global_step,
        "planned_steps": trainer.state.max_steps,
        "epochs": round(trainer.state.epoch, 3),
        "tokens_per_epoch": int(sum(pack.sum() for pack in seq_lengths)),
        "tokens_per_second": speeds[len(speeds) // 2],
        "first_loss": losses[0],
        "final_loss": sum(losses[-10:]) / len(losses[-10:]),
        "eval_loss": evals[-1] if evals else None,
        "effective_batch": {
            "asked": settings["effective_batch_size"],
            "mean_examples": round(per_step * examples / len(seq_lengths), 2),
            "packs": per_step,
        },
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(_numbers(p) for p in parameters),
        "resumed_from": resumed_from,
    }


def _numbers(parameter: torch.nn.Parameter) -> int:
    """How many numbers a parameter stands for: an NF4 one holds two in each byte."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return torch.Size(shape).numel() if shape is not None else parameter.numel()
