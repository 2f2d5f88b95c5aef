"""Train on the packs: adapter (or full model), curves, and the plan that data and hardware led to."""

import json
import shutil
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from adder import base_model, hardware
from adder.batching import MemoryProbe, choose_batch
from adder.checkpoints import newest_whole, seal
from adder.choice import Choice
from adder.errors import UserError
from adder.files import read_json, read_table, write_json, write_jsonl
from adder.loss import has_plain_head, labelled_losses
from adder.progress import Progress


def run(
    settings: dict,
    inputs: dict[str, Path],
    out: Path,
    progress: Progress,
    checkpoints: Path | None = None,
    checkpoint_count: int = 10,
) -> dict:
    """Train, and write `adapter/` (`model/` for method full), metrics.jsonl, plan.json and train.json into `out`.

    `checkpoints`: a directory that outlives a kill; training continues from the last whole checkpoint in it.
    Raises UserError when the loss stops being a number.
    """
    hardware.use_threads()
    device = hardware.device()
    plan = {"compute_dtype": hardware.compute_dtype(device, settings["compute_dtype"])}
    dtype = plan["compute_dtype"].value
    train_set, eval_set = _datasets(settings, inputs)
    progress.say(f"loading the base model for {settings['method']} on {device} in {dtype}")
    set_seed(settings["seed"])
    model, choices = base_model.load(inputs["model"] / "model", settings["method"], dtype, device)
    plan |= choices
    if settings["method"] != "full":
        model = add_adapter(model, settings)
    plan |= choose_batch(settings, train_set["seq_lengths"], device, MemoryProbe(model, train_set, dtype, device))
    folder = checkpoints or out / "checkpoints"
    arguments = _arguments(settings, plan, len(train_set), device, dtype, folder, checkpoint_count)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=AutoTokenizer.from_pretrained(inputs["tokenize"] / "tokenizer"),
        callbacks=[SealCheckpoints(), ShowProgress(progress)],
    )
    _keep_adapter_fp32(trainer.model, settings["method"])
    resumed_from = _train(trainer, folder, progress)
    summary = _summary(trainer, settings, plan, train_set, resumed_from)
    save(trainer.model, inputs, out, settings["method"])
    write_jsonl(out / "metrics.jsonl", _metrics(trainer.state.log_history))
    write_json(out / "plan.json", {name: choice.to_dict() for name, choice in plan.items()})
    write_json(out / "train.json", summary)
    if checkpoints is None:
        shutil.rmtree(folder, ignore_errors=True)
    return {name: summary[name] for name in ("steps", "final_loss", "eval_loss", "tokens_per_second")}


