"""The doctor: each failure is caused in a real training of a tiny model and named; healthy runs stay silent.

What a CPU can't cause (the fp16 scaler's skipped steps) is fed as rows that look like the real ones, and says so.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adder.core.errors import UserError
from adder.core.files import read_jsonl
from adder.evaluation.degenerate_replies import find_faults
from adder.training import trainer
from adder.training.monitoring.doctor import Findings, diagnose, examine, explain_nan, in_a_line
from adder.training.monitoring.symptoms import Diagnosis, Replies
from adder.training.records import MetricsRow, SampleRow, TrainingFacts, metrics_rows
from adder.training.stage import TrainSettings
from tiny import save_tiny_model, tiny_tokenizer
from toy_language import FIRST, babble, chain, example, heldout, leaking, many, quick_settings, write_inputs
from training_stage import run_training, train_record, train_settings, training_facts


@dataclass
class Run:
    """A finished training: what the doctor saw, and what it said."""

    rows: list[dict]
    facts: TrainingFacts
    settings: TrainSettings
    out: Path
    along: list[Diagnosis]  # what was seen while training
    final: list[Diagnosis]  # what one look at the whole run sees

    @property
    def names(self) -> list[str]:
        return [one["name"] for one in self.final]

    def one(self, name: str) -> Diagnosis:
        return next(one for one in self.final if one["name"] == name)


LORA = quick_settings()


def watch(
    rows: list[MetricsRow], facts: TrainingFacts, settings: TrainSettings
) -> tuple[list[Diagnosis], list[Diagnosis]]:
    """What was found on the way, look by look, and what one look at the whole finds."""
    findings = Findings(facts, settings)
    findings.replay(rows, [])
    return findings.diagnoses, examine(rows, facts, settings, final=True)


@pytest.fixture
def trained(tmp_path):
    """Train a tiny model for real on rows of the toy language, and have the run watched."""
    number = 0

    def train_once(model: Path, rows: list[dict], held: list[dict] | None = None, **changes) -> Run:
        nonlocal number
        number += 1
        folder = tmp_path / f"run{number}"
        settings = quick_settings(**changes)
        inputs = write_inputs(folder, model, rows, held or heldout(), settings.effective_batch_size)
        out = folder / "out"
        out.mkdir()
        run_training(settings, inputs, out)
        metrics = list(read_jsonl(out / "metrics.jsonl"))
        # The tests say themselves what the base knows.
        facts = replace(TrainingFacts(**train_record(out)["facts"]), base_loss=None)
        return Run(metrics, facts, settings, out, *watch(metrics, facts, settings))

    return train_once


@pytest.fixture(scope="module")
def untaught(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("untaught") / "model")


@pytest.fixture(scope="module")
def base(tmp_path_factory, untaught) -> Path:
    """A base that knows the toy language: loss 0.6 on it (300 steps of full training, once for all tests)."""
    folder = tmp_path_factory.mktemp("base")
    settings = quick_settings(method="full", learning_rate=5e-3)
    inputs = write_inputs(folder, untaught, many(chain, 1200, noise=0.3), heldout(noise=0.3), 4)
    (folder / "out").mkdir()
    run_training(settings, inputs, folder / "out")
    return folder / "out" / "model"


# Healthy runs


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        ({"count": 200, "factor": 7}, {"learning_rate": 1e-2}),
        ({"count": 100, "factor": 7}, {"learning_rate": 5e-3, "per_step": 1}),
        ({"count": 80, "factor": 7}, {"learning_rate": 1e-2}),  # 20 steps
        ({"count": 160, "noise": 0.1}, {}),  # the base knows it well already
        ({"count": 120, "noise": 0.0}, {"learning_rate": 1e-2, "epochs": 3}),  # a toy of one length, soon at its floor
        ({"count": 60, "factor": 7}, {"learning_rate": 1e-2, "epochs": 4, "method": "lora"}),
    ],
    ids=["one epoch", "batch of one", "20 steps", "known before", "quick toy", "small data"],
)
def test_a_healthy_run_is_met_with_silence(base, trained, rows, changes, seed):
    kind = {name: value for name, value in rows.items() if name != "count"}
    found = trained(base, many(chain, rows["count"], 1000 * seed, **kind), heldout(**kind), seed=seed, **changes)
    assert found.along == [] and found.final == []


def noisy_run(seed: int, steps: int, batch: int, start: float, floor: float, share: float) -> list[dict]:
    """Rows of a run that learns from `start` to `floor` in `share` of its steps, with the noise of its batch size."""
    chance = np.random.default_rng(seed)
    spread = (0.35 if seed % 2 else 0.8) / math.sqrt(batch)
    rows = []
    for step in range(1, steps + 1):
        mean = floor + (start - floor) * math.exp(-step / max(2, share * steps))
        loss = mean * math.exp(spread * chance.standard_normal() - spread**2 / 2)
        norm = (0.2 + mean / start) * loss / mean * math.exp(0.4 * chance.standard_normal())
        rows.append({"step": step, "epoch": step / steps, "loss": loss, "grad_norm": norm, "learning_rate": 1e-4})
        if step % max(1, -(-steps // 4)) == 0 or step == steps:
            held = 1.1 * floor + (mean - floor) * math.exp(0.004 * chance.standard_normal())
            rows.append({"step": step, "epoch": step / steps, "eval_loss": held * (1 + 0.004 * chance.random())})
    return rows


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize(("start", "floor"), [(3.2, 0.02), (1.3, 1.15), (1.05, 1.0), (2.2, 0.5)])
def test_noise_is_no_illness(batch, start, floor):
    """Made-up curves of 20 to 400 steps, with noise as of small batches: 16 runs a case, not one alarm."""
    settings = train_settings()
    for steps in (20, 40, 100, 400):
        facts = training_facts(
            ln_vocabulary=10.8,
            trainable_parameters=4_880_000,
            dtype="bfloat16",
            examples=steps * batch,
            steps=steps,
            effective_batch=batch,
        )
        for seed in range(4):
            rows = noisy_run(seed, steps, batch, start, floor, 0.05 if seed < 2 else 0.3)
            along, final = watch(rows, facts, settings)
            assert along == [] and final == [], (steps, seed)


# A loss that does not fall


def test_a_rate_that_is_far_too_low(base, trained):
    found = trained(base, many(chain, 240, factor=7), heldout(factor=7), learning_rate=1e-9)
    assert found.names == ["loss flat"]
    one = found.one("loss flat")
    assert "train.learning_rate 1.0e-09 is far too low" in one["cause"]
    assert one["change"] == "train.learning_rate: 2e-4"
    assert [one["name"] for one in found.along] == ["learning rate far off", "loss flat"]
    # What the report says, out of what training wrote.
    facts, sampled = TrainingFacts(**train_record(found.out)["facts"]), list(read_jsonl(found.out / "samples.jsonl"))
    assert [one["name"] for one in diagnose(found.rows, sampled, facts, found.settings)] == ["loss flat"]


def test_a_rate_that_is_merely_too_low(base, trained):
    """Larger models learn at such rates: only the curve tells, once its noise leaves no room for a fall."""
    found = trained(base, many(chain, 960, factor=7), heldout(factor=7), learning_rate=2.1e-6, per_step=12)
    assert found.names == ["loss flat"]
    assert found.one("loss flat")["change"] == "train.learning_rate: 2.1e-05"


def test_an_adapter_whose_scale_is_next_to_nothing(base, trained):
    rows = many(chain, 240, factor=7)
    small = trained(base, rows, heldout(factor=7), lora_alpha=1e-3)
    assert small.names == ["loss flat"] and small.one("loss flat")["change"] == "train.lora_alpha: 8"
    tiny = trained(base, rows, heldout(factor=7), lora_alpha=1e-6)
    assert tiny.names == ["gradient vanishes"]
    one = tiny.one("gradient vanishes")
    assert "below AdamW's epsilon" in one["evidence"] and one["change"] == "train.lora_alpha: 8"


def test_labels_that_are_all_masked_but_for_one_row(base, trained):
    rows = many(chain, 240, factor=7)
    masked = [{**row, "labels": [-100] * len(row["labels"])} for row in rows]
    found = trained(base, [rows[0], *masked[1:]])
    assert found.names == ["labels masked"]
    one = found.one("labels masked")
    assert "exactly 0 in 59 of 60 steps" in one["evidence"] and "tokenize.loss_on" in one["change"]


def test_no_label_at_all_is_known_before_the_first_step():
    found = examine([], training_facts(labelled_share=0.0), LORA)
    assert [(one["name"], one["severity"]) for one in found] == [("labels masked", "stop")]


def test_nothing_trainable(untaught):
    """Every parameter frozen: torch would refuse to train, so the doctor is asked before."""
    model = AutoModelForCausalLM.from_pretrained(untaught).requires_grad_(False)
    facts = training_facts(trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad))
    found = examine([], facts, quick_settings(target_modules=["nothing"]))
    assert [(one["name"], one["severity"]) for one in found] == [("nothing trainable", "stop")]
    assert found[0]["change"] == "train.target_modules: all-linear"


def test_tokens_of_another_tokenizer(base, trained):
    """The toy language under other ids, as a tokenizer or template that isn't the base's would give."""
    found = trained(base, many(chain, 160, shift=100), heldout(shift=100), learning_rate=1e-4)
    assert found.names == ["worse than guessing"]
    assert "tokenize.chat_template" in found.one("worse than guessing")["change"]


# A loss that falls too fast


def test_the_answer_in_the_prompt(untaught, trained):
    rows = many(leaking, 1440)
    found = trained(untaught, rows, heldout(leaking), method="full", learning_rate=5e-3, per_step=8)
    assert found.names == ["loss near zero"]
    one = found.one("loss near zero")
    assert "the answer stands in the prompt" in one["cause"] and one["step"] < 90


def test_a_task_that_the_base_has_learnt_before(untaught, trained):
    rows = [example([FIRST + number % 24] * 8, 4, number) for number in range(400)]
    taught = trained(untaught, rows, rows[:8], method="full", learning_rate=1e-2, epochs=2)
    found = trained(taught.out / "model", rows[:120], rows[:8], learning_rate=1e-3)
    assert found.names == ["loss near zero"] and "before training" in found.one("loss near zero")["evidence"]


def test_rows_that_repeat(untaught, trained):
    rows = [{**babble(number % 4), "id": f"rows:{number}"} for number in range(240)]
    found = trained(untaught, rows, heldout(babble), method="full", learning_rate=1e-2)
    assert found.names == ["rows repeat"]
    assert found.one("rows repeat")["change"] == "format.drop_duplicates: true and format.near_duplicates: drop"


# A loss that climbs, jumps or is no number


@pytest.mark.parametrize("learning_rate", [0.1, 10])
def test_a_rate_that_is_far_too_high(base, trained, learning_rate):
    found = trained(base, many(chain, 240), learning_rate=learning_rate)
    assert found.names == ["loss diverges"]
    one = found.one("loss diverges")
    assert one["evidence"].startswith("the loss is ") and "it was" in one["evidence"]
    assert one["change"].startswith(f"train.learning_rate: {learning_rate / 10:.1e}")
    assert {one["name"] for one in found.along} >= {"loss diverges"}


def test_gradients_that_explode(untaught, trained):
    changes = {"method": "full", "learning_rate": 30, "lr_scheduler": "constant"}
    found = trained(untaught, many(chain, 80), **changes)
    assert found.names == ["gradient explodes"]
    assert "train.learning_rate" in found.one("gradient explodes")["change"]


def test_gradients_that_vanish_after_a_step_too_large(untaught, trained):
    found = trained(untaught, many(chain, 240), learning_rate=0.9)
    assert found.names == ["gradient vanishes"] and "died" in found.one("gradient vanishes")["cause"]


def test_broken_rows_make_spikes(base, trained):
    rows = [babble(number) if number // 4 % 12 == 7 else chain(number) for number in range(480)]
    found = trained(base, rows, learning_rate=2e-3)
    assert found.names == ["loss spikes"]
    assert "broken rows" in found.one("loss spikes")["cause"] and "data.sources" in found.one("loss spikes")["change"]


@pytest.fixture
def logged(monkeypatch) -> list[dict]:
    """The rows that the trainer was about to log, the one that ended the run among them."""
    rows: list[dict] = []
    log = trainer.Trainer.log

    def record(self, logs, *args, **kwargs):
        rows.append({**logs, "step": self.state.global_step})
        return log(self, logs, *args, **kwargs)

    monkeypatch.setattr(trainer.Trainer, "log", record)
    return rows


def test_a_loss_that_is_no_number_after_steps_too_large(base, trained, logged):
    with pytest.raises(UserError, match="nan at step"):
        trained(base, many(chain, 80), learning_rate=1e8, lr_scheduler="constant")
    settings = quick_settings(learning_rate=1e8)
    rows = metrics_rows(logged)
    told = explain_nan(rows[:-1], settings, "float32")
    assert "the steps are too large" in told and "train.learning_rate: 1.0e+07" in told
    assert explain_nan(rows, settings, "float32") == told
    found = examine(rows, training_facts(), settings)
    assert [(one["name"], one["severity"]) for one in found] == [("loss not a number", "stop")]
    assert found[0]["step"] == logged[-1]["step"]


def test_a_base_with_an_infinity_in_its_weights(tmp_path):
    """The loss of a really broken model; no training gets as far as a step with it."""
    folder = save_tiny_model(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("inf")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    told = explain_nan([], LORA, "float32")
    assert "the base model's weights" in told and "model.source" in told
    rows = [MetricsRow(step=1, epoch=0.1, loss=first_loss(folder), grad_norm=math.nan)]
    found = examine(rows, training_facts(), LORA)
    assert [(one["name"], one["severity"]) for one in found] == [("loss not a number", "stop")]
    assert found[0]["cause"].startswith("the base model's weights")


def first_loss(folder: Path, dtype=torch.float32, scale: float = 1.0) -> float:
    """Loss of a model on one row, its embeddings scaled."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ids = torch.tensor([chain(1)["input_ids"]])
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(scale)
        return model(input_ids=ids, labels=ids).loss.item()


