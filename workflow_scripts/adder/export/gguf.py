"""The merged model as one GGUF file, which llama.cpp, Ollama and LM Studio run.

Names, shapes and keys are those that llama.cpp reads (the `gguf` package has them; ggml's docs/gguf.md describes them).
One tensor at a time is in memory, and the finished file is read back: every tensor in it must be the model's own within
its type's rounding.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from adder.core.errors import UserError
from adder.core.files import read_json, sha256_file, write_json
from adder.core.progress import Progress
from adder.core.stage_spec import Context
from adder.export.gguf_architectures import Architecture, refuse_unsupported, refused, rope_settings
from adder.export.stage import GgufSettings

if TYPE_CHECKING:
    import gguf
    import numpy as np
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from adder.export.gguf_vocabulary import Vocabulary

# What a checkpoint may hold that the model doesn't use.
UNUSED_TENSORS = re.compile(r".*rotary_emb\.inv_freq")
# Of models that also see, the tensors that don't read text, and what stands before the names of those that do.
SIGHT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
TEXT_PREFIX = re.compile(r"(language_model\.model|model\.language_model)\.")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
BLOCK = 32  # values that share a scale in Q8_0
CHECKED_ROWS = 4096  # of a matrix, that are compared at a time
HALF_LARGEST = 65_504.0  # the largest number in 16-bit floating point


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: its name there, what it is made of, its shape and type.

    sources: file and name of each of the model's tensors in it: of one, or of all experts of a layer. heads: of a query
    or key projection whose rows are reordered. offset: is added.
    """

    name: str
    sources: tuple[tuple[Path, str], ...]
    shape: tuple[int, ...]
    type: str
    heads: int | None = None
    offset: float = 0.0

    @property
    def source(self) -> str:
        """The model's tensor, or the first of several."""
        return self.sources[0][1]


@dataclass(frozen=True)
class GgufInputs:
    """The folders that are read: `merge` has `model/`."""

    merge: Path


class TokenizerFacts(TypedDict):
    """The tokenizer in llama.cpp's terms: its kind, its pre-tokenizer, its size."""

    model: str
    pre: str
    tokens: int


class GgufFacts(TypedDict):
    """`gguf.json`: what the file is.

    largest_error: of any value, as a share of what its type's rounding may do. notes: what llama.cpp does otherwise.
    """

    type: str
    architecture: str
    tensors: int
    bytes: int
    sha256: str
    context_length: int
    tokenizer: TokenizerFacts
    largest_error: float
    notes: list[str]


def run(settings: GgufSettings, inputs: GgufInputs, out: Path, context: Context) -> GgufFacts:
    """Write `model.gguf` and `gguf.json` into `out`; return what gguf.json says.

    Raises UserError, before anything is written, for a model that llama.cpp's format has no words for, and where the
    file that was written isn't the model.
    """
    import gguf
    from transformers import AutoConfig, AutoTokenizer

    from adder.export.gguf_vocabulary import describe

    model, path = inputs.merge / "model", out / "model.gguf"
    config = AutoConfig.from_pretrained(model, local_files_only=True)
    architecture = refuse_unsupported(config.to_dict())
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    rows = config.get_text_config().vocab_size
    vocabulary = describe(json.loads(tokenizer.backend_tokenizer.to_str()), rows)
    config = config.get_text_config()
    tensors, sees = list_tensors(model, config, architecture, settings.type)
    writer = gguf.GGUFWriter(path, architecture.name)
    add_config(writer, config, architecture, settings.type)
    add_tokenizer(writer, tokenizer, vocabulary, model)
    write(writer, tensors, rope_factors(config), context.progress)
    facts: GgufFacts = {
        "type": settings.type,
        "architecture": architecture.name,
        "tensors": len(tensors),
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
        "context_length": context_in_llama_cpp(config, architecture),
        "tokenizer": {"model": vocabulary.model, "pre": vocabulary.pre, "tokens": len(vocabulary.tokens)},
        "largest_error": check(path, tensors, context.progress),
        "notes": [*vocabulary.notes, *_notes(config, architecture, sees)],
    }
    write_json(out / "gguf.json", facts)
    return facts


