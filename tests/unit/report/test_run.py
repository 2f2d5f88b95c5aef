"""The report: what stands in it, that nothing from data can break out of it, and that it needs nothing but itself."""

import base64
import hashlib
import re

import pytest
import yaml

from adder.core.files import read_json, read_jsonl, write_json, write_jsonl
from adder.report import run
from adder.report.facts import STAGES, load
from report_fixture import HOSTILE, write_stage_folders
from report_pages import EVERYTHING, make, make_again, page_of, section


def test_page_is_well_formed_small_and_asks_for_nothing(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    page = page_of(finished)
    assert len(text.encode()) < 3_000_000
    assert [url for url in page.urls if not url.startswith(("#", "data:"))] == []
    assert "url(" not in text and "@import" not in text and "fetch(" not in text
    assert len(page.ids) == len(set(page.ids))
    anchors = {url[1:] for url in page.urls if url.startswith("#")}
    assert anchors <= set(page.ids)


def test_verdict_comes_first_and_every_section_is_there(finished):
    words = page_of(finished).words
    metrics = read_json(finished / "metrics.json")
    assert words.index(metrics["verdict"]["sentence"]) < words.index("Replies before and after")
    for heading in (
        "Field by field", "Training", "Where the rows went", "Sequence length and packing", "What the model sees",
        "The merged model is what was trained", "What Adder chose, and why", "Every setting", "Provenance and cost",
    ):  # fmt: skip
        assert heading in words
    assert "256 is the smallest multiple of 64" in words
    assert "This CPU has neither AVX512-BF16 nor AMX" in words
    assert "Why rows were rejected rows no assistant turn2 content is empty1" in words


def test_sections_stand_in_the_order_in_which_a_run_is_made(everything):
    page = page_of(everything)
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "section" and "id" in attrs]
    assert sections == [
        "verdict", "doctor", "data", "loss", "lengths", "training", "filmstrip", "merge", "evaluation", "replies",
        "choices", "settings", "provenance",
    ]  # fmt: skip
    links = [attrs["href"][1:] for tag, attrs in page.tags if tag == "a" and attrs.get("href", "").startswith("#")]
    assert links[1 : len(sections) + 1] == sections, "the navigation follows"


def test_script_tags_in_rows_replies_and_names_stay_text(tmp_path):
    out = make(tmp_path, hostile=True, heldout=30, right=0.5)
    text = (out / "report.html").read_text(encoding="utf-8")
    page = page_of(out)
    assert text.count("<script") == 1 and page.scripts == [{}]
    assert "alert(" in text and "<script>alert" not in text
    # It is shown, in every place it came from: title, prompt, reply, token, source, licence, reject reason.
    assert page.words.count("<script>alert('adder')</script>") >= 30 * 3
    assert HOSTILE in yaml.safe_load((out / "run.yaml").read_text(encoding="utf-8"))["run"]


