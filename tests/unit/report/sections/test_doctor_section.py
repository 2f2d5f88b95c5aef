"""The doctor's section: the serious first, settings as code, never healthy without having looked."""

from adder.core.files import read_json, write_json
from adder.report.sections import doctor_section
from report_fixture import write_stage_folders
from report_pages import make, make_again, page_of, section


def test_a_healthy_training_gets_one_calm_line(finished):
    doctor = section(finished, "doctor")
    assert doctor.startswith("Doctor ✓ nothing found The training looks healthy. Looked for: a loss that stays flat")
    assert "Warning" not in doctor and "Likely cause" not in doctor
    words = page_of(finished).words
    assert words.index("held-out conversations; bars are 95 %") < words.index("✓ nothing found The training")
    metrics = read_json(finished / "metrics.json")
    assert metrics["doctor"] == [] and metrics["kept"]["value"] == 122
    assert not {"diagnoses", "preflight", "advice", "kept"} & metrics["train"].keys()


def test_what_the_doctor_found_stands_under_the_verdict_the_serious_first(tmp_path):
    out = make(tmp_path, course="spiky", heldout=20)
    doctor, text = section(out, "doctor"), (out / "report.html").read_text(encoding="utf-8")
    assert doctor.startswith("Doctor Warning Loss spikes step 67 The loss jumped in 3 of 102 steps")
    assert doctor.index("Warning Loss spikes") < doctor.index("Note Gradient explodes")
    assert "Likely cause Some batches are unlike the others" in doctor and "nothing found" not in doctor
    assert "<code>train.max_grad_norm: 0.3</code> and <code>train.learning_rate: 5.0e-05</code>" in text
    assert "Set now train.max_grad_norm: 1.0 (default) train.learning_rate: 0.0001 (run)" in doctor
    assert "may well be right here: train.learning_rate: 5.0e-03 ; usual: 1e-04" in doctor.replace(
        "5.0e-03;", "5.0e-03 ;"
    )
    assert read_json(out / "metrics.json")["doctor"] == [
        {"name": "gradient explodes", "severity": "note", "step": 67},
        {"name": "loss spikes", "severity": "warning", "step": 67},
    ]


def test_a_training_without_doctor_or_samples_is_not_called_healthy(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5)
    record = read_json(inputs["train"] / "train.json")
    kept = {name: value for name, value in record.items() if name not in ("diagnoses", "advice", "kept", "preflight")}
    write_json(inputs["train"] / "train.json", kept)
    (inputs["train"] / "samples.jsonl").unlink()
    out = make_again(tmp_path, settings, inputs)
    assert "holds no diagnosis" in section(out, "doctor") and "healthy" not in section(out, "doctor")
    assert "Replies while training" not in page_of(out).words
    assert read_json(out / "metrics.json")["doctor"] is None


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
    out = make(tmp_path, hostile=True, heldout=30)
    text = (out / "report.html").read_text(encoding="utf-8")
    assert text.count("<script") == 1
    script = "<script>alert('adder')</script>"
    for words in (f"It broke{script}\"'& step 3 It broke{script}", f"Likely cause It broke{script}"):
        assert words in section(out, "doctor")
    # Name, evidence, cause, change, warning before the first step, advice.
    assert section(out, "doctor").count(script) == 6
    assert f"48213?{script}" in section(out, "training") and f"step 122{script}" in section(out, "training")
    # Three prompts, each with its gist, the whole prompt, five replies and the reference.
    assert section(out, "filmstrip").count(script) >= 3 * 8
