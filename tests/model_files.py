"""Model files of other kinds made from a saved model: GGUF, and a wheel that holds one."""

import json
import zipfile
from pathlib import Path

from safetensors.torch import load_file


def write_gguf(path: Path, model_dir: Path, rope_theta: float = 10_000.0, **metadata) -> Path:
    """The tiny Llama as a GGUF file, by the conversion that llama.cpp does: query and key rows interleaved."""
    import gguf
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        writer.add_string(f"general.{key}", value)
    writer.add_name("A name that is no path")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_token_list(tokens)
    special = set(tokenizer.all_special_tokens) | {"<|endoftext|>"}
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    merges = json.loads((model_dir / "tokenizer.json").read_text())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in load_file(model_dir / "model.safetensors").items():
        name = name.removeprefix("model.")
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            kind = names[rest.removesuffix(".weight")]
            if kind in heads:
                rows, columns = tensor.shape
                halves = tensor.reshape(heads[kind], 2, rows // heads[kind] // 2, columns)
                tensor = halves.swapaxes(1, 2).reshape(rows, columns)
            name = f"blk.{layer}.{kind}.weight"
        else:
            name = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_wheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        wheel.writestr("tiny_wheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        head = "Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\nLicense: Apache-2.0\n"
        # Needs that nobody has: a fetch that looked at them would fail.
        wheel.writestr("tiny_wheel-1.0.dist-info/METADATA", head + "Requires-Dist: no-such-package-anywhere\n")
        wheel.writestr("tiny_wheel-1.0.dist-info/RECORD", "")
    return path
