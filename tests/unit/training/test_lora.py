"""Every kind of adapter trains, merges with its proof and evaluates; each does what its paper and PEFT say."""

import gc
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from adder.core.errors import UserError
from adder.core.files import digest_file, read_json, read_jsonl, write_json, write_table
from adder.core.progress import Progress
from adder.core.stage_spec import Context, Runtime
from adder.kernels import labelled_loss
from adder.merging import run as merging
from adder.merging.stage import MergeSettings
from adder.tokenization.token_table import TokenTable
from adder.training import base_model, lora, trainer
from adder.training.packed_dataset import PackedExamples, heldout_examples
from adder.training.records import TrainInputs
from adder.training.stage import TrainSettings
from merge_fixture import reply_in_this_process  # noqa: F401 (a fixture)
from tiny import pack_rows, save_tiny_model, tiny_tokenizer, token_row, write_tokens, write_training_inputs
from training_stage import run_training, train_settings

pytestmark = pytest.mark.usefixtures("reply_in_this_process")

# The settings of each kind, and the methods that it goes with.
BOTH = ("qlora", "lora")
KINDS = {
    "rslora": (BOTH, {"use_rslora": True}),
    "dora": (BOTH, {"use_dora": True}),
    "gaussian": (BOTH, {"init_lora_weights": "gaussian"}),
    "eva": (BOTH, {"init_lora_weights": "eva"}),
    "loftq": (("qlora",), {"init_lora_weights": "loftq"}),
    "pissa": (("lora",), {"init_lora_weights": "pissa"}),
    "olora": (("lora",), {"init_lora_weights": "olora"}),
    "lora+": (BOTH, {"lora_plus_ratio": 4}),
    "neftune": (BOTH, {"neftune_noise_alpha": 5}),
    "dft": (BOTH, {"loss": "dft"}),
    "by name": (BOTH, {"target_modules": ["q_proj", "v_proj"]}),
    "by pattern": (BOTH, {"target_modules": r".*layers\.1\..*(q|down)_proj"}),
    "embedding too": (BOTH, {"modules_to_save": ["embed_tokens"]}),
    "norms too": (BOTH, {"modules_to_save": ["norm"], "keep": "best"}),
    "pissa, dora, rslora": (("lora",), {"init_lora_weights": "pissa", "use_dora": True, "use_rslora": True}),
    "loftq, dora, head": (("qlora",), {"init_lora_weights": "loftq", "use_dora": True, "modules_to_save": ["lm_head"]}),
    "eva, dora, rslora": (("qlora",), {"init_lora_weights": "eva", "use_dora": True, "use_rslora": True}),
}
CASES = [
    pytest.param(m[0], method, values, id=f"{kind}-{method}") for kind, (m, values) in KINDS.items() for method in m
]


def settings(**changes) -> TrainSettings:
    values = {"epochs": 4, "learning_rate": 1e-2, "effective_batch_size": 6, "lora_r": 4, "compute_dtype": "float32"}
    values |= {"eval_samples": 8, "eval_times": 1, "samples": 0}
    return train_settings(**{**values, **changes})


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Each training collects garbage several times: leave out the libraries, a quarter of the time here."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model_dir):
    folders = write_training_inputs(tmp_path_factory.mktemp("inputs"), tiny_model_dir, packs=4)
    # Tokens made up at random can only be learnt by heart: what is held out are eight of the training examples.
    learnt = TokenTable(folders["tokenize"] / "train.arrow")
    write_tokens(folders["tokenize"] / "heldout.arrow", [plain(learnt.row(number)) for number in range(8)])
    details = {"end_of_turn": {"token": "<|im_end|>", "id": tiny_tokenizer().eos_token_id}, "reply_ends": []}
    write_json(folders["tokenize"] / "tokenize.json", details | {"counts": {"train": {"examples": 24, "labelled": 99}}})
    return folders


def plain(row: dict) -> dict:
    return {name: row[name] if name == "id" else list(map(int, row[name])) for name in ("id", "input_ids", "labels")}


def run(inputs, out, **changes) -> dict:
    out.mkdir()
    run_training(settings(**changes), inputs, out, Progress.silent(), runtime={"checkpoints": 0})
    return read_json(out / "train.json")


