"""How fast QLoRA training runs on a GPU: the usual ways beside Adder's, on the same made-up data, in one run.

Usage: python benchmarks/train_speed.py [--workloads short_chat ...] [--arms adder ...] [--layers 32]
                                        [--seconds 520] [--add] [--out benchmarks/results/train_speed.json]

The model has Llama-3.1-8B's shape and random weights, NF4 with double quantisation, LoRA of rank 16 on all seven
projections; the lengths are log-normal, the tokens random, every token carries loss. A step is forward, backward,
clipping and fused AdamW. Speed counts the tokens of real examples, not padding. Each arm runs in a process of its own
with a time limit, and the JSON is written after each, so that a run that is cut off keeps what it has; --add keeps what
an earlier run wrote about other arms and workloads. With --side-by-side each GPU that there is takes an arm at a time.

padded_script                   one example a row, padded to the longest, checkpointing, sdpa: most tutorials
trl_packing                     TRL's SFTTrainer with packing=True as its documentation has it: sdpa, checkpointing
trl_liger                       the same with use_liger_kernel=True
unsloth                         Unsloth's model under TRL's trainer, packing, no checkpointing (its best); see below
transformers_peft_liger_varlen  packs, varlen attention, Liger's layers and loss, no checkpointing: the best by hand
axolotl_kernels                 the same with axolotl's LoRA kernels for MLP, QKV and output projection; see below
adder                           packs, LoRA fused into the base's matmuls, own attention kernel and LM head loss
adder_varlen                    the same with torch's varlen attention
adder_liger_head, adder_trl_head  the same with Liger's and with TRL's loss: what our own brings
adder_dropout                   the same with lora_dropout 0.05
adder_workspace                 NF4 values dequantised anew in each matmul: 13 GB less
adder_fp8                       the frozen base's matmuls in fp8
adder_24gb, unsloth_24gb        within 24 GB (a cap on the allocator)
adder_stage, adder_stage_fp8    the pipeline's own train stage, planner and all, from files; short_chat alone
adder_stage_2gpus               the same on two GPUs, with twice the packs a step; its share is of two floors
What only shows what one step of ours brings (adder_...), and what is capped, runs on the first workload alone.

Unsloth pins older libraries, so it has a folder of its own, which UNSLOTH_SITE names (several, joined by ":", like
PYTHONPATH, which it becomes). Without that the arm is left out, and the JSON says so. It has xformers, which its own
installation brings, and which loads where LD_LIBRARY_PATH has the CUDA 12 runtime that it was built for (pip's
nvidia-cuda-runtime-cu12); the JSON's "attention" says whether it did. flash-attn, which it would take instead, has no
wheel and was not given to it. The folder, for Python 3.12 beside torch, transformers 5.17 and accelerate, is 16 MB
packed without what nobody imports here:

    pip install --no-deps --no-compile --only-binary=:all: --python-version 3.12 --implementation cp \\
      --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \\
      --platform manylinux2014_x86_64 --platform any --target site unsloth==2026.10.9 unsloth_zoo==2026.10.9 \\
      trl==1.15.0 datasets==4.8.5 peft==0.21.2 bitsandbytes==0.50.2 cut_cross_entropy torchao xformers==0.0.35 tyro \\
      shtab docstring_parser typeguard msgspec structlog json5 nest_asyncio einops "dill<0.4.2" \\
      "multiprocess<0.70.20" xxhash rich markdown-it-py mdurl pygments typer shellingham click requests urllib3 \\
      charset_normalizer idna certifi psutil wheel
    rm -rf site/studio site/unsloth_cli

Axolotl's kernels have such a folder too, AXOLOTL_SITE, 1.3 MB packed. They are put in by the two functions that its
loader calls; its trainer isn't run, which wants dozens of other libraries in versions of its own (transformers 5.16.1,
PEFT 0.20.0). The file that is removed imports wandb, evaluate and TRL for callbacks; nothing that is measured is in it:

    pip install --no-deps --no-compile --target site axolotl==0.19.0 addict==2.4.0
    rm -r site/bin site/axolotl/utils/callbacks/__init__.py

As axolotl has it by default for packed QLoRA: lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel, packs joined in one
row, no checkpointing, fp32 pairs. Given beyond that: Liger's norm, rotary and loss, a plugin there. Liger's rotary goes
in before the attention is patched; axolotl does it after, where it misses the patched layers. For flash-attn, which has
no wheel, it has torch's varlen kernel as Adder registers it. Its kernels cast the pairs to bf16 in each product, and
the pairs' gradients come out in bf16.
"""