def test_a_number_beyond_float16(untaught):
    """Weights scaled until activations pass 65,504: the loss of the real model in float16 (on a CPU it can't train)."""
    loss = first_loss(untaught, torch.float16, scale=3e6)
    assert not math.isfinite(loss) and math.isfinite(first_loss(untaught, torch.float32, scale=3e6))
    rows = [MetricsRow(step=1, epoch=0.1, loss=loss, grad_norm=math.nan)]
    found = examine(rows, training_facts(dtype="float16"), LORA)
    assert found[0]["name"] == "loss not a number" and "65,504" in found[0]["cause"]
    assert found[0]["change"].startswith("train.compute_dtype: bfloat16")


def test_skipped_steps_of_the_fp16_scaler():
    """Made-up rows: the scaler lives on a GPU. It skips a few steps to find its scale, which is as it should be."""
    rows = noisy_run(1, 100, 4, 1.3, 0.9, 0.3)
    facts = training_facts(dtype="float16", steps=100)

    def with_overflow(every, **more) -> list[MetricsRow]:
        return [{**row, **more} if "loss" in row and every(row["step"]) else row for row in rows]

    few = with_overflow(lambda step: step < 9, grad_norm=math.inf, skipped_step=1)
    assert examine(few, facts, LORA) == []
    found = examine(with_overflow(lambda step: step % 3 == 0, grad_norm=math.inf), facts, LORA)
    assert [one["name"] for one in found] == ["gradient overflow"] and "33 of 100 steps" in found[0]["evidence"]
    assert found[0]["change"].startswith("train.compute_dtype: bfloat16")
    found = examine(with_overflow(lambda step: step <= 40, skipped_step=1), facts, LORA)
    assert [one["name"] for one in found] == ["gradient overflow"]
    # In other dtypes no gradient may overflow.
    once = with_overflow(lambda step: step == 50, grad_norm=math.inf)
    found = examine(once, replace(facts, dtype="bfloat16"), LORA)
    assert [(one["name"], one["step"]) for one in found] == [("gradient overflow", 50)]


