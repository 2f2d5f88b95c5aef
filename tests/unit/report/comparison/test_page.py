"""The comparison of runs: which is called best and when, and that the page and the table say what the figures say."""

import base64
import csv
import hashlib
import io
import json
import re

import pytest

from adder.core.errors import UserError
from adder.core.files import read_json, read_jsonl, write_json, write_jsonl
from adder.report.comparison import facts, sentences
from adder.report.comparison import page as compare
from compare_fixture import change_metrics, copy_run, sweep, write_run
from page_parser import Page
from report_fixture import HOSTILE

RATES = {"low": 1e-4, "middle": 2e-4, "high": 4e-4}


def of_rates(root, rights, **options):
    """Three runs that differ in their learning rate, with these shares of right replies."""
    return {
        name: write_run(root, name, {"train.learning_rate": rate}, right=right, **options)
        for (name, rate), right in zip(RATES.items(), rights, strict=True)
    }


def made(runs, out):
    """Compare runs; return (what was compared, the page, the table's rows)."""
    out.mkdir(exist_ok=True)
    found = compare.run(runs, out)
    page = Page((out / "compare.html").read_text(encoding="utf-8"))
    assert page.stack == []
    return found, page, list(csv.DictReader(io.StringIO((out / "compare.csv").read_text(encoding="utf-8"))))


@pytest.fixture(scope="module")
def clear(tmp_path_factory):
    """A sweep whose middle run is far better."""
    root = tmp_path_factory.mktemp("clear")
    return made(of_rates(root, (0.6, 0.95, 0.4)), root / "out")


def test_a_run_that_is_surely_better_than_all_others_is_the_one_to_use(clear):
    found, page, rows = clear
    assert found.verdict.word == "best" and found.verdict.run == "middle" and found.verdict.rivals == []
    assert sentences.sentence(found).startswith("Use middle: its exact match of 9")
    assert "surely the best of the 3 runs" in sentences.sentence(found) and "the next, low" in sentences.sentence(found)
    assert page.words.index("Use middle:") < page.words.index("Every run, the best first")
    assert [row["run"] for row in rows] == ["middle", "low", "high"]
    assert [row["status"] for row in rows] == ["best", "worse", "worse"]


def test_the_sentence_has_the_figures_of_the_table(clear):
    found, _, rows = clear
    best, second = rows[:2]
    by = 100 * (float(best["exact_match"]) - float(second["exact_match"]))
    low, high = -100 * float(second["difference_high"]), -100 * float(second["difference_low"])
    shown = sentences.sentence(found).replace("\u00a0", " ")
    assert f"{by:.1f} points above" in shown and f"95 % interval {low:.1f} to {high:.1f}" in shown
    assert by == pytest.approx(-100 * float(second["difference_to_best"]))


def test_runs_that_are_alike_are_not_told_apart(tmp_path):
    found, page, rows = made(of_rates(tmp_path, (0.915, 0.93, 0.3)), tmp_path / "out")
    assert found.verdict.word == "can't tell" and found.verdict.rivals == ["low"] and found.verdict.run == "middle"
    assert "Can't tell middle from low" in page.words and "leaves it open" in page.words
    assert found.verdict.needed_n > 200 and "held-out rows would be needed to tell it from low" in page.words
    assert {row["run"]: row["status"] for row in rows} == {"middle": "ahead", "low": "can't tell", "high": "worse"}


def test_runs_with_the_same_replies_are_not_told_apart(tmp_path):
    runs = of_rates(tmp_path, (0.9, 0.9, 0.9))
    for name, seconds in (("low", 300), ("middle", 400)):
        other_model(runs[name], name)
        metrics = read_json(runs[name]["report"] / "metrics.json")
        change_metrics(runs[name], cost=metrics["cost"] | {"total_seconds": seconds})
    found, page, rows = made(runs, tmp_path / "out")
    assert found.verdict.word == "can't tell" and len(found.verdict.rivals) == 2 and found.verdict.needed_n is None
    assert found.verdict.run == "low" and found.verdict.same_model == []
    assert "would be needed" not in page.words and "highest score" not in page.words
    assert "for low, middle and high alike, on the same 200 held-out rows" in page.words
    assert "low, middle and high score the same, so take low, which took the least time" in page.words
    assert "low took 5 min 00 s, no more than any other of them." in page.words.replace("\u00a0", " ")
    assert {row["status"] for row in rows} == {"equal"}
    assert '<section id="verdict" class="verdict unsure"' in (tmp_path / "out" / "compare.html").read_text()


