"""A file that is no configuration is refused in one sentence, with the line where YAML tells it."""

from pathlib import Path

import pytest

from adder.core.errors import UserError
from adder.workflow import config_file

MISTAKES = {
    "model: {source: a/b\ndata: [": "my.yaml, line 2, column 5: not YAML: expected ',' or '}', but got ':'",
    "model:\n\tsource: a/b": "my.yaml, line 2, column 1: not YAML: found character '\\t' that cannot start any token",
    "- a\n- b": "my.yaml: expected settings by name, such as `model: {source: …}`, found a list",
    "model: {source: a/b}\ntrain:\n  epochs: 1\n  'epochs': 2": (
        "my.yaml, line 4, column 3: `epochs` stands twice in one section (first on line 3); keep one"
    ),
    "runs:\n  a: {seed: 1}\n  a: {}": (
        "my.yaml, line 3, column 3: `a` stands twice in one section (first on line 2); keep one"
    ),
    "data:\n  sources:\n    - {path: a, path: b}": (
        "my.yaml, line 3, column 17: `path` stands twice in one section (first on line 3); keep one"
    ),
    '{"train": {},\n\t"train": {}}': (
        "my.yaml, line 2, column 2: `train` stands twice in one section (first on line 1); keep one"
    ),
    "": "my.yaml: expected settings by name, such as `model: {source: …}`, found nothing",
    "a: \udcff": "my.yaml: not UTF-8 text; give a YAML file with settings",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_what_is_wrong_is_said_with_its_place(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        config_file.read("my.yaml")
    assert str(caught.value) == MISTAKES[text]


def test_a_good_file_is_read(tmp_path):
    (tmp_path / "my.yaml").write_text("train: {epochs: 3}")
    assert config_file.read(tmp_path / "my.yaml") == {"train": {"epochs": 3}}


def test_a_key_of_other_sections_or_of_an_anchor_does_not_stand_twice(tmp_path):
    (tmp_path / "my.yaml").write_text(
        "base: &base {seed: 1, loss: nll}\nmore: &more {<<: *base, seed: 2}\n"
        "runs:\n  a: {<<: *more, seed: 3}\n  b: *more"
    )
    runs = config_file.read(tmp_path / "my.yaml")["runs"]
    assert runs == {"a": {"seed": 3, "loss": "nll"}, "b": {"seed": 2, "loss": "nll"}}


def test_json_may_be_indented_with_tabs(tmp_path):
    (tmp_path / "my.json").write_text('{\n\t"train": {"epochs":\t3, "name": "a\\tb"}\n}')
    assert config_file.read(tmp_path / "my.json") == {"train": {"epochs": 3, "name": "a\tb"}}


def test_a_file_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = "none.yaml: can't be read (No such file or directory); give a YAML file with settings"
    with pytest.raises(UserError) as caught:
        config_file.read("none.yaml")
    assert str(caught.value) == told
