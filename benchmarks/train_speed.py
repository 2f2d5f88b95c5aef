"""How fast QLoRA training runs on one GPU: the usual ways beside Adder's, on the same made-up data, in one run.

Usage: python benchmarks/train_speed.py [--workloads short_chat] [--arms adder ...] [--layers 32]
                                        [--micro-batches 4 8] [--out benchmarks/results/train_speed.json]

The model has Llama-3.1-8B's shape and random weights, NF4 with double quantisation, LoRA of rank 16 on all seven
projections; the lengths are log-normal, the tokens random, every token carries loss. A step is forward, backward,
clipping and fused AdamW. Speed counts the tokens of real examples, not padding. Each arm runs in a process of its own.

padded_script                   one example a row, padded to the longest, gradient checkpointing, sdpa: most tutorials
transformers_peft_liger_varlen  packs, varlen attention, Liger's layers and loss, no checkpointing: the best by hand
adder                           packs, varlen attention, LoRA folded into the base products, Liger's loss
adder_dropout                   the same with lora_dropout 0.05
adder_workspace                 the same without dropout, NF4 values dequantised anew in each product
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow_scripts"))

LENGTH = 2048
MEANS = {"short_chat": 225, "long_document": 1500, "classification": 60}
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel")
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
ARMS = ("padded_script", "transformers_peft_liger_varlen", "adder", "adder_dropout", "adder_workspace")
WARM_UP, STEPS = 2, 4


def flop_per_token(layers: int) -> float:
    """What the products need at least: forward, and backward to the input, two FLOP a parameter and token each."""
    wide, hidden, size = SHAPE["intermediate_size"], SHAPE["hidden_size"], SHAPE["head_dim"]
    heads = 2 * (SHAPE["num_attention_heads"] + SHAPE["num_key_value_heads"])
    layer = hidden * (heads * size + 3 * wide)
    return 4 * (layers * layer + 2 * SHAPE["vocab_size"] * hidden)


def lengths_of(workload: str, tokens: int, seed: int = 0) -> np.ndarray:
    """Log-normal example lengths (sigma 0.9) of the workload's mean, about `tokens` together, 16 to LENGTH each."""
    mean, generator = MEANS[workload], np.random.default_rng(seed)
    count = tokens // mean + 50
    return np.clip(generator.lognormal(math.log(mean) - 0.9**2 / 2, 0.9, count), 16, LENGTH).astype(int)


def full_packs(workload: str, count: int) -> list[list[int]]:
    """`count` packs, each a list of example lengths, at least 97 % full where the workload allows it."""
    from adder.packing import best_fit_decreasing

    lengths = lengths_of(workload, int(1.3 * count * LENGTH))
    packs = [[int(n) for n in lengths[pack]] for pack in best_fit_decreasing(lengths, LENGTH)]
    packs.sort(key=lambda pack: -sum(pack))
    chosen = packs[:count]
    np.random.default_rng(1).shuffle(chosen)
    return chosen


def packed_batch(packs: list[list[int]], seed: int) -> dict:
    """One row of joined packs, as TRL's padding-free collator makes them."""
    import torch

    lengths = [n for pack in packs for n in pack]
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, sum(lengths)), generator=generator).cuda()
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda()
    target = torch.roll(tokens[0], -1)
    target[ends[1:].long() - 1] = -100
    return {
        "input_ids": tokens,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].cuda(),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "target": target,
        "real": sum(lengths),
    }