import argparse
import gc
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel")
# For each arm the (packs or rows a forward pass, gradient checkpointing) that are measured.
ARMS = {  # what matters most comes first: a run that is cut off has it
    "adder": [(4, False), (8, False)],
    "adder_fp8": [(4, False), (8, False)],
    "padded_script": [(4, True)],
    "trl_packing": [(4, True)],
    "trl_liger": [(4, True)],
    "unsloth": [(8, False), (4, False)],
    "adder_stage": [(8, False)],
    "adder_stage_fp8": [(8, False)],
    "adder_stage_2gpus": [(8, False)],
    "adder_24gb": [(2, False), (8, True)],
    "transformers_peft_liger_varlen": [(8, False)],
    "axolotl_kernels": [(8, False), (4, False)],
    "adder_varlen": [(8, False)],
    "adder_workspace": [(8, False)],
    "adder_liger_head": [(8, False)],
    "adder_trl_head": [(8, False)],
    "adder_dropout": [(8, False)],
    "unsloth_24gb": [(8, True)],
}
BROAD = {
    *("adder", "adder_fp8", "padded_script", "trl_packing", "trl_liger", "unsloth"),
    *("transformers_peft_liger_varlen", "axolotl_kernels"),
}
SITES = {"unsloth": "UNSLOTH_SITE", "axolotl": "AXOLOTL_SITE"}  # by how an arm's name begins
OTHER_ATTENTION = {
    "padded_script": "sdpa",
    "transformers_peft_liger_varlen": "adder_varlen",  # torch's kernel, as Adder registers it
    "axolotl_kernels": "adder_varlen",
    "adder_varlen": "adder_varlen",
}
BY_TRL = ("trl_packing", "trl_liger", "unsloth", "unsloth_24gb")
CAP = 24e9
WARM_UP, STEPS = 2, 4
UNSLOTH_WARM_UP = 8  # it compiles layers as it meets new shapes
ARM_SECONDS = 100
UNSLOTH_SECONDS = 300
SAVED = Path("/dev/shm/adder_speed_model")


class Clock:
    """Seconds of steps after the warm-up, and the real tokens that went through them."""

    def __init__(self, warm_up: int = WARM_UP):
        self.warm_up = warm_up
        self.done, self.tokens, self.start, self.seconds = 0, 0, None, 0.0

    def tick(self, tokens: int) -> None:
        """Called after each step with what it trained on."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.done += 1
        if self.done > self.warm_up:
            self.tokens += tokens
            self.seconds = now - self.start
        elif self.done == self.warm_up:
            self.start = now

    @property
    def speed(self) -> float:
        """Real tokens a second."""
        return self.tokens / self.seconds


def build(arm: str, shape: dict, layers: int):
    """The arm's model with its adapter, ready for a loop of its own."""
    import speed_model
    from peft import get_peft_model
    from transformers import LlamaConfig

    from adder.kernels import packed_attention
    from adder.kernels.fused_lora import attach

    by_hand, by_axolotl = arm == "transformers_peft_liger_varlen", arm == "axolotl_kernels"
    if by_hand or by_axolotl:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(
            rope=True, swiglu=by_hand, rms_norm=True, cross_entropy=False, fused_linear_cross_entropy=False
        )
    kernel = OTHER_ATTENTION.get(arm)
    if kernel is None or (kernel == packed_attention.VARLEN and speed_model.device() == "cpu"):
        kernel = packed_attention.choose_attention(LlamaConfig(**shape), "bfloat16", speed_model.device()).value
    model = speed_model.base_model(shape, layers, kernel)
    if arm == "adder_trl_head":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # what its trainer asks for
    # The best that can be had by hand keeps the pairs in bf16: in fp32 each product would be cast.
    lora = speed_model.lora_config(0.05 if arm == "adder_dropout" else 0.0)
    model = get_peft_model(model, lora, autocast_adapter_dtype=not by_hand)
    speed_model.fill_pairs(model)
    if by_axolotl:
        patch_by_axolotl(model)
    if arm.startswith("adder"):
        hold = arm not in {"adder_workspace", "adder_24gb"}
        print(attach.attach(model, hold, "fp8" if arm == "adder_fp8" else "bf16"), flush=True)
    return model.train()


