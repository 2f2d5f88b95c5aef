"""The stage "model": the base model as a directory of safetensors, and where it came from."""

from pathlib import Path

from adder.core.files import digest_file, write_json
from adder.core.model_config import context_length
from adder.core.progress import Progress
from adder.data import model_source


def run(settings: dict, inputs: dict[str, Path], out: Path, progress: Progress) -> dict:
    """Write the base model to `out/model/` and where it came from to `out/source.json`.

    settings: source, revision, sha256, file (see `model_source.fetch`). Returns the content of source.json without
    the files' digests. Raises UserError for a source that can't be found, fetched, trusted or used.
    """
    folder = out / "model"
    origin = model_source.fetch(settings, folder, progress)
    model_source.refuse_unusable(folder, settings["source"])
    progress.say("digesting the model's files")
    source = {
        "source": settings["source"],
        **origin,
        "files": {path.name: digest_file(path) for path in sorted(folder.iterdir())},
        "parameters": model_source.count_parameters(folder),
        "context_length": context_length(folder),
    }
    write_json(out / "source.json", source)
    progress.say(f"{settings['source']}: {source['parameters'] / 1e6:,.1f} M parameters")
    return {name: value for name, value in source.items() if name != "files"}
