"""Which base a QLoRA adapter is merged into: what training saw is reproduced, measured, and chosen by its loss."""

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import merge_fixture
from adder.core import precision
from adder.core.errors import UserError
from adder.core.files import read_json
from adder.core.labels import IGNORE_INDEX
from adder.merging import base_choice, streamed_merge
from adder.merging.verification import Loaded, row_losses, spread_rows
from adder.merging.weight_deltas import read_adapter
from adder.training import base_model
from merge_fixture import SILENT, make_inputs, reply_in_this_process, weights  # noqa: F401 (a fixture)
from tiny import save_tiny_model

pytestmark = pytest.mark.usefixtures("reply_in_this_process")
# Wider than the usual tiny model: rows of 64 numbers would be one NF4 block each.
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "tie_word_embeddings": False}


def run(inputs, out, method="qlora", **options):
    return merge_fixture.run(inputs, out, method=method, **options)


@pytest.fixture
def inputs(tmp_path):
    """Parents of a merge after a QLoRA training."""
    base = save_tiny_model(tmp_path / "base", **SHAPE)
    found = make_inputs(tmp_path / "in", base, size=0.05, target_modules=["q_proj", "down_proj"])
    return found


def as_trained(base, device="cpu"):
    """The values that base_model's NF4 layers compute with, by the weight's name."""
    dtype = precision.compute_dtype(device).value
    model, _ = base_model.load(base, "qlora", dtype, device)
    names = {f"{name}.weight" for name, _ in model.named_modules() if name.endswith("_proj")}
    layers = base_model.four_bit_layers(model)
    if layers:
        base_model.hold_dequantised(model, getattr(torch, dtype))
    return {name: value.cpu() for name, value in model.state_dict().items() if name in names}


def check_dequantised(inputs, device):
    base = inputs["model"] / "model"
    wanted = as_trained(base, device)
    compute = getattr(torch, precision.compute_dtype(device).value)
    changes = base_choice.on_dequantised(base, {}, compute, device)
    assert changes.keys() == wanted.keys() and len(changes) == 14
    for name, weight in weights(base).items():
        if name in changes:
            found = changes[name].apply(weight.float()).cpu()
            assert torch.equal(found, wanted[name].bfloat16().float())
            assert not torch.equal(found, weight.float())


def test_the_dequantised_base_is_what_training_computed_with(inputs):
    check_dequantised(inputs, "cpu")


@pytest.mark.gpu
def test_the_dequantised_base_is_what_training_computed_with_on_a_gpu(inputs):
    check_dequantised(inputs, "cuda")


def test_weights_stored_the_other_way_round_are_quantised_by_outputs(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=1, n_head=4, n_positions=64))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    found = base_choice.on_dequantised(tmp_path, {}, torch.bfloat16, "cpu")["transformer.h.0.mlp.c_fc.weight"]
    weight = model.transformer.h[0].mlp.c_fc.weight.data.float()
    assert found.transposed and found.shape == (64, 256)
    wanted = base_choice.dequantised(weight.T.contiguous(), torch.bfloat16, "cpu").T.float()
    assert torch.equal(found.apply(weight), wanted)


@pytest.mark.parametrize("value", ["original", "dequantized"])
def test_either_base_can_be_forced(inputs, tmp_path, value):
    summary = run(inputs, tmp_path / "out", base=value)
    proof = read_json(tmp_path / "out" / "proof.json")
    assert summary["base"] == proof["base"]["value"] == value and proof["base"]["alternatives"] == []
    assert proof["kl"] < proof["tolerance"] and 0 < proof["max_difference"] < 0.05
    assert proof["adapted_weights"] == proof["changed_weights"] == (4 if value == "original" else 14)
    before, after = weights(inputs["model"] / "model"), weights(tmp_path / "out" / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == proof["adapted_weights"]
    if value == "dequantized":  # what no pair adapts is exactly what training saw
        for name, wanted in as_trained(inputs["model"] / "model").items():
            if "q_proj" not in name and "down_proj" not in name:
                assert torch.equal(after[name], wanted.bfloat16())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model", "proof.json"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")


