"""The stage "model" as a whole: the same bytes for the same model, loadable, and what is said of it."""

import io
import json

import pytest
import torch

from adder.core.files import digest_file, read_json
from adder.core.progress import Progress
from adder.workflow.code_digest import PACKAGE, closure
from data_stages import write_model
from quantised_checkpoints import by_bitsandbytes, tiny_model
from tiny import save_tiny_model


def test_directory_is_taken_as_it_is_and_loads(tiny_model_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = write_model(tmp_path / "out", tiny_model_dir)
    taken = tmp_path / "out" / "model"
    assert source["kind"] == "directory" and source["revision"] is None
    assert source["context_length"] == 512
    assert set(source["files"]) == {path.name for path in taken.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(taken)
    assert source["parameters"] == sum(p.numel() for p in model.parameters())
    original = AutoModelForCausalLM.from_pretrained(tiny_model_dir).state_dict()
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(taken).chat_template
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


def test_only_what_is_needed_is_taken(model_copy, tmp_path):
    (model_copy / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\nA model.")
    (model_copy / "LICENSE").write_text("text")
    (model_copy / "training_args.bin").write_bytes(b"a pickle beside the weights does no harm")
    (model_copy / "consolidated.safetensors").write_bytes(b"the same weights again")
    (model_copy / "modeling_own.py").write_text("raise SystemExit")
    source = write_model(tmp_path / "out", model_copy)
    assert source["license"] == "apache-2.0"
    assert "LICENSE" in source["files"]
    assert not {"training_args.bin", "consolidated.safetensors", "modeling_own.py", "README.md"} & set(source["files"])


def test_equal_directories_give_equal_bytes(tiny_model_dir, tmp_path):
    write_model(tmp_path / "a", tiny_model_dir)
    write_model(tmp_path / "b", tiny_model_dir)
    assert (tmp_path / "a" / "source.json").read_bytes() == (tmp_path / "b" / "source.json").read_bytes()


@pytest.mark.slow
def test_embedded_model(embedded_model_dir):
    """SmolLM2-135M-Instruct as the default configuration names it."""
    source = read_json(embedded_model_dir.parent / "source.json")
    assert source["sha256"] == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    assert source["license"] == "Apache-2.0"
    assert source["context_length"] == 8192
    assert source["parameters"] == 134_515_008
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer("<|im_start|>hi").input_ids[0] == tokenizer.bos_token_id != tokenizer("hi").input_ids[0]
    # SmolLM2 reads numbers digit by digit; GGUF's metadata says so only by the pre-tokenizer's name.
    assert tokenizer.tokenize("48213") == list("48213")


def test_what_the_model_has_no_use_for_is_said_with_its_count(tmp_path):
    """Layers behind those that config.json counts."""
    folder = save_tiny_model(tmp_path / "source", num_hidden_layers=3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    stream = io.StringIO()
    write_model(tmp_path / "out", folder, Progress("model", stream))
    assert "9 tensors of its files, such as model.layers.2.input_layernorm.weight, are no part" in stream.getvalue()


def test_progress_says_what_is_done(tiny_gguf, tmp_path):
    stream = io.StringIO()
    write_model(tmp_path / "out", tiny_gguf, Progress("model", stream))
    assert "model: dequantising tiny.gguf" in stream.getvalue()


CHECKPOINTS = (
    *("dequantise", "earlier_adapter", "gguf_source", "hub_config", "integer_forms", "integer_weights"),
    *("portable_files", "quantisation", "weight_files"),
)


def test_nothing_but_fetching_a_model_is_part_of_the_stage():
    """Editing how rows are fetched, or the ticket generator, must not fetch the base model anew."""
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in closure("adder.data.fetch_model")}
    checkpoints = {f"checkpoints.{name}" for name in CHECKPOINTS}
    own = {"fetch_model", "model_source", "model_types", *checkpoints}
    core = {"files", "model_config", "paths", "safetensors_layout", "section", "text_model"}
    assert names == {f"data.{name}" for name in own} | {f"core.{name}" for name in core}


def test_a_quantised_checkpoint_comes_out_in_16_bit_and_4_bit_weights_are_kept_too(tmp_path):
    plain = tiny_model(tmp_path / "plain")
    int8 = by_bitsandbytes(plain, tmp_path / "int8", load_in_8bit=True)
    nf4 = by_bitsandbytes(plain, tmp_path / "nf4", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    parameters = write_model(tmp_path / "out-plain", plain)["parameters"]
    for source, kept in ((int8, False), (nf4, True)):
        out = tmp_path / f"out-{source.name}"
        record = write_model(out, source)
        assert record["parameters"] == parameters
        assert record["quantised"]["trained_as_it_is"] == kept == (out / "packed").is_dir()
        assert set(record["files"]) == {path.name for path in (out / "model").iterdir()}
    assert read_json(tmp_path / "out-plain" / "source.json")["quantised"] is None
    packed = {path.name: digest_file(path) for path in nf4.glob("model*")}
    assert packed == {path.name: digest_file(path) for path in (tmp_path / "out-nf4" / "packed").glob("model*")}