def other_model(folders, name):
    """Give a run's merged model a digest of its own."""
    record = read_json(folders["merge"] / "stage.json")
    for path, file in record["outputs"].items():
        if path.startswith("model/"):
            file["digest"] = f"{name} {file['digest']}"
    write_json(folders["merge"] / "stage.json", record)


def test_runs_of_one_model_are_said_to_be_that(tmp_path):
    first = write_run(tmp_path, "a", right=0.9)
    found, page, rows = made({"a": first, "b": write_run(tmp_path, "b", right=0.9)}, tmp_path / "out")
    assert sentences.sentence(found).startswith("a and b are one and the same model: exact match is ")
    assert "The merged models of a and b are the same, byte for byte, so take either." in page.words
    assert re.search(r"a and b took .* each\.", page.words) and "no more than any" not in page.words
    assert [row["status"] for row in rows] == ["equal", "equal"]
    assert '<section id="verdict" class="verdict better"' in (tmp_path / "out" / "compare.html").read_text()
    # A third that can't be told from them is still in question, and another model.
    third = copy_run(first, tmp_path, "c", 0.89, {}, 400)
    found, page, _ = made({"a": first, "b": first, "c": third}, tmp_path / "third")
    assert found.verdict.rivals == ["b", "c"] and found.verdict.same_model == ["b"]
    assert "Can't tell a from b and c" in sentences.sentence(found)
    assert "The merged models of a and b are the same, byte for byte, so take " in page.words


def test_the_stroke_is_explained_where_it_is_drawn(tmp_path):
    runs = of_rates(tmp_path, (0.6, 0.95, 0.4))
    _, page, _ = made(runs, tmp_path / "far")  # the base has no row right
    assert "The stroke is the base." not in page.words
    metrics = read_json(runs["low"]["report"] / "metrics.json")
    metrics["heldout"]["exact_match"]["base"]["value"] = 0.5
    write_json(runs["low"]["report"] / "metrics.json", metrics)
    _, page, _ = made(runs, tmp_path / "near")
    assert "The stroke is the base." in page.words
    assert (tmp_path / "near" / "compare.html").read_text(encoding="utf-8").count('class="stroke"') == 1


def test_different_held_out_rows_are_not_paired_and_the_page_says_so(tmp_path):
    runs = {name: write_run(tmp_path, name, right=right, heldout=rows)
            for name, right, rows in (("a", 0.9, 200), ("b", 0.5, 180))}  # fmt: skip
    found, page, rows = made(runs, tmp_path / "out")
    assert sentences.sentence(found).endswith("more than chance explains, but on different held-out rows.")
    assert "were not evaluated on the same held-out rows" in page.words
    assert "All runs answered the same held-out rows" not in page.words
    assert rows[1]["paired"] == "False"
    assert '<section id="verdict" class="verdict unsure"' in (tmp_path / "out" / "compare.html").read_text()


def test_losses_of_other_tokens_are_not_compared(tmp_path):
    runs = of_rates(tmp_path, (0.0, 0.0, 0.0), json_replies=False)
    path = runs["low"]["evaluate_tuned"] / "samples.jsonl"
    rows = list(read_jsonl(path))
    write_jsonl(path, [row | {"labelled_tokens": row["labelled_tokens"] + 3} for row in rows])
    metrics = read_json(runs["low"]["report"] / "metrics.json")
    metrics["heldout"]["loss"]["tuned"]["value"] = 0.01
    write_json(runs["low"]["report"] / "metrics.json", metrics)
    found = facts.compare(runs)
    assert found.metric == "loss" and found.runs[0].name == "low"  # the lowest loss leads
    assert found.verdict.word == "can't tell" and len(found.verdict.rivals) == 2
    assert "different numbers of tokens, so a loss per token can't decide" in sentences.sentence(found)


