"""A .gguf file as a base model: all that the file says is read, or the file is refused.

transformers reads weights and sizes out of it, but leaves out how the position embedding is scaled, biases that the
architecture has by default not, and whatever else its list doesn't have. Here every tensor and every key of the model
is accounted for.
"""

import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adder.core.errors import UserError
from adder.core.progress import Progress
from adder.data.checkpoints.portable_files import make_portable

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PretrainedConfig

# Keys of an architecture (behind "llama."), and the setting of config.json that each is, where transformers leaves it.
SETTINGS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "use_parallel_residual": "use_parallel_residual",
    "rope.freq_base": "rope_theta",
}
# Keys that say what is known otherwise, or nothing of the model.
TOLD_OTHERWISE = ("vocab_size", "attention.value_length", "tensor_data_layout")
# Those that mean nothing where they have this value.
NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "logit_scale": 1.0,
    "attention.scale": 0.0,
    "rope.scaling.type": "none",
    "rope.scaling.finetuned": True,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scaling.factor": 1.0,
    "rope.scale_linear": 1.0,
}
ROTATES_A_PART = ("phi3", "stablelm", "nemotron")  # of each head
SCALINGS = ("none", "linear", "yarn")
FREQUENCY_FACTORS = "rope_freqs.weight"
# Original contexts that a table of Llama 3's frequency factors may come from.
CONTEXTS = tuple(2**power for power in range(4, 21))

Keys = Mapping[str, Any]  # of the architecture, by what stands behind its name


def dequantise(gguf: Path, folder: Path, progress: Progress) -> None:
    """Save a .gguf as bf16 safetensors with tokenizer, chat template and generation config.

    Raises UserError for a file that can't be read, or says of its model what can't be taken over.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    progress.say(f"dequantising {gguf.name}")
    try:
        # transformers draws a bar that can't be turned off and fills a log with hundreds of lines.
        with redirect_stderr(io.StringIO()):
            reader = GGUFReader(gguf)
            _refuse_parts(reader, gguf)
            config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
            _complete(config, reader, gguf)
            # Without dequantize=True the model keeps GGUF's blocks and save_pretrained refuses.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                config=config,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
                local_files_only=True,
                output_loading_info=True,
            )
        model, found = loaded
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model.source: {gguf.name} can't be read: {type(error).__name__}: {error}") from error
    _refuse_unread(model, reader, sorted(found["missing_keys"]), gguf)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit:
        tokenizer.model_max_length = limit  # GGUF's tokenizer metadata carries none
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_portable(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # written by way of a private temporary file


def _refused(gguf: Path, reason: str) -> UserError:
    return UserError(
        f"model.source: {gguf.name} can't be taken over as it is: {reason}. Name the model's repository of safetensors "
        "instead"
    )


def _refuse_parts(reader: "GGUFReader", gguf: Path) -> None:
    field = reader.fields.get("split.count")
    if field is not None and field.contents() > 1:
        raise _refused(gguf, f"it is one of {field.contents()} files that make the model together")


def _complete(config: "PretrainedConfig", reader: "GGUFReader", gguf: Path) -> None:
    """Set what the file says of the model and transformers left out. Raises UserError for what has no place."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    architecture = reader.fields["general.architecture"].contents()
    keys = {
        name.removeprefix(f"{architecture}."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(f"{architecture}.")
    }
    names = {tensor.name for tensor in reader.tensors}
    mapped = GGUF_CONFIG_MAPPING.get(config.model_type.removesuffix("_text"), {})
    read = {name for name, setting in mapped.items() if setting is not None}
    for name, setting in SETTINGS.items():
        if name in keys and name not in read and _set(config, setting, keys[name]):
            read.add(name)
    read |= _set_scaling(config, keys, reader, gguf)
    for layers, flag in ((".attn_", "attention_bias"), (".ffn_", "mlp_bias")):
        if hasattr(config, flag):
            setattr(config, flag, any(layers in name and name.endswith(".bias") for name in names))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if hasattr(config, "query_pre_attn_scalar"):
        # In no key: llama.cpp goes by the number of layers, that of the models of 27 B.
        is_27b = config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}.get(architecture)
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if is_27b else width
    rotated = keys.get("rope.dimension_count", width)
    if config.model_type in ROTATES_A_PART and rotated < width:
        config.rope_parameters["partial_rotary_factor"] = rotated / width
    if rotated == width * _rotated_share(config):
        read.add("rope.dimension_count")
    left = [
        name
        for name, value in keys.items()
        if name not in read and name not in TOLD_OTHERWISE and NEUTRAL.get(name) != value
    ]
    if left:
        raise _refused(gguf, f"it says {architecture}.{left[0]} = {keys[left[0]]}, which isn't read here")