def adapter_digests(out) -> dict:
    return {path.name: digest_file(path) for path in sorted((out / "adapter").iterdir())}


@torch.no_grad()
def heldout_loss(model, inputs) -> float:
    """Mean loss on the held-out examples, by transformers' own forward pass."""
    sums = []
    for row in heldout_examples(inputs["tokenize"] / "heldout.arrow", 8):
        labels = torch.tensor([row["labels"]])
        found = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels, use_cache=False).loss
        sums.append((float(found), int((labels[:, 1:] != -100).sum())))
    return sum(value * count for value, count in sums) / sum(count for _, count in sums)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def plain_adapter(inputs, tmp_path_factory) -> dict:
    """The tensors that plain LoRA ends with, by method."""
    found = {}
    for method in BOTH:
        run(inputs, tmp_path_factory.mktemp(method) / "out", method=method)
        found[method] = weights(tmp_path_factory.getbasetemp() / f"{method}0" / "out")
    return found


@pytest.mark.parametrize(("first", "method", "values"), CASES)
def test_it_trains_the_same_way_twice_and_merges_and_evaluates(inputs, tmp_path, first, method, values, plain_adapter):
    summary = run(inputs, tmp_path / "train", method=method, **values)
    if method == first:
        run(inputs, tmp_path / "again", method=method, **values)
        assert adapter_digests(tmp_path / "train") == adapter_digests(tmp_path / "again")
    trained, plain = weights(tmp_path / "train"), plain_adapter[method]
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())
    # The setting did something: no pair is what plain LoRA trains.
    assert not any(tensor.shape == plain[n].shape and torch.equal(tensor, plain[n]) for n, tensor in trained.items()
                   if "lora_" in n and n in plain)  # fmt: skip
    if values.get("init_lora_weights") == "eva":
        assert read_json(tmp_path / "train" / "adapter" / "adapter_config.json")["rank_pattern"]

    (tmp_path / "merge").mkdir()
    stages = {"train": tmp_path / "train"} | {name: inputs[name] for name in ("model", "tokenize", "format")}
    context = Context(Progress.silent(), Runtime(threads=1))
    merging.run(MergeSettings(method=method), merging.MergeInputs(**stages), tmp_path / "merge", context)
    proof = read_json(tmp_path / "merge" / "proof.json")
    assert proof["checked"] and proof["kl"] < proof["tolerance"] and proof["base_kl"] > 10 * proof["kl"]
    assert proof["changed_weights"] == proof["adapted_weights"]
    # What was merged is what was trained, start of the pairs and quantisation included; and it is no more the base.
    base = heldout_loss(load(inputs["model"] / "model"), inputs)
    merged = heldout_loss(load(tmp_path / "merge" / "model"), inputs)
    learnt = base - summary["eval_loss"]
    assert learnt > 0.03 and merged == pytest.approx(summary["eval_loss"], abs=0.1 * learnt)


def weights(out) -> dict:
    return load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "values",
    [
        {"method": "lora", "lora_plus_ratio": 8, "use_dora": True, "init_lora_weights": "pissa", "loss": "dft"},
        {"init_lora_weights": "eva", "modules_to_save": ["lm_head"], "neftune_noise_alpha": 5},
        {"init_lora_weights": "loftq", "lora_plus_ratio": 8, "keep": "best", "modules_to_save": ["norm"]},
    ],
    ids=["lora+ dora pissa dft", "eva head neftune", "loftq lora+ norm"],
)
def test_a_killed_run_continues_to_the_same_adapter(inputs, tmp_path, monkeypatch, values):
    class Killed(BaseException):
        pass

    step = trainer.Trainer.training_step

    def die_late(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise Killed
        return step(self, *args, **kwargs)

    values = settings(**values, eval_times=4)
    (tmp_path / "whole").mkdir()
    run_training(values, inputs, tmp_path / "whole", Progress.silent())
    (tmp_path / "out").mkdir()
    options = {"checkpoints": tmp_path / "checkpoints", "runtime": {"checkpoints": 3}}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer.Trainer, "training_step", die_late)
        run_training(values, inputs, tmp_path / "out", Progress.silent(), **options)
    run_training(values, inputs, tmp_path / "out", Progress.silent(), **options)
    assert read_json(tmp_path / "out" / "train.json")["resumed_from"] == 4
    assert adapter_digests(tmp_path / "out") == adapter_digests(tmp_path / "whole")


