"""The merge section: which weights, why, and the proof."""

from adder.core.files import read_json, write_json
from adder.report.sections import evaluation_section, merge_section
from report_fixture import write_stage_folders
from report_pages import make_again, section


def test_the_merge_shows_three_losses_the_choice_and_the_reply_from_disk(everything, finished):
    merge = section(everything, "merge")
    for words in (
        "adapter on NF4 0.0412 – –", "merged into the original 0.0431 +0.0019 +0.0002 to +0.0037",
        "merged into the dequantised chosen 0.0413 +0.0001 −0.0004 to +0.0006", "2,731 tokens of 64 held-out rows",
        "the adapter was trained on the former",
        "KL divergence 3.1×10⁻⁶ nats per token", "allowed are 0.05; the base is 1.94 away", "✓ same reply",
        "model.safetensors 269 MB 210",
    ):  # fmt: skip
        assert words in merge.replace("\u00a0", " "), words
    assert "Held-out loss 0.0413 nats per token; base + adapter 0.0412" in merge
    # What a proof doesn't hold isn't shown.
    merge = section(finished, "merge")
    assert "Which weights" not in merge and "same reply" not in merge and "each file" not in merge
    assert "✓ checked" in merge and "Weights unchanged" not in merge


def test_a_merge_as_set_and_a_reply_that_differs_at_a_tie(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5, merge_bases=True)
    proof = read_json(inputs["merge"] / "proof.json")
    proof["base"] = {"value": "original", "reason": "as set by merge.base", "alternatives": []}
    proof["reloaded"] |= {"same": False, "tied": {"position": 12, "gap": 1e-4}}
    write_json(inputs["merge"] / "proof.json", proof)
    merge = section(make_again(tmp_path, settings, inputs), "merge")
    assert "As set by merge.base." in merge and "difference" not in merge.partition("Predictions")[0]
    assert "answers as base + adapter did, up to token 12, where two are as good as tied" in merge


def test_no_minus_stands_before_a_zero():
    assert [merge_section.signed(value) for value in (-4e-5, 4e-5, -0.0001)] == ["0.0000", "0.0000", "−0.0001"]
    assert evaluation_section.change(-1e-6, share=True) == "+0.0 points"