def test_all_three_are_measured_on_the_same_rows(inputs, tmp_path):
    run(inputs, tmp_path / "out")
    found = read_json(tmp_path / "out" / "proof.json")["base"]
    table = found["alternatives"]
    assert [row["base"] for row in table] == list(base_choice.NAMES.values())
    assert {(row["rows"], row["tokens"]) for row in table} == {(12, table[0]["tokens"])}
    assert table[0]["difference"] is None and all(len(row["difference"]["ci95"]) == 2 for row in table[1:])
    assert f"{table[1]['loss']:.4f}" in found["reason"] and f"{table[2]['loss']:.4f}" in found["reason"]
    # By other code: PEFT on the loaded models.
    rows = spread_rows(inputs["tokenize"] / "heldout.arrow", 64, 8192)
    dtype = precision.compute_dtype("cpu").value
    model, _ = base_model.load(inputs["model"] / "model", "qlora", dtype, "cpu")
    adapted = PeftModel.from_pretrained(model, inputs["train"] / "adapter")
    assert table[0]["loss"] == pytest.approx(plain_loss(adapted, rows, dtype), abs=1e-3)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype=getattr(torch, dtype))
    chosen = table[1 if found["value"] == "original" else 2]
    assert chosen["loss"] == pytest.approx(plain_loss(merged, rows, dtype), abs=1e-3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model", "proof.json"]


@torch.no_grad()
def plain_loss(model, rows, dtype):
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels, use_cache=False).loss
        number = int((labels[:, 1:] != IGNORE_INDEX).sum())
        total, count = total + float(loss) * number, count + number
    return total / count


def test_the_dequantised_base_is_nearer_to_what_was_trained(inputs):
    """Merged into what training saw, predictions are those of training; into the original they are NF4's error off."""
    base, adapter = inputs["model"] / "model", inputs["train"] / "adapter"
    rows = spread_rows(inputs["tokenize"] / "heldout.arrow", 64, 8192)
    compute = getattr(torch, precision.compute_dtype("cpu").value)
    candidates = {"original": read_adapter(adapter)}
    candidates["dequantized"] = base_choice.on_dequantised(base, candidates["original"], compute, "cpu")
    work = inputs["model"] / "work"
    work.mkdir()
    losses = base_choice.measure(base, adapter, candidates, rows, work, SILENT)
    gaps = {
        name: sum(abs(a - b) for (a, _), (b, _) in zip(losses["trained"], losses[name], strict=True))
        for name in candidates
    }
    assert gaps["dequantized"] < 0.5 * gaps["original"]


def losses(shift, noise=0.0):
    """Losses of 40 rows of 10 tokens; the dequantised differs by `shift` nats a token from the original."""
    spread = [((-1) ** row) * noise for row in range(40)]
    original = [(10.0 + row / 10, 10) for row in range(40)]
    dequantised = [(nats + 10 * (shift + s), 10) for (nats, _), s in zip(original, spread, strict=True)]
    return {"trained": [(nats - 1, 10) for nats, _ in original], "original": original, "dequantized": dequantised}


@pytest.mark.parametrize(
    ("shift", "noise", "value", "words"),
    [
        (-0.02, 0.01, "dequantized", "the lower is taken"),
        (0.02, 0.01, "original", "the lower is taken"),
        (-0.02, 0.5, "original", "a tie within noise, which goes to the original"),
        (0.0, 0.0, "original", "a tie within noise, which goes to the original"),
    ],
)
def test_the_lower_loss_wins_and_a_tie_goes_to_the_original(shift, noise, value, words):
    found = base_choice.choose_base(losses(shift, noise))
    assert found.value == value and words in found.reason
    first, second, third = found.alternatives
    assert second["difference"]["value"] == pytest.approx(0.1)
    assert third["loss"] - second["loss"] == pytest.approx(shift, abs=1e-9)
    assert first["rows"] == 40 and first["tokens"] == 400


def test_no_minus_stands_before_a_difference_that_is_nothing():
    assert "differ by +0.0000 (95 % interval +0.0000 to +0.0000)" in base_choice.choose_base(losses(-1e-5)).reason


def test_rows_of_a_group_count_together():
    """What forty rows tell apart, two groups of twenty do not when the rows of each lean their own way."""
    found = losses(-0.02, 0.06)
    groups = [("even", "odd")[row % 2] for row in range(40)]
    alone, together = base_choice.choose_base(found), base_choice.choose_base(found, groups)
    assert alone.value == "dequantized" and "on 40 rows:" in alone.reason
    assert together.value == "original" and "on 40 rows in 2 groups:" in together.reason
    one = base_choice.choose_base(losses(-0.02), ["the same"] * 40)
    assert one.value == "original" and "in 1 group: " in one.reason and "a tie" in one.reason


def test_the_groups_of_the_held_out_rows_are_found(tmp_path):
    groups = [f"{number % 3:016x}" for number in range(12)]
    base = save_tiny_model(tmp_path / "base", **SHAPE)
    inputs = make_inputs(tmp_path / "in", base, groups=groups, size=0.05, target_modules=["q_proj", "down_proj"])
    rows = base_choice.held_out(inputs["tokenize"] / "heldout.arrow")[::-2]
    wanted = [groups[int(row["id"].removeprefix("x:"))] for row in rows]
    assert base_choice.groups_of(inputs["format"] / "heldout.parquet", rows) == wanted
    run(inputs, tmp_path / "out")
    assert "on 12 rows in 3 groups:" in read_json(tmp_path / "out" / "proof.json")["base"]["reason"]