def patch_by_axolotl(model) -> None:
    """Put axolotl's LoRA kernels into the model, by the two functions that its loader calls for that."""
    from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches, patch_self_attn_lora
    from axolotl.utils.dict import DictDefault

    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        options = DictDefault(base_model=folder, lora_mlp_kernel=True, lora_qkv_kernel=True, lora_o_kernel=True)
        patch_self_attn_lora(options)
    apply_lora_kernel_patches(model, options)


def loss_function(model, arm: str):
    """The function from a batch to its mean loss."""
    import torch

    bare = model.get_base_model()

    def by_transformers(batch: dict) -> torch.Tensor:
        """The model's own loss, by way of all logits."""
        with torch.autocast(model.device.type, torch.bfloat16):
            return model(**batch).loss

    def by_trl(batch: dict) -> torch.Tensor:
        """TRL's fused head, which adder's trainer would have otherwise."""
        with torch.autocast(model.device.type, torch.bfloat16):
            return model(**batch, fused_lm_head=True).loss

    def hidden_and_target(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states that predict a labelled token, and these tokens."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden, target = bare.model(**inputs, use_cache=False).last_hidden_state[:, :-1], batch["labels"][:, 1:]
        mask = target != -100
        return hidden[mask], target[mask]

    def by_liger(batch: dict) -> torch.Tensor:
        """Liger's fused head."""
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(bare.lm_head.weight, *hidden_and_target(batch))

    def by_adder(batch: dict) -> torch.Tensor:
        """The package's own."""
        from adder.kernels.lm_head_loss import frozen_lm_head_losses

        hidden, target = hidden_and_target(batch)
        return frozen_lm_head_losses(hidden, bare.lm_head.weight, None, target).mean()

    if arm == "padded_script":
        return by_transformers
    if arm in {"transformers_peft_liger_varlen", "axolotl_kernels", "adder_liger_head"}:
        return by_liger
    return by_trl if arm == "adder_trl_head" else by_adder


def measure_loop(arm: str, options, report) -> None:
    """Measure an arm by a plain training loop; `report` takes each row as it comes."""
    import torch

    model = build(arm, options.shape, options.layers)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    loss_of = loss_function(model, arm)

    def step(batch: dict) -> torch.Tensor:
        """One optimizer step; its loss."""
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    for micro, checkpointing in ARMS[arm]:
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        for workload in options.workloads:
            batches = batches_of(arm, workload, micro, options.shape["vocab_size"])
            reals = [sum(lengths) for lengths, _ in batches]
            clock, loss = Clock(), None
            try:
                reset_peak()
                for i in range(WARM_UP + STEPS):
                    loss = step(batches[i % len(batches)][1])
                    clock.tick(reals[i % len(batches)])
            except torch.OutOfMemoryError:
                report(workload, micro, checkpointing, {"out_of_memory": True})
                model.zero_grad()
            else:
                report(workload, micro, checkpointing, figures(clock, loss.item()))
                if options.profile:
                    write_profile(step, batches[0][1], options.profile / f"profile_{arm}_{workload}_{micro}.txt")
            batches = loss = None
        if checkpointing:
            model.gradient_checkpointing_disable()


def batches_of(arm: str, workload: str, micro: int, vocabulary: int) -> list[tuple[list[int], dict]]:
    """Three batches, always the same ones, each with the lengths of its examples."""
    import speed_model

    if arm == "padded_script":
        lengths = [int(n) for n in speed_model.lengths_of(workload, 12 * speed_model.MEANS[workload])]
        parts = [lengths[i * micro : (i + 1) * micro] for i in range(3)]
        return [(part, speed_model.padded_batch(part, i, vocabulary)) for i, part in enumerate(parts)]
    packs = speed_model.full_packs(workload, 3 * micro)
    parts = [packs[i * micro : (i + 1) * micro] for i in range(3)]
    return [
        ([n for pack in part for n in pack], speed_model.packed_batch(part, i, vocabulary))
        for i, part in enumerate(parts)
    ]


def figures(clock: Clock, loss: float) -> dict:
    """One measurement's row."""
    return {
        "real_tokens_per_second": round(clock.speed, 1),
        "peak_memory_bytes": peak(),
        "final_loss": round(loss, 4),
    }


def reset_peak() -> None:
    """Forget the memory that was taken before."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    """The most memory that was taken since."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def measure_trainer(arm: str, options, report) -> None:
    """Measure TRL's SFTTrainer with packing, on its own model or on Unsloth's."""
    by_unsloth = arm.startswith("unsloth")
    if by_unsloth:
        import unsloth  # noqa: F401 - before all others, as it asks
    import speed_model
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    clock = None

    class Timed(SFTTrainer):
        """The trainer with a clock."""

        def training_step(self, model, inputs, *args, **kwargs):
            """As the trainer's."""
            tokens = inputs["input_ids"].numel()
            loss = super().training_step(model, inputs, *args, **kwargs)
            clock.tick(tokens)  # optimizer steps fall within the next one's time, and the last one's into none
            return loss

    vocabulary = options.shape["vocab_size"]
    warm_up = UNSLOTH_WARM_UP if by_unsloth else WARM_UP
    steps = warm_up + STEPS
    ((_, checkpointing), *_) = ARMS[arm]  # of an arm's sizes all have the same
    model = unsloth_model(checkpointing) if by_unsloth else trl_model(options)
    for (micro, _), workload in itertools.product(ARMS[arm], options.workloads):
        lengths = speed_model.lengths_of(workload, int(1.2 * (steps + 1) * micro * speed_model.LENGTH))
        rows = [speed_model.random_tokens(int(n), vocabulary, i).tolist() for i, n in enumerate(lengths)]
        clock = Clock(warm_up)
        reset_peak()
        config = SFTConfig(
            output_dir=tempfile.mkdtemp(),
            packing=True,
            max_length=speed_model.LENGTH,
            per_device_train_batch_size=micro,
            max_steps=steps,
            learning_rate=1e-4,
            gradient_checkpointing=checkpointing,
            bf16=True,
            optim="adamw_torch_fused",
            use_liger_kernel=arm == "trl_liger",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Timed(
            model=model,
            args=config,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=speed_model.tokenizer_of(vocabulary),
        )
        try:
            trainer.train()
        except torch.OutOfMemoryError:
            report(workload, micro, checkpointing, {"out_of_memory": True})
        else:
            losses = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
            row = figures(clock, losses[-1])
            if by_unsloth:
                from unsloth.utils import attention_dispatch

                row["attention"] = "xformers" if attention_dispatch.HAS_XFORMERS else "torch's sdpa"
            report(workload, micro, checkpointing, row)
        trainer = None


def trl_model(options):
    """What `from_pretrained` with a BitsAndBytesConfig and `get_peft_model` would give."""
    import speed_model
    from peft import get_peft_model

    model = speed_model.base_model(options.shape, options.layers, "sdpa")
    model.is_loaded_in_4bit = True
    model = get_peft_model(model, speed_model.lora_config())
    speed_model.fill_pairs(model)
    return model


def unsloth_model(checkpointing: bool):
    """The saved model through Unsloth's loader and its patched PEFT."""
    import speed_model
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(SAVED), max_seq_length=speed_model.LENGTH, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        target_modules=speed_model.TARGETS,
        use_gradient_checkpointing="unsloth" if checkpointing else False,
        random_state=0,
    )
    speed_model.fill_pairs(model)
    return model


def measure_stage(arm: str, options, report) -> None:
    """Measure the pipeline's train stage on the saved model: loading, planning and training as in any run.

    The speed is the median that train.json has, of single steps; model and data come from files, the batch from trials.
    """
    import pyarrow as pa
    import speed_model

    from adder.core.files import read_json, write_json, write_table
    from adder.core.progress import Progress
    from adder.core.stage_spec import Context, Runtime
    from adder.training import run
    from adder.training.records import TrainInputs
    from adder.training.stage import TrainSettings

    ((micro, _),) = ARMS[arm]
    gpus = 2 if arm == "adder_stage_2gpus" else 1
    packs = speed_model.full_packs("short_chat", (WARM_UP + STEPS + 2) * micro * gpus)
    vocabulary, folder = options.shape["vocab_size"], Path(tempfile.mkdtemp())
    inputs = {name: folder / name for name in ("model", "tokenize", "lengths")}
    for path in inputs.values():
        path.mkdir()
    (inputs["model"] / "model").symlink_to(SAVED)
    write_json(inputs["model"] / "source.json", {"source": "random", "revision": None})
    speed_model.tokenizer_of(vocabulary).save_pretrained(inputs["tokenize"] / "tokenizer")
    rows, numbers, lengths = [], [], []
    for pack in packs:
        numbers.append(list(range(len(rows), len(rows) + len(pack))))
        lengths.append(pack)
        for n in pack:
            ids = speed_model.random_tokens(n, vocabulary, len(rows)).tolist()
            rows.append(ids)
    speed_model.write_tokens(inputs["tokenize"] / "train.arrow", rows)
    speed_model.write_tokens(inputs["tokenize"] / "heldout.arrow", rows[:2])
    table = {"rows": numbers, "starts": [[0] * len(pack) for pack in packs], "seq_lengths": lengths}
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in table])
    write_table(inputs["lengths"] / "packs.parquet", pa.table(table, schema=schema))
    examples = sum(map(len, packs)) / len(packs) * micro * gpus
    settings = TrainSettings(
        epochs=1,
        effective_batch_size=round(examples),
        lora_dropout=0.0,
        eval_samples=0,
        samples=0,
        frozen_products="fp8" if arm == "adder_stage_fp8" else "bf16",
        reshuffle=False,
    )
    out = folder / "out"
    out.mkdir()
    reset_peak()
    runtime = Runtime(checkpoints=0, gpus=gpus, report_to=[])
    run.run(settings, TrainInputs(**inputs), out, Context(Progress.silent(), runtime, out))
    summary, plan = read_json(out / "train.json"), read_json(out / "plan.json")
    row = {
        "real_tokens_per_second": summary["tokens_per_second"],
        "peak_memory_bytes": summary["peak_gpu_memory_bytes"] if gpus > 1 else peak(),
        "gpus": gpus,
        "final_loss": round(summary["final_loss"], 4),
        "plan": {name: choice["value"] for name, choice in plan.items()},
    }
    report("short_chat", plan["micro_batch_size"]["value"], plan["gradient_checkpointing"]["value"], row)


