"""Where tensors lie, by the headers alone, is where safetensors itself has them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from adder.core.errors import UserError
from adder.core.safetensors_layout import (
    DTYPES,
    INDEX,
    layout,
    parameter_count,
    shard_files,
    stored_tensors,
    total_bytes,
)

TENSORS = {"b": torch.arange(6, dtype=torch.float32).view(2, 3), "a": torch.ones(4, dtype=torch.bfloat16)}


def test_bytes_of_a_tensor_are_found_in_the_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = layout(tmp_path / "model.safetensors")
    assert found.size == (tmp_path / "model.safetensors").stat().st_size
    content = (tmp_path / "model.safetensors").read_bytes()
    for stored in found.tensors:
        values = torch.frombuffer(bytearray(content[stored.start : stored.stop]), dtype=DTYPES[stored.dtype])
        assert torch.equal(values.view(stored.shape), TENSORS[stored.name])


def test_shards_count_together(tmp_path):
    for number, (name, tensor) in enumerate(TENSORS.items()):
        save_file({name: tensor}, tmp_path / f"{number}.safetensors")
    index = {"weight_map": {name: f"{number}.safetensors" for number, name in enumerate(TENSORS)}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert shard_files(tmp_path) == ["0.safetensors", "1.safetensors"]
    assert stored_tensors(tmp_path).keys() == TENSORS.keys() and parameter_count(tmp_path) == 10
    assert total_bytes(tmp_path) == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no model.safetensors and no"):
        shard_files(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"short", b"x" * 5000, (2**40).to_bytes(8, "little"), b"\x02" + bytes(7) + b"[]"]
)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is no whole safetensors file: it doesn't begin with"):
        layout(tmp_path / "model.safetensors")


def test_a_file_that_is_cut_off_or_only_a_pointer_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="ends before its last tensor does"):
        layout(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        layout(path)
