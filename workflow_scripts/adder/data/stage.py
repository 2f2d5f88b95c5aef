"""The stages "model" and "data": the base model as a directory, and the raw rows of every source."""

import contextlib
from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from adder.core.errors import UserError
from adder.core.file_digests import FileDigests
from adder.core.files import read_json
from adder.core.paths import ADAPTER_FILES, adapter_folder, local_files, resolve_path
from adder.core.secrets import refuse_secrets
from adder.core.section import Section
from adder.core.stage_spec import Memory, StageSpec
from adder.data.checkpoints.quantisation import refuse_unknown
from adder.data.converter import imported_files
from adder.data.field_template import parse
from adder.data.model_types import ModelSettings
from adder.data.records import Origin

# Settings of a source that only some origins have.
NEEDED_ORIGIN: dict[str, tuple[Origin, ...]] = {
    "revision": ("hub",),
    "config": ("hub",),
    "split": ("hub", "path", "url"),
    "sha256": ("path", "url"),
    "table": ("path", "url"),
    "token_env": ("url",),
    "convert": ("path", "url"),
}


Role = Literal["system", "user", "assistant", "tool"]
MessageKey = Literal["role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", "train"]


def _as_json(value: str | int | bool) -> str:
    """A value as JSON writes it; the settings' own JSON has True for a key that is true."""
    return str(value).lower() if str(value) in ("True", "False") else str(value)


def _theirs(names: str | int | list[str | int]) -> list[str]:
    return [str(name).strip().lower() for name in (names if isinstance(names, list) else [names])]


