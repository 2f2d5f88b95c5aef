"""The adapter that a training goes on from: a PEFT folder or one of the hub, held against the base that it is for."""

import os
import re
import shutil
from pathlib import Path

from adder.core.errors import UserError
from adder.core.files import read_json
from adder.core.paths import ADAPTER_FILES, HUB_ID, adapter_folder
from adder.core.progress import Progress
from adder.data.model_types import AdapterRecord, ModelSettings

# What names of the same model end with in other precisions.
PRECISIONS = re.compile(
    r"([-_.](unsloth|bnb|\d?bit|[48]bit|fp8|bf16|fp16|awq|gptq|int[48]|dynamic|hf))+$", re.IGNORECASE
)


def fetch(settings: ModelSettings, folder: Path, progress: Progress) -> AdapterRecord:
    """Write the adapter of `model.adapter` into `folder`, made here. Raises UserError for one that isn't there."""
    assert settings.adapter is not None
    path, revision = adapter_folder(settings.adapter), None
    if path is None:
        path = _download(settings.adapter, settings.adapter_revision)
        revision = path.name
    elif settings.adapter_revision:
        raise UserError("model.adapter_revision is for an adapter of the hub: leave it out where it is a folder")
    folder.mkdir()
    for name in ADAPTER_FILES:
        shutil.copyfile(path / name, folder / name)
    progress.say(f"going on from the adapter {settings.adapter}")
    base = read_json(folder / ADAPTER_FILES[0]).get("base_model_name_or_path")
    return {"source": settings.adapter, "revision": revision, "base": base}


def check_base(adapter: AdapterRecord, settings: ModelSettings, folder: Path, model: Path, progress: Progress) -> None:
    """Raise UserError where the adapter in `folder` is one for another base than the directory `model`.

    By the shapes of all that it adapts, and by its base's name where both are of the hub; else another name is said.
    """
    from adder.core.safetensors_layout import layout, stored_tensors  # torch, which parsing doesn't need

    stored, (_, weights) = stored_tensors(model), ADAPTER_FILES
    known = 0
    for tensor in layout(folder / weights).tensors:
        module, is_lora, part = tensor.name.removeprefix("base_model.model.").rpartition(".lora_")
        weight = stored.get(f"{module}.weight") if is_lora else None
        if weight is None or part not in ("A.weight", "B.weight"):
            continue
        known += 1
        # GPT-2's layers are stored the other way round.
        size, sides = (tensor.shape[1], (1, 0)) if part == "A.weight" else (tensor.shape[0], (0, 1))
        if len(weight.shape) == 2 and size not in (weight.shape[sides[0]], weight.shape[sides[1]]):
            raise UserError(
                f"model.adapter: {settings.adapter} has {list(tensor.shape)} for {tensor.name}, and {settings.source} "
                f"{list(weight.shape)} for {module}.weight: it is an adapter of another model"
            )
    if not known and not _is_nested(stored):
        raise UserError(f"model.adapter: {settings.adapter} adapts no layer that {settings.source} has")
    name = adapter["base"]
    if not name or name == settings.source:
        return
    if _plain(name) == _plain(settings.source):
        return
    if HUB_ID.fullmatch(name) and HUB_ID.fullmatch(settings.source) and not Path(settings.source).exists():
        raise UserError(
            f"model.adapter: {settings.adapter} was trained on {name}, and model.source is {settings.source}; name the "
            "base that it was trained on"
        )
    progress.note(f"the adapter says that it was trained on {name}; its shapes fit {settings.source}")


def _plain(name: str) -> str:
    return PRECISIONS.sub("", name.rstrip("/").rpartition("/")[2].casefold())


def _is_nested(stored: object) -> bool:
    """Whether names on disk and in memory may differ, as those of multimodal models do."""
    return isinstance(stored, dict) and any("language_model" in name for name in stored)


def _download(adapter: str, revision: str | None) -> Path:
    import huggingface_hub

    from adder.data.hub_errors import HTTPError, explain

    token = os.environ.get("HF_TOKEN") or False
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                adapter, revision=revision, allow_patterns=list(ADAPTER_FILES), token=token
            )
        )
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(
            explain(
                error,
                f"model.adapter: {adapter}",
                no_revision=f"has no revision '{revision}' (model.adapter_revision: a branch, a tag or a commit)",
                missing="is neither a folder here nor an adapter on the hub. Check the spelling",
                unreachable="is neither a folder here nor in the hub's cache, and the hub is out of reach",
            )
        ) from error
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"model.adapter: {adapter} has no {missing[0]}: it is no adapter that PEFT wrote in safetensors"
        )
    return folder
