"""Stage "download": the base model as a directory of safetensors, and the raw rows of every source as JSON lines."""

from pathlib import Path

from adder import model_source, rows
from adder.context import context_length
from adder.errors import UserError
from adder.files import digest_file, write_json
from adder.progress import Progress

PROGRESS_EVERY = 1000  # rows


def run_model(settings: dict, inputs: dict[str, Path], out: Path, progress: Progress) -> dict:
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


def run_data(settings: dict, inputs: dict[str, Path], out: Path, progress: Progress) -> dict:
    """Write every source's rows to `out/rows.jsonl` and one entry a file to `out/sources.json`.

    settings: sources, heldout.sources (see `rows.read_source`). A row is {"source", "row", "split", "data"}, or
    {"source", "row", "split", "error", "raw"} where it could not be read. `row` counts from 1: the line in a JSONL
    file, the row elsewhere. `split` is null unless the held-out rows have sources of their own. Returns
    {"rows", "unreadable", "sources"}.
    """
    heldout_sources = (settings.get("heldout") or {}).get("sources")
    splits = [("train" if heldout_sources else None, source) for source in settings["sources"]]
    splits += [("heldout", source) for source in heldout_sources or []]
    if not splits:
        raise UserError("data.sources is empty: name at least one file, for example [{path: data/rows.jsonl}]")

    files = [rows.files_of(source) for _, source in splits]
    names = iter(
        rows.short_names([(source, path) for (_, source), group in zip(splits, files, strict=True) for path in group])
    )
    entries = []
    with (out / "rows.jsonl").open("w", encoding="utf-8") as file:
        for (split, source), group in zip(splits, files, strict=True):
            named = [(next(names), path) for path in group]
            entries += _write_source(file, split, source, named, progress)
    write_json(out / "sources.json", entries)
    summary = {
        "rows": sum(entry["rows"] for entry in entries),
        "unreadable": sum(entry["unreadable"] for entry in entries),
        "sources": len(entries),
    }
    progress.say(f"{summary['rows']:,} rows from {summary['sources']} sources, {summary['unreadable']:,} unreadable")
    return summary


def _write_source(
    file, split: str | None, source: dict, named: list[tuple[str, Path | None]], progress: Progress
) -> list[dict]:
    """Append one source's rows to the open rows.jsonl; return an entry for each of its files."""
    counts = {name: {"rows": 0, "unreadable": 0} for name, _ in named}
    for name, number, row in rows.read_source(source, named):
        count = counts[name]
        count["rows"] += 1
        count["unreadable"] += isinstance(row, rows.Unreadable)
        file.write(rows.encode_record(name, number, split, row) + "\n")
        if count["rows"] % PROGRESS_EVERY == 0:
            progress.line(f"{name}: {count['rows']:,} rows")
    return [{"name": name, **rows.describe(source, path), "split": split, **counts[name]} for name, path in named]
