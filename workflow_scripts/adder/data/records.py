"""What the stage "data" writes, for those that read it: rows.jsonl, sources.json and reading.json."""

from typing import Any, Literal, NotRequired, TypedDict

Origin = Literal["path", "url", "hub", "builtin"]
Split = Literal["train", "heldout", "test"]


class ReadableRecord(TypedDict):
    """A line of rows.jsonl. row: from 1, the line of a JSONL file, the row elsewhere; source: the file's short name.

    split: None unless the held-out rows have sources of their own; "test" is only to be kept out of training. unfit:
    columns whose value JSON can't hold, null in `data`, with the value's type.
    """

    source: str
    row: int
    split: Split | None
    data: dict[str, Any]
    unfit: NotRequired[dict[str, str]]


class UnreadableRecord(TypedDict):
    """A line of rows.jsonl for a row that could not be read: why, how it begins, and the kind that it counts as."""

    source: str
    row: int
    split: Split | None
    error: str
    raw: str
    kind: str


RowRecord = ReadableRecord | UnreadableRecord


class Reading(TypedDict):
    """How a file's rows are to be read; reading.json has one for each file's short name.

    row_format: a name of formatting.row_formats, or "auto". system, prompt, completion: templates (field_template).
    message_keys: {ours: theirs}, roles: {theirs: ours}, of messages. values: {column: {value: name}}.
    """

    row_format: str
    columns: dict[str, str]
    weight: float
    split: Split | None
    system: NotRequired[str]
    prompt: NotRequired[str]
    completion: NotRequired[str]
    message_keys: NotRequired[dict[str, str]]
    roles: NotRequired[dict[str, str]]
    values: NotRequired[dict[str, dict[str, str]]]


class BuiltinRecord(TypedDict):
    """The built-in generator's settings."""

    builtin: str
    rows: int
    part: str
    seed: int


class HubRecord(TypedDict):
    """Which part of which data set of the hub a file is."""

    id: str
    config: str
    split: str
    file: str


class ConverterRecord(TypedDict):
    """The user's Python file that read a file."""

    path: str
    sha256: str


class SourceRecord(TypedDict):
    """An entry of sources.json: where a file of rows came from, how it was read, how many rows it gave.

    name: the file's short name. path: a local path, a URL as it is configured, or a hub id and the file's name.
    kind: the format, "converted" or "builtin". revision: the commit of a hub data set. limit and sample: of the whole
    source.
    """

    name: str
    kind: str
    origin: Origin
    path: str | None
    sha256: str | None
    license: str | None
    revision: str | None
    encoding: str | None
    limit: int | None
    sample: int | None
    weight: float
    split: Split | None
    rows: int
    unreadable: int
    builtin: NotRequired[BuiltinRecord]
    hub: NotRequired[HubRecord]
    convert: NotRequired[ConverterRecord]
    notes: NotRequired[list[str]]


class RowSummary(TypedDict):
    """What the stage says of itself: rows, those of them that could not be read, and files.

    also_read: digests of what converters opened beside what the settings name, as opened_files.digests_of has them.
    """

    rows: int
    unreadable: int
    sources: int
    also_read: NotRequired[dict[str, str]]