def test_lower_is_better_for_the_loss(tmp_path):
    runs = of_rates(tmp_path, (0.0, 0.0, 0.0), json_replies=False)
    for name, factor in (("low", 2.0), ("high", 3.0)):
        path = runs[name]["evaluate_tuned"] / "samples.jsonl"
        write_jsonl(path, [row | {"loss": row["loss"] * factor} for row in list(read_jsonl(path))])
        metrics = read_json(runs[name]["report"] / "metrics.json")
        metrics["heldout"]["loss"]["tuned"]["value"] *= factor
        write_json(runs[name]["report"] / "metrics.json", metrics)
    found, _, rows = made(runs, tmp_path / "out")
    assert (
        found.verdict.run == "middle"
        and found.verdict.word == "best"
        and "below that of the next, low" in sentences.sentence(found)
    )
    assert [row["run"] for row in rows] == ["middle", "low", "high"]


def test_one_run_has_a_page_too(tmp_path):
    found, page, rows = made({"default": write_run(tmp_path, "default")}, tmp_path / "out")
    assert found.verdict.word == "one" and sentences.sentence(found).startswith(
        "default is the only run. The tuned model is better"
    )
    assert len(rows) == 1 and rows[0]["difference_to_best"] == ""
    assert "Cost against quality" not in page.words and "Which settings lead where" not in page.words
    assert "Training loss" in page.words


