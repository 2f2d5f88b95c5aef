"""Digests are of the content, and of large files no more often than needed."""

import errno
import json
import os
import shutil

import pytest

import damaged_files
from adder.core import file_digests, files
from adder.core.errors import UserError
from adder.core.file_digests import FileDigests, canonical


@pytest.fixture
def digests(tmp_path, monkeypatch) -> FileDigests:
    """Of files that are as good as old."""
    monkeypatch.setattr(file_digests, "UNSETTLED", 0)
    return FileDigests(tmp_path / "cache" / "digests.json", tmp_path)


def test_equal_values_are_equal_text_whatever_the_order_of_keys():
    assert canonical({"a": 1, "b": [2, "ü"]}) == canonical({"b": [2, "ü"], "a": 1}) == '{"a":1,"b":[2,"ü"]}'


def test_a_file_is_read_once_while_it_stays_as_it_is(tmp_path, digests, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}")
    before = digests.of(tmp_path / "rows.jsonl")

    monkeypatch.setattr(file_digests, "digest_file", damaged_files.never)
    assert FileDigests(digests.memory, tmp_path).of(tmp_path / "rows.jsonl") == before
    assert next(iter(json.loads(digests.memory.read_text())["digests"].values()))[1] == before


def test_a_file_under_another_name_or_written_anew_with_a_known_digest_is_not_read(tmp_path, digests, monkeypatch):
    (tmp_path / "a").write_text("weights")
    known = digests.of(tmp_path / "a")
    digests.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").write_text("weights")
    digests.note({tmp_path / "c": known})

    monkeypatch.setattr(file_digests, "digest_file", damaged_files.never)
    assert FileDigests(digests.memory, tmp_path).of_all([tmp_path / "b", tmp_path / "c"]) == [known, known]


def test_what_has_just_changed_is_not_remembered(tmp_path):
    """File systems count time in steps: another change may bear the same time stamp."""
    (tmp_path / "x").write_text("1")
    digests = FileDigests(tmp_path / "digests.json", tmp_path)
    digests.of(tmp_path / "x")
    assert not digests.memory.exists() and digests.changed() == []


def test_what_takes_long_is_said_before_and_once(tmp_path, monkeypatch):
    monkeypatch.setattr(file_digests, "WORTH_SAYING", 10)
    monkeypatch.setattr(file_digests, "UNSETTLED", 0)
    (tmp_path / "model").mkdir()
    for name in ("a", "b"):
        (tmp_path / "model" / name).write_text("12345")
    said = []
    digests = FileDigests(tmp_path / "digests.json", tmp_path, said.append)
    for _ in range(2):
        digests.of(tmp_path / "model")
    assert said == [f"reading {tmp_path / 'model' / 'a'} and 1 more files, 0.0 GB, to know the content again: once"]


@pytest.mark.parametrize("place", range(0, 160, 7))
def test_a_damaged_memory_tells_nothing(tmp_path, digests, place):
    (tmp_path / "x").write_text("1")
    before = digests.of(tmp_path / "x")
    content = digests.memory.read_bytes()
    place %= len(content)
    digests.memory.write_bytes(content[:place] + bytes([content[place] ^ 2]) + content[place + 1 :])
    assert FileDigests(digests.memory, tmp_path).of(tmp_path / "x") == before


def test_what_another_version_remembered_of_a_large_file_is_not_taken_for_its_digest(tmp_path, digests, monkeypatch):
    (tmp_path / "x").write_text("large enough")
    small = digests.of(tmp_path / "x")
    monkeypatch.setattr(file_digests, "LEAF", 4)
    monkeypatch.setattr(files, "LEAF", 4)
    large = FileDigests(digests.memory, tmp_path).of(tmp_path / "x")
    assert large.startswith("tree-") and not small.startswith("tree-")
    stat = (tmp_path / "x").stat()
    assert FileDigests(digests.memory, tmp_path).holds(tmp_path / "x", small, stat.st_size)


@pytest.mark.parametrize("how", ["copied over with its time stamp", "renamed into its place", "written in place"])
def test_another_content_of_the_same_size_and_time_stamp_is_noticed(tmp_path, digests, how):
    file, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    file.write_text("1111")
    other.write_text("2222")
    stamp = file.stat().st_mtime_ns
    os.utime(other, ns=(stamp, stamp))
    before = digests.of(file)
    if how == "copied over with its time stamp":
        shutil.copy2(other, file)
    if how == "renamed into its place":
        os.replace(other, file)
    if how == "written in place":
        file.write_text("2222")
        os.utime(file, ns=(stamp, stamp))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (4, stamp)
    assert digests.of(file) != before


