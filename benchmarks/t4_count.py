"""What the article's notebook asks of a T4, stage by stage: a count of FLOPs, bytes and launches. No measurement.

    python benchmarks/t4_count.py [--rows 2000] [--tokens 225] [--out benchmarks/results/t4_count.json]

Qwen2.5-1.5B in NF4, LoRA of rank 16 on all projections, 2,000 rows, merged, before and after. Training steps run on
the meta device through transformers' and PEFT's own layers, each example of a pack attended to by itself, as Adder does
it on a card without Adder's matmul kernels: each operator that isn't a view counts as a launch, its inputs and outputs
as bytes, its matmuls' multiplications and additions as FLOPs. NF4 weights are dequantised at each use (three launches:
bitsandbytes' two, and the addition between them). Decoding and merging are counted by formulas (`decoding`, `merging`).

`seconds` of a stage: its FLOPs by the T4's 65 TFLOP/s (fp16, tensor cores), which no program can do without; the bytes
of these operators by its 320 GB/s, which fused kernels would lower; the launches by 5 µs each. The largest of the three
bounds this path from below: real kernels reach neither rate.
"""

import argparse
import json
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
FLOPS, BANDWIDTH, LAUNCH_SECONDS = 65e12, 320e9, 5e-6
NF4_BYTES = 4.127 / 8  # of a value, with double quantisation
LAYERS, HIDDEN, MLP, HEADS, KV_HEADS, HEAD_SIZE, VOCABULARY = 28, 1536, 8960, 12, 2, 128, 151936
RANK, PACK, LABELLED = 16, 2048, 0.5  # half of a row's tokens carry loss
HELD_OUT, NEW_TOKENS, BATCH = 100, 128, 50
LINEAR = LAYERS * (HIDDEN * HEAD_SIZE * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * MLP)
EMBEDDING = VOCABULARY * HIDDEN  # tied: the LM head as well


class Count(TypedDict):
    """What a stage, or a step, does."""

    flops: float
    bytes: float
    launches: float


def add(*counts: Count) -> Count:
    return {
        "flops": sum(count["flops"] for count in counts),
        "bytes": sum(count["bytes"] for count in counts),
        "launches": sum(count["launches"] for count in counts),
    }


def times(count: Count, factor: float) -> Count:
    return {"flops": count["flops"] * factor, "bytes": count["bytes"] * factor, "launches": count["launches"] * factor}


class Operators(TorchDispatchMode):
    """Counts launches and bytes of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.launches = 0.0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        results = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        known = {id(x.untyped_storage()) for x in tensors}
        is_view = not func._schema.is_mutable and all(id(x.untyped_storage()) in known for x in results)
        if results and not is_view and "empty" not in str(func) and "detach" not in str(func):
            self.launches += 1
            self.bytes += sum(x.nbytes for x in (*tensors, *results) if x.device.type == "meta")
        return out


class Attention(torch.autograd.Function):
    """Stands for torch's memory-efficient kernel, example by example: nothing is computed, `count` is added to."""

    count: ClassVar[Count] = {"flops": 0, "bytes": 0, "launches": 0}
    lengths: ClassVar[tuple[int, ...]] = ()

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        Attention.note(query, key, matmuls=2, launches=1)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value = ctx.saved_tensors
        Attention.note(query, key, matmuls=5, launches=2)  # the scores are computed anew
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)

    @staticmethod
    def note(query: torch.Tensor, key: torch.Tensor, matmuls: int, launches: int) -> None:
        heads, size = query.shape[1], query.shape[-1]
        flops = sum(matmuls * heads * size * n * n for n in Attention.lengths)  # causal: half of 2 n²
        sizes = (2 * query.nbytes + 2 * key.nbytes) * (1 if matmuls == 2 else 2)
        more: Count = {"flops": flops, "bytes": sizes, "launches": launches * len(Attention.lengths)}
        Attention.count = add(Attention.count, more)


