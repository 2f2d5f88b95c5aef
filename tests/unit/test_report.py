"""The report: what stands in it, that nothing from data can break out of it, and that it needs nothing but itself."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import yaml

from adder import plots, report, report_data, report_samples, report_text
from adder.errors import UserError
from adder.files import read_json, read_jsonl, write_json, write_jsonl
from adder.progress import Progress
from report_fixture import HOSTILE, write_stage_folders

VOID = {"meta", "link", "input", "br", "img", "hr"}
SVG_LEAVES = {"line", "circle", "rect", "path", "polyline"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what the tests ask about."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.stack, self.tags, self.urls, self.ids, self.text, self.scripts = [], [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.urls += [attrs[name] for name in ("src", "href", "action", "poster", "xlink:href") if attrs.get(name)]
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag == "script":
            self.scripts.append(attrs)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in SVG_LEAVES, f"<{tag}/> closes nothing in HTML"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, f"</{tag}> inside {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data):
        if not self.stack or self.stack[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


def make(folder, **kwargs):
    """Write stage folders and the report of them; return the report's folder."""
    settings, inputs = write_stage_folders(folder / "stages", **kwargs)
    return make_again(folder, settings, inputs)


def make_again(folder, settings, inputs):
    out = folder / "report"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    report.run(settings, inputs, out, Progress.silent())
    return out


def page_of(out) -> Page:
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert page.stack == []
    return page


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make(tmp_path_factory.mktemp("report"))


def test_page_is_well_formed_small_and_asks_for_nothing(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    page = page_of(finished)
    assert len(text.encode()) < 3_000_000
    assert [url for url in page.urls if not url.startswith(("#", "data:"))] == []
    assert "url(" not in text and "@import" not in text and "fetch(" not in text
    assert len(page.ids) == len(set(page.ids))
    anchors = {url[1:] for url in page.urls if url.startswith("#")}
    assert anchors <= set(page.ids)


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


def test_verdict_comes_first_and_every_section_is_there(finished):
    words = page_of(finished).words
    metrics = read_json(finished / "metrics.json")
    assert words.index(metrics["verdict"]["sentence"]) < words.index("Replies before and after")
    for heading in (
        "Field by field", "Training", "Where the rows went", "Sequence length and packing", "What carries loss",
        "The merged model is what was trained", "What Adder chose, and why", "Every setting", "Provenance and cost",
    ):  # fmt: skip
        assert heading in words
    assert "256 is the smallest multiple of 64" in words
    assert "This CPU has neither AVX512-BF16 nor AMX" in words
    assert "2 × no assistant message; 1 × empty reply" in words


def test_script_tags_in_rows_replies_and_names_stay_text(tmp_path):
    out = make(tmp_path, hostile=True, heldout=30, right=0.5)
    text = (out / "report.html").read_text(encoding="utf-8")
    page = page_of(out)
    assert text.count("<script") == 1 and page.scripts == [{}]
    assert "alert(" in text and "<script>alert" not in text
    # It is shown, in every place it came from: title, prompt, reply, token, source, licence, reject reason.
    assert page.words.count("<script>alert('adder')</script>") >= 30 * 3
    assert HOSTILE in yaml.safe_load((out / "run.yaml").read_text(encoding="utf-8"))["run"]


def test_plots_escape_their_labels():
    part = {"name": HOSTILE, "count": 3, "kind": "tuned"}
    drawn = [
        plots.flow(3, [part], HOSTILE),
        plots.bars([{"name": HOSTILE, "value": 1.0, "kind": "plain", "note": HOSTILE}], str, HOSTILE),
        plots.lines([{"name": HOSTILE, "kind": "tuned", "points": [(1, 1.0), (2, 2.0)]}], HOSTILE, str, HOSTILE),
        plots.histogram([0, 1, 2], [3, 4], 1, HOSTILE, HOSTILE),
    ]
    for svg in drawn:
        assert "<script" not in svg
        page = Page(svg)
        assert page.stack == [] and page.tags[0][1]["aria-label"] == HOSTILE


def test_metrics_hold_what_the_schema_promises(finished):
    metrics = read_json(finished / "metrics.json")
    assert metrics["schema_version"] == 1 and metrics["run"] == "default"
    for name in ("exact_match", "loss", "perplexity", "json_valid", "field_f1"):
        entry = metrics["heldout"][name]
        for who in ("base", "tuned"):
            assert entry[who].keys() == {"value", "ci95", "n"} and entry[who]["n"] == 200
            low, high = entry[who]["ci95"]
            assert low <= entry[who]["value"] <= high
        low, high = entry["difference"]["ci95"]
        assert low <= entry["difference"]["value"] <= high
        assert entry["difference"]["value"] == pytest.approx(entry["tuned"]["value"] - entry["base"]["value"], abs=1e-6)
    assert metrics["verdict"].keys() >= {"verdict", "metric", "difference", "ci95", "sentence"}
    assert (metrics["verdict"]["verdict"], metrics["verdict"]["metric"]) == ("better", "exact_match")
    assert set(metrics["stages"]) == set(report_data.STAGES)
    for stage in metrics["stages"].values():
        assert stage["seconds"] > 0 and stage["peak_memory_bytes"] > 0 and stage["restored"] is False
    assert metrics["data"]["rows_in"] == metrics["data"]["accepted"] + 14 + 6 + 3
    assert metrics["lengths"]["max_seq_length"] == 256 and metrics["lengths"]["packing"] is True


def test_too_few_rows_to_tell(tmp_path):
    out = make(tmp_path, heldout=12, right=0.2)
    verdict = read_json(out / "metrics.json")["verdict"]
    assert verdict["verdict"] == "can't tell" and verdict["needed_n"] > 12
    text = (out / "report.html").read_text(encoding="utf-8")
    assert 'class="verdict unsure"' in text and verdict["sentence"] in page_of(out).words


def test_only_a_sure_difference_gets_a_colour():
    assert report.is_sure({"value": 0.4, "ci95": [0.2, 0.6], "p": 0.001})
    assert not report.is_sure({"value": 0.4, "ci95": [0.2, 0.6], "p": 0.06})
    assert not report.is_sure({"value": -7.7, "ci95": [-16.9, 1.5]})
    assert not report.is_sure({"value": 0.4, "ci95": None}) and not report.is_sure({})


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=20)
    path = inputs["evaluate_base"] / "scores.json"
    scores = read_json(path)
    infinite = float("inf")
    scores["heldout"]["perplexity"] = {"value": infinite, "ci95": [1.0, infinite], "n": 20, "stderr": float("nan")}
    scores["heldout"]["loss"]["ci95"] = [0.1, infinite]
    write_json(path, scores)
    out = make_again(tmp_path, settings, inputs)

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    metrics = json.loads((out / "metrics.json").read_text(), parse_constant=refuse)
    assert metrics["heldout"]["perplexity"]["base"] == {"value": None, "ci95": [1.0, None], "n": 20}
    page_of(out)