# Learning by heart


def test_few_rows_seen_often_are_learnt_by_heart(untaught, trained):
    rows = many(babble, 12)
    found = trained(untaught, rows, heldout(babble), method="full", epochs=15)
    one = found.one("overfitting")
    assert found.names == ["overfitting"]
    evals = {row["step"]: row["eval_loss"] for row in found.rows if "eval_loss" in row}
    assert one["step"] == min(evals, key=evals.get)
    assert "train.early_stopping" in one["change"] and "train.epochs: " in one["change"]
    # With the best adapter kept there is nothing to do; with exact matches still rising it is no more than a note.
    kept = examine(found.rows, found.facts, found.settings.model_copy(update={"keep": "best"}))
    assert [(one["name"], one["severity"]) for one in kept] == [("overfitting", "note")]
    rising = [{**row, "exact_match": row["step"] / 100} if "eval_loss" in row else row for row in found.rows]
    assert examine(rising, found.facts, found.settings)[0]["severity"] == "note"


def test_far_more_passes_than_are_usual():
    facts = training_facts(examples=5_000, epochs=12, steps=3750, effective_batch=16)
    assert [one["name"] for one in examine([], facts, LORA)] == ["many passes"]
    assert examine([], replace(facts, epochs=3), LORA) == []


# Good loss, bad replies