def test_fifty_runs_fit_on_a_page(tmp_path):
    runs = sweep(tmp_path, 50)
    _, page, rows = made(runs, tmp_path / "out")
    assert (tmp_path / "out" / "compare.html").stat().st_size < 3_000_000
    assert sorted(row["run"] for row in rows) == sorted(runs)
    scores = [float(row["exact_match"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    drawn = [attrs["data-run"] for tag, attrs in page.tags if tag == "g" and "data-run" in attrs]
    assert {drawn.count(str(n)) for n in range(50)} <= {
        4,
        5,
    }  # two curves, the scatter (some named), the parallel lines
    assert "Which settings lead where" in page.words


def test_settings_that_differ_are_columns_and_what_stages_chose_stands_apart(tmp_path):
    runs = {
        name: write_run(
            tmp_path, name, {"train.learning_rate": rate, "report.title": name}, {"train.micro_batch_size": batch}
        )
        for name, rate, batch in (("a", 1e-4, 4), ("b", 2e-4, 8))
    }
    found = facts.compare(runs)
    assert found.differing == (["train.learning_rate"], ["train.micro_batch_size"])
    _, page, rows = made(runs, tmp_path / "out")
    assert [row["train.learning_rate"] for row in rows] == ["0.0001", "0.0002"]
    assert "report.title" not in rows[0] and "report.title" not in page.words
    assert "Chosen differently" in page.words and "Which settings lead where" not in page.words


def test_a_run_that_forgot_too_much_is_not_the_one_to_use(tmp_path):
    runs = of_rates(tmp_path, (0.6, 0.95, 0.4))
    change_metrics(runs["middle"], guard={"passed": False, "failed": ["gsm8k"]})
    found, page, rows = made(runs, tmp_path / "out")
    assert found.verdict.run == "low" and found.verdict.word == "best"
    assert rows[-1]["run"] == "middle" and rows[-1]["status"] == "failed: gsm8k"
    assert "Ruled out, for losing more than it may in a guarded task: middle." in page.words
    for name in ("low", "high"):
        change_metrics(runs[name], guard={"passed": False, "failed": ["gsm8k"]})
    found, _, _ = made(runs, tmp_path / "out")
    assert found.verdict.word == "refused" and sentences.sentence(found).startswith("Use none of them")


def test_tasks_are_columns(tmp_path):
    runs = of_rates(tmp_path, (0.6, 0.95, 0.4), tasks=("my_tone",))
    _, page, rows = made(runs, tmp_path / "out")
    tuned = read_json(runs["middle"]["report"] / "metrics.json")["tasks"][0]["tuned"]["value"]
    assert float(rows[0]["task my_tone"]) == tuned and "my_tone" in page.words


def test_the_table_has_all_digits_and_the_cost(tmp_path):
    runs = of_rates(tmp_path, (0.6, 0.95, 0.4), price_per_hour=2.5)
    _, page, rows = made(runs, tmp_path / "out")
    metrics = read_json(runs["middle"]["report"] / "metrics.json")
    assert float(rows[0]["exact_match"]) == metrics["heldout"]["exact_match"]["tuned"]["value"]
    assert float(rows[0]["loss_low"]) == metrics["heldout"]["loss"]["tuned"]["ci95"][0]
    assert float(rows[0]["price"]) == metrics["cost"]["price"]["value"] and rows[0]["currency"] == "EUR"
    assert float(rows[0]["seconds"]) == metrics["cost"]["total_seconds"]
    assert "price, EUR" in page.words and f"{metrics['cost']['price']['value']:.2f} EUR" in page.words


def test_cost_is_time_where_a_run_has_no_price(tmp_path):
    runs = {"a": write_run(tmp_path, "a", price_per_hour=2.5), "b": write_run(tmp_path, "b", right=0.5)}
    _, page, _ = made(runs, tmp_path / "out")
    assert "time of all stages, minutes" in page.words and "price, EUR" not in page.words


def test_nothing_from_data_or_settings_becomes_markup(tmp_path):
    name = f"run {HOSTILE}".replace("/", "|")
    runs = {
        name: write_run(tmp_path, "a", {"train.lora_r": HOSTILE, f"train.{HOSTILE}": 1}, {"merge.x": HOSTILE},
                        hostile=True, tasks=("gsm8k",), heldout=30),
        "b": write_run(tmp_path, "b", {"train.lora_r": 8, "train.lora_alpha": 3}, right=0.5, heldout=30),
    }  # fmt: skip
    metrics = read_json(runs[name]["report"] / "metrics.json")
    finding = {"name": HOSTILE, "severity": "stop", "step": 3}
    change_metrics(runs[name], doctor=[finding], tasks=[metrics["tasks"][0] | {"task": HOSTILE}],
                   verdict=metrics["verdict"] | {"sentence": HOSTILE})  # fmt: skip
    _, page, _ = made(runs, tmp_path / "out")
    text = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert text.count("<script") == 1 and page.scripts == [{}] and "<script>alert" not in text
    assert page.words.count("<script>alert('adder')") >= 8
    assert [name for _, attrs in page.tags for name in attrs if name.startswith("on")] == []


def test_the_page_asks_for_nothing_and_may_run_its_own_script_only(clear, tmp_path):
    _, page, _ = clear
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    made(of_rates(tmp_path, (0.6, 0.95, 0.4)), tmp_path / "out")
    text = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", text, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    outside = [url for url in page.urls if not url.startswith(("#", "data:"))]
    assert outside == ["./middle/report.html", "./low/report.html", "./high/report.html"]
    assert len(page.ids) == len(set(page.ids)) and {url[1:] for url in page.urls if url[0] == "#"} <= set(page.ids)
    assert "url(" not in text and "@import" not in text


def test_a_missing_file_is_named_and_nothing_is_written(tmp_path):
    runs = of_rates(tmp_path, (0.6, 0.95, 0.4))
    missing = runs["high"]["evaluate_tuned"] / "samples.jsonl"
    missing.unlink()
    with pytest.raises(UserError, match=re.escape(f"compare: {missing} is missing")):
        made(runs, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_score_that_is_not_finite_is_left_out(tmp_path):
    runs = of_rates(tmp_path, (0.6, 0.95, 0.4))
    metrics = read_json(runs["high"]["report"] / "metrics.json")
    metrics["heldout"]["loss"]["tuned"] |= {"value": None, "ci95": None}  # as metrics.json has an infinite loss
    write_json(runs["high"]["report"] / "metrics.json", metrics)
    _, _, rows = made(runs, tmp_path / "out")
    assert {row["run"]: bool(row["loss"]) for row in rows} == {"middle": True, "low": True, "high": False}


def test_the_same_runs_give_the_same_bytes(tmp_path):
    runs = of_rates(tmp_path, (0.6, 0.95, 0.4))
    for name in ("one", "two"):
        made(runs, tmp_path / name)
    for file in ("compare.html", "compare.csv"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_curve_is_smoothed_without_losing_its_end():
    points = [(n, float(n % 2)) for n in range(1, 601)]
    smooth = compare.smooth(points)
    assert len(smooth) <= 60 and smooth[-1][0] == 600 and smooth[0][0] == 11
    assert compare.smooth(points[:40]) == points[:40]


def test_of_settings_with_parts_only_those_that_differ_are_shown_in_words(tmp_path):
    own = {"path": "rows.jsonl", "hub": None, "weight": 1.0, "columns": {}}
    more = {"path": "more.jsonl", "hub": None, "weight": 0.5, "columns": {"prompt": "question"}}
    listed = {"a": [own], "b": [{**own, "weight": 2.0, "columns": {"prompt": "ask"}}], "c": [own, more]}
    runs = {
        name: write_run(tmp_path, name, {"data.sources": sources, "train.target_modules": modules})
        for (name, sources), modules in zip(listed.items(), ["all-linear", ["q_proj", "v_proj"], []], strict=True)
    }
    found, page, _ = made(runs, tmp_path / "out")
    keys = ["data.sources.0.weight", "data.sources.0.columns.prompt", "data.sources.1", "train.target_modules"]
    assert found.differing.set == keys
    assert "data.sources 1 weight, data.sources 1 columns.prompt, data.sources 2" in page.words
    for shown in ("sources 1 weight", "q_proj, v_proj", "path more.jsonl, weight 0.5, co…"):
        assert shown in page.words
    html = (tmp_path / "out" / "compare.html").read_text()
    assert 'title="path more.jsonl, weight 0.5, columns prompt question (run)"' in html
    assert "[{" not in html and "&#34;weight" not in page.words


def test_the_figures_stand_before_the_settings(tmp_path):
    """However many settings there are, the figures aren't pushed off the screen."""
    made(of_rates(tmp_path, (0.6, 0.95, 0.4)), tmp_path / "out")
    table = (tmp_path / "out" / "compare.html").read_text().partition("<thead>")[2]
    assert table.index("against its base") < table.index(">doctor<") < table.index(">learning_rate<")


@pytest.mark.parametrize("against", ["nothing", "doubts", "guard"])
def test_better_than_its_base_is_green_only_where_nothing_stands_against_it(tmp_path, against):
    runs = of_rates(tmp_path, (0.6, 0.95, 0.4))
    verdict = json.loads((runs["middle"]["report"] / "metrics.json").read_text())["verdict"]
    assert verdict["verdict"] == "better"
    if against == "doubts":
        change_metrics(runs["middle"], verdict={**verdict, "doubts": ["the doctor warns of overfitting"]})
    if against == "guard":
        change_metrics(runs["middle"], guard={"passed": False, "failed": ["gsm8k"]})
    made(runs, tmp_path / "out")
    html = (tmp_path / "out" / "compare.html").read_text()
    own = next(row for row in html.split("<tr ") if ">middle</a>" in row)
    assert re.search(r'<span class="mark (\w+)" title="[^"]*">better<', own)[1] == (
        "good" if against == "nothing" else "unsure"
    )
    best = re.search(r'<span class="mark (\w+)">(best|failed: gsm8k)<', own)
    assert best and best[1] == {"nothing": "good", "doubts": "unsure", "guard": "bad"}[against]
