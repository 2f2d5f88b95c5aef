"""Made-up work for train_speed.py: example lengths, packs, and a model of Llama-3.1-8B's shape with random weights."""

import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]

LENGTH = 2048
MEANS = {"short_chat": 225, "long_document": 1500, "classification": 60}
LLAMA_8B = {
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
# For a try on a CPU: every arm that needs no kernels runs in seconds.
TINY = LLAMA_8B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def device() -> str:
    """Where the benchmark runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def visible_gpus() -> list[str]:
    """The GPUs that there are for this process, as CUDA_VISIBLE_DEVICES has them; none without CUDA."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def flop_per_token(shape: dict, layers: int) -> float:
    """What the frozen base's matmuls need: forward, and backward to the input, two FLOP a parameter and token each.

    The embedding is looked up, not multiplied; LoRA's matmuls and attention, 2 % here, are left out.
    """
    wide, hidden, size = shape["intermediate_size"], shape["hidden_size"], shape["head_dim"]
    heads = 2 * (shape["num_attention_heads"] + shape["num_key_value_heads"])
    layer = hidden * (heads * size + 3 * wide)
    return 4 * (layers * layer + shape["vocab_size"] * hidden)


def lengths_of(workload: str, tokens: int, seed: int = 0) -> np.ndarray:
    """Log-normal example lengths (sigma 0.9) of the workload's mean, about `tokens` together, 16 to LENGTH each."""
    mean, generator = MEANS[workload], np.random.default_rng(seed)
    count = tokens // mean + 50
    return np.clip(generator.lognormal(math.log(mean) - 0.9**2 / 2, 0.9, count), 16, LENGTH).astype(int)


def full_packs(workload: str, count: int) -> list[list[int]]:
    """`count` packs, each a list of example lengths, at least 97 % full where the workload allows it."""
    from adder.packing.best_fit_decreasing import best_fit_decreasing

    lengths = lengths_of(workload, int(1.3 * count * LENGTH))
    packs = [[int(n) for n in lengths[pack]] for pack in best_fit_decreasing(lengths, LENGTH)]
    packs.sort(key=lambda pack: -sum(pack))
    chosen = packs[:count]
    np.random.default_rng(1).shuffle(chosen)
    return chosen


def random_tokens(count: int, vocabulary: int, seed: int) -> torch.Tensor:
    """Token ids, int64 (count,); the three lowest stay for special tokens."""
    return torch.randint(3, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


def packed_batch(packs: list[list[int]], seed: int, vocabulary: int) -> dict:
    """One row of joined packs, as TRL's padding-free collator makes them; every token carries loss but first ones."""
    lengths = [n for pack in packs for n in pack]
    tokens = random_tokens(sum(lengths), vocabulary, seed)[None].to(device())
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device())
    labels = tokens.clone()
    labels[0, ends[:-1].long()] = -100
    return {
        "input_ids": tokens,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].to(device()),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def padded_batch(lengths: list[int], seed: int, vocabulary: int) -> dict:
    """Rows padded to the longest; padding carries no loss."""
    longest = max(lengths)
    tokens = random_tokens(len(lengths) * longest, vocabulary, seed).view(-1, longest).to(device())
    mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long().to(device())
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def base_model(shape: dict, layers: int, attention: str):
    """A Llama with random weights in NF4 with double quantisation; embeddings and LM head in bf16, not tied.

    The decoder layers are copies of one, which halves the time and changes no speed.
    """
    import bitsandbytes
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, num_hidden_layers=layers, use_cache=False, attn_implementation=attention)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 2
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    torch.manual_seed(0)

    def random(*sizes: int) -> torch.nn.Parameter:
        """A frozen weight."""
        weight = torch.randn(sizes, device=device(), dtype=torch.bfloat16) * 0.02
        return torch.nn.Parameter(weight, requires_grad=False)

    first = model.model.layers[0]
    for name, bare in list(first.named_modules()):
        parent = first.get_submodule(name.rpartition(".")[0])
        if isinstance(bare, torch.nn.Linear):
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
            setattr(parent, name.rpartition(".")[2], linear.to(device()))
        elif type(bare).__name__.endswith("RMSNorm"):
            bare.weight = _ones(shape)
    for number in range(1, layers):
        layer = copy.deepcopy(first)
        layer.self_attn.layer_idx = number
        model.model.layers[number] = layer
    model.model.norm.weight = _ones(shape)
    model.model.embed_tokens.weight = random(shape["vocab_size"], shape["hidden_size"])
    model.lm_head.weight = random(shape["vocab_size"], shape["hidden_size"])
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device())
    return model


def _ones(shape: dict) -> torch.nn.Parameter:
    ones = torch.ones(shape["hidden_size"], device=device(), dtype=torch.bfloat16)
    return torch.nn.Parameter(ones, requires_grad=False)


def lora_config(dropout: float = 0.0):
    """Rank 16 on all seven projections."""
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules=TARGETS, task_type="CAUSAL_LM")


def fill_pairs(model) -> None:
    """The same pairs in every arm, so that losses can be compared."""
    generator = torch.Generator(device()).manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                spread = 0.01 if "lora_B" in name else parameter.shape[1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, device=device(), generator=generator) * spread)


def tokenizer_of(vocabulary: int):
    """A tokenizer with one word a token, for trainers that ask for one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<pad>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.model_max_length = LENGTH
    return fast


def write_tokens(path: Path, examples: list[list[int]]) -> None:
    """Write a token table of examples whose every token carries loss."""
    import pyarrow as pa

    from adder.tokenization.token_table import SCHEMA

    rows = [
        {"id": f"rows:{n}", "input_ids": ids, "labels": ids, "tokens": len(ids), "labelled": len(ids) - 1, "digest": n}
        for n, ids in enumerate(examples)
    ]
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), max_chunksize=5)


def save(shape: dict, layers: int, folder: Path) -> None:
    """Write the model as a quantised checkpoint that transformers and Unsloth load, with its tokenizer."""
    from safetensors.torch import save_file

    model = base_model(shape, layers, "sdpa")
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))
    tokenizer_of(shape["vocab_size"]).save_pretrained(folder)
