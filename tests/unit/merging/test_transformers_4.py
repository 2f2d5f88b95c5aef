"""Merged models are read by transformers 4 as by 5: the base's own files where it has some, else files for both."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import transformers_4
from adder.core.files import read_json, write_json
from adder.data.checkpoints.portable_files import OF_LOADING
from adder.merging import verification
from adder.tokenization import tokenizer_files
from adder.tokenization.block_tokenizer import load_tokenizer
from adder.tokenization.chat_template import choose_template
from data_stages import write_model
from merge_fixture import make_inputs, reply_by_dtype, run
from model_files import write_gguf
from tiny import CHATML, save_tiny_model

ROPE = {"rope_theta": 100_000.0, "rope_type": "default"}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
PLAIN = "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}<|im_end|>{% endfor %}"


def published_by_4(folder: Path, **config) -> Path:
    """A base as Qwen2.5 is published: files that transformers 4 wrote."""
    save_tiny_model(folder, rope_parameters=config.pop("rope", ROPE), **config)
    own = read_json(folder / "config.json")
    rope = own.pop("rope_parameters")
    own |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": own.pop("dtype"), "transformers_version": "4.45.0"}
    if rope["rope_type"] != "default":
        own["rope_scaling"] = rope
    (folder / "config.json").write_text(json.dumps(own, indent=1))  # not as we would write it
    (folder / "chat_template.jinja").unlink()
    names = ["<|endoftext|>", "<|im_start|>"]
    tokenizer = {
        "chat_template": CHATML,
        "additional_special_tokens": names,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": names}))
    return folder


def merged(folder: Path, base: Path, chat_template: str | None = None, pad: str | None = None, **lora) -> Path:
    """The merged model of the base, with the tokenizer as the tokenize stage writes it."""
    inputs = make_inputs(folder / "in", base, size=0.05, **lora)
    shutil.rmtree(inputs["tokenize"] / "tokenizer")
    tokenizer = load_tokenizer(base)
    choose_template(tokenizer, chat_template)
    tokenizer.pad_token = pad or tokenizer.pad_token
    tokenizer_files.save(tokenizer, base, inputs["tokenize"] / "tokenizer")
    run(inputs, folder / "out", method="lora")
    return folder / "out" / "model"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Merged models by what their base is."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "reply_of_fresh_process", reply_by_dtype("float32"))
        return made_of_each_base(folder)


def made_of_each_base(folder: Path) -> dict[str, Path]:
    bases = {"by 4": published_by_4(folder / "by4"), "scaled": published_by_4(folder / "scaled", rope=LLAMA3)}
    gguf = write_gguf(folder / "tiny.gguf", save_tiny_model(folder / "tiny", rope_parameters=ROPE), rope_theta=1e5)
    write_model(folder / "gguf", gguf)
    bases["out of a GGUF file"] = folder / "gguf" / "model"
    found = {name: merged(folder / f"merged {name}", base) for name, base in bases.items()}
    template = folder / "own.jinja"
    template.write_text(PLAIN)
    found["another template and pad token"] = merged(folder / "other", bases["by 4"], str(template), "<|im_end|>")
    return found | {f"base {name}": base for name, base in bases.items()}


@pytest.fixture(scope="module")
def readings(models):
    """How both generations read them, one process each."""
    library = transformers_4.library()
    if library is None:
        pytest.skip("transformers 4 can't be installed here: the package index is out of reach")
    folders = list(models.values())
    return transformers_4.read(folders), transformers_4.read(folders, library)


def test_both_generations_read_the_same_model_tokens_and_prompt(models, readings):
    own, old = readings
    assert own["version"].startswith("5.") and old["version"].startswith("4.57")
    for name, folder in models.items():
        assert transformers_4.differences(own["found"][str(folder)], old["found"][str(folder)]) == [], name


def test_the_base_of_the_position_embedding_is_seen_in_these_logits(models, readings, tmp_path):
    """What the comparison is for: a theta read as 10,000 shows."""
    folder = shutil.copytree(models["out of a GGUF file"], tmp_path / "wrong")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {n: v for n, v in config.items() if n not in ("rope_theta", "rope_parameters")})
    wrong = transformers_4.read([folder])["found"][str(folder)]
    right = readings[0]["found"][str(models["out of a GGUF file"])]
    assert any("logits" in found for found in transformers_4.differences(wrong, right))


def test_files_that_say_what_the_bases_say_are_its_own(models):
    for name in ("by 4", "scaled", "out of a GGUF file"):
        base, folder = models[f"base {name}"], models[name]
        for path in base.iterdir():
            if path.suffix != ".safetensors" and path.name != "generation_config.json":
                assert (folder / path.name).read_bytes() == path.read_bytes(), f"{name}: {path.name}"


def test_another_template_and_pad_token_are_all_that_changes(models):
    base, folder = models["base by 4"], models["another template and pad token"]
    changed = {"chat_template": PLAIN, "pad_token": "<|im_end|>"}
    was, now = (read_json(path / "tokenizer_config.json") for path in (base, folder))
    assert now == was | changed and list(now) == list(was)
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(folder).pad_token == "<|im_end|>"


SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
TOWER |= {"image_size": 28, "patch_size": 14}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Other shapes than Llama's: norms of queries, two kinds of position embedding, joined matrices, experts, a tower.
OTHERS = {
    "qwen3": SHAPE,
    "mistral": {**SHAPE, "sliding_window": 16},
    "phi3": {**{name: value for name, value in SHAPE.items() if name != "head_dim"}, "sliding_window": 16},
    "gemma3_text": {**SHAPE, "sliding_window": 16, "query_pre_attn_scalar": 8, "rope_theta": 1e5},
    "qwen3_moe": {**SHAPE, **MOE},
    "mixtral": {**SHAPE, **MOE},
    "gpt_oss": {**SHAPE, **MOE, "sliding_window": 16},
    "gemma3": {"text_config": {**SHAPE, "sliding_window": 16}, "vision_config": TOWER, "mm_tokens_per_image": 4},
}
TARGETS = {"phi3": "qkv_proj|down_proj", "gemma3": "q_proj|down_proj"}


def settings_of(name: str, vocabulary: dict[str, int]) -> dict:
    own = OTHERS[name]
    if "text_config" in own:
        return {"model_type": name, **own, "text_config": {**own["text_config"], **vocabulary}, **vocabulary}
    return {"model_type": name, **own, **vocabulary}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Bases that transformers 4 made, and their merged models, as both generations read them."""
    library = transformers_4.library()
    if library is None:
        pytest.skip("transformers 4 can't be installed here: the package index is out of reach")
    folder = tmp_path_factory.mktemp("others")
    tokenizer = published_by_4(folder / "tokenizer")
    known = load_tokenizer(tokenizer)
    vocabulary = {"vocab_size": len(known), "eos_token_id": known.eos_token_id, "pad_token_id": known.pad_token_id}
    bases = {name: folder / f"base {name}" for name in OTHERS}
    transformers_4.make({path: settings_of(name, vocabulary) for name, path in bases.items()}, library)
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "reply_of_fresh_process", reply_by_dtype("float32"))
        for name, base in bases.items():
            for path in tokenizer.iterdir():
                if path.name.startswith(("tokenizer", "special", "vocab", "merges")):
                    shutil.copyfile(path, base / path.name)
            layers = TARGETS.get(name, "q_proj|o_proj")
            wanted = rf"(?!.*(vision|visual)).*({layers})"
            made[name] = merged(folder / f"merged {name}", base, target_modules=wanted)
    folders = [*bases.values(), *made.values()]
    return bases, made, transformers_4.read(folders), transformers_4.read(folders, library)


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_shapes_are_read_alike_by_both_generations(others, name):
    bases, made, own, old = others
    found = [reading["found"][str(made[name])] for reading in (own, old)]
    assert transformers_4.differences(*found) == []
    before = old["found"][str(bases[name])]
    assert before["tokens"] == found[1]["tokens"]
    assert any("logits" in one for one in transformers_4.differences(before, found[1]))  # the adapter is in it


def test_nothing_of_how_it_was_loaded_is_left(models):
    for path in models["out of a GGUF file"].glob("*.json"):
        content = read_json(path)
        assert not set(OF_LOADING) & content.keys() and content.get("use_cache") is not False, path.name