def write_profile(step, batch: dict, path: Path) -> None:
    """Write where the GPU's time goes in one step, by kernel."""
    import torch
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step(batch)
        torch.cuda.synchronize()
    path.write_text(profiler.key_averages().table("cuda_time_total", row_limit=60, max_name_column_width=110))


def product_rate(size: int = 8192) -> dict:
    """FLOP/s of a bf16 product of size × size × size on random numbers, the mean of 20 after 5; the card's name."""
    import torch

    if not torch.cuda.is_available():
        size, name = 256, "CPU"
        a, b = torch.randn(size, size), torch.randn(size, size)
        synchronize = time.perf_counter
    else:
        name, synchronize = torch.cuda.get_device_name(), torch.cuda.synchronize
        a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    synchronize()
    return {"flop_per_second": 20 * 2 * size**3 / (time.perf_counter() - start), "gpu": name}


def run_arm(options) -> None:
    """The child process: measure one arm, writing the rows that there are after each of them."""
    import speed_model
    import torch

    if options.run == "product_rate":
        options.out.write_text(json.dumps(product_rate()))
        return
    if options.run == "save_model":
        speed_model.save(options.shape, options.layers, SAVED)
        options.out.write_text("[]")
        return
    if options.run not in BROAD:
        options.workloads = options.workloads[:1]
    rows, start = [], time.perf_counter()

    def report(workload: str, micro: int, checkpointing, found: dict) -> None:
        """Take a row, and write all that there are."""
        head = {"workload": workload, "name": options.run, "micro_batch": micro, "checkpointing": checkpointing}
        rows.append(head | found)
        options.out.write_text(json.dumps(rows))
        print(f"{time.perf_counter() - start:5.1f} s {json.dumps(rows[-1])}", flush=True)

    if options.run.endswith("_24gb"):
        torch.cuda.set_per_process_memory_fraction(CAP / torch.cuda.get_device_properties(0).total_memory)
    if options.run in BY_TRL:
        measure_trainer(options.run, options, report)
    elif options.run.startswith("adder_stage"):
        measure_stage(options.run, options, report)
    else:
        measure_loop(options.run, options, report)