def padded_batch(lengths: list[int], seed: int) -> dict:
    """Rows padded to the longest; padding carries no loss."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, SHAPE["vocab_size"], (len(lengths), max(lengths)), generator=generator).cuda()
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long().cuda()
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": tokens.masked_fill(mask == 0, -100),
        "real": sum(lengths),
    }


def build(arm: str, layers: int):
    """The arm's model: random weights quantised on the GPU, with its adapter, ready to train."""
    import bitsandbytes
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from adder import attention

    if arm == "transformers_peft_liger_varlen":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(
            rope=True, swiglu=True, rms_norm=True, cross_entropy=False, fused_linear_cross_entropy=False
        )
    kernel = "sdpa" if arm == "padded_script" else attention.implementation("cuda", "bfloat16")
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, use_cache=False, attn_implementation=kernel)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    torch.manual_seed(0)

    def random(*shape: int) -> torch.nn.Parameter:
        weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02
        return torch.nn.Parameter(weight, requires_grad=False)

    names = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    for name in names:
        bare = model.get_submodule(name)
        linear = bitsandbytes.nn.Linear4bit(
            bare.in_features,
            bare.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            compress_statistics=True,
            device="meta",
        )
        values = random(bare.out_features, bare.in_features).data
        linear.weight = bitsandbytes.nn.Params4bit(
            values, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear.cuda())
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            ones = torch.ones(SHAPE["hidden_size"], device="cuda", dtype=torch.bfloat16)
            module.weight = torch.nn.Parameter(ones, requires_grad=False)
    model.model.embed_tokens.weight = random(SHAPE["vocab_size"], SHAPE["hidden_size"])
    model.lm_head.weight = random(SHAPE["vocab_size"], SHAPE["hidden_size"])
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).cuda()
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05 if arm == "adder_dropout" else 0.0,
        target_modules=sorted({name.rpartition(".")[2] for name in names}),
        task_type="CAUSAL_LM",
    )
    # The best that can be had by hand keeps the pairs in bf16: in fp32 each product would be cast.
    by_hand = arm == "transformers_peft_liger_varlen"
    model = get_peft_model(model, lora, autocast_adapter_dtype=not by_hand)
    with torch.no_grad():  # the same pairs in every arm, so that losses can be compared
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                spread = 0.01 if "lora_B" in name else parameter.shape[1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, device="cuda") * spread)
    if arm == "padded_script":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if arm.startswith("adder"):
        from adder import folded_lora

        print(folded_lora.attach(model, hold=arm != "adder_workspace"), flush=True)
    return model.train()


def trainer(model, arm: str):
    """The function of one training step: batch to loss."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    if arm == "padded_script":

        def loss_of(batch: dict) -> torch.Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                return model(**{k: v for k, v in batch.items() if k != "real"}).loss
    else:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused, bare = LigerFusedLinearCrossEntropyLoss(ignore_index=-100), model.get_base_model()

        def loss_of(batch: dict) -> torch.Tensor:
            inputs = {k: v for k, v in batch.items() if k not in {"real", "target"}}
            hidden = bare.model(**inputs, use_cache=False).last_hidden_state[0]
            return fused(bare.lm_head.weight, hidden, batch["target"])

    def step(batch: dict) -> torch.Tensor:
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def batches_of(arm: str, workload: str, micro: int) -> list[dict]:
    """Three batches, always the same ones."""
    if arm == "padded_script":
        lengths = lengths_of(workload, 12 * MEANS[workload])
        return [padded_batch([int(n) for n in lengths[i * micro : (i + 1) * micro]], i) for i in range(3)]
    packs = full_packs(workload, 3 * micro)
    return [packed_batch(packs[i * micro : (i + 1) * micro], i) for i in range(3)]


def measure(arm: str, workloads: list[str], micro_batches: list[int], layers: int, profile: Path | None) -> list[dict]:
    """Real tokens a second, peak memory and last loss for each workload and micro-batch that fits."""
    import torch

    start = time.perf_counter()
    model = build(arm, layers)
    step = trainer(model, arm)
    torch.cuda.empty_cache()
    print(f"{arm}: built in {time.perf_counter() - start:.0f} s", flush=True)
    rows = []
    for workload in workloads:
        for micro in micro_batches:
            torch.cuda.reset_peak_memory_stats()
            try:
                batches = batches_of(arm, workload, micro)
                for i in range(WARM_UP):
                    step(batches[i % 3])
                torch.cuda.synchronize()
                start = time.perf_counter()
                for i in range(STEPS):
                    loss = step(batches[i % 3])
                torch.cuda.synchronize()
                seconds = time.perf_counter() - start
            except torch.OutOfMemoryError:
                rows.append({"workload": workload, "name": arm, "micro_batch": micro, "out_of_memory": True})
                model.zero_grad()
            else:
                real = sum(batches[i % 3]["real"] for i in range(STEPS))
                rows.append(
                    {
                        "workload": workload,
                        "name": arm,
                        "micro_batch": micro,
                        "real_tokens_per_second": round(real / seconds, 1),
                        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
                        "final_loss": round(loss.item(), 4),
                    }
                )
                if profile:
                    write_profile(step, batches[0], profile / f"profile_{arm}_{workload}_{micro}.txt")
            batches = loss = None
            torch.cuda.empty_cache()
            print(json.dumps(rows[-1]), flush=True)
    return rows


def write_profile(step, batch: dict, path: Path) -> None:
    """Write where the GPU's time goes in one step, by kernel."""
    import torch
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step(batch)
        torch.cuda.synchronize()
    path.write_text(profiler.key_averages().table("cuda_time_total", row_limit=60, max_name_column_width=110))