def test_nothing_from_models_or_judges_breaks_out_of_the_new_parts(tmp_path):
    out = make(tmp_path, hostile=True, heldout=30, **EVERYTHING)
    page = page_of(out)
    assert (out / "report.html").read_text(encoding="utf-8").count("<script") == 1 and page.scripts == [{}]
    script = "<script>alert('adder')</script>"
    merge, evaluation = section(out, "merge"), section(out, "evaluation")
    for before in ("on the former", "order 48213).", '"48213"}', "model.safetensors"):
        assert before + script in merge, before
    judged = ("judge-large", "Is every field right?", "answers the request.", "sorry to hear about that!")
    for before in (*judged, "gsm8k", "of gsm8k?"):
        assert before + script in evaluation, before
    assert re.search(r"tuned says \d+" + re.escape(script), evaluation)
    assert f"gsm8k{script}" in section(out, "verdict") and f"gsm8k{script}" in section(out, "provenance")
    handlers = [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert handlers == []


def test_equal_stages_give_equal_bytes(finished, tmp_path):
    first = {path.name: path.read_bytes() for path in finished.iterdir()}
    inputs = {stage: finished.parent / "stages" / stage for stage in STAGES}
    inputs = {stage: next(folder.iterdir()) for stage, folder in inputs.items()}
    settings, _ = write_stage_folders(tmp_path / "stages")
    again = make_again(tmp_path, settings, inputs)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == first
    assert set(first) == {"report.html", "card.md", "model_card.md", "metrics.json", "run.yaml"}


def test_free_text_full_training_and_restored_stages(tmp_path):
    out = make(tmp_path, json_replies=False, eval_loss=False, method="full", restored=True, right=0.0, heldout=40)
    metrics = read_json(out / "metrics.json")
    words = page_of(out).words
    assert metrics["verdict"]["metric"] == "loss" and metrics["verdict"]["verdict"] == "better"
    assert "json_valid" not in metrics["heldout"] and metrics["fields"] == {}
    assert metrics["stages"]["train"]["restored"] is True
    assert "Field by field" not in words and "restored" in words


@pytest.mark.parametrize("emptied", ["metrics.jsonl", "plan.json"])
def test_a_training_without_curves_or_plan_still_reports(tmp_path, emptied):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5)
    (inputs["train"] / emptied).write_text("" if emptied.endswith("l") else "{}")
    assert "held-out" in page_of(make_again(tmp_path, settings, inputs)).words


def test_a_tab_has_its_sections_name(finished):
    words = page_of(finished).words
    assert "Filmstrip" not in words and words.count("Replies while training") == 2


def test_the_header_counts_what_was_trained_on_and_of_how_many(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=12)
    facts = load(inputs, settings.shows)
    facts.format["train_rows"] = facts.format["train"]
    facts.lengths["dropped"] = 0
    assert run.trained_on(facts) == "980"
    facts.lengths["tokens"]["count"], facts.lengths["dropped"] = 300, 2  # train.max_examples: 300, two too long
    assert run.trained_on(facts) == "298 of 980"
    words = page_of(make_again(tmp_path, settings, inputs)).words
    assert "977 of 1,030 training and 12 held-out conversations" in words


def test_held_out_texts_without_replies_are_judged_by_their_loss(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=20)
    for who in ("base", "tuned"):
        path = inputs[f"evaluate_{who}"]
        rows = [
            {key: row[key] for key in ("id", "reference", "loss", "labelled_tokens")} | {"prompt": [], "reply": None}
            for row in read_jsonl(path / "samples.jsonl")
        ]
        write_jsonl(path / "samples.jsonl", rows)
        scores = read_json(path / "scores.json")
        scores["heldout"] = {name: scores["heldout"][name] for name in ("loss", "perplexity")}
        write_json(path / "scores.json", scores)
    out = make_again(tmp_path, settings, inputs)
    metrics, words = read_json(out / "metrics.json"), page_of(out).words
    assert metrics["verdict"]["metric"] == "loss" and metrics["verdict"]["verdict"] == "better"
    assert "The held-out texts have no replies" in words and "on the same 20 held-out conversations" in words


def test_replies_are_judged_where_some_held_out_rows_are_texts(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=60)
    for who in ("base", "tuned"):
        path = inputs[f"evaluate_{who}"] / "samples.jsonl"
        rows = list(read_jsonl(path))
        kept = ("id", "reference", "loss", "labelled_tokens")
        rows[:10] = [{key: row[key] for key in kept} | {"prompt": [], "reply": None} for row in rows[:10]]
        write_jsonl(path, rows)
    out = make_again(tmp_path, settings, inputs)
    metrics = read_json(out / "metrics.json")
    assert metrics["verdict"]["metric"] == "exact_match" and metrics["heldout"]["exact_match"]["difference"]["ci95"]
    assert "of 50 tuned replies match" in page_of(out).words


def test_the_page_may_run_its_own_script_only(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    page = page_of(finished)
    metas = [attrs for tag, attrs in page.tags if tag == "meta"]
    policy = next(attrs["content"] for attrs in metas if attrs.get("http-equiv") == "Content-Security-Policy")
    script = re.search(r"<script>(.*?)</script>", text, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert page.scripts == [{}]
    handlers = [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert handlers == []
