"""Config and tokenizer files as both generations of transformers, 4 and 5, and what is built on them, read them.

What transformers 5 writes by itself is for 5: transformers 4 doesn't know the tokenizer class it names, stops at a list
of extra special tokens, and looks for the base of the position embedding where 5 no longer writes it, which it then
takes to be 10,000 without a word.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adder.core.files import read_json, write_json

# A model directory's files that make its tokenizer.
TOKENIZER_FILES = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|tekken)\.json"
    r"|chat_template\.jinja|merges\.txt|vocab\.txt|[\w.-]+\.(model|tiktoken)"
)
# A folder in it with further chat templates, each a file by its name.
NAMED_TEMPLATES = "additional_chat_templates"
# What transformers 5 writes down of how a file was loaded.
OF_LOADING = ("_model_name_or_path", "_from_model_config", "backend", "is_local", "local_files_only")
# Classes that 5 names for any fast tokenizer, and what 4 calls it; 5 knows that name too.
FAST_TOKENIZER = {"TokenizersBackend": "PreTrainedTokenizerFast"}

JsonObject = dict[str, Any]


def make_portable(folder: Path) -> None:
    """Rewrite what `save_pretrained` of transformers 5 wrote into `folder`; files that aren't there are left out."""
    for name, rewritten in {
        "config.json": portable_config,
        "tokenizer_config.json": portable_tokenizer_config,
        "generation_config.json": _without_loading,
    }.items():
        if (folder / name).exists():
            write_json(folder / name, rewritten(read_json(folder / name)))


def portable_config(config: Mapping[str, Any]) -> JsonObject:
    """A model's config.json with the position embedding and dtype under the names of both generations."""
    made = _without_loading(config)
    made.pop("use_cache", None)  # true where nothing is said; training turns it off
    if "dtype" in made:
        made["torch_dtype"] = made["dtype"]
    rope = made.get("rope_parameters") or {}
    # Some models have settings for each kind of layer.
    whole = rope.get("full_attention", rope) or {}
    if "rope_theta" in whole:
        made["rope_theta"] = whole["rope_theta"]
    if "partial_rotary_factor" in whole:
        made["partial_rotary_factor"] = whole["partial_rotary_factor"]
    if whole.get("rope_type", "default") != "default":
        made["rope_scaling"] = {
            name: value for name, value in whole.items() if name not in ("rope_theta", "partial_rotary_factor")
        }
    if "sliding_attention" in rope:
        made["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    for part in ("text_config", "vision_config", "audio_config"):
        if isinstance(made.get(part), dict):
            made[part] = portable_config(made[part])
    return made


def portable_tokenizer_config(config: Mapping[str, Any]) -> JsonObject:
    """A tokenizer_config.json with a class and a list of special tokens that both generations know."""
    made = _without_loading(config)
    name = made.get("tokenizer_class")
    if name is not None:
        made["tokenizer_class"] = FAST_TOKENIZER.get(name, name)
    # A list has another name in 4; an object (tokens that a model's processor has by name) is the same in both.
    if isinstance(made.get("extra_special_tokens"), list):
        extra = made.pop("extra_special_tokens")
        if extra:
            made["additional_special_tokens"] = extra
    return made


def _without_loading(config: Mapping[str, Any]) -> JsonObject:
    return {name: value for name, value in config.items() if name not in OF_LOADING}