def product_rate() -> float:
    """FLOP/s of a bf16 product of 8,192 × 8,192 × 8,192 on random numbers, the mean of 20 after 5."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - start)


def run_arm(options) -> None:
    """The child process: measure the product's rate or one arm, and write JSON."""
    import torch

    if options.run == "product_rate":
        result = {"flop_per_second": product_rate(), "gpu": torch.cuda.get_device_name()}
    else:
        micros = [4] if options.run == "padded_script" else options.micro_batches
        result = measure(options.run, options.workloads, micros, options.layers, options.profile)
    options.out.write_text(json.dumps(result))


def compare(options) -> dict:
    """Run every arm in a process of its own, and put their figures together."""

    def child(name: str):
        part = options.out.with_suffix(f".{name}.part")
        arguments = ["--run", name, "--out", part, "--layers", options.layers, "--workloads", *options.workloads]
        arguments += ["--micro-batches", *options.micro_batches]
        arguments += ["--profile", options.profile] if options.profile else []
        environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        done = subprocess.run([sys.executable, __file__, *map(str, arguments)], env=environment)
        if done.returncode:
            print(f"{name} failed", flush=True)
            return None
        result = json.loads(part.read_text())
        part.unlink()
        return result

    rate = child("product_rate")
    floor = rate["flop_per_second"] / flop_per_token(options.layers)
    result = {
        "hardware": {"gpu": rate["gpu"]},
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "model": {**SHAPE, "num_hidden_layers": options.layers},
        "product_flop_per_second": rate["flop_per_second"],
        "floor_tokens_per_second": round(floor, 1),
        "workloads": {name: {"mean_length": MEANS[name], "arms": []} for name in options.workloads},
    }
    for arm in options.arms:
        for row in child(arm) or []:
            if "real_tokens_per_second" in row:
                row["share_of_floor"] = round(row["real_tokens_per_second"] / floor, 4)
            result["workloads"][row.pop("workload")]["arms"].append(row)
            options.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


def table(result: dict) -> str:
    """The result as text."""
    lines = [f"{result['hardware']['gpu']}, floor {result['floor_tokens_per_second']:,.0f} tokens/s"]
    for workload, found in result["workloads"].items():
        lines.append(f"{workload} (mean {found['mean_length']} tokens)")
        for row in found["arms"]:
            if "out_of_memory" in row:
                lines.append(f"  {row['name']:32} {row['micro_batch']:3}  out of memory")
                continue
            lines.append(
                f"  {row['name']:32} {row['micro_batch']:3} {row['real_tokens_per_second']:10,.0f} tokens/s "
                f"{row['share_of_floor']:6.1%} {row['peak_memory_bytes'] / 2**30:6.1f} GiB  loss {row['final_loss']}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=MEANS, default=["short_chat"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/train_speed.json")
    parser.add_argument("--profile", type=Path, help="folder for a profile of each measurement")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_arm(options)
    else:
        print(table(compare(options)))


if __name__ == "__main__":
    main()
