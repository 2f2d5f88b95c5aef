"""The tokenizer that travels with the model: the base's own bytes where nothing was set anew."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from adder.core.files import read_json
from adder.tokenization import tokenizer_files
from adder.tokenization.block_tokenizer import load_tokenizer
from tiny import CHATML

OTHER = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture
def base(tiny_model_dir, tmp_path):
    """A base whose files are not as anything here would write them."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps(read_json(folder / name), indent=7))
    return folder


def test_an_unchanged_tokenizer_is_the_bases_byte_for_byte(base, tmp_path):
    tokenizer_files.save(load_tokenizer(base), base, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_truncation_that_a_file_carries_is_no_reason_to_write_it_anew(base, tmp_path):
    spec = read_json(base / "tokenizer.json")
    spec["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (base / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer_files.save(load_tokenizer(base), base, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_named_templates_travel_with_the_tokenizer(base, tmp_path):
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text(OTHER)
    tokenizer_files.save(load_tokenizer(base), base, tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.get_chat_template() == CHATML and loaded.get_chat_template("tool_use") == OTHER


def test_a_template_and_a_pad_token_that_were_set_are_all_that_changes(base, tmp_path):
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template, tokenizer.pad_token = OTHER, "<|endoftext|>"
    tokenizer_files.save(tokenizer, base, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    set_anew = {"chat_template": OTHER, "pad_token": "<|endoftext|>"}
    was = read_json(base / "tokenizer_config.json")
    assert read_json(tmp_path / "out" / "tokenizer_config.json") == was | set_anew
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.chat_template, loaded.pad_token) == (OTHER, "<|endoftext|>")


def test_what_can_only_be_written_anew_is_written_for_both_generations(base, tmp_path):
    tokenizer = load_tokenizer(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    tokenizer_files.save(tokenizer, base, tmp_path / "out")
    written = read_json(tmp_path / "out" / "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast" and "local_files_only" not in written
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("<extra>").input_ids == tokenizer("<extra>").input_ids
