"""Rows of Parquet, ORC and Arrow files, as their author wrote them before the container's schema unified them.

A schema gives every struct all fields that any row has, so a key that a row's author never wrote comes back as null. A
null in a struct can't be told from it, so fields that are null are left out of structs, and counted; columns that are
null stay. Values that were stored as JSON text because their keys differ (Arrow's extension type `arrow.json`, the
feature `Json` of `datasets`) are read, and keep their nulls.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adder.core.errors import UserError
from adder.data.compression import CHUNK, open_bytes, uncompressed
from adder.data.row_types import Unfit

BATCH = 1024  # rows in memory at a time
JSON_EXTENSION = "arrow.json"
EXTENSION_KEY = b"ARROW:extension:name"  # of a field's metadata, where pyarrow doesn't know the extension
NULLS_LEFT_OUT = "fields that are null in structs are left out, as keys that the file's schema filled in"

LABELS_NAMED = "labels that `datasets` numbers are read by their names"

Restore = Callable[[Any], Any]


def parquet_rows(path: Path, notes: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file; what was found on the way is counted in `notes`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # With a buffer and no read-ahead, one row group of any size is decoded page by page.
        with uncompressed(path) as plain, pq.ParquetFile(plain, buffer_size=CHUNK, pre_buffer=False) as file:
            rows = _Rows(path, file.schema_arrow, notes)
            for batch in file.iter_batches(batch_size=BATCH):
                yield from rows.of(batch)
    except pa.ArrowException as error:
        raise UserError(f"{path}: can't be read as Parquet: {error}") from error


def orc_rows(path: Path, notes: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows of an ORC file, a stripe in memory at a time; what was found on the way is counted in `notes`."""
    import pyarrow as pa
    from pyarrow import orc

    try:
        with uncompressed(path) as plain, open(plain, "rb") as opened:
            file = orc.ORCFile(opened)
            rows = _Rows(path, file.schema, notes, _lost_in_orc)
            for stripe in range(file.nstripes):
                batch = file.read_stripe(stripe)
                for start in range(0, batch.num_rows, BATCH):
                    yield from rows.of(batch.slice(start, BATCH))
    except pa.ArrowException as error:
        raise UserError(f"{path}: can't be read as ORC: {error}") from error