def add_adapter(model: torch.nn.Module, settings: dict) -> PeftModel:
    """Put LoRA pairs on the modules that settings name; the pairs are fp32."""
    wanted = settings["target_modules"]
    config = LoraConfig(
        r=settings["lora_r"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings["lora_dropout"],
        target_modules=linear_names(model) if wanted == "all-linear" else wanted,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"train.target_modules: {wanted} does not fit this model ({error}); "
            f"its linear layers are called {', '.join(linear_names(model))}"
        ) from error


def linear_names(model: torch.nn.Module) -> list[str]:
    """Names (last part) of the model's linear layers, found by type, the LM head left out; sorted."""
    head = model.get_output_embeddings()
    linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return sorted({name.rpartition(".")[2] for name in linear})


class Trainer(SFTTrainer):
    """TRL's trainer, with tokens per second in its log and, on CPUs, the LM head at labelled positions only.

    On a GPU TRL's own fused head does that; on a CPU it would compute the logits of every position.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens = 0
        self.tokens_logged = 0
        self.clock = time.perf_counter()
        self.idle = 0.0  # seconds since the last log that were not spent on training steps

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the labelled tokens of the whole optimizer step, this micro-batch's part of it."""
        if model.training:
            self.tokens += inputs["input_ids"].numel()
        bare = self.accelerator.unwrap_model(self.model)
        bare = bare.get_base_model() if isinstance(bare, PeftModel) else bare
        if self.args.device.type != "cpu" or return_outputs or not has_plain_head(bare):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            losses = labelled_losses(bare, **inputs)
        count = losses.numel() if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / torch.as_tensor(count).clamp(min=1)

    def evaluate(self, *args, **kwargs):
        """As TRL's; the time it takes is none of the training's."""
        start = time.perf_counter()
        result = super().evaluate(*args, **kwargs)
        self.idle += time.perf_counter() - start
        return result

    def log(self, logs, start_time=None):
        """Add the training speed since the last log: tokens of real examples, in steps alone."""
        if "loss" in logs:
            if not torch.isfinite(torch.tensor(float(logs["loss"]))):
                raise UserError(
                    f"the loss became {logs['loss']} at step {self.state.global_step}: lower train.learning_rate "
                    f"(now {self.args.learning_rate}) or train.max_grad_norm (now {self.args.max_grad_norm})"
                )
            now = time.perf_counter()
            seconds = max(now - self.clock - self.idle, 1e-9)
            logs["tokens_per_second"] = round((self.tokens - self.tokens_logged) / seconds, 1)
            self.clock, self.idle, self.tokens_logged = now, 0.0, self.tokens
        super().log(logs, start_time)


class SealCheckpoints(TrainerCallback):
    """Seal each checkpoint once it is complete: only a sealed one is continued from."""

    def on_save(self, args, state, control, **kwargs):
        """Called by the trainer after all files of a checkpoint are written."""
        seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class ShowProgress(TrainerCallback):
    """One line with step, loss, speed and time left."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.start = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Note where this process starts, which after a kill is not step 0."""
        self.start = (time.perf_counter(), state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the line that the trainer has just logged."""
        logs = logs or {}
        if "eval_loss" in logs:
            self.progress.say(f"step {state.global_step}/{state.max_steps}, held-out loss {logs['eval_loss']:.4f}")
        if "loss" in logs:
            began, first = self.start
            done = max(state.global_step - first, 1)
            left = (time.perf_counter() - began) / done * (state.max_steps - state.global_step)
            self.progress.line(
                f"step {state.global_step}/{state.max_steps}, loss {float(logs['loss']):.4f}, "
                f"{logs['tokens_per_second']:,.0f} tokens/s, {_clock(left)} left",
                last=state.global_step == state.max_steps,
            )


def save(model: torch.nn.Module, inputs: dict[str, Path], out: Path, method: str) -> None:
    """Write the adapter in PEFT's form (or the full model in 16 bit), the same bytes for the same weights."""
    if method == "full":
        model.to(torch.bfloat16).save_pretrained(out / "model")
        AutoTokenizer.from_pretrained(inputs["tokenize"] / "tokenizer").save_pretrained(out / "model")
        return
    source = read_json(inputs["model"] / "source.json")
    config = model.peft_config["default"]
    # Not the path of this machine's copy: an adapter is loaded elsewhere.
    config.base_model_name_or_path, config.revision = source["source"], source["revision"]
    model.save_pretrained(out / "adapter")
    (out / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's empty form; the merged model has a real one
    path = out / "adapter" / "adapter_config.json"
    stored = json.loads(path.read_text())
    write_json(path, {key: sorted(v) if key == "target_modules" else v for key, v in stored.items()})


def _datasets(settings: dict, inputs: dict[str, Path]) -> tuple[Dataset, Dataset | None]:
    """The packs, and held-out examples as packs of one, longest first so that evaluation batches are even."""
    packs = Dataset(read_table(inputs["lengths"] / "packs.parquet"))
    if not settings["eval_samples"]:
        return packs, None
    heldout = read_table(inputs["tokenize"] / "heldout.parquet").slice(0, settings["eval_samples"]).to_pylist()
    rows = [
        {
            "input_ids": row["input_ids"],
            "labels": [-100, *row["labels"][1:]],
            "seq_lengths": [len(row["input_ids"])],
        }
        for row in sorted(heldout, key=lambda row: (-len(row["input_ids"]), row["id"]))
    ]
    return packs, Dataset.from_list(rows)


def _arguments(settings, plan, packs, device, dtype, folder, checkpoint_count) -> SFTConfig:
    accumulation = plan["gradient_accumulation_steps"].value
    micro = plan["micro_batch_size"].value
    per_epoch = -(-packs // (micro * accumulation))
    steps = max(1, round(settings["epochs"] * per_epoch))
    scheduler, options = settings["lr_scheduler"], {}
    if scheduler == "cosine" and settings["min_lr_ratio"]:
        scheduler, options = "cosine_with_min_lr", {"min_lr_rate": settings["min_lr_ratio"]}
    return SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=max(1, micro * 4),
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
        gradient_checkpointing=plan["gradient_checkpointing"].value,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        optim="adamw_torch_fused" if device == "cuda" else "adamw_torch",
        padding_free=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        eval_strategy="steps" if settings["eval_samples"] else "no",
        eval_steps=max(1, -(-steps // settings["eval_times"])),
        save_strategy="steps" if checkpoint_count else "no",
        save_steps=max(1, steps // (checkpoint_count + 1)),
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        dataloader_pin_memory=device == "cuda",
    )


def _keep_adapter_fp32(model: torch.nn.Module, method: str) -> None:
    """Undo TRL's cast of a quantised model's adapter to bf16, in which small updates are lost to rounding."""
    for parameter in model.parameters():
        if parameter.requires_grad and method != "full":
            parameter.data = parameter.data.float()


def _train(trainer: Trainer, folder: Path, progress: Progress) -> int | None:
    """Train to the end, from the newest whole checkpoint if there is one; return the step continued from."""
    newest = newest_whole(folder)
    if newest is None:
        shutil.rmtree(folder, ignore_errors=True)
        trainer.train()
        result = None
    else:
        result = int(newest.name.removeprefix("checkpoint-"))
        progress.say(f"continuing from the checkpoint at step {result}")
        trainer.train(resume_from_checkpoint=str(newest))
    if trainer.args.eval_strategy != "no" and not _evaluated_last(trainer.state):
        trainer.evaluate()
    return result


def _evaluated_last(state) -> bool:
    return any("eval_loss" in row and row["step"] == state.max_steps for row in state.log_history)


def _metrics(history: list[dict]) -> list[dict]:
    wanted = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second")
    rows = [{name: row[name] for name in wanted if name in row} for row in history]
    return [row for row in rows if "loss" in row or "eval_loss" in row]


def _summary(
    trainer: Trainer, settings: dict, plan: dict[str, Choice], packs: Dataset, resumed_from: int | None
) -> dict:
    rows = _metrics(trainer.state.log_history)
    losses = [row["loss"] for row in rows if "loss" in row]
    evals = [row["eval_loss"] for row in rows if "eval_loss" in row]
    speeds = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    parameters = list(trainer.model.parameters())
    per_step = plan["micro_batch_size"].value * plan["gradient_accumulation_steps"].value
    examples = sum(map(len, packs["seq_lengths"]))
    return {
        "steps": trainer.state.max_steps,
        "epochs": round(trainer.state.epoch, 3),
        "tokens_per_epoch": sum(map(sum, packs["seq_lengths"])),
        "tokens_per_second": speeds[len(speeds) // 2],
        "first_loss": losses[0],
        "final_loss": sum(losses[-10:]) / len(losses[-10:]),
        "eval_loss": evals[-1] if evals else None,
        "effective_batch": {
            "asked": settings["effective_batch_size"],
            "mean_examples": round(per_step * examples / len(packs), 2),
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


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