def child(name: str, options, limit: float, gpu: str | None = None) -> tuple[list | dict | None, str | None]:
    """Run one arm in a process of its own, on one GPU if named; what it wrote, and why it is not all, if it isn't."""
    part, log = (options.out.with_suffix(f".{name}.{end}") for end in ("part", "log"))
    part.unlink(missing_ok=True)
    arguments = ["--run", name, "--out", part, "--layers", options.layers, "--workloads", *options.workloads]
    arguments += ["--profile", options.profile] if options.profile else []
    arguments += ["--tiny"] if options.tiny else []
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    if site := site_of(name):
        environment |= {"PYTHONPATH": os.environ[site], "UNSLOTH_DISABLE_STATISTICS": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    problem = None
    with log.open("w") as output:
        try:
            done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=limit)
            if done.returncode:
                problem = f"ended with {done.returncode}: {last_line(log)}"
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit:.0f} s"
    print("".join(line for line in log.read_text().splitlines(True) if "real_tokens_per_second" in line), end="")
    result = json.loads(part.read_text()) if part.exists() else None
    part.unlink(missing_ok=True)
    if problem:
        print(f"{name} {problem}", flush=True)
    else:
        log.unlink()
    return result, problem


def site_of(arm: str) -> str | None:
    """The variable that names the folder with the arm's own libraries, if it has some."""
    return SITES.get(arm.partition("_")[0])