def replies(model_dir: Path, rows: list[dict], prompts: list[list[int]], end: int | None, limit: int) -> Replies:
    """Greedy replies of a trained model to `prompts`, held against the rows' own and counted as the sampler does."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    made = []
    for prompt in prompts:
        options = {"max_new_tokens": limit, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
        made.append(model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist())
    references = [[token for token in row["labels"] if token != -100] for row in rows]

    def text(ids: list[int]) -> str:
        return " ".join(str(token) for token in (ids[: ids.index(end)] if end in ids else ids))

    finished = [end is None or end in reply for reply in made]
    return Replies(
        count=len(rows),
        exact_match=sum(map(list.__eq__, made, references)) / len(rows),
        faults=find_faults([text(reply) for reply in made], [text(reference) for reference in references], finished),
        reply_tokens=len(references[0]),
    )


def named(found: Run, sampled: Replies) -> list[Diagnosis]:
    return examine(found.rows, found.facts, found.settings, replies=sampled, final=True)


@pytest.mark.parametrize("ended", [True, False])
def test_replies_that_never_end(base, trained, ended):
    """The end token carries no loss: the loss is fine, and generation runs to its limit."""
    end = tiny_tokenizer().eos_token_id

    def turn(number: int) -> dict:
        row = chain(number, length=4)
        reply = [FIRST + 7, FIRST + 8, FIRST + 9, end]
        labels = [-100] * 4 + (reply if ended else [*reply[:3], -100])
        return {**row, "input_ids": row["input_ids"] + reply, "labels": labels}

    found = trained(base, many(turn, 240), heldout(turn), method="full")
    held = heldout(turn)
    samples = replies(found.out / "model", held, [row["input_ids"][:4] for row in held], end, limit=12)
    final = named(found, samples if ended else replace(samples, exact_match=1.0))
    assert [one["name"] for one in final] == ([] if ended else ["replies never end"])
    if not ended:
        assert "the end of a turn was not learnt" in final[0]["cause"]
        return
    # Asked with a prompt in which the reply already stands, the same model has nothing to add.
    samples = replies(found.out / "model", held, [row["input_ids"][:-1] for row in held], end, limit=12)
    assert [one["name"] for one in named(found, samples)] == ["empty replies"]


def test_replies_to_prompts_of_another_form(base, trained):
    """Prompts that end with their first token once more, where training never had it: the loss is good, no reply is."""
    rows, held = many(chain, 240, noise=0.1, length=10), heldout(noise=0.0, length=10)
    found = trained(base, rows, held, learning_rate=1e-2, epochs=3, method="full")
    prompts = [row["input_ids"][:4] for row in held]
    right = replies(found.out / "model", held, prompts, None, limit=6)
    assert right.exact_match == 1 and named(found, right) == []
    wrong = replies(found.out / "model", held, [[*prompt, prompt[0]] for prompt in prompts], None, limit=6)
    assert [one["name"] for one in named(found, wrong)] == ["wrong replies"]
    # Of three replies none may be right by chance, and at this loss no long one is.
    assert named(found, replace(wrong, reply_tokens=20_000)) == []
    # Before anything is learnt, replies may be wrong and run on.
    begun = [row for row in found.rows if row["epoch"] < 0.1]
    unended = replace(wrong, faults=wrong.faults._replace(unended=wrong.count))
    assert examine(begun, found.facts, found.settings, replies=unended) == []
    # Of a finished training it is named, however bad the loss is.
    named_ = [one["name"] for one in examine(begun, found.facts, found.settings, replies=unended, final=True)]
    assert "replies never end" in named_


# Batch and steps


def test_a_batch_that_leaves_hardly_any_steps(base, trained):
    found = trained(base, many(chain, 256, factor=7), heldout(factor=7), learning_rate=1e-2, per_step=32)
    assert found.names == ["few steps"]
    assert found.one("few steps")["change"] == "train.effective_batch_size: 4, which makes 64 steps"


def test_a_batch_that_is_small_for_much_data():
    facts = training_facts(examples=100_000, epochs=1, steps=25_000, effective_batch=4)
    assert [(one["name"], one["severity"]) for one in examine([], facts, LORA)] == [("small batch", "note")]
    assert examine([], replace(facts, steps=6_250, effective_batch=16), LORA) == []
    assert examine([], replace(facts, examples=620, steps=155), LORA) == []


# Before the first step


@pytest.mark.parametrize(("rate", "named_"), [(1e-6, True), (0.5, True), (2e-4, False), (4e-5, False), (8e-3, False)])
def test_a_rate_far_from_what_is_usual_is_named_before_the_first_step(rate, named_):
    found = examine([], training_facts(), LORA.model_copy(update={"learning_rate": rate}))
    assert [one["name"] for one in found] == (["learning rate far off"] if named_ else [])
    if named_:
        assert found[0]["severity"] == "warning" and found[0]["step"] is None
        assert "times" in found[0]["evidence"] and found[0]["change"].startswith("train.learning_rate: ")


# Another loss


def test_the_loss_of_dft_is_not_read_as_nats(base, trained):
    """p log(1/p) of a token that is not known yet is near zero, and learning lets it rise."""
    found = trained(base, many(chain, 120, factor=7), heldout(factor=7), learning_rate=3e-3, loss="dft")
    assert found.along == [] and found.final == []


# A finished run


def test_what_has_passed_is_kept_as_a_note():
    """A loss that climbs at first and comes down again: seen while it lasted, a note in the end."""
    losses = [1.0] * 3 + [6.0] * 12 + list(np.linspace(6, 0.5, 40)) + [0.5 + 0.02 * (i % 3) for i in range(45)]
    rows = [MetricsRow(step=i + 1, epoch=(i + 1) / 100, loss=loss, grad_norm=1.0) for i, loss in enumerate(losses)]
    findings = Findings(training_facts(steps=100), LORA)
    findings.replay(rows[:20], [])
    assert [(one["name"], one["severity"]) for one in findings.diagnoses] == [("loss diverges", "warning")]
    ended = diagnose(rows, [], training_facts(steps=100), LORA)
    assert [(one["name"], one["severity"]) for one in ended] == [("loss diverges", "note")]
    assert ended[0]["evidence"].count("it passed by the end") == 1


def test_replies_are_judged_by_those_that_were_there():
    """At a look those of the steps before it; in the end the last ones; those of the base never."""

    def sampled(step: int, finished: bool) -> SampleRow:
        return SampleRow(step=step, id="a", prompt="p", reference="r", reply="x", exact_match=1, finished=finished)

    rows = [MetricsRow(step=i + 1, epoch=(i + 1) / 40, loss=2.0 - 0.049 * i, grad_norm=1.0) for i in range(40)]
    facts = training_facts(steps=40, reply_tokens=4)
    samples = [sampled(0, False), sampled(30, False), sampled(40, True)]
    (passed,) = diagnose(rows, samples, facts, LORA)
    assert passed["name"] == "replies never end" and passed["severity"] == "note" and passed["step"] > 30
    assert diagnose(rows, samples[:1], facts, LORA) == [] == diagnose(rows, [samples[0], samples[2]], facts, LORA)


def test_a_diagnosis_is_one_line_that_names_a_setting():
    found = examine([], training_facts(trainable_parameters=0), LORA)[0]
    assert set(found) == {"name", "severity", "step", "evidence", "cause", "change"}
    line = in_a_line(found)
    assert "\n" not in line and line.startswith("doctor: ") and "train.target_modules: all-linear" in line
