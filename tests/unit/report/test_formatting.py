"""Numbers, durations and texts as people read them."""

import pytest

from adder.core.files import read_json, write_json
from adder.report import formatting
from report_fixture import write_stage_folders
from report_pages import make_again, page_of


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (122, "122"), (0.0131, "0.0131"), (3.1e-6, "3.1×10⁻⁶"), (631.7, "632"), (2.304, "2.30"),
        (134_515_008, "134,515,008"), (-1.966, "−1.97"), (None, "–"), (float("inf"), "∞"), (float("nan"), "–"),
    ],
)  # fmt: skip
def test_numbers_have_sensible_digits(value, text):
    assert formatting.number(value) == text


def test_durations_and_sizes_have_units():
    spaced = [s.replace("\u00a0", " ") for s in map(formatting.duration, (0.94, 59.6, 342.6, 7500))]
    assert spaced == ["0.9 s", "60 s", "5 min 43 s", "2 h 05 min"]
    assert formatting.size(2_410_000_000).replace("\u00a0", " ") == "2.41 GB"
    assert formatting.percent(0.915).replace("\u00a0", " ") == "91.5 %"
    assert [formatting.energy(one).replace("\u00a0", " ") for one in (None, 312.4, 42_480, 9e6)] == [
        "–", "312 J", "11.8 Wh", "2.50 kWh",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"), (True, "true"), (2e-4, "0.0002"), ([], "none"), (["q", "v"], "q, v"), ("auto", "auto"),
        ({"path": "a", "hub": None, "columns": {}, "roles": {"x": 1}}, "path a, roles x 1"),
    ],
)  # fmt: skip
def test_settings_are_compared_in_words(value, text):
    assert formatting.in_words(value) == text


def test_what_stages_write_has_the_signs_of_the_figures_beside_it(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=12, merge_bases=True)
    proof = read_json(inputs["merge"] / "proof.json")
    proof["base"]["reason"] = "run-2 and 1e-05: the two differ by -0.0038 (95 % interval -0.0049 to +0.0002)"
    write_json(inputs["merge"] / "proof.json", proof)
    words = page_of(make_again(tmp_path, settings, inputs)).words
    assert "differ by −0.0038 (95 % interval −0.0049 to +0.0002)" in words and "un-2 and 1e-05" in words
    assert formatting.cell(("loss", -3)) == "−3"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/anna/data/a.jsonl", "a.jsonl"),
        ("~/base", "base"),
        ("../x/y/", "y"),
        (r"C:\\Users\\Anna\\m", "m"),
        ("org/base", "org/base"),
        ("https://host/v1/models", "https://host/v1/models"),
        ("3/4 and and/or", "3/4 and and/or"),
        ("merged into /a/b, checked", "merged into b, checked"),
    ],
)
def test_local_paths_are_named_without_their_folders(text, shown):
    assert formatting.public(text) == shown
