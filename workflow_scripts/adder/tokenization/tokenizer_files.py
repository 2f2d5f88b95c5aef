"""The tokenizer's files for the merged model: the base's own bytes, but for what was set anew."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adder.core.files import read_json
from adder.data.checkpoints.portable_files import NAMED_TEMPLATES, TOKENIZER_FILES, make_portable

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def save(tokenizer: PreTrainedTokenizerFast, base: Path, folder: Path) -> None:
    """Write into `folder` (made here) what loads as `tokenizer`, which was loaded from `base`.

    Files that say what the base's say are its own, byte for byte: they load wherever the base does. Only another chat
    template or pad token is written into them, and only where that doesn't load as the same does transformers write
    all anew.
    """
    own = cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(base, local_files_only=True))
    folder.mkdir()
    for path in sorted(base.iterdir()):
        if TOKENIZER_FILES.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)
        elif path.name == NAMED_TEMPLATES:
            shutil.copytree(path, folder / path.name)
    if _template(own) != _template(tokenizer):
        _set_template(folder, cast("str | dict[str, str]", tokenizer.chat_template))
    if own.pad_token != tokenizer.pad_token:
        _set(folder / "tokenizer_config.json", "pad_token", tokenizer.pad_token)
        if (folder / "special_tokens_map.json").exists():
            _set(folder / "special_tokens_map.json", "pad_token", tokenizer.pad_token)
    if not _loads_as(tokenizer, folder):
        shutil.rmtree(folder)
        tokenizer.save_pretrained(folder)
        make_portable(folder)


def _template(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """The chat templates by name; one alone is the default."""
    own: Any = tokenizer.chat_template
    return own if isinstance(own, dict) else {"default": own} if own else {}


def _set_template(folder: Path, template: str | dict[str, str]) -> None:
    """Put the template, or several by name, where every reader looks, also those that know no file for it."""
    for name in TEMPLATE_FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / NAMED_TEMPLATES, ignore_errors=True)
    if isinstance(template, dict):
        listed = [{"name": name, "template": text} for name, text in template.items()]
        _set(folder / "tokenizer_config.json", "chat_template", listed)
    else:
        _set(folder / "tokenizer_config.json", "chat_template", template)


def _set(path: Path, name: str, value: Any) -> None:
    """Set one value of a JSON object, all others in their order."""
    content = {**(read_json(path) if path.exists() else {}), name: value}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _loads_as(tokenizer: PreTrainedTokenizerFast, folder: Path) -> bool:
    """Whether the files load as a tokenizer with the same tokens, special ones and template."""
    try:
        loaded = cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, KeyError):
        return False
    # A tokenizer.json may carry the truncation and padding of whoever saved it, which isn't ours to change.
    loaded.backend_tokenizer.no_truncation()
    loaded.backend_tokenizer.no_padding()
    same = ("special_tokens_map", "added_tokens_encoder", "vocab_size")
    return (
        all(getattr(loaded, name) == getattr(tokenizer, name) for name in same)
        and _template(loaded) == _template(tokenizer)
        and loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    )