def adapted(folder, method="lora", dtype="float32", **changes):
    model, _ = base_model.load(folder, method, dtype, "cpu")
    torch.manual_seed(0)
    return lora.add_adapter(model, settings(method=method, lora_dropout=0.0, **changes))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 45)[None], use_cache=False).logits.float()


def train_a_little(model) -> None:
    """Move everything that is trained, as some steps would."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "use_dora": True, "modules_to_save": ["norm"]}])
def test_a_start_out_of_the_weights_is_the_base_and_is_saved_for_the_base(inputs, tmp_path, start, more):
    folder = inputs["model"] / "model"
    model = adapted(folder, init_lora_weights=start, **more)
    assert torch.allclose(logits(model), logits(load(folder)), atol=1e-4)
    assert not torch.allclose(model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight,
                              load(folder).model.layers[0].mlp.up_proj.weight, atol=1e-3)  # fmt: skip
    train_a_little(model)
    lora.save(model, TrainInputs(inputs["lengths"], inputs["tokenize"], inputs["model"]), tmp_path)
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert config["init_lora_weights"] is True and config["r"] == 8
    # Anybody who loads it on the original base gets what was trained.
    anybodys = PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    assert torch.allclose(logits(anybodys), logits(model), atol=1e-4)
    assert not torch.allclose(logits(anybodys), logits(load(folder)), atol=1e-2)


@pytest.mark.parametrize("more", [{}, {"use_dora": True, "use_rslora": True}])
def test_loftq_starts_nearer_to_the_base_than_zero_does(inputs, tmp_path, more):
    folder = inputs["model"] / "model"
    right = logits(load(folder))
    zero = logits(adapted(folder, "qlora", lora_r=16, **more))
    model = adapted(folder, "qlora", init_lora_weights="loftq", lora_r=16, **more)
    assert (logits(model) - right).norm() < 0.8 * (zero - right).norm()
    train_a_little(model)
    lora.save(model, TrainInputs(inputs["lengths"], inputs["tokenize"], inputs["model"]), tmp_path)
    # On the 16-bit base the quantisation error is not made up for a second time.
    found = logits(PeftModel.from_pretrained(load(folder), tmp_path / "adapter"))
    assert (found - logits(model)).norm() < 1.2 * (right - logits(adapted(folder, "qlora", init_lora_weights="loftq",
                                                                          lora_r=16, **more))).norm()  # fmt: skip


def test_loftq_on_nf4_layers_is_loftq_on_held_values(inputs, monkeypatch):
    folder = inputs["model"] / "model"
    held = adapted(folder, "qlora", init_lora_weights="loftq")
    monkeypatch.setattr(
        base_model, "choose_nf4_values", lambda *_: base_model.Choice("dequantised in each product", "test")
    )
    packed = adapted(folder, "qlora", init_lora_weights="loftq")
    assert base_model.four_bit_layers(packed) and not base_model.four_bit_layers(held)
    for (name, one), (_, other) in zip(lora.layers(held), lora.layers(packed), strict=True):
        for a, b in zip(lora._pair(one), lora._pair(other), strict=True):
            assert torch.allclose(a, b, atol=1e-5), name


def test_dora_on_nf4_keeps_the_trained_lengths_in_the_merged_weights(inputs, tmp_path):
    """In training a row is direction (quantised base + pair) times length; merging changes that base only."""
    folder = inputs["model"] / "model"
    model = adapted(folder, "qlora", use_dora=True)
    base = load_file(folder / "model.safetensors")
    for name, layer in lora.layers(model):
        start = layer.lora_magnitude_vector["default"].weight
        assert torch.allclose(start, layer.get_base_layer().weight.norm(dim=1), rtol=1e-5)
        assert not torch.allclose(start, base[f"{name}.weight"].float().norm(dim=1), rtol=1e-4)
    train_a_little(model)
    lora.save(model, TrainInputs(inputs["lengths"], inputs["tokenize"], inputs["model"]), tmp_path)
    changes = merging.read_adapter(tmp_path / "adapter")
    peft = PeftModel.from_pretrained(load(folder), tmp_path / "adapter").merge_and_unload().state_dict()
    for name, layer in lora.layers(model):
        merged = changes[f"{name}.weight"].apply(base[f"{name}.weight"].float())
        assert torch.allclose(merged.norm(dim=1), layer.lora_magnitude_vector["default"].weight, rtol=1e-5)
        assert torch.allclose(merged, peft[f"{name}.weight"], atol=1e-6)


def test_eva_starts_from_the_inputs_directions(inputs, tmp_path):
    model = adapted(inputs["model"] / "model", init_lora_weights="eva")
    packs = PackedExamples(inputs["tokenize"] / "train.arrow", inputs["lengths"] / "packs.parquet", 42, False)
    lora.initialise(model, packs, settings(init_lora_weights="eva"))
    ranks = [len(a) for _, layer in lora.layers(model) for a, _ in [lora._pair(layer)]]
    assert sum(ranks) == 4 * 14 and len(set(ranks)) > 1
    for _, layer in lora.layers(model):
        a, b = lora._pair(layer)
        assert torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-3) and not b.any()
        assert layer.scaling["default"] == 8  # alpha 32 over rank 4, whatever rank it got
    # They are the leading directions of what the first layer reads at labelled positions.
    layer = next(layer for name, layer in lora.layers(model) if name.endswith("layers.0.self_attn.q_proj"))
    read = []
    layer.register_forward_pre_hook(lambda _module, args: read.append(args[0]))
    for batch in lora._eva_batches(packs, 1):
        labelled_loss.labelled_losses(model.get_base_model(), **batch)
        read[-1] = read[-1][batch["labels"] != -100].detach()
    read = torch.cat(read)
    read = read - read.mean(0)
    best = torch.linalg.svd(read, full_matrices=False)[2][: len(lora._pair(layer)[0])]
    assert (read @ lora._pair(layer)[0].T).norm() > 0.95 * (read @ best.T).norm()


def test_eva_without_enough_tokens_is_refused(inputs):
    packs = PackedExamples(inputs["tokenize"] / "train.arrow", inputs["lengths"] / "packs.parquet", 42, False)
    model = adapted(inputs["model"] / "model", init_lora_weights="eva", lora_r=1000)
    with pytest.raises(UserError, match=r"eva needs 2000 labelled tokens for train.lora_r: 1000"):
        lora.initialise(model, packs, settings(init_lora_weights="eva"))


def test_lora_plus_groups_are_pefts(inputs):
    model = adapted(inputs["model"] / "model")
    found = lora.optimizer_groups(model, settings(lora_plus_ratio=4, weight_decay=0.1))
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4, loraplus_weight_decay=0.1
    ).param_groups
    wanted = [group for group in theirs if group["params"]]
    assert [(g["lr"], g["weight_decay"]) for g in found] == [(g["lr"], g["weight_decay"]) for g in wanted]
    assert [set(map(id, g["params"])) for g in found] == [set(map(id, g["params"])) for g in wanted]
    assert lora.optimizer_groups(model, settings()) is None


def test_lora_plus_groups_hold_each_trained_parameter_once_and_vectors_do_not_decay(inputs):
    model = adapted(inputs["model"] / "model", use_dora=True, modules_to_save=["norm", "embed_tokens"])
    groups = lora.optimizer_groups(model, settings(lora_plus_ratio=4))
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert groups[0]["lr"] == 1e-2  # the first group's rate is what is logged
    assert all(p.ndim > 1 or not group["weight_decay"] for group in groups for p in group["params"])


def test_lora_plus_is_what_the_training_learns_by(inputs, tmp_path):
    run(inputs, tmp_path / "plus", method="lora", lora_plus_ratio=8, learning_rate=1e-4)
    run(inputs, tmp_path / "plain", method="lora", learning_rate=1e-4)
    plus, plain = weights(tmp_path / "plus"), weights(tmp_path / "plain")
    size = {kind: [sum(float(t.norm()) for n, t in w.items() if kind in n) for w in (plus, plain)] for kind in ("B",)}
    assert size["B"][0] > 5 * size["B"][1]  # B starts from zero
    rates = [row["learning_rate"] for row in read_jsonl(tmp_path / "plus" / "metrics.jsonl") if "loss" in row]
    assert max(rates) <= 1e-4


def batch_of(*lengths) -> dict:
    rows = [[token_row(i, length)] for i, length in enumerate(lengths)]
    return DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(pack_rows(rows))


def test_dft_is_trls(inputs, tmp_path):
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        loss_type="dft",
        use_cpu=True,
        bf16=False,
        max_length=None,
        padding_free=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to=[],
    )
    ours = load(inputs["model"] / "model")
    theirs = load(inputs["model"] / "model")
    data = heldout_examples(inputs["tokenize"] / "heldout.arrow", 2)
    trainer = SFTTrainer(model=theirs, args=arguments, train_dataset=data, processing_class=tiny_tokenizer())
    batch = batch_of(40, 23)
    count = torch.tensor(31)
    expected = trainer.compute_loss(theirs, dict(batch), num_items_in_batch=count)
    losses = labelled_loss.labelled_losses(ours, **batch)
    found = labelled_loss.dft(losses).sum() / count
    assert torch.allclose(found, expected, rtol=1e-5) and not torch.allclose(losses.sum() / count, expected, rtol=1e-2)
    found.backward()
    expected.backward()
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6, rtol=1e-3), name


def test_dft_is_trained_on_and_nll_judged_by(inputs, tmp_path):
    for kind in ("dft", "nll"):
        run(inputs, tmp_path / kind, loss=kind, learning_rate=1e-9)
    first, evals = (
        {
            kind: next(row[name] for row in read_jsonl(tmp_path / kind / "metrics.jsonl") if name in row)
            for kind in ("dft", "nll")
        }
        for name in ("loss", "eval_loss")
    )
    assert first["dft"] < 0.1 * first["nll"] and evals["dft"] == pytest.approx(evals["nll"], rel=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["norm"]])
def test_whole_modules_are_trained_in_fp32_within_a_16_bit_base(tmp_path, names, autocast):
    folder = save_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    model = adapted(folder, dtype="bfloat16", modules_to_save=names)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    hidden = []
    model.get_base_model().model.layers[1].register_forward_pre_hook(lambda _m, args: hidden.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        labelled_loss.labelled_losses(model.get_base_model(), **batch_of(20)).sum().backward()
    assert hidden == [torch.bfloat16]
    whole = [parameter for name, parameter in model.named_parameters() if "modules_to_save" in name]
    assert whole and all(parameter.grad.abs().sum() > 0 for parameter in whole)


@pytest.mark.parametrize("held", [False, True])
def test_dora_on_nf4_gives_the_16_bit_numbers_that_attention_kernels_take(inputs, monkeypatch, held):
    """Under autocast PEFT's DoRA on an NF4 layer gives fp32, which flash attention refuses."""
    chosen = base_model.Choice("dequantised once" if held else "dequantised in each product", "test")
    monkeypatch.setattr(base_model, "choose_nf4_values", lambda *_: chosen)
    model = adapted(inputs["model"] / "model", "qlora", "bfloat16", use_dora=True)
    found = []
    for _, layer in lora.layers(model):
        layer.register_forward_hook(lambda _m, _i, output: found.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        labelled_loss.labelled_losses(model.get_base_model(), **batch_of(20)).sum().backward()
    assert len(found) == 14 and set(found) == {torch.bfloat16}
    trained = [parameter for name, parameter in model.named_parameters() if "lora_B" in name or "magnitude" in name]
    assert all(parameter.dtype == torch.float32 and parameter.grad.abs().sum() > 0 for parameter in trained)


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_an_embedding_that_is_the_head_too_stays_one_tensor(inputs, tmp_path, names):
    folder = inputs["model"] / "model"
    model = adapted(folder, modules_to_save=names)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    train_a_little(model)
    lora.save(model, TrainInputs(inputs["lengths"], inputs["tokenize"], inputs["model"]), tmp_path)
    stored = weights(tmp_path)
    prefix = "base_model.model."
    assert torch.equal(stored[f"{prefix}lm_head.weight"], stored[f"{prefix}model.embed_tokens.weight"])
    found = logits(PeftModel.from_pretrained(load(folder), tmp_path / "adapter"))
    assert torch.allclose(found, logits(model), atol=1e-5)


def test_an_untied_head_is_trained_and_merged_alone(inputs, tmp_path):
    own = write_training_inputs(tmp_path / "in", save_tiny_model(tmp_path / "base", tie_word_embeddings=False), packs=8)
    own["tokenize"].joinpath("tokenize.json").write_bytes((inputs["tokenize"] / "tokenize.json").read_bytes())
    run(own, tmp_path / "train", modules_to_save=["lm_head"])
    (tmp_path / "merge").mkdir()
    stages = {"train": tmp_path / "train"} | {name: own[name] for name in ("model", "tokenize", "format")}
    context = Context(Progress.silent(), Runtime(threads=1))
    merging.run(MergeSettings(method="lora"), merging.MergeInputs(**stages), tmp_path / "merge", context)
    before, after = (load_file(f / "model.safetensors") for f in (own["model"] / "model", tmp_path / "merge" / "model"))
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    wanted = weights(tmp_path / "train")["base_model.model.lm_head.weight"]
    assert (after["lm_head.weight"].float() - wanted).abs().max() < 2e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["nothing"]}, r"train.target_modules.*nothing.*called down_proj, gate_proj"),
        ({"target_modules": r".*q_pro("}, r"train.target_modules: \.\*q_pro\( does not fit.*subpattern"),
        ({"target_modules": r".*nothing"}, r"train.target_modules.*not found.*called down_proj, gate_proj"),
        ({"target_modules": ".*"}, r"train.target_modules: \.\* does not fit this model \(Target module LlamaModel"),
        ({"target_modules": r".*(embed_tokens|q_proj)"}, r"takes in model.embed_tokens.*train.modules_to_save"),
        ({"target_modules": ["lm_head", "q_proj"]}, r"takes in lm_head, the LM head.*train.modules_to_save"),
        ({"modules_to_save": ["head"], "method": "lora"}, None),  # PEFT goes by how a name ends: lm_head
        ({"modules_to_save": ["lm_heads"]}, r"train.modules_to_save: lm_heads is no module.*called down_proj, embed"),
        ({"modules_to_save": ["q_proj"]}, r"train.modules_to_save: model.layers.0.self_attn.q_proj is quantised"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_training(tiny_model_dir, changes, message):
    changes = {"method": "qlora", **changes}
    if message is None:
        assert adapted(tiny_model_dir, **changes)
        return
    with pytest.raises(UserError, match=message) as caught:
        adapted(tiny_model_dir, **changes)
    assert len(str(caught.value)) < 500


def test_experts_and_routers_outside_of_linear_layers_are_refused_before_training():
    config = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    fits = r"train.target_modules: .* does not fit this model \(lora.ParamWrapper"
    with pytest.raises(UserError, match=fits):  # by PEFT itself, with dropout
        lora.add_adapter(MixtralForCausalLM(MixtralConfig(**config)), settings(target_modules=["gate"]))
    for wanted in (["gate"], ["w1", "w2", "w3", "q_proj"]):
        with pytest.raises(UserError, match=r"an expert or router.*Name linear layers instead: k_proj, o_proj, q_proj"):
            changes = settings(target_modules=wanted, lora_dropout=0.0)
            lora.add_adapter(MixtralForCausalLM(MixtralConfig(**config)), changes)
    with pytest.raises(
        UserError, match="gate_up_proj is no layer of this model that can be adapted; its linear layers"
    ):
        changes = settings(target_modules=["q_proj", "gate_up_proj"])
        lora.add_adapter(MixtralForCausalLM(MixtralConfig(**config)), changes)
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    partly = Qwen3MoeConfig(**config, num_experts=4, moe_intermediate_size=16, head_dim=8, mlp_only_layers=[0])
    partly.num_hidden_layers = 2  # a dense layer, whose gate_proj is a linear layer, and one of experts
    for mixture in (MixtralForCausalLM(MixtralConfig(**config)), Qwen3MoeForCausalLM(partly)):
        model = lora.add_adapter(mixture, settings())
        assert {name.rpartition(".")[2] for name, _ in lora.layers(model)} == attention


def test_the_adapters_files_name_no_machine_and_are_ordinary_json(inputs, tmp_path):
    run(inputs, tmp_path / "out", target_modules=r".*\.(q|v)_proj", modules_to_save=["norm", "embed_tokens"])
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == r".*\.(q|v)_proj" and config["base_model_name_or_path"] == "tiny"
    assert config["modules_to_save"] == sorted(config["modules_to_save"])


@pytest.fixture(scope="module")
def earlier(inputs, tmp_path_factory) -> dict:
    """A run to go on from, by method, and inputs whose training rows are its held-out ones, all in one pack."""
    folder = tmp_path_factory.mktemp("earlier")
    rows = [plain(TokenTable(inputs["tokenize"] / "heldout.arrow").row(number)) for number in range(8)]
    found = {}
    for method in ("qlora", "lora"):
        found[method] = run(inputs, folder / method, method=method, epochs=1, learning_rate=1e-2)["eval_loss"]
    parents = {name: folder / name for name in ("tokenize", "lengths")}
    shutil.copytree(inputs["tokenize"], parents["tokenize"])
    write_tokens(parents["tokenize"] / "train.arrow", rows)
    parents["lengths"].mkdir()
    lengths = [len(row["input_ids"]) for row in rows]
    packs = {"rows": [list(range(8))], "starts": [[0] * 8], "seq_lengths": [lengths]}
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in packs])
    write_table(parents["lengths"] / "packs.parquet", pa.table(packs, schema=schema))
    return {"folder": folder, "losses": found, "inputs": {**inputs, **parents}}


