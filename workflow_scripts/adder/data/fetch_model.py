"""The stage "model": the base model as a directory of safetensors, and where it came from."""

from pathlib import Path

from adder.core.files import digest_file, write_json
from adder.core.model_config import context_length
from adder.core.stage_spec import Context, NoInputs
from adder.data import model_source
from adder.data.model_types import ModelRecord, ModelSettings, ModelSummary


def run(settings: ModelSettings, inputs: NoInputs, out: Path, context: Context) -> ModelSummary:
    """Write the base model to `out/model/` and its ModelRecord to `out/source.json`.

    Raises UserError for a source that can't be found, fetched, trusted or used.
    """
    folder = out / "model"
    origin = model_source.fetch(settings, folder, context.progress)
    model_source.refuse_unusable(folder, settings.source)
    context.progress.say("digesting the model's files")
    summary: ModelSummary = {
        **origin,
        "source": settings.source,
        "parameters": model_source.count_parameters(folder),
        "context_length": context_length(folder),
    }
    record: ModelRecord = {**summary, "files": {path.name: digest_file(path) for path in sorted(folder.iterdir())}}
    write_json(out / "source.json", record)
    context.progress.say(f"{settings.source}: {summary['parameters'] / 1e6:,.1f} M parameters")
    return summary