def arrow_rows(path: Path, split: str | None, notes: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow file, or of a folder that `datasets` saved, of which `split` names one of several."""
    import pyarrow as pa

    try:
        for file in arrow_files(path, split):
            rows = None
            for batch in _batches(file):
                rows = rows or _Rows(file, batch.schema, notes)
                for start in range(0, batch.num_rows, BATCH):
                    yield from rows.of(batch.slice(start, BATCH))
    except pa.ArrowException as error:
        raise UserError(f"{path}: can't be read as Arrow: {error}") from error


def arrow_files(path: Path, split: str | None = None) -> list[Path]:
    """The Arrow files of a folder that `datasets` saved, in order; a file stands for itself.

    split: which of several to take. Raises UserError where that isn't told, or isn't there.
    """
    if path.is_file():
        if split is not None:
            raise UserError(f"{path}: is one file, and `split: {split}` names a part of a folder that `datasets` saved")
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = _read_object(path / "dataset_dict.json").get("splits") or []
        if split is None and len(splits) != 1:
            names = ", ".join(f"{path}/{name}" for name in splits)
            raise UserError(
                f"{path}: holds several splits; name the folder of one: {names} (or one by `split:`: "
                f"{', '.join(splits)})"
            )
        if split is not None and split not in splits:
            raise UserError(f"{path}: has no split '{split}'; it has {', '.join(splits)}")
        path = path / (split or splits[0])
    elif split is not None:
        raise UserError(f"{path}: holds no splits, so `split: {split}` names nothing there")
    state = _read_object(path / "state.json")
    try:
        return [path / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}/state.json: names no data files; was this folder written by `datasets`?") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {error}") from error
    return value if isinstance(value, dict) else {}


def _batches(path: Path) -> Iterator[Any]:
    """Record batches of an Arrow file, in the file format or the stream format."""
    import pyarrow as pa

    with open_bytes(path) as start:
        is_stream = start.read(6) != b"ARROW1"
    if is_stream:
        with open_bytes(path) as file, pa.ipc.open_stream(file) as reader:
            yield from reader
        return
    # Mapped: a file may be one batch, of which the system can drop what is not being looked at.
    with uncompressed(path) as plain, pa.memory_map(str(plain)) as file, pa.ipc.open_file(file) as reader:
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


class _Rows:
    """Turns the batches of one file into rows."""

    def __init__(
        self, path: Path, schema: Any, notes: Counter[str], lost: Callable[[Any], str | None] | None = None
    ) -> None:
        """lost: names a type of which the file's reader loses some; None for others."""
        self.notes, self.nulls = notes, 0
        self.names: list[str] = list(schema.names)
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise UserError(f"{path}: has more than one column named '{repeated[0]}'")
        features = _features(schema.metadata)
        self.unfit = [_unfit_type(field.type) or (lost(field.type) if lost else None) for field in schema]
        self.only_nulls = [not _holds_json_or_maps(field, features.get(field.name)) for field in schema]
        self.restore = [self._restorer(field, features.get(field.name)) for field in schema]
        for name, type in zip(self.names, self.unfit, strict=True):
            if type is not None:
                notes[f"the column '{name}' is of the type {type}, which can't be read"] = 1

    def of(self, batch: Any) -> Iterator[dict[str, Any]]:
        """The rows of one batch."""
        if not self.names:
            yield from ({} for _ in range(batch.num_rows))
            return
        columns = [self._values(batch.column(index), index) for index in range(len(self.names))]
        if self.nulls:
            self.notes[NULLS_LEFT_OUT] += self.nulls
            self.nulls = 0
        for cells in zip(*columns, strict=True):
            yield dict(zip(self.names, cells, strict=True))

    def _values(self, column: Any, index: int) -> list[Any]:
        type, restore = self.unfit[index], self.restore[index]
        if type is not None:
            unfit = Unfit(type)
            return [unfit if valid else None for valid in column.is_valid().to_pylist()]
        try:
            values = column.to_pylist()
        except (ValueError, OverflowError):  # also UnicodeDecodeError: one value of a thousand is enough
            values = [_value(scalar) for scalar in column]
        if restore is None or (self.only_nulls[index] and not _has_nulls(column)):
            return values
        return [value if value is None or isinstance(value, Unfit) else restore(value) for value in values]

    def _restorer(self, field: Any, feature: Any) -> Restore | None:
        """What makes a value of the field what it was; None where it is that already. feature: of `datasets`."""
        import pyarrow.types as types

        type = field.type
        if _is_json(field, feature):
            return _parsed
        if names := _label_names(feature):
            self.notes[LABELS_NAMED] = 1
            return lambda value: names[value] if isinstance(value, int) and 0 <= value < len(names) else value
        if types.is_struct(type):
            of_feature = feature if isinstance(feature, dict) else {}
            found = {child.name: self._restorer(child, of_feature.get(child.name)) for child in type.fields}
            inner = {name: restore for name, restore in found.items() if restore is not None}
            return lambda value: self._without_nulls(value, inner)
        if types.is_map(type):
            of_value = self._restorer(type.item_field, None)
            if not (types.is_string(type.key_type) or types.is_large_string(type.key_type)):
                return None
            return lambda pairs: {
                key: value if of_value is None or value is None else of_value(value) for key, value in pairs
            }
        if _is_list(type):
            of_item = self._restorer(type.value_field, _item_feature(feature))
            if of_item is not None:
                return lambda items: [None if item is None else of_item(item) for item in items]
        return None

    def _without_nulls(self, value: dict[str, Any], inner: Mapping[str, Restore]) -> dict[str, Any]:
        kept = {name: item for name, item in value.items() if item is not None}
        self.nulls += len(value) - len(kept)
        for name, restore in inner.items():
            if name in kept:
                kept[name] = restore(kept[name])
        return kept


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError) as error:
        return Unfit(f"{scalar.type} with a value that isn't valid ({error})")


