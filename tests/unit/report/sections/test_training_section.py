"""The training section: curves with their marks, evaluations, the look before the start."""

from adder.core.files import read_json
from adder.report import plots
from adder.report.facts import load
from adder.report.sections import training_section
from report_fixture import write_stage_folders
from report_pages import make, section


def test_a_training_that_was_interrupted_says_in_how_many_attempts(tmp_path, finished):
    out = make(tmp_path, attempts=2)
    assert "Time 5 min 43 s whole stage in 2 attempts; 632 tokens/s within a step" in section(out, "training").replace(
        "\u00a0", " "
    )
    assert read_json(out / "metrics.json")["stages"]["train"]["attempts"] == 2
    assert "Time 5 min 43 s whole stage; 632 tokens/s within a step" in section(finished, "training").replace(
        "\u00a0", " "
    )


def test_the_preflight_is_shown_and_its_warnings_stand_with_the_doctor(finished, tmp_path):
    training = section(finished, "training")
    seen = training[training.index("Looked at before the first step") :]
    for words in (
        "Carry loss 39.4 % 99 of the first pack's 251 tokens",
        "Loss of the base 2.21 on that pack; blind guessing: 10.8",
        "Layers reached 210 of 210", "Time expected roughly 5 min 18 s for the steps; the whole stage took 5 min 43 s",
        "Disk for checkpoints 176 MB of 61.2 GB free", "Disk for the merged model 269 MB",
    ):  # fmt: skip
        assert words in seen.replace("\u00a0", " "), words
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert '<span class="on">{&#34;intent&#34;: &#34;delivery_status&#34;}&lt;|im_end|&gt;</span>' in text
    assert text.count("<i>next example</i>") == 1 and '<details class="preflight"><summary>' in text
    assert "Before the first step" not in section(finished, "doctor")
    out = make(tmp_path, course="spiky", heldout=5)
    assert "Before the first step: Warning 1 of 210 trained layers get no gradient" in section(out, "doctor")
    assert "209 of 210" in section(out, "training") and "from token 13 of 251 on" in section(out, "training")


def test_curves_mark_the_best_and_the_kept_step(finished, tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5, course="overfitted")
    facts = load(inputs, settings.shows)
    assert training_section.step_marks(facts) == [plots.Mark(62, "best", "best, kept, overfitting: step 62")]
    facts.train["kept"]["value"] = 122
    facts.diagnoses.clear()
    labels = [mark.label for mark in training_section.step_marks(facts)]
    assert labels == ["best: step 62", "kept: step 122"]
    loss, exact = training_section.curves(facts)[:2]
    assert all(label in loss.plot and label in exact.plot for label in labels)
    assert exact.unit == "of 3 sampled replies" and "step 0 · exact match 0\u00a0%" in exact.plot
    assert "step 62 · exact match 67\u00a0%" in exact.plot and "step 62 · held-out loss 0.325" in loss.plot
    facts.records["train"]["settings"]["best_by"] = "exact_match"
    facts.curve[:] = [
        row | ({"exact_match": 1.0} if row.get("exact_match") and row["step"] == 31 else {}) for row in facts.curve
    ]
    assert training_section.best_step(facts) == 31


def test_evaluations_stand_in_numbers_too(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5)
    rows = training_section.evaluation_rows(load(inputs, settings.shows))
    assert [row.step for row in rows] == [0, 31, 62, 93, 122]
    assert rows[0] == (0, None, None, 0.0)
    assert 0.2 < rows[1].loss < 0.6 and rows[-1].exact_match == 1.0
