"""What stands for a model and a source in the keys of their stages, and which settings go together."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from adder.core.errors import UserError
from adder.core.file_digests import FileDigests, canonical
from adder.data.model_types import ModelSettings
from adder.data.stage import DATA, MODEL, Data, RowSettings, Source
from data_stages import SUM_LINES, SUMS


def identity(project: Path, source: dict[str, Any]) -> object:
    """What stands for one source of rows."""
    settings = RowSettings.model_validate({"sources": [source]})
    return DATA.identity(settings, "data", FileDigests(project / "digests.json", project))


def test_a_source_counts_by_content_where_it_is_local_and_by_its_settings_elsewhere(tmp_path, monkeypatch):
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_list(SUMS[:3]).save_to_disk(folder)
    (tmp_path / "rows.jsonl").write_bytes(SUM_LINES)
    monkeypatch.setenv("MY_SECRET", "one")
    local, saved = {"path": "rows.jsonl"}, {"path": "saved"}
    web = {"url": "https://host/rows.jsonl?sig=${MY_SECRET}"}
    hub = {"hub": "org/sums", "revision": "main"}
    keys = [identity(tmp_path, source) for source in (local, saved, web, hub)]
    assert len({canonical(key) for key in keys}) == 4
    monkeypatch.setenv("MY_SECRET", "two")
    (tmp_path / "rows.jsonl").touch()
    assert [identity(tmp_path, source) for source in (local, saved, web, hub)] == keys
    for source, changes in (
        (local, [{"weight": 2.0}, {"row_format": "text"}, {"columns": {"text": "answer"}}, {"license": "mit"}]),
        (web, [{"sha256": "0" * 64}]),
        (hub, [{"revision": "v2"}, {"config": "main"}, {"split": "test"}]),
    ):
        for change in changes:
            assert identity(tmp_path, {**source, **change}) not in keys
    (folder / "state.json").write_text((folder / "state.json").read_text() + " ")
    assert identity(tmp_path, saved) != keys[1]
    with pytest.raises(UserError, match="data.sources.0.url: `token` in this URL looks like a secret"):
        identity(tmp_path, {"url": "https://host/x.jsonl?token=abc"})


def test_a_converter_counts_with_what_it_imports_from_beside_it(tmp_path):
    (tmp_path / "code").mkdir()
    for name in ("rows.dat", "code/other.py"):
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "code/mine.py").write_text("import helper\n")
    (tmp_path / "code/helper.py").write_text("import deeper\n")
    (tmp_path / "code/deeper.py").write_text("x = 1\n")
    source = {"path": "rows.dat", "convert": "code/mine.py"}
    keys = [identity(tmp_path, source)]
    (tmp_path / "code/other.py").write_text("x = 2\n")
    assert identity(tmp_path, source) == keys[0]
    for name, text in (("deeper", "x = 2"), ("helper", "import deeper, json"), ("mine", "import helper, json")):
        (tmp_path / f"code/{name}.py").write_text(f"{text}\n")
        keys.append(identity(tmp_path, source))
    assert len({canonical(key) for key in keys}) == 4
    with pytest.raises(UserError, match=r"data\.sources\.0\.convert: there is no file 'none\.py'"):
        identity(tmp_path, {"path": "rows.dat", "convert": "none.py"})


def test_a_model_counts_by_content_where_it_is_local_and_by_its_settings_elsewhere(tmp_path):
    def key(source: str) -> object:
        return MODEL.identity(ModelSettings(source=source), "model", FileDigests(tmp_path / "digests.json", tmp_path))

    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    before = key("model")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/config.json").write_text("{}")
    assert key("./copy") == before
    (tmp_path / "model/config.json").write_text("{} ")
    assert key("model") != before
    assert key("org/name") == ModelSettings(source="org/name").model_dump(mode="json")
    with pytest.raises(UserError, match=r"model\.source: '\./none' is neither there"):
        key("./none")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "one of path, url, hub, builtin, found none"),
        ({"path": "a", "hub": "b/c"}, "found path and hub"),
        ({"builtin": "tickets"}, "`rows` goes with `builtin`"),
        ({"builtin": "poems", "rows": 3}, "'tickets'"),
        ({"path": "a", "config": "train"}, "`config` goes with `hub`, not with `path`"),
        ({"builtin": "tickets", "rows": 3, "split": "train"}, "`split` goes with `hub` or `path` or `url`"),
        ({"hub": "b/c", "convert": "x.py"}, "`convert` goes with `path` or `url`"),
        ({"path": "a", "sha256": "0"}, "sha256"),
    ],
)
def test_settings_of_a_source_that_do_not_go_together(source, message):
    with pytest.raises(ValidationError, match=message):
        Source.model_validate(source)


def test_no_sources_are_refused_and_a_tenth_is_held_out_where_nothing_is_said():
    with pytest.raises(ValidationError, match=r"sources\n +List should have at least 1 item"):
        Data(sources=[])
    assert Data(sources=[Source(path="a")]).heldout.share == 0.1


def test_the_workflow_is_parsed_without_what_the_stages_compute_with():
    heavy = ["torch", "transformers", "pyarrow", "datasets", "huggingface_hub", "requests", "pandas", "numpy"]
    code = f"import json, sys, adder.data.stage; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "{}"}, "names no column"),
        ({"completion": "{a"}, "names no column"),
        ({"prompt": "always the same"}, "names no column in braces"),
        ({"system": ""}, "is empty"),
        ({"prompt": "{a}", "row_format": "text"}, "leave one of them out"),
        ({"roles": {"user": "a", "assistant": ["b", "A "]}}, "`roles` has 'a' twice"),
        ({"roles": {"boss": "a"}}, "boss"),
        ({"message_keys": {"speaker": "role"}}, "speaker"),
        ({"values": {"label": {0: True, 1: False}}}, "such as Yes and No, need quotes"),
        ({"values": {"label": "good"}}, "values"),
    ],
)
def test_templates_and_names_of_messages_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        Source(path="rows.csv", **settings)


def test_values_have_names_by_number_or_by_what_they_are():
    named = {"a": ["x", "y"], "b": {True: "yes", False: "no"}, "c": {"1": "one", 2: "two"}}
    read = Source(path="rows.csv", values=named)
    expected = {"a": {"0": "x", "1": "y"}, "b": {"true": "yes", "false": "no"}, "c": {"1": "one", "2": "two"}}
    assert read.values_by_name() == expected
    assert Source.model_validate(read.model_dump(mode="json")).values_by_name() == expected


def test_roles_are_known_by_what_the_data_call_them():
    source = Source(path="rows.csv", roles={"user": "Customer", "assistant": ["Agent", 1]}, system="Be brief.")
    assert source.roles_by_name() == {"customer": "user", "agent": "assistant", "1": "assistant"}
