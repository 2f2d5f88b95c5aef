"""The proof holds whatever the memory: by layers as in one piece, in a fresh process, and with near-ties told apart."""

import pytest
import torch
from peft import PeftModel

from adder.core import hardware
from adder.core.errors import UserError
from adder.core.files import read_json
from adder.core.labels import IGNORE_INDEX
from adder.core.progress import Progress
from adder.core.safetensors_layout import parameter_count
from adder.core.stage_spec import Context, Runtime
from adder.merging import verification
from architectures import tiny_architecture
from merge_fixture import make_inputs, reply_by_dtype, run
from tiny import save_tiny_model, token_row, write_tokens


def rows_of(inputs):
    return verification.spread_rows(inputs["tokenize"] / "heldout.arrow", 16, 1024)


def adapted(loaded, inputs):
    return verification.Loaded(
        PeftModel.from_pretrained(loaded.model, inputs["train"] / "adapter").eval(), loaded.by_layers
    )


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        ({}, {}),
        ({"tie_word_embeddings": False, "attention_bias": True}, {"use_dora": True, "bias": "lora_only"}),
        ({"tie_word_embeddings": False}, {"modules_to_save": ["lm_head"]}),
    ],
)
def test_a_model_loaded_by_layers_predicts_as_one_held_in_memory(tmp_path, model, lora):
    """fp32 sums in another order: logits of about one agree to 1e-5. Batches of several rows are made here."""
    inputs = make_inputs(tmp_path / "in", save_tiny_model(tmp_path / "base", **model), **lora)
    base, rows = inputs["model"] / "model", rows_of(inputs)
    assert len(verification._batches(rows, verification.BATCH)) < len(rows)
    found = []
    for loading in ("whole", "by layers"):
        plain = verification.load(base, torch.float32, loading, "cpu")
        bare = list(verification.logits_of(plain, rows))
        found.append((bare, list(verification.logits_of(adapted(plain, inputs), rows))))
    for one, other in zip(*found, strict=True):
        for (logits, target), (same, same_target) in zip(one, other, strict=True):
            assert torch.equal(target, same_target) and torch.allclose(logits, same, atol=1e-5)
    assert not torch.allclose(found[0][0][0][0], found[0][1][0][0], atol=1e-3)


def test_by_layers_the_weights_stay_16_bit_in_their_file_between_passes(tmp_path):
    inputs = make_inputs(tmp_path / "in", save_tiny_model(tmp_path / "base"))
    loaded = verification.load(inputs["model"] / "model", torch.float32, "by layers", "cpu")
    seen = []
    layers = loaded.model.model.layers
    layers[0].mlp.register_forward_hook(lambda *_: seen.append([layer.mlp.up_proj.weight.dtype for layer in layers]))
    list(verification.logits_of(loaded, rows_of(inputs)))
    assert seen[0] == [torch.float32, torch.bfloat16]
    assert {parameter.dtype for parameter in layers.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "falcon", "jamba", "opt", "stablelm", "gpt_oss", "mamba"])
def test_rows_in_one_pass_do_not_see_one_another(tmp_path, name):
    """Whatever the attention, and with recurrent states."""
    tiny_architecture(name).save_pretrained(tmp_path)
    loaded = verification.load(tmp_path, torch.float32, "by layers", "cpu")
    rows = [token_row(number, 9 + number, 128) for number in range(5)]
    together = list(verification.logits_of(loaded, rows))
    for row, (logits, target) in zip(rows, together, strict=True):
        [(alone, own)] = verification.logits_of(loaded, [row])
        assert torch.equal(target, own) and torch.allclose(logits, alone, atol=1e-5)


def test_loading_is_chosen_by_free_memory(tmp_path, monkeypatch):
    base = save_tiny_model(tmp_path / "base")
    needed = 4 * parameter_count(base)
    for device, share in (("cpu", verification.MEMORY_SHARE), ("cuda", verification.GPU_SHARE)):
        for factor, value in ((1.01, "whole"), (0.99, "by layers")):
            monkeypatch.setattr(hardware, "free_memory", lambda _, f=factor, s=share: needed / s * f)
            choice = verification.choose_loading(base, torch.float32, device)
            assert choice.value == value and "GiB of weights" in choice.reason and "float32" in choice.reason


def test_the_whole_proof_by_layers(tmp_path, monkeypatch):
    inputs = make_inputs(tmp_path / "in", save_tiny_model(tmp_path / "base"))
    monkeypatch.setattr(verification, "reply_of_fresh_process", reply_by_dtype("bfloat16"))
    monkeypatch.setattr(hardware, "free_memory", lambda _: 1000)
    run(inputs, tmp_path / "out")
    found = read_json(tmp_path / "out" / "proof.json")
    assert found["loading"]["value"] == "by layers" and 0 < found["kl"] < found["tolerance"]
    assert found["reloaded"]["dtype"] == "bfloat16"
    assert "each layer's weights read when its turn comes" in found["reason"]


def test_a_fresh_process_replies_as_base_and_adapter_do(tmp_path):
    """The real thing: another Python, which has nothing but the merged folder."""
    inputs = make_inputs(tmp_path / "in", save_tiny_model(tmp_path / "base"), size=0.1)
    run(inputs, tmp_path / "out")
    found = read_json(tmp_path / "out" / "proof.json")["reloaded"]
    assert found["same"] or found["tied"]
    assert found["dtype"] == "float32" and "Message" in found["prompt"] and found["reply"]


def reply_logits(ids, gap=None, at=1):
    """Logits whose favourites are `ids`, but for one that is `gap` below another token."""
    logits = torch.zeros(len(ids), 10)
    logits[torch.arange(len(ids)), torch.tensor(ids)] = 5.0
    if gap is not None:
        logits[at, (ids[at] + 1) % 10] = 5.0 + gap
    return logits