def test_without_held_out_rows_the_original_is_taken_and_said_so(inputs, tmp_path):
    from tiny import write_tokens

    write_tokens(inputs["tokenize"] / "heldout.arrow", [])
    run(inputs, tmp_path / "out")
    proof = read_json(tmp_path / "out" / "proof.json")
    assert proof["base"]["value"] == "original" and "no held-out rows" in proof["base"]["reason"]
    assert not proof["checked"] and proof["reloaded"] is None


def test_only_qlora_has_a_choice(inputs, tmp_path):
    summary = run(inputs, tmp_path / "out", method="lora")
    assert "base" not in summary and read_json(tmp_path / "out" / "proof.json")["base"] is None


def test_a_wrong_dequantised_weight_is_caught(inputs, tmp_path, monkeypatch):
    right = streamed_merge._write_block

    def wrong(source, sink, device, block):
        if isinstance(block, streamed_merge.ChangedBlock) and block.tensor.name == "model.layers.1.mlp.up_proj.weight":
            streamed_merge._copy(source, sink, block.start, block.stop)  # the original's, as if it weren't quantised
            return block.stop - block.start
        return right(source, sink, device, block)

    monkeypatch.setattr(streamed_merge, "_write_block", wrong)
    with pytest.raises(UserError, match="up_proj.weight isn't base"):
        run(inputs, tmp_path / "out", base="dequantized")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_base_with_an_fp32_file_is_dequantised_too(tmp_path):
    base = save_tiny_model(tmp_path / "base", **SHAPE)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    shutil.rmtree(base)
    model.save_pretrained(base), tokenizer.save_pretrained(base)
    inputs = make_inputs(tmp_path / "in", base, size=0.05)
    run(inputs, tmp_path / "out", base="dequantized")
    after = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert read_json(tmp_path / "out" / "proof.json")["kl"] < 1e-6  # nothing is rounded to 16 bits


def test_row_losses_are_cross_entropy(inputs):
    model = AutoModelForCausalLM.from_pretrained(inputs["model"] / "model", dtype=torch.float32)
    rows = spread_rows(inputs["tokenize"] / "heldout.arrow", 64, 8192)
    found = row_losses(Loaded(model, False), rows)
    total, count = (sum(values) for values in zip(*found, strict=True))
    assert total / count == pytest.approx(plain_loss(model, rows, "float32"), rel=1e-5)


def test_a_cpu_reads_no_more_rows_than_tell_the_two_apart(inputs, tmp_path, monkeypatch):
    base, adapter = inputs["model"] / "model", inputs["train"] / "adapter"
    rows = spread_rows(inputs["tokenize"] / "heldout.arrow", 64, 8192)
    compute = getattr(torch, precision.compute_dtype("cpu").value)
    candidates = {"original": read_adapter(adapter)}
    candidates["dequantized"] = base_choice.on_dequantised(base, candidates["original"], compute, "cpu")
    monkeypatch.setattr(base_choice, "FIRST_ROWS", 9)
    work = tmp_path / "work"
    work.mkdir()
    for apart, count in ((True, 9), (False, len(rows))):
        monkeypatch.setattr(base_choice, "told_apart", lambda losses, groups, apart=apart: apart)
        found = base_choice.measure(base, adapter, candidates, rows, work, SILENT)
        assert {len(own) for own in found.values()} == {count} and count in (9, 12)
    assert list(work.iterdir()) == []  # nothing was written
    in_files = base_choice.measure_files(base, adapter, candidates, rows, work, SILENT)
    for name, own in found.items():  # the last run's, of all rows
        assert sum(nats for nats, _ in own) == pytest.approx(sum(nats for nats, _ in in_files[name]), rel=5e-3)


def test_rows_tell_apart_when_zero_is_outside_or_all_is_next_to_it():
    assert base_choice.told_apart(losses(-0.02, 0.01), None)
    assert not base_choice.told_apart(losses(-0.02, 0.5), None)
    assert base_choice.told_apart(losses(0.0, 1e-5), None)
    assert not base_choice.told_apart(losses(-0.02, 0.01), ["one", "two"] * 20)  # two groups are too few to trust


def test_rows_of_one_group_tell_nothing_before_all_are_read():
    losses = {name: [(1.0 + number / 10, 5) for number in range(16)] for name in ("trained", "original", "dequantized")}
    assert not base_choice.told_apart(losses, ["one"] * 16)