class Source(Section):
    """One source of rows: files, a URL, a data set of the hub, or the built-in generator."""

    path: str | None = None
    """A file, a pattern such as `data/*.jsonl`, a folder that `datasets` saved, or a folder of documents: JSON, JSON
    lines, CSV, TSV, Parquet, ORC, Arrow, SQLite, spreadsheets, text or Markdown, each also compressed (`.gz`, `.zst`,
    `.xz`, `.bz2`, a `.zip` of one file)."""
    url: str | None = None
    """A file elsewhere: `https://…`, `s3://…`, `gs://…` or anything else that fsspec opens. `${NAME}` stands for an
    environment variable, so that no secret is written here."""
    hub: str | None = None
    """Id of a data set of the Hugging Face hub (`openai/gsm8k`); a token is read from `HF_TOKEN`."""
    revision: str | None = None
    """Branch, tag or commit of `hub`; the commit it stands for is pinned in the output."""
    config: str | None = None
    """Configuration (subset) of `hub`, where it has several."""
    split: str | None = None
    """Split of `hub`, `train` without it; of a folder that `datasets` saved, or of a JSON file with several lists."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Expected SHA-256 of the one file at `path` or `url`; anything else is refused."""
    token_env: str | None = None
    """Name of the environment variable that holds the token for `url`, sent as `Authorization: Bearer`."""
    format: Literal[
        "auto", "json", "jsonl", "csv", "tsv", "parquet", "orc", "arrow", "sqlite", "spreadsheet", "text"
    ] = "auto"
    """How to read the file; `auto` goes by its ending. `text`: each file is one row, a document."""
    table: str | None = None
    """Table or view of an SQLite file, or sheet of a spreadsheet; without it, the only one."""
    encoding: str | list[str] = "utf-8"
    """Text encoding; UTF-8 may start with a byte-order mark. Of a list, each file is read in the first that fits it."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """What separates the cells of a CSV file; without it, comma, semicolon, tab or vertical bar, as the file tells."""
    header: list[str] | None = Field(default=None, min_length=1)
    """Names of the columns of a CSV file or sheet whose first line is a row, in order: `[question, answer]`."""
    convert: str | None = None
    """A Python file with `def rows(path, encoding)` that yields one dictionary a row, for any other format. It may
    import Python files beside it."""
    # Formats are registered above this package, so that a new one changes nothing here; workflow.settings checks it.
    row_format: str = "auto"
    """What a row is; `auto` goes by its columns. `preference` trains on the `chosen` reply; `text` on all of a text."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of the row format's columns in this source, where they differ: `{question: problem, answer: solution}`.
    `request.messages` is a key within a column."""
    prompt: str | None = None
    """What is asked, made of columns in braces: `"{context}\\n\\n{question}"`; `{answers.text.0}` looks into a
    value."""
    completion: str | None = None
    """The reply, made in the same way: `"{answer}"`."""
    system: str | None = None
    """The system message, made in the same way; without braces the same for all rows."""
    message_keys: dict[MessageKey, str] = Field(default_factory=dict)
    """What messages call their keys, where they differ: `{role: speaker, content: utterance}`."""
    roles: dict[Role, str | int | list[str | int]] = Field(default_factory=dict)
    """What messages call their roles, where they differ: `{user: customer, assistant: [agent, bot]}`."""
    values: dict[str, dict[str | int | bool, str] | list[str]] = Field(default_factory=dict)
    """What a column's values are called where they are numbers, or true or false: `{label: {0: negative, 1:
    positive}}`, or `{answer: [A, B, C, D]}`, counted from 0."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first so many rows."""
    sample: int | None = Field(default=None, ge=1)
    """Take so many rows, spread over the source and the same ones every time."""
    weight: float = Field(default=1.0, gt=0, le=100)
    """How often each training row of the source is used an epoch: 2 for twice, 0.5 for a fixed half of the rows."""
    license: str | None = None
    """Licence of the data, for the model card; a hub data set states its own."""
    builtin: Literal["tickets"] | None = None
    """`tickets`: the data set that Adder writes itself, customer messages and the JSON tickets they stand for."""
    rows: int | None = Field(default=None, ge=1)
    """How many rows the built-in generator writes."""
    part: Literal["train", "heldout"] = "train"
    """Which part of its vocabulary the built-in generator uses; held-out names, products and phrasings are its own."""
    seed: int = 42
    """Seed of the built-in generator."""

    def roles_by_name(self) -> dict[str, str]:
        """{theirs: ours} of `roles`, in lower case."""
        return {name: ours for ours, names in self.roles.items() for name in _theirs(names)}

    def values_by_name(self) -> dict[str, dict[str, str]]:
        """{column: {value, as JSON writes it: name}} of `values`."""
        numbered = {
            column: names if isinstance(names, dict) else dict(enumerate(names))
            for column, names in self.values.items()
        }
        return {column: {_as_json(value): name for value, name in names.items()} for column, names in numbered.items()}

    @field_validator("values", mode="before")
    @classmethod
    def _names_of_values(cls, value: object) -> object:
        for names in value.values() if isinstance(value, dict) else ():
            if any(isinstance(name, bool) for name in (names.values() if isinstance(names, dict) else names or ())):
                raise ValueError("names that YAML takes for true or false, such as Yes and No, need quotes")
        return value

    @field_validator("prompt", "completion", "system")
    @classmethod
    def _template(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            template = parse(value)
            if not template.parts:
                raise ValueError("is empty")
            if not template.fields and info.field_name != "system":
                raise ValueError("names no column in braces, so that it would be the same for all rows")
        return value

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        given = [name for name in ("prompt", "completion") if getattr(self, name) is not None]
        if given and self.row_format != "auto":
            raise ValueError(f"`row_format` says what a row is, and so does `{given[0]}`: leave one of them out")
        theirs = [name for names in self.roles.values() for name in _theirs(names)]
        double = next((name for name in theirs if theirs.count(name) > 1), None)
        if double is not None:
            raise ValueError(f"`roles` has '{double}' twice")
        return self

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [name for name in get_args(Origin) if getattr(self, name) is not None]
        if len(given) != 1:
            allowed = ", ".join(get_args(Origin))
            raise ValueError(f"a source has one of {allowed}, found {' and '.join(given) or 'none'}")
        if (self.rows is None) != (self.builtin is None):
            raise ValueError("`rows` goes with `builtin`, and `builtin` needs it; use `limit` or `sample` for files")
        for name, needed in NEEDED_ORIGIN.items():
            if getattr(self, name) is not None and given[0] not in needed:
                raise ValueError(
                    f"`{name}` goes with {' or '.join(f'`{one}`' for one in needed)}, not with `{given[0]}`"
                )
        return self


class Heldout(Section):
    """Rows that are never trained on and decide the verdict. One of share, size, sources; else a tenth of the rows."""

    share: float | None = Field(default=None, gt=0, lt=1)
    """Share of the rows to hold out, chosen by a hash of the prompt: a row stays where it is when others are added."""
    size: int | None = Field(default=None, ge=1)
    """Number of rows to hold out, those with the smallest hashes: an added row can displace one of them at most."""
    sources: list[Source] | None = Field(default=None, min_length=1)
    """Held-out rows from sources of their own; training rows that stand among them are dropped."""
    group_by: str | None = None
    """Column whose rows stay together: one conversation or author never stands on both sides. Intervals take each of
    its groups as a whole."""
    keep_passages: bool = True
    """Rows that ask about one passage, found by the long lines that they share, stay on one side by themselves."""
    stratify_by: str | None = None
    """Column of whose values each is held out by the same share."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [name for name in ("share", "size", "sources") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"only one of share, size and sources can be set, found {' and '.join(given)}")
        if not given:
            self.share = 0.1
        by = [name for name in ("group_by", "stratify_by") if getattr(self, name) is not None]
        if by and given == ["sources"]:
            raise ValueError(f"{by[0]} has no effect where the held-out rows have sources of their own")
        if len(by) > 1:
            raise ValueError("only one of group_by and stratify_by can be set")
        return self


class Data(Section):
    """Where rows come from, and which are held out."""

    sources: list[Source] = Field(min_length=1)
    """The sources, in order."""
    heldout: Heldout = Field(default_factory=Heldout)
    """Rows held out for the evaluation; without it a tenth of the rows."""
    tests: list[Source] = Field(default_factory=list)
    """Test sets that the model will be judged by elsewhere: training rows that overlap with one are dropped."""


class RowSettings(Section):
    """What the stage "data" reads: the sources of training, held-out and test rows."""

    sources: list[Source] = Field(min_length=1)
    """The sources, in order."""
    heldout_sources: list[Source] | None = None
    """Sources of held-out rows, where these have some of their own."""
    tests: list[Source] = Field(default_factory=list)
    """Test sets that the model will be judged by elsewhere: training rows that overlap with one are dropped."""


def _model_identity(settings: ModelSettings, where: str, digests: FileDigests) -> dict[str, object]:
    """A local model counts by its files' content, one from elsewhere by its settings."""
    identity = settings.model_dump(mode="json")
    if settings.adapter is not None and (folder := adapter_folder(settings.adapter, digests.root)):
        identity["adapter"] = [digests.of(folder / name) for name in ADAPTER_FILES]
    path = resolve_path(settings.source, digests.root)
    looks_local = settings.source.startswith((".", "/", "~")) or settings.source.endswith(".gguf") or path.exists()
    if settings.source.startswith("wheel:") or not looks_local:
        return identity
    if not path.exists():
        raise UserError(f"{where}.source: {settings.source!r} is neither there ({path}) nor a hub id (owner/name)")
    return {**identity, "source": digests.of(path)}


def _row_identity(settings: RowSettings, where: str, digests: FileDigests) -> dict[str, object]:
    groups = {
        f"{where}.sources": settings.sources,
        f"{where}.heldout.sources": settings.heldout_sources or [],
        f"{where}.tests": settings.tests,
    }
    return {
        name: [_source_identity(source, f"{name}.{i}", digests) for i, source in enumerate(sources)]
        for name, sources in groups.items()
    }


def _source_identity(source: Source, where: str, digests: FileDigests) -> dict[str, object]:
    """A local file counts by its name and content, a converter with what it imports from beside it; a URL or a hub data
    set counts by its settings.
    """
    identity = source.model_dump(mode="json")
    if source.path is not None:
        identity["path"] = digests.named(local_files(source.path, f"{where}.path", digests.root))
    if source.url is not None:
        refuse_secrets(source.url, f"{where}.url")
    if source.convert is not None:
        converter = resolve_path(source.convert, digests.root)
        own = digests.of_named(source.convert, f"{where}.convert")
        helpers = imported_files(converter)
        identity["convert"] = [own, *([str(file.relative_to(converter.parent)), digests.of(file)] for file in helpers)]
    return identity


def _refuse_model(settings: ModelSettings, model: Path) -> None:
    from adder.core.model_config import refuse_other_than_causal  # not at the top: the workflow is parsed without NumPy

    with contextlib.suppress(ValueError):  # no JSON: the stage says so, with all else about its files
        config = read_json(model / "config.json")
        refuse_unknown(config, settings.source)
        refuse_other_than_causal(config, settings.source)


MODEL = StageSpec(
    name="model",
    rule="download_model",
    run="adder.data.fetch_model",
    settings=ModelSettings,
    section="model",
    message="Fetching the base model",
    result=lambda found: (
        f"{found['parameters'] / 1e6:,.1f} M parameters"
        + (f", a context of {found['context_length']:,} tokens" if found["context_length"] else "")
    ),
    reads={},
    identity=_model_identity,
    refuse=_refuse_model,
    shows={"model": "source.json"},
    local=True,
    threads=None,
    memory=Memory(base_mb=8000),
)
DATA = StageSpec(
    name="data",
    rule="download_data",
    run="adder.data.fetch_rows",
    settings=RowSettings,
    section="data",
    takes={"heldout_sources": "data.heldout.sources"},
    message="Fetching the rows",
    result=lambda found: f"{found['rows']:,} rows of {found['sources']:,} source{'s' * (found['sources'] != 1)}",
    reads={},
    identity=_row_identity,
    shows={"data": "sources.json"},
    local=True,
)