def test_equal_and_nearly_tied_replies_pass_and_others_fail():
    reply = {"input_ids": [3, 4, 5], "text": "a b c"}
    same = {"reply": "a b c", "same": True, "tied": None, "counts_as_tied": 0.1}
    assert verification.compare_reply(reply_logits([3, 4, 5]), reply, 0.1) == same
    found = verification.compare_reply(reply_logits([3, 4, 5], 0.05), reply, 0.1)
    assert not found["same"] and found["tied"] == {"position": 2, "gap": pytest.approx(0.05, abs=1e-6)}
    with pytest.raises(UserError, match="at token 2 of 'a b c' they prefer another one by 0.2 nats"):
        verification.compare_reply(reply_logits([3, 4, 5], 0.2), reply, 0.1)


def test_a_wrong_reply_fails_the_stage(tmp_path, monkeypatch):
    inputs = make_inputs(tmp_path / "in", save_tiny_model(tmp_path / "base"), size=0.1)
    right = reply_by_dtype("float32")

    def wrong(model, prompt, device):
        reply, dtype = right(model, prompt, device)
        return reply | {"input_ids": [(token + 1) % 300 for token in reply["input_ids"]]}, dtype

    monkeypatch.setattr(verification, "reply_of_fresh_process", wrong)
    with pytest.raises(UserError, match="doesn't reply as base \\+ adapter do: at token 1"):
        run(inputs, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_logits_that_are_not_finite_fail(tmp_path):
    good = [(torch.zeros(2, 5), torch.tensor([1, 2]))]
    bad = [(torch.full((2, 5), torch.nan), torch.tensor([1, 2]))]
    for expected, actual in ((good, bad), (bad, good)):
        with pytest.raises(UserError, match="aren't finite"):
            verification.differences(expected, iter(actual), good)


def test_differences_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    make = [[(torch.randn(n, 7, generator=generator), torch.arange(n)) for n in (3, 2)] for _ in range(3)]
    found = verification.differences(make[0], iter(make[1]), make[2])
    before, after, _ = (torch.cat([logits for logits, _ in pairs]).double() for pairs in make)
    target = torch.cat([t for _, t in make[0]])
    kl = torch.nn.functional.kl_div(
        after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert found["kl"] == pytest.approx(float(kl), rel=1e-5) and found["positions"] == 5
    assert found["max_difference"] == pytest.approx(float((before - after).abs().max()), rel=1e-6)
    assert found["mean_difference"] == pytest.approx(float((before - after).abs().mean()), rel=1e-5)
    loss = torch.nn.functional.cross_entropy(after, target)
    assert found["heldout_loss"]["merged"] == pytest.approx(float(loss), rel=1e-5)
    assert found["top_token_agreement"] == float((before.argmax(-1) == after.argmax(-1)).double().mean())
    assert found["base_kl"] > 0


def test_a_few_flipped_routers_pass_and_a_shift_of_all_positions_does_not():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(40, 7, generator=generator)
    pairs = [(before, torch.arange(40) % 7)]
    few = before.clone()
    few[::10] += 0.3 * torch.randn(4, 7, generator=generator)
    shifted = before + 0.1 * torch.randn(40, 7, generator=generator)
    flipped, wrong = (verification.differences(pairs, [(x, pairs[0][1])], pairs) for x in (few, shifted))
    assert flipped["kl"] > 1e-3 < wrong["kl"]
    assert flipped["kl_median"] == 0 and wrong["kl_median"] > 1e-3
    worse = {**flipped, "heldout_loss": {"merged": 2.1, "adapter": 2.0}}
    same = {**flipped, "heldout_loss": {"merged": 2.001, "adapter": 2.0}}
    passed = [verification.only_routers_flip(found, 1e-3) for found in (same, worse, {**same, "kl_median": 2e-3})]
    assert passed == [True, False, False]


def test_rows_are_spread_and_cut_to_the_labels_asked_for(tmp_path):
    write_tokens(tmp_path / "rows.arrow", [token_row(number, 20) for number in range(40)])
    rows = verification.spread_rows(tmp_path / "rows.arrow", 16, 1024)
    assert len(rows) == 16 and rows[1]["input_ids"] == token_row(2, 20)["input_ids"]
    rows = verification.spread_rows(tmp_path / "rows.arrow", 16, 25)
    assert sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:]) == 25
    assert verification.shortest_prompt([token_row(1, 20), token_row(2, 8)]) == token_row(2, 8)["input_ids"][:4]


@pytest.mark.gpu
@pytest.mark.parametrize("loading", ["whole", "by layers"])
def test_the_proof_on_a_gpu(tmp_path, monkeypatch, loading):
    inputs = make_inputs(tmp_path / "in", save_tiny_model(tmp_path / "base"))
    if loading == "by layers":
        monkeypatch.setattr(hardware, "free_memory", lambda _: 1000)
        monkeypatch.setattr(verification, "reply_of_fresh_process", reply_by_dtype("bfloat16"))
    out = tmp_path / "out"
    out.mkdir()
    rows = rows_of(inputs)
    from adder.merging import streamed_merge, weight_deltas

    context = Context(Progress.silent(), Runtime(device="cuda", threads=1))
    streamed_merge.merge_weights(
        inputs["model"] / "model", weight_deltas.read_adapter(inputs["train"] / "adapter"), out, context
    )
    for path in (inputs["model"] / "model").glob("*.json"):
        (out / path.name).write_bytes(path.read_bytes())
    found = verification.compare(inputs["model"] / "model", inputs["train"] / "adapter", out, rows, 1e-3, context)
    assert 0 < found["kl"] < 1e-3 and found["loading"]["value"] == loading
