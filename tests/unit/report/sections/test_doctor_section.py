"""The doctor's section: the serious first, settings as code, never healthy without having looked."""

import pytest

from adder.core.errors import UserError
from adder.core.files import read_json, write_json
from adder.report import html_page, run, run_metrics
from adder.report.facts import load
from adder.report.page_section import RunReport
from adder.report.resolved_settings import SettingRow
from adder.report.sections import doctor_section
from adder.training.monitoring import doctor
from adder.training.monitoring.symptoms import Diagnosis
from report_fixture import HOSTILE, write_stage_folders
from report_pages import make, make_again, page_of, section


def test_a_healthy_training_gets_one_calm_line(finished):
    doctor = section(finished, "doctor")
    assert doctor.startswith("Doctor ✓ nothing found Looked for: a loss that stays flat")
    assert "Warning" not in doctor and "Likely cause" not in doctor
    words = page_of(finished).words
    assert words.index("held-out conversations; bars are 95 %") < words.index("✓ nothing found Looked for")
    metrics = read_json(finished / "metrics.json")
    assert metrics["doctor"] == [] and metrics["kept"]["value"] == 122
    assert not {"diagnoses", "preflight", "advice", "kept"} & metrics["train"].keys()


def test_what_the_doctor_found_stands_under_the_verdict(tmp_path):
    out = make(tmp_path, course="spiky", heldout=20)
    shown, text = section(out, "doctor"), (out / "report.html").read_text(encoding="utf-8")
    assert shown.startswith("Doctor Warning Loss spikes step 67 The loss jumped in 3 of 102 steps")
    assert "Likely cause Some batches are unlike the others" in shown and "nothing found" not in shown
    assert "<code>train.max_grad_norm: 0.3</code> and <code>train.learning_rate: 2.5e-03</code>" in text
    assert "Set now train.max_grad_norm: 1.0 (default) train.learning_rate: 0.005 (run)" in shown
    assert "may well be right here: train.learning_rate: 5.0e-03 ; usual: 1e-04" in shown.replace(
        "5.0e-03;", "5.0e-03 ;"
    )
    assert read_json(out / "metrics.json")["doctor"] == [{"name": "loss spikes", "severity": "warning", "step": 67}]


def test_the_serious_stands_first():
    note = Diagnosis(name="a", severity="note", step=3, evidence="", cause="", change="train.epochs: 1")
    rows = [SettingRow({"key": "train.epochs", "value": 2, "from": "run", "reason": None})]
    first, second = doctor_section.found([note, {**note, "name": "b", "severity": "stop"}], rows)
    assert (first.name, second.name) == ("b", "a")
    assert first.change == [(True, "train.epochs: 1")] and first.now == rows


def test_a_mended_diagnosis_reaches_a_training_that_is_finished(tmp_path, monkeypatch):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5)
    assert "nothing found" in section(make_again(tmp_path, settings, inputs), "doctor")
    mended = Diagnosis(name="too cold", severity="warning", step=7, evidence="e", cause="c", change="train.epochs: 9")
    monkeypatch.setattr(doctor, "diagnose", lambda *_: [mended])
    assert "Warning Too cold step 7" in section(make_again(tmp_path, settings, inputs), "doctor")


def test_a_training_that_left_nothing_to_judge_by_is_refused(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5)
    record = read_json(inputs["train"] / "train.json")
    del record["facts"]
    write_json(inputs["train"] / "train.json", record)
    with pytest.raises(UserError, match="has nothing to judge the training by; an older version wrote it"):
        make_again(tmp_path, settings, inputs)


def test_settings_are_set_as_code_with_the_values_that_one_can_write():
    def code(text):
        pieces = doctor_section.with_settings(text)
        assert "".join(piece for _, piece in pieces) == text
        return [piece for is_code, piece in pieces if is_code]

    assert code("train.epochs: 3, or train.keep: best with train.early_stopping: 2") == [
        "train.epochs: 3", "train.keep: best", "train.early_stopping: 2"
    ]  # fmt: skip
    assert code("train.epochs: fewer") == ["train.epochs"] and code("train.max_examples: far fewer") == [
        "train.max_examples"
    ]
    assert code("too large (train.learning_rate 1.5e-03).") == ["train.learning_rate 1.5e-03"]
    assert code("train.target_modules: all-linear") == ["train.target_modules: all-linear"]
    assert code("data.sources: look at those rows") == ["data.sources"] and code("it trains. model is") == []
    assert code("no gradient in model.layers.1.mlp, base_model.model.lm_head.x") == []
    assert code("tokenize.chat_template: null (the model's own)") == ["tokenize.chat_template: null"]
    assert doctor_section.mentioned("train.epochs: 1, train.keep: best, train.epochs: 2") == [
        "train.epochs", "train.keep"
    ]  # fmt: skip


def test_doctor_filmstrip_and_preflight_escape_what_they_show(tmp_path):
    script = "<script>alert('adder')</script>"
    settings, inputs = write_stage_folders(tmp_path / "stages", hostile=True, heldout=30)
    facts = load(inputs, settings.shows)
    bad = Diagnosis(name=HOSTILE, severity="stop", step=3, evidence=HOSTILE, cause=HOSTILE, change=HOSTILE)
    facts.diagnoses[:], facts.advice[:] = [bad], [f"train.epochs: 3{HOSTILE}"]
    view = run.build_view(RunReport(settings, facts, run_metrics.build_metrics(settings, facts)))
    out = tmp_path / "page"
    out.mkdir()
    text = html_page.render("report", view, ("report.css",))
    (out / "report.html").write_text(text, encoding="utf-8")
    assert text.count("<script") == 1
    # Name, evidence, cause, change, warning before the first step, advice.
    assert section(out, "doctor").count(script) == 6 and f"Likely cause {script}" in section(out, "doctor")
    assert f"48213?{script}" in section(out, "training") and f"step 122{script}" in section(out, "training")
    # Three prompts, each with its gist, the whole prompt, five replies and the reference.
    assert section(out, "filmstrip").count(script) >= 3 * 8
