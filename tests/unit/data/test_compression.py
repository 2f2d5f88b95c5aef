"""Compressed files are known by their first bytes and read as what they hold; damaged ones are named."""

import bz2
import gzip
import io
import lzma
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adder.core.errors import UserError
from adder.data.compression import bare_name, open_bytes
from data_stages import data, read, write_rows

TEXT = b"".join(b'{"n": %d, "text": "%s"}\n' % (n, b"Gr\xc3\xbc\xc3\x9fe" * (n % 7)) for n in range(3000))


def _zipped(name: str, content: bytes, **others: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, held in {name: content, **others}.items():
            archive.writestr(member, held)
    return stream.getvalue()


def _zstd(content: bytes) -> bytes:
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as file:
        file.write(content)
    return stream.getvalue().to_pybytes()


WAYS = {
    "gz": gzip.compress,
    "zst": _zstd,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zip": lambda content: _zipped("inner.jsonl", content),
}


@pytest.mark.parametrize("ending", WAYS)
def test_each_compression_gives_the_same_rows_and_is_named_where_it_is_damaged(tmp_path, ending):
    path = tmp_path / f"rows.jsonl.{ending}"
    path.write_bytes(WAYS[ending](TEXT))
    with open_bytes(path) as file:
        assert file.read() == TEXT
    _, records, entries, *_ = write_rows(tmp_path / "data", [{"path": str(path)}])
    assert [row["n"] for row in data(records)] == list(range(3000))
    assert (entries[0]["name"], entries[0]["kind"], entries[0]["rows"]) == ("rows", "jsonl", 3000)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"rows\.jsonl.*: can't be read"):
        read(path)


def test_a_zip_is_read_as_the_one_file_that_it_holds(tmp_path):
    path = tmp_path / "rows.zip"
    path.write_bytes(_zipped("folder/rows.csv", b"a,b\n1,2\n", **{"__MACOSX/x": b"?", "folder/.DS_Store": b"?"}))
    assert bare_name(path) == "rows.csv"
    assert read(path) == [(1, {"a": "1", "b": "2"})]
    path.write_bytes(_zipped("a.csv", b"a\n1\n", **{"b.csv": b"a\n2\n"}))
    with pytest.raises(UserError, match=r"rows\.zip: .* holds 2 \(a\.csv, b\.csv\): unpack it"):
        read(path)


def test_a_text_that_begins_as_a_compressed_file_might_is_a_text(tmp_path):
    (tmp_path / "rows.csv").write_text("BZh9\nPK\n")
    assert read(tmp_path / "rows.csv") == [(1, {"BZh9": "PK"})]


@pytest.mark.parametrize("ending", WAYS)
def test_compressed_parquet_is_read(tmp_path, ending):
    stream = io.BytesIO()
    pq.write_table(pa.table({"n": list(range(100))}), stream)
    path = tmp_path / f"rows.parquet.{ending}"
    path.write_bytes(WAYS[ending](stream.getvalue()))
    assert [row["n"] for _, row in read(path)] == list(range(100))
