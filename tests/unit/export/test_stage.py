"""The stage "gguf": wanted only where a type is set, refused for models that can't be written."""

import pytest

from adder.core.errors import UserError
from adder.core.files import write_json
from adder.export.stage import GGUF, GgufSettings


def test_no_file_is_wanted_by_default():
    assert not GGUF.wanted(GgufSettings(type="off")) and GGUF.wanted(GgufSettings(type="q8_0"))


def test_a_model_that_cannot_be_written_is_refused_before_any_job(tmp_path):
    assert GGUF.refuse is not None
    write_json(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"]})
    GGUF.refuse(GgufSettings(type="f16"), tmp_path)
    write_json(tmp_path / "config.json", {"architectures": ["MambaForCausalLM"]})
    with pytest.raises(UserError, match="its architecture is MambaForCausalLM"):
        GGUF.refuse(GgufSettings(type="f16"), tmp_path)
