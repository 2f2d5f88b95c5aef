"""What the training benchmarks share: the pipeline's own stages up to the packs, and the same training by plain TRL.

Plain TRL is SFTTrainer with PEFT, packing and everything else as it comes, on the very tokens that Adder trains on.
"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from adder.training.stage import TrainSettings

ROOT = Path(__file__).resolve().parents[1]

SNIPS = ROOT / "../shared/data/snips"
PROMPT = "Turn the request into a function call."
STAGES = ("model", "data", "format", "tokenize", "lengths")


def snips_sources(data: Path, train_rows: int | None = None) -> dict:
    """The SNIPS files as a configuration names them, as config/examples/snips.yaml does."""
    convert = str(ROOT / "config/examples/snips.py")
    train = {"path": f"{data}/train_*_full.json", "convert": convert, "encoding": ["utf-8", "latin-1"]}
    if train_rows:
        train["sample"] = train_rows
    return {
        "sources": [train],
        "heldout": {"sources": [{"path": f"{data}/validate_*.json", "convert": convert}]},
    }


def ticket_sources(train_rows: int) -> dict:
    """The built-in tickets."""
    heldout = {"builtin": "tickets", "rows": 32, "part": "heldout"}
    return {"sources": [{"builtin": "tickets", "rows": train_rows}], "heldout": {"sources": [heldout]}}


def prepare(model: str, sources: dict, work: Path, effective_batch: int, prompt: str | None = None) -> dict:
    """Run download, format, tokenize and lengths into folders of `work`; return lengths.json. `model`: its source."""
    from adder.core.progress import Progress
    from adder.core.stage_spec import Context, NoInputs
    from adder.data import fetch_model, fetch_rows
    from adder.data.model_types import ModelSettings
    from adder.data.stage import RowSettings
    from adder.formatting import run as formatting
    from adder.formatting.stage import FormatSettings
    from adder.packing import run as lengths
    from adder.packing.stage import LengthsSettings
    from adder.tokenization import run as tokenize
    from adder.tokenization.stage import TokenizeSettings
    from adder.workflow.settings import Data

    progress = Progress.silent()
    folders = {name: work / name for name in STAGES}
    for folder in folders.values():
        folder.mkdir(parents=True)
    fetch_model.run(ModelSettings(source=model), NoInputs(), folders["model"], Context(progress))
    data = Data.model_validate(sources).model_dump(mode="json")
    rows = RowSettings(sources=data["sources"], heldout_sources=data["heldout"]["sources"])
    fetch_rows.run(rows, NoInputs(), folders["data"], Context(progress))
    settings = FormatSettings(system_prompt=prompt, share=data["heldout"]["share"], size=data["heldout"]["size"])
    formatting.run(settings, formatting.FormatInputs(folders["data"]), folders["format"], Context(progress))
    inputs = tokenize.TokenizeInputs(folders["format"], folders["model"])
    tokenize.run(TokenizeSettings(), inputs, folders["tokenize"], Context(progress))
    choices = LengthsSettings(effective_batch_size=effective_batch, max_examples=None)
    inputs = lengths.LengthsInputs(folders["tokenize"], folders["model"])
    lengths.run(choices, inputs, folders["lengths"], Context(progress))
    return json.loads((folders["lengths"] / "lengths.json").read_text())


class Clock:
    """Seconds of each optimizer step of any trainer in this process, and of the process's cores; starts by `watch`."""

    steps: ClassVar[list[float]] = []
    cpu: ClassVar[list[float]] = []

    @classmethod
    def watch(cls) -> None:
        """Let every trainer that is made from now on be watched."""
        import transformers.trainer
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                self.began = time.perf_counter(), time.process_time()

            def on_step_end(self, *args, **kwargs):
                cls.steps.append(time.perf_counter() - self.began[0])
                cls.cpu.append(time.process_time() - self.began[1])

        transformers.trainer.DEFAULT_CALLBACKS.append(Callback)


def train_with_trl(
    work: Path, out: Path, settings: "TrainSettings", packs_per_step: int, max_length: int, dtype: str, **options
) -> list[dict]:
    """Train on the prepared tokens by SFTTrainer into `out`/adapter (`out`/model for method full); its log.

    `settings`: those of Adder's train stage, of which rate, schedule, epochs, adapter and seed are taken. One pack a
    forward pass, `packs_per_step` a step, as Adder has. `options` go to SFTConfig and stand above all that.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed
    from trl import SFTConfig, SFTTrainer

    from adder.tokenization.token_table import TokenTable

    set_seed(settings.seed)
    full, compute = settings.method == "full", getattr(torch, dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    model = AutoModelForCausalLM.from_pretrained(
        work / "model" / "model",
        dtype=torch.float32 if full else compute,
        device_map={"": 0 if device == "cuda" else "cpu"},
        quantization_config=quantised if settings.method == "qlora" else None,
    )
    lora = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    table = TokenTable(work / "tokenize" / "train.arrow")
    rows = [table.row(number) for number in range(len(table))]
    data = Dataset.from_list([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
    config = SFTConfig(
        **{
            "output_dir": str(out / "trl"),
            "max_length": max_length,
            "packing": True,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": packs_per_step,
            "num_train_epochs": settings.epochs,
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": settings.lr_scheduler,
            "warmup_steps": settings.warmup_ratio,
            "weight_decay": settings.weight_decay,
            "max_grad_norm": settings.max_grad_norm,
            "seed": settings.seed,
            "use_cpu": device == "cpu",
            "bf16": dtype == "bfloat16",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            **options,
        }
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(work / "tokenize" / "tokenizer"),
        peft_config=None if full else lora,
    )
    trainer.train()
    trainer.save_model(str(out / ("model" if full else "adapter")))
    return [row for row in trainer.state.log_history if "loss" in row]
