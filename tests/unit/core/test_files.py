"""Files come out the same for the same content, and whole or not at all."""

import errno
import fcntl
import hashlib
import os

import pyarrow as pa
import pytest

from adder.core import files
from adder.core.files import (
    atomic_write,
    clone,
    digest_file,
    has_digest,
    link_or_copy,
    read_json,
    read_jsonl,
    read_table,
    sha256_file,
    write_json,
    write_jsonl,
    write_table,
)


def test_equal_values_are_equal_bytes(tmp_path):
    write_json(tmp_path / "a", {"b": "ü", "a": [1, None]})
    write_json(tmp_path / "b", {"a": [1, None], "b": "ü"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_json(tmp_path / "a") == {"a": [1, None], "b": "ü"}


def test_lines_are_read_as_they_were_written(tmp_path):
    rows = [{"text": "line\nbreak \u2028"}, [1], None]
    assert write_jsonl(tmp_path / "x.jsonl", iter(rows)) == 3
    assert list(read_jsonl(tmp_path / "x.jsonl")) == rows


def test_tables_are_the_same_bytes(tmp_path):
    table = pa.table({"a": [1, 2], "b": ["x", None]})
    write_table(tmp_path / "a.parquet", table)
    write_table(tmp_path / "b.parquet", table)
    assert digest_file(tmp_path / "a.parquet") == digest_file(tmp_path / "b.parquet")
    assert read_table(tmp_path / "a.parquet") == table


def test_digests_are_those_of_the_tools_that_people_have(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest_file(tmp_path / "x") == "384264f676f39536840523f284921cdc68b6846b"  # b2sum -l 160
    assert has_digest(tmp_path / "x", "384264f676f39536840523f284921cdc68b6846b")


def test_a_large_files_digest_is_of_all_its_bytes_in_order_and_marked_as_such(tmp_path, monkeypatch):
    """Each leaf's bytes, their order and the length count; the way in which small files are digested is still known."""
    monkeypatch.setattr(files, "LEAF", 8)
    monkeypatch.setattr(files, "AT_A_TIME", 3)
    path = tmp_path / "x"
    found = set()
    contents = [b"a" * 8 + b"b" * 8 + b"c", b"b" * 8 + b"a" * 8 + b"c", b"a" * 8 + b"b" * 8, b"a" * 8 + b"b" * 9]
    contents += [bytes([*contents[0][:i], 0, *contents[0][i + 1 :]]) for i in range(17)]
    for content in contents:
        path.write_bytes(content)
        digest = digest_file(path)
        assert digest.startswith("tree-") and len(digest) == 45 and has_digest(path, digest)
        assert has_digest(path, hashlib.blake2b(content, digest_size=20).hexdigest())
        found.add(digest)
    assert len(found) == len(contents)
    options = {"digest_size": 20, "inner_size": 20, "fanout": 0, "depth": 2, "leaf_size": 8}
    leaves = [
        hashlib.blake2b(part, node_offset=number, last_node=number == 2, **options).digest()
        for number, part in enumerate((b"a" * 8, b"b" * 8, b"c"))
    ]
    path.write_bytes(contents[0])
    root = hashlib.blake2b(b"".join(leaves), node_depth=1, last_node=True, **options)
    assert digest_file(path) == f"tree-{root.hexdigest()}"


def test_a_link_takes_no_room_and_a_copy_stands_in_where_there_can_be_none(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("1")
    link_or_copy(tmp_path / "x", tmp_path / "y")
    assert os.path.samefile(tmp_path / "x", tmp_path / "y")

    def refuse(*_):
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(tmp_path / "x", tmp_path / "z")
    assert (tmp_path / "z").read_text() == "1" and not os.path.samefile(tmp_path / "x", tmp_path / "z")


def test_where_the_file_system_cannot_clone_nothing_is_left_of_it(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("1")

    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    assert not clone(tmp_path / "x", tmp_path / "y") and not (tmp_path / "y").exists()


def test_a_clone_shares_no_later_change(tmp_path):
    """On Btrfs or XFS: `pytest --basetemp` says where."""
    (tmp_path / "x").write_bytes(b"1" * 5000)
    (tmp_path / "x").chmod(0o444)
    os.utime(tmp_path / "x", (7, 7))
    if not clone(tmp_path / "x", tmp_path / "y"):
        pytest.skip("this file system has no reflinks")
    stat = (tmp_path / "y").stat()
    assert (stat.st_mtime, stat.st_mode & 0o777) == (7, 0o444) and not (tmp_path / "y").samefile(tmp_path / "x")
    (tmp_path / "x").chmod(0o644)
    (tmp_path / "x").write_bytes(b"2" * 5000)
    assert (tmp_path / "y").read_bytes() == b"1" * 5000


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_breaks_off_leaves_what_was_there_and_nothing_else(tmp_path, kind):
    target = tmp_path / "target"

    def write(partial, text):
        if kind == "folder":
            partial.mkdir()
            partial = partial / "inner"
        partial.write_text(text)

    with atomic_write(target) as partial:
        write(partial, "first")
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as partial:
        write(partial, "second")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (target if kind == "file" else target / "inner").read_text() == "first"