def last_line(log: Path) -> str:
    """What a process said last, which for a Python error is the error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing was said"


def compare(options) -> dict:
    """Run every arm and put their figures together; what fails or is left out is said beside them."""
    import speed_model

    begun = time.monotonic()
    rate, problem = child("product_rate", options, ARM_SECONDS)
    if rate is None:
        raise SystemExit(f"the product's rate can't be measured: {problem}")
    earlier = json.loads(options.out.read_text()) if options.add and options.out.exists() else {}
    # It differs by a per cent or two from call to call; all arms are held against the fastest that was seen.
    flop_per_second = max(rate["flop_per_second"], earlier.get("product_flop_per_second", 0))
    floor = flop_per_second / speed_model.flop_per_token(options.shape, options.layers)
    workloads = earlier.get("workloads", {})
    for name in options.workloads:
        known = workloads.get(name, {"arms": []})["arms"]
        kept = [row for row in known if row["name"] not in options.arms]
        workloads[name] = {"mean_length": speed_model.MEANS[name], "arms": kept}
    left_out = {arm: why for arm, why in earlier.get("left_out", {}).items() if arm not in options.arms}
    result = {
        "hardware": {"gpu": rate["gpu"]},
        "versions": {name: version(name) for name in PACKAGES},
        "model": {**options.shape, "num_hidden_layers": options.layers},
        "product_flop_per_second": flop_per_second,
        "floor_tokens_per_second": round(floor, 1),
        "workloads": workloads,
        "left_out": left_out,
    }
    absent = {arm: site for arm in options.arms if (site := site_of(arm)) and site not in os.environ}
    left_out |= {arm: f"{site} names no folder that it is installed in" for arm, site in absent.items()}
    arms = [arm for arm in options.arms if arm not in absent]
    shutil.rmtree(SAVED, ignore_errors=True)  # it may be of another shape
    if any(arm.startswith(("unsloth", "adder_stage")) for arm in arms):
        child("save_model", options, ARM_SECONDS)
    gpus = speed_model.visible_gpus() if options.side_by_side else []
    free = queue.SimpleQueue()
    for gpu in gpus or [None]:
        free.put(gpu)

    def measured(arm: str) -> tuple[str, list, str | None]:
        """Rows of an arm, on a GPU that is free; and why they are not all, if they aren't."""
        left = options.seconds - (time.monotonic() - begun)
        if left < 20:
            return arm, [], f"the {options.seconds} s for all arms were over"
        gpu = free.get()
        try:
            rows, problem = child(arm, options, min(left, limit_of(arm)), gpu)
        finally:
            free.put(gpu)
        return arm, rows or [], problem

    def write() -> None:
        """All that is known so far."""
        for found in workloads.values():
            put_in_order(found["arms"], floor)
        options.out.write_text(json.dumps(result, indent=2) + "\n")

    write()
    with ThreadPoolExecutor(free.qsize()) as pool:
        for future in as_completed([pool.submit(measured, arm) for arm in arms]):
            arm, rows, problem = future.result()
            for row in rows:
                workloads[row.pop("workload")]["arms"].append(row)
            if problem:
                left_out[arm] = problem
            write()
    shutil.rmtree(SAVED, ignore_errors=True)
    return result