def _unfit_type(type: Any) -> str | None:
    """The name of a type that JSON can't hold, None for others."""
    import pyarrow.types as types

    binary = (
        types.is_binary(type)
        or types.is_large_binary(type)
        or types.is_fixed_size_binary(type)
        or types.is_binary_view(type)
    )
    return str(type) if binary or types.is_duration(type) or types.is_interval(type) else None


def _lost_in_orc(type: Any) -> str | None:
    """What to call a type that pyarrow 26 doesn't bring back from ORC as it was written; None for others.

    In structs within structs it takes values for those of other rows where a struct is null.
    """
    return "struct in struct (which pyarrow mixes up in ORC; save it as Parquet)" if _has_structs(type, False) else None


def _has_structs(type: Any, within: bool) -> bool:
    import pyarrow.types as types

    if types.is_struct(type):
        return within or any(_has_structs(child.type, True) for child in type.fields)
    if types.is_map(type):
        return _has_structs(type.item_type, within)
    return _is_list(type) and _has_structs(type.value_type, within)


def _is_list(type: Any) -> bool:
    import pyarrow.types as types

    return (
        types.is_list(type)
        or types.is_large_list(type)
        or types.is_fixed_size_list(type)
        or types.is_list_view(type)
        or types.is_large_list_view(type)
    )


def _is_json(field: Any, feature: Any) -> bool:
    """Whether a field holds JSON as text: by its type, its metadata or the feature that `datasets` wrote down."""
    import pyarrow as pa
    import pyarrow.types as types

    if isinstance(field.type, pa.BaseExtensionType):
        return field.type.extension_name == JSON_EXTENSION
    if not (types.is_string(field.type) or types.is_large_string(field.type) or types.is_string_view(field.type)):
        return False
    named = (field.metadata or {}).get(EXTENSION_KEY) == JSON_EXTENSION.encode()
    return named or (isinstance(feature, dict) and feature.get("_type") == "Json")


def _holds_json_or_maps(field: Any, feature: Any) -> bool:
    """Whether there is more to restore in a field than nulls in structs."""
    import pyarrow.types as types

    if _is_json(field, feature) or types.is_map(field.type) or _label_names(feature):
        return True
    if types.is_struct(field.type):
        of_feature = feature if isinstance(feature, dict) else {}
        return any(_holds_json_or_maps(child, of_feature.get(child.name)) for child in field.type.fields)
    return _is_list(field.type) and _holds_json_or_maps(field.type.value_field, _item_feature(feature))


def _has_nulls(array: Any) -> bool:
    """Whether a struct anywhere in an array has a field that is null; also true where such a struct is null itself."""
    import pyarrow.types as types

    if types.is_struct(array.type):
        fields = [array.field(index) for index in range(array.type.num_fields)]
        return any(field.null_count or _has_nulls(field) for field in fields)
    return _is_list(array.type) and _has_nulls(array.values)


def _features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The features by column that `datasets` writes into a schema, {} where it wrote none."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _label_names(feature: Any) -> list[str]:
    """The names of a `ClassLabel` of `datasets`, whose values are stored as their numbers; none for other features."""
    return feature.get("names") or [] if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else []


def _item_feature(feature: Any) -> Any:
    """The feature of a list's items: `[feature]` in old files, `{"_type": "List", "feature": …}` in new ones."""
    if isinstance(feature, list):
        return feature[0] if feature else None
    return feature.get("feature") if isinstance(feature, dict) else None


def _parsed(text: Any) -> Any:
    """The value of a JSON text; a text that is no JSON stays one."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