def by_count(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> tuple[Any, None]:
    """An attention function of transformers."""
    return Attention.apply(query, key, value).transpose(1, 2), None


def training_step(tokens_a_row: int, recompute: bool) -> Count:
    """One pack, forward and backward."""
    from peft import LoraConfig, get_peft_model
    from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

    AttentionInterface.register("counted", by_count)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=True,
        attn_implementation="counted",
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).half()
        lora = LoraConfig(r=RANK, target_modules="q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
        peft_model = get_peft_model(model, lora)
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    if recompute:
        peft_model.gradient_checkpointing_enable({"use_reentrant": False})
        peft_model.enable_input_require_grads()
    peft_model.train()
    rows = PACK // tokens_a_row
    Attention.lengths = (tokens_a_row,) * rows
    Attention.count = {"flops": 0, "bytes": 0, "launches": 0}
    with torch.device("meta"), Operators() as operators, FlopCounterMode(display=False) as flops:
        ids, positions = torch.zeros(1, PACK, dtype=torch.int64), torch.zeros(1, PACK, dtype=torch.int64)
        with torch.autocast("cuda", torch.float16):
            hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        labelled = hidden[0, : int(PACK * LABELLED)]
        logits = model.lm_head(labelled).float()
        torch.nn.functional.cross_entropy(logits, torch.zeros(len(labelled), dtype=torch.int64)).backward()
    uses = 3 if recompute else 2
    linears = 7 * LAYERS
    dequantised: Count = {"flops": 0, "bytes": uses * LINEAR * (NF4_BYTES + 2), "launches": uses * linears * 3}
    counted: Count = {"flops": flops.get_total_flops(), "bytes": operators.bytes, "launches": operators.launches}
    return add(counted, Attention.count, dequantised)


def optimizer_step() -> Count:
    """AdamW on LoRA's fp32 parameters, in few launches (foreach), and the scaler's look at the gradients."""
    trained = LAYERS * RANK * (5 * HIDDEN + HEAD_SIZE * (2 * HEADS + 2 * KV_HEADS) + 3 * MLP + 2 * HIDDEN)
    return {"flops": 0, "bytes": trained * 4 * 9, "launches": 60}


def decoding(replies: int, prompt: int) -> Count:
    """Greedy replies of NEW_TOKENS in batches: prompts, then a step a token, by transformers' layers in fp16."""
    batches = -(-replies // BATCH)
    weights = 2 * (LINEAR + EMBEDDING)
    cache = 2 * 2 * LAYERS * KV_HEADS * HEAD_SIZE * BATCH
    steps: Count = {
        "flops": 2 * (LINEAR + EMBEDDING) * replies * NEW_TOKENS,
        "bytes": batches * sum(weights + cache * (prompt + n) for n in range(NEW_TOKENS)),
        "launches": batches * NEW_TOKENS * LAYERS * 25,
    }
    prompts: Count = {
        "flops": 2 * LINEAR * replies * prompt,
        "bytes": batches * weights,
        "launches": batches * LAYERS * 25,
    }
    return add(steps, prompts)


def held_out_loss(tokens_a_row: int) -> Count:
    """The loss of the held-out rows: one pass forward."""
    tokens = HELD_OUT * tokens_a_row
    passes = -(-tokens // PACK)
    flops = 2 * LINEAR * tokens + 2 * EMBEDDING * tokens * LABELLED
    return {"flops": flops, "bytes": passes * 2 * (LINEAR + EMBEDDING) * 2, "launches": passes * LAYERS * 30}


def merging() -> Count:
    """W + s·B·A by blocks: read, multiplied, written."""
    return {"flops": 2 * LINEAR * RANK, "bytes": 3 * 2 * (LINEAR + EMBEDDING), "launches": 7 * LAYERS * 4}


def shown(count: Count) -> dict[str, Any]:
    """A count, rounded, with the seconds that a T4 needs for it at least."""
    seconds = count["flops"] / FLOPS, count["bytes"] / BANDWIDTH, count["launches"] * LAUNCH_SECONDS
    rounded = {name: float(f"{value:.4g}") for name, value in count.items()}
    return rounded | {"seconds": {name: round(s, 2) for name, s in zip(count, seconds, strict=True)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=225, help="of a row, in the mean")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "t4_count.json")
    options = parser.parse_args()
    packs = -(-options.rows * options.epochs // (PACK // options.tokens))
    evaluation = add(decoding(HELD_OUT, int(options.tokens * (1 - LABELLED))), held_out_loss(options.tokens))
    stages: dict[str, Count] = {"evaluate the base": evaluation}
    for name, recompute in (("train", False), ("train, all layers checkpointed", True)):
        stages[name] = times(add(training_step(options.tokens, recompute), optimizer_step()), packs)
    stages |= {"merge": merging(), "evaluate the merged model": evaluation}
    weights = {"bytes_nf4": int(LINEAR * NF4_BYTES + 2 * EMBEDDING), "bytes_fp16": 2 * (LINEAR + EMBEDDING)}
    result = {
        "what": "a count, not a measurement: nothing here was run on a T4",
        "card": {"flops": FLOPS, "bytes_a_second": BANDWIDTH, "launch_seconds": LAUNCH_SECONDS},
        "rows": options.rows, "tokens_a_row": options.tokens, "epochs": options.epochs, "packs": packs,
        "tokens_a_pack": PACK, "rank": RANK, "labelled_share": LABELLED, "held_out": HELD_OUT,
        "new_tokens": NEW_TOKENS, "decoding_batch": BATCH, "weights": weights,
        "stages": {name: shown(count) for name, count in stages.items()},
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