def test_run_yaml_says_where_every_setting_came_from(finished, tmp_path):
    record = yaml.safe_load((finished / "run.yaml").read_text(encoding="utf-8"))
    settings, _ = write_stage_folders(tmp_path / "stages", heldout=5)
    rows = record["settings"]
    for row in settings["resolved"]:
        found = rows[row["key"]]
        if found["from"] == "chosen":
            assert row["value"] == "auto" and found["reason"]
        else:
            assert found == {"value": row["value"], "from": row["origin"]}
    assert rows["lengths.max_seq_length"]["value"] == 256 and rows["lengths.max_seq_length"]["from"] == "chosen"
    assert rows["train.compute_dtype"]["value"] == "float32"
    assert rows["train.gradient_accumulation_steps"]["from"] == "chosen"
    assert rows["evaluate.max_new_tokens"]["value"] == 69
    assert record["stages"]["train"]["key"] == settings["stages"]["train"]
    assert record["stages"]["train"]["path"].endswith(f"train/{settings['stages']['train']}")
    assert record["versions"]["torch"] == "2.13.0"
    assert yaml.safe_load(yaml.safe_dump(record)) == record


def test_a_value_that_the_user_gave_is_not_shown_as_chosen(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5)
    for row in settings["resolved"]:
        if row["key"] == "lengths.max_seq_length":
            row.update(value=256, origin="config")
    facts = report_data.load(inputs)
    found = {row["key"]: row for row in report_data.resolve(settings, facts)}
    assert found["lengths.max_seq_length"] == {
        "key": "lengths.max_seq_length", "value": 256, "from": "config", "reason": None
    }  # fmt: skip
    view = report.build_view(settings, facts, report_data.build_metrics(settings, facts))
    assert "lengths.max_seq_length" not in [choice["key"] for choice in view["choices"]]


def test_equal_stages_give_equal_bytes(finished, tmp_path):
    first = {path.name: path.read_bytes() for path in finished.iterdir()}
    inputs = {stage: finished.parent / "stages" / stage for stage in report_data.STAGES}
    inputs = {stage: next(folder.iterdir()) for stage, folder in inputs.items()}
    settings, _ = write_stage_folders(tmp_path / "stages")
    again = make_again(tmp_path, settings, inputs)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == first
    assert set(first) == {"report.html", "metrics.json", "run.yaml"}


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