def _set(config: "PretrainedConfig", setting: str, value: Any) -> bool:
    """Give a setting its value where the model has it; return whether it does."""
    if setting == "rope_theta":
        rope = getattr(config, "rope_parameters", None)
        if rope is None or "rope_theta" not in rope:
            return False
        rope["rope_theta"] = value
        return True
    if not hasattr(config, setting):
        # Head sizes that no setting names are worked out.
        return setting == "head_dim" and value == config.hidden_size // config.num_attention_heads
    setattr(config, setting, value)
    return True


def _rotated_share(config: "PretrainedConfig") -> float:
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0


def _set_scaling(config: "PretrainedConfig", keys: Keys, reader: "GGUFReader", gguf: Path) -> set[str]:
    """Set how the position embedding is scaled; return the keys that said so."""
    tables = {tensor.name: tensor for tensor in reader.tensors if tensor.name.startswith("rope_f")}
    kind, factor = keys.get("rope.scaling.type", "none"), keys.get("rope.scaling.factor", 1.0)
    if kind not in SCALINGS or tables.keys() - {FREQUENCY_FACTORS}:
        raise _refused(gguf, f"its position embedding is scaled by {min(tables, default=repr(kind))}")
    scaling: dict[str, Any] = {}
    used: set[str] = set()
    if FREQUENCY_FACTORS in tables:
        scaling = _llama3_scaling(config, tables[FREQUENCY_FACTORS].data, gguf)
    elif "rope.scale_linear" in keys and keys["rope.scale_linear"] != 1.0:
        scaling, used = {"rope_type": "linear", "factor": keys["rope.scale_linear"]}, {"rope.scale_linear"}
    elif kind != "none":
        scaling = {"rope_type": kind, "factor": factor}
        used = {"rope.scaling.type", "rope.scaling.factor"}
    if kind == "linear":
        used.add("rope.scaling.original_context_length")  # nothing that linear scaling needs
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys["rope.scaling.original_context_length"]
        used.add("rope.scaling.original_context_length")
        for name in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{name}" in keys:
                scaling[name] = keys[f"rope.scaling.yarn_{name}"]
                used.add(f"rope.scaling.yarn_{name}")
        if keys.get("rope.scaling.yarn_ext_factor") == 1.0:
            used.add("rope.scaling.yarn_ext_factor")
    if scaling:
        rope = getattr(config, "rope_parameters", None)
        if not rope:
            raise _refused(gguf, f"its position embedding is scaled ({scaling['rope_type']})")
        # Where kinds of layers differ, it is those with full attention.
        rope.get("full_attention", rope).update(scaling)
    return used


def _llama3_scaling(config: "PretrainedConfig", table: Any, gguf: Path) -> dict[str, Any]:
    """The settings of Llama 3's scaling that make this table of frequency factors, which is all that a file has of it.

    Raises UserError where none of the usual ones does.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factors = torch.tensor(table, dtype=torch.float64)
    rope = config.rope_parameters
    width = 2 * len(factors)
    plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    before = dict(rope)
    for context in CONTEXTS:
        scaling = {
            "rope_type": "llama3",
            "factor": round(float(factors.max()), 4),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": context,
        }
        config.rope_parameters = {**before, **scaling}
        scaled: torch.Tensor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].double()
        config.rope_parameters = rope
        if torch.allclose(plain / scaled, factors, rtol=1e-4):
            return scaling
    raise _refused(gguf, f"its table of frequency factors ({FREQUENCY_FACTORS}) is none of Llama 3's kind")


def _refuse_unread(model: Any, reader: "GGUFReader", missing: list[str], gguf: Path) -> None:
    """Refuse a file of whose tensors one has no place in the model, or that lacks one of the model's."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    kind = TENSOR_PROCESSORS.get(reader.fields["general.architecture"].contents(), TensorProcessor)
    places = get_gguf_hf_weights_map(model, kind(config=model.config.to_dict()))
    read = {FREQUENCY_FACTORS, *places}
    # Experts are joined in memory and their names with them.
    left = sorted(t.name for t in reader.tensors if t.name not in read and "_exps" not in t.name)
    if left:
        raise _refused(gguf, f"{type(model).__name__} in transformers has no place for its tensor {left[0]}")
    if missing:
        raise _refused(gguf, f"it has no tensor for {missing[0]}")
