"""Local files of a source: which they are, their names, encodings and digests."""

import hashlib
from pathlib import Path

import pytest

from adder.core.errors import UserError
from data_stages import SUM_LINES, read, write_rows

ROOT = Path(__file__).resolve().parents[3]


def test_each_file_of_a_pattern_has_the_first_encoding_that_fits_all_of_it(tmp_path):
    start = b'{"a": "' + b"x" * 3_000_000
    for name, end in (("one", "é".encode()), ("two", b"\xe9"), ("three", b"")):
        (tmp_path / f"{name}.jsonl").write_bytes(start + end + b'"}\n')
    own = {"path": str(tmp_path / "*.jsonl"), "encoding": ["utf-8", "cp1252"]}
    _, records, entries, *_ = write_rows(tmp_path / "data", [own])
    ends = {record["source"]: record["data"]["a"][-1] for record in records}
    assert ends == {"one": "é", "two": "é", "three": "x"}
    assert {entry["name"]: entry["encoding"] for entry in entries} == {
        "one": "utf-8",
        "two": "cp1252",
        "three": "utf-8",
    }
    with pytest.raises(
        UserError, match=r"two.jsonl: byte 3000007 .* is not valid utf-8, byte 3000007 .* not valid ascii"
    ):
        read(tmp_path / "two.jsonl", encoding=["utf-8", "ascii"])


def test_missing_files_and_empty_patterns_are_named(tmp_path):
    with pytest.raises(UserError, match=r"data.sources.0.path: no file matches .*none\.jsonl"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"no file matches .*\*\.jsonl"):
        read(tmp_path / "*.jsonl")
    with pytest.raises(UserError, match="is a directory"):
        read(tmp_path)


def test_pattern_gives_one_named_entry_a_file_in_sorted_order(tmp_path):
    for folder, name in (("b", "rows"), ("a", "rows"), ("a", "other")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.jsonl").write_text(f'{{"from": "{folder}/{name}"}}\n')
    listed = [{"path": str(tmp_path / "*/*.jsonl"), "license": "MIT"}]
    _, records, entries, *_ = write_rows(tmp_path / "data", listed)
    assert [entry["name"] for entry in entries] == ["other", "a/rows", "b/rows"]
    assert [record["data"]["from"] for record in records] == ["a/other", "a/rows", "b/rows"]
    assert all(entry["license"] == "MIT" and len(entry["sha256"]) == 64 for entry in entries)
    assert {record["split"] for record in records} == {None}


def test_a_file_listed_twice_has_two_names(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    same = {"path": str(tmp_path / "rows.jsonl")}
    _, records, entries, *_ = write_rows(tmp_path / "data", [same], heldout=[same])
    assert [entry["split"] for entry in entries] == ["train", "heldout"]
    assert len({(record["source"], record["row"]) for record in records}) == 2


def test_sha256_of_a_local_file_is_checked(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(SUM_LINES)
    (tmp_path / "more.jsonl").write_bytes(SUM_LINES)
    digest = hashlib.sha256(SUM_LINES).hexdigest()
    write_rows(tmp_path / "right", [{"path": str(tmp_path / "rows.jsonl"), "sha256": digest}])
    with pytest.raises(UserError, match=rf"data.sources.0.sha256: .*rows.jsonl has SHA-256 {digest}, expected 0000"):
        write_rows(tmp_path / "wrong", [{"path": str(tmp_path / "rows.jsonl"), "sha256": "0" * 64}])
    with pytest.raises(UserError, match=r"is the digest of one file; .*\*.jsonl stands for several"):
        write_rows(tmp_path / "several", [{"path": str(tmp_path / "*.jsonl"), "sha256": digest}])


SNIPS = ROOT / "../shared/data/snips"


@pytest.mark.skipif(not SNIPS.exists(), reason="needs the SNIPS files in ../shared/data")
def test_of_several_encodings_each_snips_file_is_read_in_the_first_that_fits(tmp_path):
    source = {
        "path": str(SNIPS / "*.json"),
        "convert": str(ROOT / "config/examples/snips.py"),
        "encoding": ["utf-8", "latin-1"],
    }
    _, records, entries, *_ = write_rows(tmp_path / "data", [source])
    assert len(records) == 13_784 + 700 and not any("error" in record for record in records)
    assert {entry["name"] for entry in entries if entry["encoding"] == "latin-1"} == {"train_PlayMusic_full"}
    assert {entry["encoding"] for entry in entries} == {"utf-8", "latin-1"}
    with pytest.raises(UserError, match=r"PlayMusic_full.json: byte \d+ \(0x..\) is not valid utf-8, byte"):
        write_rows(tmp_path / "neither", [{**source, "encoding": ["utf-8", "ascii"]}])
