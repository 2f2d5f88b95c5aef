"""Text and Markdown files: each is a row, wherever it lies and however many there are."""

import gzip
from pathlib import Path

import pytest

from adder.core.errors import UserError
from adder.data.documents import common_folder
from data_stages import data, read, write_rows


def _folder(tmp_path: Path, count: int = 5) -> Path:
    folder = tmp_path / "texts"
    for number in range(count):
        path = folder / f"part {number % 2}" / f"{number}.{('txt', 'md')[number % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"# Größe {number}\r\n\r\nText.\n".encode())
    (folder / ".git").mkdir()
    (folder / ".git" / "config.txt").write_text("no document")
    return folder


def test_a_file_is_one_document(tmp_path):
    (tmp_path / "one.md").write_text("\ufeff# A\n\nb, c\n", encoding="utf-8")
    (tmp_path / "two.txt.gz").write_bytes(gzip.compress(b"a\r\nb"))
    assert read(tmp_path / "one.md") == [(1, {"text": "# A\n\nb, c\n"})]
    assert read(tmp_path / "two.txt.gz") == [(1, {"text": "a\nb"})]
    (tmp_path / "log.dat").write_text("a\n")
    assert read(tmp_path / "log.dat", format="text") == [(1, {"text": "a\n"})]


@pytest.mark.parametrize("pattern", ["texts", "texts/*/*", "texts/**/*.*"])
def test_a_folder_or_pattern_of_documents_is_one_source_with_a_row_each(tmp_path, pattern):
    folder = _folder(tmp_path)
    summary, records, entries, *_ = write_rows(tmp_path / "data", [{"path": str(tmp_path / pattern)}])
    assert [row["text"] for row in data(records)] == [f"# Größe {n}\n\nText.\n" for n in (0, 2, 4, 1, 3)]
    assert [record["row"] for record in records] == [1, 2, 3, 4, 5]
    assert summary == {"rows": 5, "unreadable": 0, "sources": 1}
    before = entries[0]
    assert (before["kind"], before["name"], before["encoding"]) == ("text", "texts", "utf-8")
    (folder / "part 0" / "0.txt").write_text("changed")
    after = write_rows(tmp_path / "again", [{"path": str(tmp_path / pattern)}]).entries[0]
    assert after["sha256"] != before["sha256"]


def test_other_files_of_a_folder_of_documents_are_counted_and_rows_among_them_refused(tmp_path):
    folder = _folder(tmp_path)
    (folder / "picture.png").write_bytes(b"\xff")
    entry = write_rows(tmp_path / "data", [{"path": str(folder)}]).entries[0]
    assert entry["notes"] == ["the folder has files of other kinds, which are left out"] and entry["rows"] == 5
    (folder / "rows.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="is a directory, and none that .* holds just text"):
        read(folder)


def test_each_document_has_the_first_encoding_that_fits(tmp_path):
    folder = _folder(tmp_path)
    (folder / "old.txt").write_bytes(b"Gr\xf6\xdfe")
    with pytest.raises(UserError, match=r"old\.txt: byte 2 \(0xf6\).*cp1252`, in which it reads: Größe"):
        read(folder)
    _, records, entries, *_ = write_rows(tmp_path / "data", [{"path": str(folder), "encoding": ["utf-8", "cp1252"]}])
    assert data(records)[0] == {"text": "Größe"} and entries[0]["encoding"] == "cp1252 or utf-8"


def test_files_of_rows_in_the_same_pattern_stay_files_of_rows(tmp_path):
    folder = _folder(tmp_path, 3)
    (folder / "rows.jsonl").write_text('{"text": "a row"}\n')
    _, records, entries, *_ = write_rows(tmp_path / "data", [{"path": str(folder / "**" / "*.*")}])
    assert [entry["rows"] for entry in entries] == [3, 1] and data(records)[3] == {"text": "a row"}


def test_the_common_folder_is_above_all_files(tmp_path):
    assert common_folder([tmp_path / "a" / "b" / "x", tmp_path / "a" / "c" / "y"]) == tmp_path / "a"
    assert common_folder([Path("x"), Path("y")]) == Path()