def limit_of(arm: str) -> float:
    """Seconds that an arm may take."""
    return UNSLOTH_SECONDS if arm.startswith("unsloth") else ARM_SECONDS


def put_in_order(rows: list[dict], floor: float) -> None:
    """Sort a workload's rows as the arms are, and give each its share of the floor, which may have risen since."""
    rows.sort(key=lambda row: list(ARMS).index(row["name"]))
    for row in rows:
        if "real_tokens_per_second" in row:
            row["share_of_floor"] = round(row["real_tokens_per_second"] / floor / row.get("gpus", 1), 4)


def version(name: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def table(result: dict) -> str:
    """The result as text."""
    lines = [f"{result['hardware']['gpu']}, floor {result['floor_tokens_per_second']:,.0f} tokens/s"]
    for workload, found in result["workloads"].items():
        lines.append(f"{workload} (mean {found['mean_length']} tokens)")
        for row in found["arms"]:
            how = f"  {row['name']:32} {row['micro_batch']:3} {'checkpointed' if row['checkpointing'] else '':13}"
            if "out_of_memory" in row:
                lines.append(f"{how} out of memory")
                continue
            lines.append(
                f"{how} {row['real_tokens_per_second']:10,.0f} tokens/s {row['share_of_floor']:6.1%} "
                f"{row['peak_memory_bytes'] / 2**30:6.1f} GiB  loss {row['final_loss']}"
            )
    lines += [f"left out: {arm}: {why}" for arm, why in result["left_out"].items()]
    return "\n".join(lines)


def main() -> None:
    """Read the command line; measure everything, or one arm as a child of that."""
    import speed_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=speed_model.MEANS, default=["short_chat"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=520, help="for all arms together")
    parser.add_argument("--add", action="store_true", help="to what --out holds already, from the same card")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/train_speed.json")
    parser.add_argument("--side-by-side", action="store_true", help="an arm on each GPU at a time")
    parser.add_argument("--profile", type=Path, help="folder for a profile of each measurement")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a try without a GPU")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.shape = speed_model.TINY if options.tiny else speed_model.LLAMA_8B
    if options.run:
        run_arm(options)
    else:
        print(table(compare(options)))


if __name__ == "__main__":
    main()
