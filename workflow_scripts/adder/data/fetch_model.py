"""The stage "model": the base model as a directory of safetensors, and where it came from."""

from pathlib import Path

from adder.core.file_digests import FileDigests
from adder.core.files import files_in, read_json, write_json
from adder.core.model_config import context_length
from adder.core.stage_spec import Context, NoInputs
from adder.data import model_source
from adder.data.checkpoints import earlier_adapter
from adder.data.checkpoints.quantisation import quantisation
from adder.data.model_types import ModelRecord, ModelSettings, ModelSummary, QuantisedRecord


def run(settings: ModelSettings, inputs: NoInputs, out: Path, context: Context) -> ModelSummary:
    """Write the base model, in 16 bit, to `out/model/` and its ModelRecord to `out/source.json`.

    4-bit weights of bitsandbytes are kept as they came in `out/packed/`, for a training on just these; an adapter to go
    on from is in `out/adapter/`.

    Raises UserError for a source that can't be found, fetched, trusted or used.
    """
    folder = out / "model"
    digests = FileDigests.of_results(context.results)
    origin = model_source.fetch(settings, folder, context.progress, digests.link)
    model_source.refuse_unusable(folder, settings.source)
    quantised = _dequantise(settings.source, out, context, digests)
    unused = model_source.refuse_other_models(folder, settings.source, context.threads)
    adapter = None
    if settings.adapter is not None:
        adapter = earlier_adapter.fetch(settings, out / "adapter", context.progress)
        earlier_adapter.check_base(adapter, settings, out / "adapter", folder, context.progress)
    summary: ModelSummary = {
        **origin,
        "source": settings.source,
        "parameters": model_source.count_parameters(folder),
        "context_length": context_length(folder),
        "quantised": quantised,
        "adapter": adapter,
    }
    files = files_in(folder)
    names = [str(path.relative_to(folder)) for path in files]
    record: ModelRecord = {**summary, "files": dict(zip(names, digests.of_all(files), strict=True))}
    write_json(out / "source.json", record)
    context.progress.say(f"{settings.source}: {summary['parameters'] / 1e6:,.1f} M parameters")
    if unused:
        context.progress.say(
            f"{len(unused)} tensors of its files, such as {unused[0]}, are no part of the language model that "
            "transformers makes of its config.json: they are not trained, and stay as they are"
        )
    return summary


def _dequantise(source: str, out: Path, context: Context, digests: FileDigests) -> QuantisedRecord | None:
    """Make `out/model/` one in 16 bit where it is quantised; None where it isn't."""
    from adder.data.checkpoints import dequantise  # torch, which most models don't need here

    folder, packed = out / "model", out / "packed"
    if quantisation(read_json(folder / "config.json")) is None:
        dequantise.refuse_packed(folder, source)
        return None
    folder.rename(packed)
    folder.mkdir()
    record = dequantise.dequantise(packed, folder, source, context.threads, context.progress)
    if not record["trained_as_it_is"]:
        digests.remove(packed)
    return record