def test_a_missing_file_is_named(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5)
    (inputs["merge"] / "proof.json").unlink()
    with pytest.raises(UserError, match=r"merge/\w+/proof.json is missing"):
        report.run(settings, inputs, tmp_path, Progress.silent())
    with pytest.raises(UserError, match="no folder given for train"):
        report.run(settings, {k: v for k, v in inputs.items() if k != "train"}, tmp_path, Progress.silent())


def test_evaluations_of_different_rows_are_refused(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5)
    path = inputs["evaluate_base"] / "samples.jsonl"
    write_jsonl(path, list(read_jsonl(path))[1:])
    with pytest.raises(UserError, match="different rows.*tickets:1"):
        report.run(settings, inputs, tmp_path, Progress.silent())


def test_worst_samples_come_first_and_right_ones_keep_a_place(tmp_path):
    _, inputs = write_stage_folders(tmp_path / "stages", heldout=100, right=0.3)
    samples = report_data.paired_samples(inputs["evaluate_base"], inputs["evaluate_tuned"])
    chosen = report_samples.select_samples(samples, 30)
    marks = [row["tuned"]["right"] for row in chosen["rows"]]
    assert marks == [False] * 20 + [True] * 10
    losses = [row["loss"] for row in chosen["rows"][:20]]
    assert losses == sorted(losses, reverse=True)
    assert (chosen["shown"], chosen["total"], chosen["wrong"] + chosen["right"]) == (30, 100, 100)
    few_right = [s | {"tuned": s["tuned"] | {"exact_match": int(n < 3)}} for n, s in enumerate(samples)]
    assert [r["tuned"]["right"] for r in report_samples.select_samples(few_right, 30)["rows"]].count(True) == 3


def test_loss_counts_each_row_by_its_tokens():
    rows = [{"loss": 1.0, "labelled_tokens": 30}, {"loss": 4.0, "labelled_tokens": 10}]
    assert report_data.per_row("loss", rows).mean() == pytest.approx((30 + 40) / 40)


def test_only_the_differing_value_is_marked_whatever_the_order_of_keys():
    reference = '{"intent": "refund", "amount": 19.99, "date": "2026-05-03"}'
    marked, unlike = report_samples.mark(
        reference, '{"date": "2026-05-04", "amount": 19.99, "intent": "refund"}', False
    )
    assert not unlike
    assert [(kind, text) for kind, text in marked if kind != "same"] == [
        ("missing", "2026-05-03"), ("wrong", "2026-05-04"),
    ]  # fmt: skip
    assert report_samples.mark(reference, "I am sorry to hear that.", False) == (
        [("same", "I am sorry to hear that.")], True,
    )  # fmt: skip
    assert report_samples.mark(reference, "", False) == ([("same", "")], False)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (122, "122"), (0.0131, "0.0131"), (3.1e-6, "3.1×10⁻⁶"), (631.7, "632"), (2.304, "2.30"),
        (134_515_008, "134,515,008"), (-1.966, "−1.97"), (None, "–"), (float("inf"), "∞"), (float("nan"), "–"),
    ],
)  # fmt: skip
def test_numbers_have_sensible_digits(value, text):
    assert report_text.number(value) == text


def test_durations_and_sizes_have_units():
    spaced = [s.replace("\u00a0", " ") for s in map(report_text.duration, (0.94, 59.6, 342.6, 7500))]
    assert spaced == ["0.9 s", "60 s", "5 min 43 s", "2 h 05 min"]
    assert report_text.size(2_410_000_000).replace("\u00a0", " ") == "2.41 GB"
    assert report_text.percent(0.915).replace("\u00a0", " ") == "91.5 %"


def test_ticks_are_round_and_inside():
    assert plots.ticks(0, 2.3, 4) == [0, 1, 2]
    assert plots.ticks(1, 122, 7) == [20, 40, 60, 80, 100, 120]
    assert plots.ticks(5, 5) == [5]


def test_a_curve_with_holes_or_a_single_point_is_drawn():
    series = {"name": "loss", "kind": "tuned", "points": [(1, 2.0), (2, float("nan")), (3, 1.0)]}
    assert plots.lines([series], "step", str, "Loss").count('class="hit"') == 2
    assert "polyline" in plots.lines([series | {"points": [(1, 2.0)]}], "step", str, "Loss")
    assert plots.lines([series | {"points": []}], "step", str, "Loss") == ""
    long = series | {"points": [(n, float(n)) for n in range(100_000)]}
    assert len(plots.lines([long], "step", str, "Loss")) < 150_000