def list_tensors(
    model: Path, config: "PretrainedConfig", architecture: Architecture, wanted: str
) -> tuple[list[Tensor], bool]:
    """Every tensor of the file, from the headers of the safetensors alone, and whether others, for sight, are left out.

    Raises UserError for unknown ones.
    """
    import gguf

    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    known = {gguf.TENSOR_NAMES[kind].replace("{bid}", "#") for kind in gguf.MODEL_TENSORS[arch]}
    router, shared_router = (
        gguf.TENSOR_NAMES[kind].replace("{bid}", "#")
        for kind in (gguf.MODEL_TENSOR.FFN_GATE_INP, gguf.MODEL_TENSOR.FFN_GATE_INP_SHEXP)
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found = []
    stored, sees = _stored(model, bool(config.tie_word_embeddings))
    for source, parts in stored.items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        kind = re.sub(r"\d+", "#", name.rpartition(".")[0]) if name else ""
        if name is None or kind not in known:
            raise refused(f"llama.cpp's {architecture.name} has no tensor for {source}")
        if architecture.name in ("qwen3", "qwen3moe") and name.endswith(".bias"):
            raise refused(f"llama.cpp's {architecture.name} has no bias, as {source} is")
        shapes = {shape for _, _, shape in parts}
        shape = next(iter(shapes)) if len(parts) == 1 and ".experts." not in source else (len(parts), *shapes.pop())
        part = name.split(".")[-2] if architecture.reorders_heads else ""
        if kind == shared_router:
            shape = shape[-1:]
        own = "F32" if kind == router else _type(shape, wanted)  # what routes tokens stays exact
        offset = architecture.norm_offset if name.endswith("norm.weight") else 0.0
        sources = tuple((file, name) for file, name, _ in parts)
        found.append(Tensor(name, sources, shape, own, heads.get(part), offset))
    return found, sees


def _stored(model: Path, tied: bool) -> tuple[dict[str, list[tuple[Path, str, tuple[int, ...]]]], bool]:
    """The model's tensors by the name that a text model has for them: (file, name there, shape) of each.

    That is one, or, under the name of all, one an expert in their order. Also whether there are others, for sight.
    """
    from safetensors import safe_open

    found: dict[str, dict[int, tuple[Path, str, tuple[int, ...]]]] = {}
    sees = False
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in sorted(stored.keys()):
                if SIGHT.fullmatch(name):
                    sees = True
                    continue
                source = TEXT_PREFIX.sub("model.", name).removeprefix("language_model.")
                if UNUSED_TENSORS.fullmatch(source) or (tied and source == "lm_head.weight"):
                    continue
                expert = EXPERT.fullmatch(source)
                number = int(expert[2]) if expert else 0
                joined = f"{expert[1]}.{expert[3]}" if expert else source
                found.setdefault(joined, {})[number] = (file, name, tuple(stored.get_slice(name).get_shape()))
    return {name: [parts[number] for number in sorted(parts)] for name, parts in found.items()}, sees


def add_config(writer: "gguf.GGUFWriter", config: "PretrainedConfig", architecture: Architecture, wanted: str) -> None:
    """Add the model's sizes and its position embedding to the file's head."""
    import gguf

    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if wanted == "f32" else f"MOSTLY_{wanted.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_in_llama_cpp(config, architecture))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    rope = rope_settings(config.to_dict())
    writer.add_rope_dimension_count(int(_head_dim(config) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    _add_own_config(writer, config, architecture)


def _add_own_config(writer: "gguf.GGUFWriter", config: "PretrainedConfig", architecture: Architecture) -> None:
    """Add what only some architectures have."""
    if architecture.windows:
        writer.add_sliding_window(config.sliding_window)
    if architecture.name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture.name in ("qwen2moe", "qwen3moe"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if architecture.name == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if architecture.name == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def add_tokenizer(
    writer: "gguf.GGUFWriter", tokenizer: "PreTrainedTokenizerBase", vocabulary: "Vocabulary", model: Path
) -> None:
    """Add pieces, special ids and the chat template to the file's head.

    The reply ends at the tokenizer's end token or at the end of turn that the model was trained on, the first in
    generation_config.json.
    """
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    ends = read_json(model / "generation_config.json")["eos_token_id"]
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    ids["eot"] = ends if isinstance(ends, int) else ends[0]
    for name, index in ids.items():
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    begins, ends = _added_around(tokenizer)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(ends)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.get_chat_template())


def write(writer: "gguf.GGUFWriter", tensors: list[Tensor], factors: "np.ndarray | None", progress: Progress) -> None:
    """Write head and tensors. Raises UserError where a value is too large for f16."""
    import gguf
    import numpy as np

    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.type]
        # Shapes in bytes are what the writer takes for types that NumPy hasn't, and for the others alike.
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        writer.add_tensor_info(tensor.name, shape, np.dtype("uint8"), math.prod(shape), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for number, (tensor, values) in enumerate(_values(tensors), 1):
        progress.line(f"writing tensor {number} of {len(tensors)}")
        if tensor.type == "F16" and (largest := max(values.max(), -values.min())) > HALF_LARGEST:
            raise UserError(
                f"export.gguf: {tensor.source} has a value of {largest:,.0f}, above the largest of f16 "
                f"({HALF_LARGEST:,.0f}); can be: bf16, f32"
            )
        writer.write_tensor_data(gguf.quants.quantize(values, gguf.GGMLQuantizationType[tensor.type]))
    writer.close()


def check(path: Path, tensors: list[Tensor], progress: Progress) -> float:
    """Read the file back; return the largest error of any value as a share of what its rounding may do.

    Raises UserError where a tensor is missing, or differs by more than its type's rounding.
    """
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    largest = 0.0
    for number, (tensor, values) in enumerate(_values(tensors), 1):
        progress.line(f"checking tensor {number} of {len(tensors)}")
        found = stored.get(tensor.name)
        if found is None or found.tensor_type.name != tensor.type:
            raise UserError(f"{path}: {tensor.name} is missing, or isn't {tensor.type}")
        if tuple(map(int, reversed(found.shape))) != values.shape:  # GGUF counts from the innermost
            raise UserError(f"{path}: {tensor.name} has the shape {found.shape}, {tensor.source} has {values.shape}")
        for start in range(0, len(values), CHECKED_ROWS):
            rows = slice(start, start + CHECKED_ROWS)
            read = gguf.quants.dequantize(found.data[rows], found.tensor_type)
            share = _share_of_limit(abs(read - values[rows]), values[rows], tensor.type)
            if not share <= 1:
                raise UserError(f"{path}: {tensor.name} isn't {tensor.source} within the rounding of {tensor.type}")
            largest = max(largest, share)
    return largest


def rope_factors(config: "PretrainedConfig") -> "np.ndarray | None":
    """What llama.cpp divides each frequency of the position embedding by (float32, half a head), for Llama 3's scaling.

    The scaled frequencies are those that transformers computes with.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if rope_settings(config.to_dict())["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    steps = torch.arange(0, _head_dim(config), 2, dtype=torch.float32) / _head_dim(config)
    return (config.rope_parameters["rope_theta"] ** -steps / scaled).float().numpy()


def context_in_llama_cpp(config: "PretrainedConfig", architecture: Architecture) -> int:
    """Longest text in tokens: at most a sliding window, where llama.cpp hasn't that."""
    window = None if architecture.windows else getattr(config, "sliding_window", None)
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def _notes(config: "PretrainedConfig", architecture: Architecture, sees: bool) -> list[str]:
    window = context_in_llama_cpp(config, architecture)
    notes = ["without what the model sees by: llama.cpp has that in a file of its own"] if sees else []
    if window != config.max_position_embeddings:
        notes.append(f"cut to {window:,} tokens, the model's sliding window, which llama.cpp doesn't have for it")
    return notes


def _values(tensors: list[Tensor]) -> Iterator[tuple[Tensor, "np.ndarray"]]:
    """Each tensor with the model's values for it (float32), in llama.cpp's order of rows."""
    import torch
    from safetensors import safe_open

    opened: dict[Path, Any] = {}
    for tensor in tensors:
        for file, _ in tensor.sources:
            if file not in opened:
                opened[file] = safe_open(file, "pt")
        parts = [opened[file].get_tensor(name).float() for file, name in tensor.sources]
        values = (parts[0] if len(parts) == 1 else torch.stack(parts)).reshape(tensor.shape)
        if tensor.heads:
            halves = values.reshape(tensor.heads, 2, -1, *values.shape[1:])
            values = halves.transpose(1, 2).reshape(values.shape)
        yield tensor, (values + tensor.offset if tensor.offset else values).contiguous().numpy()


def _type(shape: tuple[int, ...], wanted: str) -> str:
    """Matrices in the wanted type, vectors (norms, biases) in f32, as llama.cpp wants them."""
    if len(shape) == 1:
        return "F32"
    return "F16" if wanted == "q8_0" and shape[-1] % BLOCK else wanted.upper()


def _share_of_limit(error: "np.ndarray", values: "np.ndarray", kind: str) -> float:
    """Largest error as a share of what rounding may do.

    That is half a unit in the last place of f16 (11 bits) and bf16 (8 bits). In Q8_0 it is half a step, which is a
    127th of the block's largest value, and 127 times the rounding of that step to f16.
    """
    import numpy as np

    if kind == "F32":
        return 0.0 if not error.any() else math.inf
    if kind == "Q8_0":
        step = abs(values.reshape(-1, BLOCK)).max(axis=1, keepdims=True) / 127
        limit = step / 2 + 127 * (step * 2.0**-11 + 2.0**-25)
        error = error.reshape(-1, BLOCK)
    else:
        limit = abs(values) * 2.0**-11 + 2.0**-25 if kind == "F16" else abs(values) * 2.0**-8 + 2.0**-134
    share = float((error / limit).max())
    return share if np.isfinite(share) else math.inf


def _added_around(tokenizer: "PreTrainedTokenizerBase") -> tuple[bool, bool]:
    """Whether the tokenizer itself puts its first token before a text, and its end token behind it."""
    plain, full = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    for begins in (False, True):
        for ends in (False, True):
            if full == [tokenizer.bos_token_id] * begins + plain + [tokenizer.eos_token_id] * ends:
                return begins, ends
    raise refused(f"its tokenizer puts tokens around a text that GGUF has no words for: {full}, not {plain}")


def _head_dim(config: "PretrainedConfig") -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
