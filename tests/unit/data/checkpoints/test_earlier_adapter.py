"""The adapter that a training goes on from: where it may be, and which base it is for."""

import io
import shutil
from pathlib import Path

import pytest

from adder.core import paths
from adder.core.errors import UserError
from adder.core.file_digests import FileDigests
from adder.core.files import read_json, write_json
from adder.core.progress import Progress
from adder.data.checkpoints import earlier_adapter
from adder.data.model_types import ModelSettings
from adder.data.stage import MODEL
from data_stages import write_model
from merge_fixture import make_adapter
from tiny import save_tiny_model


@pytest.fixture(scope="module")
def adapter(tiny_model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "own"
    make_adapter(tiny_model_dir, folder)
    return folder


def test_a_folder_is_taken_with_its_base_told(tiny_model_dir, tmp_path, adapter):
    record = write_model(tmp_path / "out", tiny_model_dir, adapter=str(adapter))
    assert record["adapter"] == {"source": str(adapter), "revision": None, "base": str(tiny_model_dir)}
    taken = {path.name for path in (tmp_path / "out" / "adapter").iterdir()}
    assert taken == {"adapter_config.json", "adapter_model.safetensors"}
    assert write_model(tmp_path / "none", tiny_model_dir)["adapter"] is None


def pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def without_config(folder):
    (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    ("change", "words"), [(pickled, "pickle, which can run code"), (without_config, r"no adapter_config\.json")]
)
def test_what_is_no_adapter_is_refused_before_any_job(tmp_path, adapter, change, words):
    shutil.copytree(adapter, tmp_path / "own")
    change(tmp_path / "own")
    settings = ModelSettings(source="org/base", adapter="own")
    with pytest.raises(UserError, match=f"model.adapter: own holds .*{words}"):
        MODEL.identity(settings, "model", FileDigests(tmp_path / "digests.json", tmp_path))
    with pytest.raises(UserError, match="neither a folder here .* nor a hub id"):
        paths.adapter_folder("./elsewhere")


def test_a_folder_counts_by_its_content(tmp_path, adapter):
    shutil.copytree(adapter, tmp_path / "a")
    shutil.copytree(adapter, tmp_path / "b")
    digests = FileDigests(tmp_path / "digests.json", tmp_path)
    keys = [MODEL.identity(ModelSettings(source="o/b", adapter=name), "model", digests) for name in ("a", "b")]
    assert keys[0] == keys[1]
    write_json(tmp_path / "b" / "adapter_config.json", {"r": 1})
    assert MODEL.identity(ModelSettings(source="o/b", adapter="b"), "model", digests) != keys[0]


def test_an_adapter_of_another_model_is_refused_by_its_shapes(tmp_path, adapter):
    other = save_tiny_model(tmp_path / "other", hidden_size=32)
    with pytest.raises(UserError, match="it is an adapter of another model"):
        write_model(tmp_path / "out", other, adapter=str(adapter))


@pytest.mark.parametrize(
    ("source", "base", "refused"),
    [
        ("org/base-7B", "org/base-7B", False),
        ("unsloth/base-7B-bnb-4bit", "org/Base-7B", False),
        ("unsloth/base-7B-unsloth-bnb-4bit", "org/base-7B", False),
        ("org/base-7B-Instruct", "org/base-7B", True),
        ("org/base-7B", None, False),
    ],
)
def test_the_names_of_bases_are_compared_where_both_are_of_the_hub(tiny_model_dir, adapter, source, base, refused):
    settings = ModelSettings(source=source, adapter="own")
    record = {"source": "own", "revision": None, "base": base}
    stream = io.StringIO()
    where = (adapter, tiny_model_dir, Progress(stream=stream))
    if refused:
        with pytest.raises(UserError, match=f"was trained on {base}, and model.source is {source}"):
            earlier_adapter.check_base(record, settings, *where)
    else:
        earlier_adapter.check_base(record, settings, *where)
        assert not stream.getvalue()


def test_another_name_of_a_local_base_is_said(tiny_model_dir, adapter):
    stream = io.StringIO()
    settings = ModelSettings(source=str(tiny_model_dir), adapter="own")
    record = {"source": "own", "revision": None, "base": "org/quite-another"}
    earlier_adapter.check_base(record, settings, adapter, tiny_model_dir, Progress(stream=stream))
    assert "was trained on org/quite-another; its shapes fit" in stream.getvalue()
    assert read_json(adapter / "adapter_config.json")["peft_type"] == "LORA"