@pytest.mark.parametrize("clones", [False, True])
def test_own_links_clones_and_removals_cost_no_second_reading(tmp_path, digests, monkeypatch, clones):
    model, target = tmp_path / "model.safetensors", tmp_path / "published"
    model.write_text("weights")
    before = digests.of(model)
    # A copy, for file systems that have no reflinks.
    monkeypatch.setattr(file_digests, "clone", lambda source, to: clones and bool(shutil.copy2(source, to)))
    monkeypatch.setattr(file_digests, "digest_file", damaged_files.never)
    digests.clone_or_link(model, target)
    assert target.samefile(model) == (not clones)
    digests.link(model, tmp_path / "linked")
    assert FileDigests(digests.memory, tmp_path).of_all([model, target, tmp_path / "linked"]) == [before] * 3
    model.unlink() if clones else digests.remove(model)
    digests.remove(tmp_path / "linked")
    digests.remove(tmp_path / "linked")  # which isn't there
    assert FileDigests(digests.memory, tmp_path).of(target) == before


def test_links_of_others_have_the_file_read_again(tmp_path, digests):
    """A change whose time stamp was put back may hide behind them, and behind one that comes while we link."""
    (tmp_path / "x").write_text("1111")
    before = digests.of(tmp_path / "x")
    stat = (tmp_path / "x").stat()

    def write() -> None:
        (tmp_path / "x").write_text("2222")
        os.utime(tmp_path / "x", ns=(stat.st_mtime_ns, stat.st_mtime_ns))

    write()
    os.link(tmp_path / "x", tmp_path / "y")
    assert FileDigests(digests.memory, tmp_path).of(tmp_path / "x") != before
    assert not FileDigests(digests.memory, tmp_path).holds(tmp_path / "x", before, 4)


def test_what_has_just_changed_is_copied_instead_of_linked(tmp_path):
    (tmp_path / "x").write_text("1")
    digests = FileDigests(tmp_path / "digests.json", tmp_path)
    digests.link(tmp_path / "x", tmp_path / "y")
    assert (tmp_path / "y").read_text() == "1" and not (tmp_path / "y").samefile(tmp_path / "x")
    assert digests.changed() == []


def test_own_links_to_what_is_read_are_no_change_and_those_of_others_are(tmp_path, digests):
    for name in ("x", "y", "z"):
        (tmp_path / name).write_text(name)
    digests.of_all([tmp_path / name for name in ("x", "y", "z")])
    other = FileDigests(digests.memory, tmp_path)
    other.link(tmp_path / "x", tmp_path / "linked")
    assert digests.changed() == []
    os.link(tmp_path / "y", tmp_path / "other")
    other.remove(tmp_path / "linked")
    (tmp_path / "z").unlink()
    assert digests.changed() == [tmp_path / "y", tmp_path / "z"]


def test_a_folder_counts_by_names_and_content_of_its_files(tmp_path, digests):
    (tmp_path / "a" / "inner").mkdir(parents=True)
    (tmp_path / "a" / "inner" / "x").write_text("1")
    before = digests.of(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert digests.of(tmp_path / "b") == before
    (tmp_path / "b" / "inner" / "x").rename(tmp_path / "b" / "inner" / "y")
    assert digests.of(tmp_path / "b") != before


def test_a_file_holds_what_it_was_written_with(tmp_path, digests, monkeypatch):
    path = tmp_path / "x"
    path.write_text("1111")
    stat = path.stat()
    asked = {"digest": files.digest_file(path), "size": 4}
    for _ in range(2):
        assert digests.holds(path, **asked)
        monkeypatch.setattr(file_digests, "digest_file", damaged_files.never)  # once
    monkeypatch.undo()
    path.touch()
    assert digests.holds(path, **asked)
    path.write_text("2222")
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert not digests.holds(path, **asked)
    path.write_text("11")
    assert not digests.holds(path, **asked)
    path.unlink()
    assert not digests.holds(path, **asked)


def test_a_memory_that_cannot_be_read_costs_no_more_than_time(tmp_path):
    (tmp_path / "digests.json").write_text("{")
    (tmp_path / "x").write_text("1")
    assert len(FileDigests(tmp_path / "digests.json", tmp_path).of(tmp_path / "x")) == 40


def test_a_file_that_is_not_there_is_named_with_its_setting(digests):
    with pytest.raises(UserError, match=r"tokenize.chat_template: there is no file 'gone.jinja' \(looked for /"):
        digests.of_named("gone.jinja", "tokenize.chat_template")


def test_a_file_that_may_not_be_read_is_named_with_why(tmp_path, digests, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(file_digests, "digest_file", refuse)
    with pytest.raises(UserError, match=r"rows\.jsonl: Permission denied; give yourself the right to it"):
        digests.of(tmp_path / "rows.jsonl")
