"""Paths as the configuration names them."""

import pytest

from adder.core.errors import UserError
from adder.core.paths import is_saved_dataset, local_files, resolve_path


def test_a_pattern_stands_for_its_files_sorted(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.csv"):
        (tmp_path / name).touch()
    assert [path.name for path in local_files("*.jsonl", "here", tmp_path)] == ["a.jsonl", "b.jsonl"]
    assert local_files(str(tmp_path / "c.csv"), "here") == [tmp_path / "c.csv"]


def test_a_saved_data_set_is_one_file(tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").touch()
    assert is_saved_dataset(tmp_path / "saved") and not is_saved_dataset(tmp_path)
    assert local_files("saved", "here", tmp_path) == [tmp_path / "saved"]


def test_what_is_not_there_is_said_with_its_setting(tmp_path):
    with pytest.raises(UserError, match=r"^data\.sources\.0\.path: no file matches 'x\*' \(looked for /"):
        local_files("x*", "data.sources.0.path", tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder is a directory, and none that `datasets` saved"):
        local_files("folder", "here", tmp_path)


def test_a_path_starts_at_the_project_or_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve_path("a/../b", tmp_path) == tmp_path.resolve() / "b"
    assert str(resolve_path("~/b", tmp_path)) == "/home/me/b"


def test_a_folder_of_documents_stands_for_these_unless_rows_are_among_them(tmp_path):
    for name in ("b.md", "deep/a.TXT", "picture.png", ".hidden/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert local_files(str(tmp_path), "data") == [tmp_path / "b.md", tmp_path / "deep/a.TXT"]
    (tmp_path / "rows.csv.gz").write_text("x")
    with pytest.raises(UserError, match="is a directory"):
        local_files(str(tmp_path), "data")