def going_on(inputs, model: Path, adapter: Path) -> dict:
    shutil.copytree(inputs["model"], model)
    shutil.copytree(adapter, model / "adapter")
    return {**inputs, "model": model}


@pytest.mark.parametrize(("before", "method"), [("qlora", "qlora"), ("lora", "lora"), ("lora", "full")])
def test_a_training_goes_on_where_an_earlier_one_ended(earlier, tmp_path, before, method):
    """Its first loss, on the earlier one's held-out rows, is the earlier one's last held-out loss."""
    adapter = earlier["folder"] / before / "adapter"
    parents = going_on(earlier["inputs"], tmp_path / "model", adapter)
    record = run(parents, tmp_path / "out", method=method, epochs=1, lora_dropout=0.0)
    assert record["first_loss"] == pytest.approx(earlier["losses"][before], abs=2e-5)
    from_the_base = run(earlier["inputs"], tmp_path / "base", method=method, epochs=1, lora_dropout=0.0)
    assert abs(from_the_base["first_loss"] - record["first_loss"]) > 0.05
    if method != "full":
        assert weights(tmp_path / "out").keys() == load_file(adapter / "adapter_model.safetensors").keys()


def test_what_an_earlier_adapter_adapts_must_be_what_is_set(earlier, inputs, tmp_path):
    few = {"target_modules": ["q_proj"], "epochs": 1}
    run(inputs, tmp_path / "few", method="lora", **few)
    model = load(inputs["model"] / "model")
    with pytest.raises(UserError, match=r"target_modules is all-linear, here \[down_proj.*and .* has \['q_proj'\]"):
        lora.add_adapter(model, settings(method="lora"), tmp_path / "few" / "adapter")
    damaged = tmp_path / "damaged"
    shutil.copytree(earlier["folder"] / "lora" / "adapter", damaged)
    tensors = load_file(damaged / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, damaged / "adapter_model.safetensors")
    with pytest.raises(UserError, match="has no partner"):
        lora.add_adapter(load(inputs["model"] / "model"), settings(method="lora"), damaged)
