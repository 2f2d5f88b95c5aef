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

from adder.core import hardware, precision
from adder.core.choice import Choice
from adder.core.files import read_json, write_json, write_jsonl
from adder.core.progress import Progress
from adder.core.rng import undisturbed
from adder.tokenization.token_table import TokenTable
from adder.training import base_model, base_precision, lora, preflight, step_planner
from adder.training.checkpoints import newest_whole
from adder.training.distributed import collectives, fsdp, launcher
from adder.training.monitoring import trackers
from adder.training.monitoring.advice import advise
from adder.training.monitoring.doctor import Doctor
from adder.training.neftune import add_noise
from adder.training.packed_dataset import PackedExamples, RefillPacks, heldout_examples
from adder.training.sampled_replies import Sampler, choose_prompts
from adder.training.trainer import Judge, ShowProgress, Trainer


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
    plan that it began with. Where memory runs out, it goes on from there with a smaller plan. `runtime`: {gpus,
    sharding, checkpoints, save_total_limit, report_to, results}, of the machine; each of several GPUs has a process of
    its own, and without `gpus` this one trains alone; trackers write below `results`. Raises UserError for a set-up
    that can't work, when the loss stops being a number and when memory runs out with the smallest plan.
    """
    folder, runtime, device = checkpoints or out / "checkpoints", runtime or {}, hardware.device()
    step_packs, _ = step_planner.step_packs(settings, _packs(inputs, settings).seq_lengths)
    processes = launcher.choose(runtime.get("gpus", 1), device, step_packs)
    request = dict(
        settings=settings, inputs=inputs, out=out, folder=folder, runtime=runtime, device=device, processes=processes
    )
    while True:
        try:
            if processes.value == 1:
                start(**request, progress=progress)
            else:
                launcher.train(request, processes.value, device, progress)
            break
        except step_planner.MemoryRanOut as error:
            progress.say(str(error))
        trackers.close_all()
        gc.collect()  # what is left of the training that failed, before the model is loaded anew
        torch.cuda.empty_cache()
    if checkpoints is None:
        shutil.rmtree(folder, ignore_errors=True)
    summary = read_json(out / "train.json")
    told = ("steps", "final_loss", "eval_loss", "tokens_per_second", "peak_gpu_memory_bytes")
    return {name: summary[name] for name in told if name in summary}


def start(
    settings: dict,
    inputs: dict[str, Path],
    out: Path,
    folder: Path,
    runtime: dict,
    device: str,
    processes: Choice,
    progress: Progress,
) -> None:
    """One start, from `folder`'s last whole checkpoint where there is one, as the process or one of `processes`.

    Raises planner.MemoryRanOut when another start, by the plan that `folder` then holds, can go on.
    """
    hardware.use_threads()
    if device == "cuda":
        hardware.prepare_gpu()
    plan = {"compute_dtype": precision.compute_dtype(device, settings["compute_dtype"])}
    dtype = plan["compute_dtype"].value
    packs = _packs(inputs, settings)
    seq_lengths = packs.seq_lengths
    progress.say(f"loading the base model for {settings['method']} on {device} in {dtype}")
    set_seed(settings["seed"])
    base = inputs["model"] / "model"
    if processes.value > 1:
        plan["sharding"] = collectives.on_main(fsdp.choose, runtime.get("sharding", "auto"), settings, base, device)
    in_shards = processes.value > 1 and plan["sharding"].value == "fsdp"
    model, choices = base_model.load(base, settings["method"], dtype, device, in_shards)
    plan |= choices
    newest, step_plan = collectives.on_main(_begun, folder)
    if settings["method"] != "full":
        model = lora.add_adapter(model, settings)
        lora.initialise(model, packs, settings)
        if device == "cuda" and not in_shards:
            plan |= _fold(model, dtype, settings, packs, (step_plan or {}).get("frozen_products"))
            if plan["lora_products"].value != "PEFT":
                plan.pop("nf4_values", None)  # folding chose anew, and says what
    if settings["neftune_noise_alpha"]:
        add_noise(model, settings["neftune_noise_alpha"])
    if in_shards:
        fsdp.shard(model, device)

    resumed_from = newest and int(newest.name.removeprefix("checkpoint-"))
    levels = step_planner.supported(model, device)
    if step_plan and step_plan["processes"].value != processes.value:
        progress.say(f"begun with {step_plan['processes'].value} GPUs, goes on with {processes.value}: planning anew")
        step_plan = None
    if step_plan is None and in_shards:
        step_plan = {"processes": processes, **step_planner.cautious(settings, seq_lengths, levels, processes.value)}
    elif step_plan is None:
        trials = step_planner.Trials(model, seq_lengths, dtype, device)
        chosen = collectives.on_main(
            step_planner.choose, settings, seq_lengths, device, levels, trials, processes.value
        )
        step_plan = {"processes": processes, **chosen}
    if "frozen_products" in plan:
        step_plan["frozen_products"] = plan["frozen_products"]  # outlives a kill too
    collectives.on_main(step_planner.save, step_plan, folder)
    step_planner.apply(model, step_planner.of(step_plan).checkpointing)
    plan |= step_plan

    tokenizer = AutoTokenizer.from_pretrained(inputs["tokenize"] / "tokenizer")
    heldout = heldout_examples(inputs["tokenize"] / "heldout.arrow", settings["eval_samples"])
    arguments = _arguments(settings, plan, seq_lengths, heldout, device, dtype, folder, runtime)
    facts = _facts(model, inputs, settings, plan, arguments, seq_lengths) | {"results": out}
    advice = advise(settings, facts)
    for line in advice:
        progress.say(f"advice: {line}")
    watchers = trackers.callbacks(
        runtime.get("report_to", []) if collectives.is_main() else [],
        Path(runtime.get("results", out)),
        folder.name,
        settings,
        progress,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=packs.dataset(),
        eval_dataset=heldout,
        processing_class=tokenizer,
        optimizers=(lora.create_optimizer(model, arguments, settings), None),
        callbacks=[RefillPacks(packs), ShowProgress(progress, len(heldout or ())), *watchers],
        settings=settings,
        step_packs=step_planner.step_packs(settings, seq_lengths)[0],
        pack_tokens=[int(pack.sum()) for pack in seq_lengths],
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
        lora.keep_fp32(trainer.model)  # TRL casts a quantised model's adapter to bf16
    collectives.share(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    try:
        seen = _check(trainer, packs, plan, progress)
        _optimise(trainer, newest, progress)
    except torch.OutOfMemoryError as error:
        checkpoint = newest_whole(folder)
        continued_from = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
        step_plan = step_planner.fall_back(step_plan, levels, trainer.state.global_step, continued_from)
        step_planner.save(step_plan, folder)
        raise step_planner.MemoryRanOut(step_plan["memory_fallback"].reason) from error
    peak = collectives.largest(torch.cuda.max_memory_allocated() if device == "cuda" else 0)
    kept = trainer.judge.finish(trainer.model, trainer.state, progress)
    lora.save(trainer.model, inputs, out, settings["method"])
    if not collectives.is_main():
        return

    summary = {
        **_summary(trainer, settings, seq_lengths, resumed_from),
        "kept": kept.to_dict(),
        "preflight": seen,
        "diagnoses": trainer.doctor.conclude(trainer.state.log_history),
        "advice": advice,
        **({"peak_gpu_memory_bytes": int(peak)} if device == "cuda" else {}),
    }
    write_jsonl(out / "metrics.jsonl", _metrics(trainer.state.log_history))
    write_jsonl(out / "samples.jsonl", trainer.sampler.rows)
    write_json(out / "plan.json", {name: choice.to_dict() for name, choice in plan.items()})
    write_json(out / "train.json", summary)
    return summary


def _packs(inputs: dict[str, Path], settings: dict) -> PackedExamples:
    tokens, packs = inputs["tokenize"] / "train.arrow", inputs["lengths"] / "packs.parquet"
    return PackedExamples(tokens, packs, settings["seed"], settings["reshuffle"])


def _fold(
    model: torch.nn.Module, dtype: str, settings: dict, packs: PackedExamples, kept: Choice | None
) -> dict[str, Choice]:
    """As frozen_products.attach; every process takes what the main one found."""
    rest = (model, dtype, settings["frozen_products"], packs)
    choices = collectives.on_main(base_precision.attach, *rest, kept)
    return choices if collectives.is_main() else base_precision.attach(*rest, choices["frozen_products"])


def _begun(folder: Path) -> tuple[Path | None, dict[str, Choice] | None]:
    """The last whole checkpoint and the plan of an earlier start; without a checkpoint nothing else is kept of it."""
    newest, plan = newest_whole(folder), step_planner.load(folder)
    if newest is None:
        shutil.rmtree(folder, ignore_errors=True)
    return newest, plan


def _check(trainer: Trainer, packs: PackedExamples, plan: dict[str, Choice], progress: Progress) -> dict:
    """Look before the first step, and say what is seen."""
    seen = preflight.check(
        trainer.model, trainer.processing_class, packs.pack(0), trainer.settings, plan, trainer.doctor.facts
    )
    if "frozen_products" in plan:
        seen["warnings"] += base_precision.warnings(plan["frozen_products"])
    if "nf4_weights" in plan:
        seen["warnings"].append(f"train.method: qlora, but {plan['nf4_weights'].reason}")
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
    if not collectives.is_main():
        torch.manual_seed(trainer.args.seed + collectives.number())  # dropout of its own
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
    per_step, _ = step_planner.step_packs(settings, seq_lengths)
    files = (inputs["model"] / "model").glob("*.safetensors")
    return {
        "ln_vocabulary": math.log(model.config.get_text_config().vocab_size),
        "parameters": _numbers(model),
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
    micro = plan["micro_batch_size"].value
    per_epoch = -(-len(seq_lengths) // step_planner.step_packs(settings, seq_lengths)[0])
    steps = max(1, round(settings["epochs"] * per_epoch))
    scheduler, options = settings["lr_scheduler"], {}
    if scheduler == "cosine" and settings["min_lr_ratio"]:
        scheduler, options = "cosine_with_min_lr", {"min_lr_rate": settings["min_lr_ratio"]}
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=_eval_batch(micro, seq_lengths, heldout),
        gradient_accumulation_steps=plan["gradient_accumulation_steps"].value,
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
        router_aux_loss_coef=0.0,  # the loss is that of the tokens; with it Mixtral's generate fails on the way
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
        # Else a batch that is read ahead would wait for all work that the GPU has been given.
        accelerator_config={"non_blocking": device == "cuda"},
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # a process has one GPU, whatever it sees
    return arguments


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


def _summary(trainer: Trainer, settings: dict, seq_lengths: list[np.ndarray], resumed_from: int | None) -> dict:
    rows = _metrics(trainer.state.log_history)
    losses = [row["loss"] for row in rows if "loss" in row]
    evals = [row["eval_loss"] for row in rows if "eval_loss" in row]
    speeds = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    parameters = list(trainer.model.parameters())
    per_step, _ = step_planner.step_packs(settings, seq_lengths)
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
        "total_parameters": _numbers(trainer.model),
        "resumed_from": resumed_from,
    }


def _numbers(model: torch.nn.Module) -> int:
    """How many numbers a model's parameters stand for: an NF4 layer's element holds several, whole or in shards."""
    packed = base_model.four_bit_layers(model).values()
    more = sum(layer.in_features * layer.out_features - layer.weight.numel() for layer in packed)
    return sum(parameter.numel() for parameter in model.parameters()) + more
