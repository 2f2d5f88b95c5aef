"""The report: what stands in it, that nothing from data can break out of it, and that it needs nothing but itself."""

import base64
import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import yaml

from adder.core import intervals
from adder.core.errors import UserError
from adder.core.files import read_json, read_jsonl, write_json, write_jsonl
from adder.core.progress import Progress
from adder.report import (
    data_card,
    data_section,
    evaluation_section,
    formatting,
    html_page,
    merge_section,
    plots,
    provenance_section,
    samples_section,
    summary_section,
    training_section,
)
from adder.report import facts as report_data
from adder.report import run as report
from adder.report import scores as report_scores
from adder.training import evaluation_history
from page_parser import Page
from report_fixture import HOSTILE, TASKS, write_stage_folders


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


EVERYTHING = {
    "tasks": tuple(TASKS), "judged": True, "merge_bases": True, "price_per_hour": 2.4, "energy": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The report of a run with tasks, a judge, a choice of the merge's base, price and energy."""
    return make(tmp_path_factory.mktemp("everything"), **EVERYTHING)


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


def test_the_summary_tells_the_alarming_first(everything, tmp_path):
    lines = re.findall(r'<li class="is-(\w+)">(.*?)</li>', (everything / "report.html").read_text(encoding="utf-8"))
    words = [" ".join("".join(Page(line).text).split()) for _, line in lines]
    assert [tone for tone, _ in lines] == ["bad", "good", "good", "good", "good", "calm"]
    assert words[0] == "✗Other tasks the guard fails this run: gsm8k lost 2.4 points; arc_easy lost 10.0 points"
    assert "no prompt of the 200 held-out rows is trained on, nor one much like it" in words[2]
    assert words[5].replace("\u00a0", " ") == "Cost 15 min 41 s, 0.63 EUR, 0.0118 kWh"
    out = make(tmp_path, course="spiky", right=0.0, heldout=20)
    lines = re.findall(r'<li class="is-(\w+)">(.*?)</li>', (out / "report.html").read_text(encoding="utf-8"))
    words = [" ".join("".join(Page(line).text).split()) for _, line in lines]
    assert [tone for tone, _ in lines] == ["unsure", "unsure", "good", "good", "calm"]
    assert words[:2] == [
        "!Training loss spikes at step 67, and 1 more",
        "!Replies none of the 20 tuned replies is just as its reference",
    ]  # fmt: skip


def test_other_scores_are_told_where_they_say_more_or_the_opposite():
    sure, unsure = {"value": 0.2, "ci95": [0.1, 0.3], "p": 0.001}, {"value": 0.2, "ci95": [-0.1, 0.3], "p": 0.3}
    heldout = {"exact_match": {"difference": unsure}, "field_f1": {"difference": sure}, "loss": {"difference": sure},
               "perplexity": {"difference": sure}}  # fmt: skip
    told = summary_section.scores_line({"verdict": "can't tell", "metric": "exact_match"}, heldout)
    assert (told["tone"], told["text"]) == ("unsure", "surely better: Field F1; surely worse: Held-out loss")
    del heldout["loss"]
    told = summary_section.scores_line({"verdict": "can't tell", "metric": "exact_match"}, heldout)
    assert (told["tone"], told["text"]) == ("calm", "surely better: Field F1")
    assert summary_section.scores_line({"verdict": "better", "metric": "exact_match"}, heldout) is None
    assert summary_section.scores_line({"verdict": "worse", "metric": "exact_match"}, heldout)["tone"] == "unsure"


def test_stages_stand_in_the_order_of_the_run_whatever_that_of_the_inputs(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5, **EVERYTHING)
    facts = report_data.load(dict(sorted(inputs.items())))
    assert list(facts["records"]) == [
        *report_data.STAGES, "task_base_0", "task_tuned_0", "task_base_1", "task_tuned_1", "task_base_2",
        "task_tuned_2", "judge",
    ]  # fmt: skip


def test_a_model_that_fails_its_guard_is_not_shown_in_green():
    metrics = {"verdict": {"verdict": "better"}, "guard": {"passed": False}}
    assert report.tone(metrics) == "unsure" and report.tone(metrics | {"guard": None}) == "better"
    assert report.tone({"verdict": {"verdict": "can't tell"}, "guard": None}) == "unsure"


def test_rows_that_overlap_and_stay_are_an_alarm():
    counts = {"heldout": 40}
    stays = summary_section.data_line({"action": "report", "found": 6, "dropped": 1}, counts)
    assert stays["tone"] == "unsure" and stays["text"].startswith("5 training rows ask much of what")
    off = summary_section.data_line({"action": "off", "found": 0, "dropped": 0}, counts)
    assert off["tone"] == "calm" and "were not looked for" in off["text"]


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


def test_scores_say_what_they_mean_how_sure_and_on_how_many_rows(everything):
    words = section(everything, "evaluation").replace("\u00a0", " ")
    assert "Exact match replies that say what their reference says" in words
    exact = read_json(everything / "metrics.json")["heldout"]["exact_match"]
    low, high = (f"{100 * end:+.1f}" for end in exact["difference"]["ci95"])
    assert f"+{100 * exact['difference']['value']:.1f} points {low} to {high} < 0.001 200 better" in words
    assert "3 replies were cut off at the limit of 69" in words


def test_tasks_show_what_was_lost_and_the_guard_names_it(everything, finished):
    metrics = read_json(everything / "metrics.json")
    assert metrics["guard"] == {"passed": False, "failed": ["gsm8k", "arc_easy"]}
    assert [(row["task"], row["verdict"], row["guard"]) for row in metrics["tasks"]] == [
        ("gsm8k", "worse", "failed"), ("arc_easy", "worse", "failed"), ("my_tone", "better", None),
    ]  # fmt: skip
    for row in metrics["tasks"]:
        assert row.keys() == {
            "task", "version", "metric", "higher_is_better", "num_fewshot", "base", "tuned", "difference", "verdict",
            "max_drop", "guard",
        }  # fmt: skip
        assert row["difference"].keys() == {"value", "ci95", "p"} and row["base"].keys() == {"value", "ci95", "n"}
        # Means of 60 to 400 zeros and ones in double precision.
        assert row["difference"]["value"] == pytest.approx(row["tuned"]["value"] - row["base"]["value"], abs=1e-12)
    words = section(everything, "evaluation").replace("\u00a0", " ")
    assert "arc_easy acc_norm; 0 examples in the prompt; the first 400 documents" in words
    assert "✗ failed may lose 3.0 points" in words and "✓ passed" not in words
    assert "arc_easy: 40 documents worse than before, 0 better" in words and "tuned says" in words
    assert "arc_easy: acc_norm got worse by 0.1" in words
    quiet = read_json(finished / "metrics.json")
    assert quiet["tasks"] == [] and quiet["guard"] is None and quiet["judge"] is None
    assert "Other tasks" not in page_of(finished).words


def test_a_guard_that_passes_and_a_task_in_which_lower_is_better(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5, tasks=("arc_easy", "my_tone"))
    settings["tasks"][0]["max_drop"] = 0.01
    for who in ("base", "tuned"):
        path = inputs[f"task_{who}_0"] / "scores.json"
        write_json(path, read_json(path) | {"higher_is_better": False})
        path = inputs[f"task_{who}_1"] / "scores.json"
        parts = {f"tone_{n}": {"value": 0.5, "n": 30} for n in range(2)}
        write_json(path, read_json(path) | {"subtasks": parts, "chat_template": False, "prompts_cut": 2})
    out = make_again(tmp_path, settings, inputs)
    metrics = read_json(out / "metrics.json")
    assert metrics["guard"] == {"passed": True, "failed": []} and metrics["tasks"][0]["verdict"] == "better"
    words = section(out, "evaluation").replace("\u00a0", " ")
    assert "lower is better" in words and "arc_easy: 0 documents worse" not in words and "✓ passed" in words
    assert "asked without the chat template; 2 prompts lost their beginning" in words
    assert "my_tone: its 2 parts" in words and "tone_1 30 50.0 % 50.0 %" in words
    assert "Other tasks 2 better; the guard passes" in section(out, "verdict")


def test_tasks_on_different_documents_are_refused(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5, tasks=("gsm8k",))
    path = inputs["task_base_0"] / "samples.jsonl"
    write_jsonl(path, list(read_jsonl(path))[1:])
    with pytest.raises(UserError, match="different rows.*gsm8k:0"):
        report.run(settings, inputs, tmp_path, Progress.silent())


def test_the_judge_is_shown_with_what_speaks_against_the_tuned_model_first(everything):
    words = section(everything, "evaluation").replace("\u00a0", " ")
    judge = read_json(everything / "metrics.json")["judge"]
    assert judge["sentence"] in words and "It was told: “Is every field right?”" in words
    assert f"tuned preferred {judge['wins']} tie {judge['ties']} base preferred {judge['losses']}" in words
    assert f"Order decided {judge['inconsistent']} pairs in which the orders disagree" in words
    outcomes = re.findall(
        r'<details class="judgement"><summary><span class="mark \w+">(.*?)</span>',
        (everything / "report.html").read_text(encoding="utf-8"),
    )
    assert list(dict.fromkeys(outcomes)) == ["base preferred", "order decides", "tie", "tuned preferred"]
    rows = [{"first": one, "second": other} for one, other in (("tuned", "tuned"), ("tuned", "tie"), ("base", "base"))]
    assert [evaluation_section.outcome(row) for row in rows] == ["win", "inconsistent", "loss"]


def test_cost_has_price_and_energy_only_where_they_are_known(everything, finished):
    cost = read_json(everything / "metrics.json")["cost"]
    assert cost["total_seconds"] == pytest.approx(sum(cost["seconds"].values()))
    assert cost["price"] == {
        "value": pytest.approx(2.4 * cost["total_seconds"] / 3600),
        "per_hour": 2.4,
        "currency": "EUR",
    }
    assert cost["energy"]["joules"] == pytest.approx(45 * cost["total_seconds"])
    assert set(cost["seconds"]) > {"train", "task_base_0", "task_tuned_2", "judge"}
    shown = section(everything, "provenance").replace("\u00a0", " ")
    assert "Price 0.63 EUR at 2.40 EUR an hour" in shown and "Energy 0.0118 kWh recorded by all stages" in shown
    assert "task_tuned_1 arc_easy" in shown
    cost = read_json(finished / "metrics.json")["cost"]
    assert cost["price"] is None and cost["energy"] is None
    assert "Price" not in section(finished, "provenance") and "Energy" not in section(finished, "provenance")
    amounts = {0.0123: "0.0123 EUR", 0: "0.00 EUR", 1234.5: "1,234.50 EUR"}
    assert {value: provenance_section.money(value, "EUR") for value in amounts} == amounts


def test_a_training_that_was_interrupted_says_in_how_many_attempts(tmp_path, finished):
    out = make(tmp_path, attempts=2)
    assert "Time 5 min 43 s whole stage in 2 attempts; 632 tokens/s within a step" in section(out, "training").replace(
        "\u00a0", " "
    )
    assert read_json(out / "metrics.json")["stages"]["train"]["attempts"] == 2
    assert "Time 5 min 43 s whole stage; 632 tokens/s within a step" in section(finished, "training").replace(
        "\u00a0", " "
    )


def test_every_file_of_model_data_and_adapter_has_its_digest(everything):
    shown = section(everything, "provenance")
    stages = everything.parent / "stages"
    files = [p for stage, name in (("model", "model"), ("train", "adapter"), ("merge", "model"))
             for p in (next((stages / stage).iterdir()) / name).iterdir()]  # fmt: skip
    files.append(next((stages / "data").iterdir()) / "rows.jsonl")
    assert len(files) == 9
    for path in files:
        digest = hashlib.blake2b(path.read_bytes(), digest_size=20).hexdigest()  # what b2sum -l 160 prints
        assert f"{path.as_posix()} " in shown and digest in shown[shown.index(path.as_posix()) :][:200], path
    assert "88bb" * 16 in shown, "the source's own digest, whole"


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


def test_free_text_is_shown_by_how_near_it_comes_the_farthest_first(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=30, json_replies=False, right=0.2)
    path = inputs["evaluate_tuned"] / "samples.jsonl"
    rows = [row | {"exact_match": 0} for row in read_jsonl(path)]
    write_jsonl(path, [row | ({"chrf": 0.01} if row["id"] == "tickets:7" else {}) for row in rows])
    samples = report_scores.paired_samples(inputs["evaluate_base"], inputs["evaluate_tuned"])
    first = samples_section.select_samples(samples, 10)["rows"][0]
    assert first["id"] == "tickets:7" and first["tuned"]["scores"][1].replace("\u00a0", " ") == "chrF 1.0 %"
    words = section(make_again(tmp_path, settings, inputs), "evaluation")
    assert "ROUGE-L words that reply and reference have in common" in words and "Field by field" not in words
    assert "Why these scores: the references are free text." in words


def test_f1_and_perplexity_are_compared_row_by_row():
    """Rows are hard or easy for both models alike, so unpaired intervals would be several times as wide."""

    def row(right, loss, tokens):
        fields = {name: {"expected": "x", "found": "x" if n < right else "y", "correct": n < right}
                  for n, name in enumerate("abcd")}  # fmt: skip
        return {"reply": "{}", "fields": fields, "loss": loss, "labelled_tokens": tokens}

    base = [row(n % 4, 0.5 + n % 4, 5 + n % 7) for n in range(60)]
    tuned = [row(n % 4 + (n % 3 == 0), 0.4 + n % 4, 5 + n % 7) for n in range(60)]
    f1 = report_scores.difference("field_f1", base, tuned)
    assert f1["value"] == pytest.approx(20 / 240) and f1["p"] < 0.001  # of 240 values in all, 20 more are right
    assert 0.04 < f1["ci95"][0] < f1["value"] < f1["ci95"][1] < 0.13
    tokens = np.array([one["labelled_tokens"] for one in base])
    loss = (tokens * np.array([one["loss"] for one in base])).sum() / tokens.sum()
    found = report_scores.difference("perplexity", base, tuned)
    assert found["value"] == pytest.approx(np.exp(loss - 0.1) - np.exp(loss)) and found["p"] < 0.001
    apart = intervals.perplexity(intervals.ratio(tokens * [one["loss"] for one in base], tokens))["ci95"]
    assert found["ci95"][1] - found["ci95"][0] < 0.2 * (apart[1] - apart[0])


def test_a_task_may_call_its_score_as_a_held_out_one_is_called():
    score = {"value": 0.5, "ci95": [0.4, 0.6], "n": 3}
    scores = {"metric": "loss", "metrics": {"loss": score}, "version": 1, "higher_is_better": False, "num_fewshot": 0}
    samples = [{"base": {"loss": 0.5 + n}, "tuned": {"loss": 0.4 + n}} for n in range(9)]
    task = {"base": scores, "tuned": scores, "samples": samples}
    (row,) = report_scores.compare_tasks([task], [{"task": "mine", "max_drop": None}])
    assert row["verdict"] == "better" and row["difference"]["value"] == pytest.approx(-0.1)


def test_a_row_without_labelled_tokens_weighs_nothing_in_the_loss():
    rows = [{"loss": 1.0, "labelled_tokens": 30}, {"loss": 0.0, "labelled_tokens": 0}]
    assert report_scores.per_row("loss", rows).mean() == pytest.approx(1.0)


def test_fields_show_their_difference_and_how_sure_it_is(finished):
    fields = read_json(finished / "metrics.json")["fields"]
    assert list(fields) and all(entry.keys() == {"base", "tuned", "difference"} for entry in fields.values())
    amount = fields["amount"]
    assert amount["base"]["precision"] is None and amount["difference"]["precision"] is None  # the base gave none
    gain = amount["difference"]["f1"]
    assert gain["value"] == pytest.approx(amount["tuned"]["f1"] - amount["base"]["f1"]) and gain["p"] < 0.001
    words = section(finished, "evaluation").replace("\u00a0", " ")
    low, high = (f"{100 * end:+.1f}" for end in gain["ci95"])
    assert f"{100 * amount['tuned']['f1']:.1f} % {100 * gain['value']:+.1f} , {low} to {high}" in words
    assert "tuned precision tuned recall tuned is" in words and "this one is missing" not in words


def test_rows_in_groups_are_less_sure_and_the_page_says_so(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=60, groups=6, right=0.3)
    path = inputs["evaluate_tuned"] / "samples.jsonl"
    # Whole groups are right: 60 rows that tell no more than 6 do.
    rows = [row | {"exact_match": int(int(row["group"], 16) < 3)} for row in read_jsonl(path)]
    write_jsonl(path, rows)
    out = make_again(tmp_path, settings, inputs)
    metrics = read_json(out / "metrics.json")
    assert metrics["verdict"]["groups"] == 6 and metrics["verdict"]["verdict"] == "can't tell"
    assert "60 held-out rows in 6 groups" in metrics["verdict"]["sentence"]
    words = section(out, "evaluation")
    assert "The rows come in 6 groups (data.heldout.group_by)" in words and "a group favours" in words
    for who in ("base", "tuned"):
        path = inputs[f"evaluate_{who}"] / "samples.jsonl"
        write_jsonl(path, [{key: row[key] for key in row if key != "group"} for row in read_jsonl(path)])
    out = make_again(tmp_path, settings, inputs)
    metrics = read_json(out / "metrics.json")
    assert metrics["verdict"]["groups"] is None and metrics["verdict"]["verdict"] == "better"
    assert "groups" not in section(out, "evaluation")


def test_the_best_evaluation_is_the_earliest_of_equals():
    history = [{"step": step, "eval_loss": loss} for step, loss in ((10, 0.5), (20, 0.3), (30, 0.3), (40, 0.4))]
    history += [{"step": 20, "exact_match": 0.2}, {"step": 40, "exact_match": 0.6}, {"step": 41, "loss": 0.01}]
    assert (
        evaluation_history.best_step(history, "loss") == 20
        and evaluation_history.evaluations_since_best(history, "loss") == 2
    )
    assert (
        evaluation_history.best_step(history, "exact_match") == 40 and evaluation_history.best_step([], "loss") is None
    )
    assert evaluation_history.evaluations_since_best([], "loss") == 0


def test_script_tags_in_rows_replies_and_names_stay_text(tmp_path):
    out = make(tmp_path, hostile=True, heldout=30, right=0.5)
    text = (out / "report.html").read_text(encoding="utf-8")
    page = page_of(out)
    assert text.count("<script") == 1 and page.scripts == [{}]
    assert "alert(" in text and "<script>alert" not in text
    # It is shown, in every place it came from: title, prompt, reply, token, source, licence, reject reason.
    assert page.words.count("<script>alert('adder')</script>") >= 30 * 3
    assert HOSTILE in yaml.safe_load((out / "run.yaml").read_text(encoding="utf-8"))["run"]


def test_what_data_says_is_escaped_in_every_part_of_the_data_section(tmp_path):
    out = make(tmp_path, hostile=True, heldout=30)
    text = (out / "report.html").read_text(encoding="utf-8")
    data = text[text.index('<section id="data"') : text.index('<section id="lengths"')]
    shown = " ".join(Page(data).text)
    script = "<script>alert('adder')</script>"
    # Reason, its raw row, source name, path, licence, finding, column name and value, first word, message, reasoning,
    # tool name, plain text, token example's name and token, reason of the tokenizer.
    for before in (
        "no assistant turn", '{"message": "', "tickets", "train-00000-of-00001.parquet", "CC0-1.0", "my kettle",
        "language", "日本語", "<b>", "48213?", "due date is 3 May.", "track_order", "Four ticks: ````", "tickets:1",
        "refuses it",
    ):  # fmt: skip
        assert before + script in shown, before
    assert "<script" not in data


def test_rows_are_accounted_for_and_empty_classes_are_not_shown(finished, tmp_path):
    words = page_of(finished).words
    for fate in ("Copies50", "Test sets40", "Near-duplicates9", "Left out210", "Not tokenized1", "Too long3"):
        assert fate in words
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5)
    facts = report_data.load(inputs)
    card = facts["format"]
    for name in ("tests", "near_duplicates", "left_out", "repeats"):
        card["rows_in"] -= card[name] if name != "repeats" else 0
        card[name] = 0
    names = [name for name, _, _ in data_section.fates(facts)]
    assert not {"Copies", "Test sets", "Near-duplicates", "Left out"} & set(names)
    parts = data_section.flow_parts(card)
    assert sum(part["count"] for part in parts) == card["rows_in"]
    assert [part["name"] for part in parts] == ["training", "held out", "duplicates", "leaked", "rejected"]


def test_sources_say_where_they_came_from_and_what_pins_them(finished):
    words = page_of(finished).words
    assert "notes data/notes.jsonl jsonl latin-1 80 2 unreadable text training not stated sha256 99cc99cc99cc" in words
    assert "messages training weight 0.5 apache-2.0 commit 3f1c3f1" in words
    assert "test set MIT" in words


def test_findings_say_what_was_done(tmp_path):
    _, inputs = write_stage_folders(tmp_path / "stages", heldout=5)
    card = report_data.load(inputs)["format"]
    _, near, overlap = data_section.findings(card)
    assert near["summary"] == "9 rows found, 9 of them dropped." and "MinHash" in near["method"]
    assert near["pairs"][0]["left"][:2] == ("dropped", "tickets:20") and near["pairs"][0]["right"][0] == "kept"
    assert [pair["note"] for pair in overlap["pairs"]] == [
        "8-word overlap: 85\u00a0% of the held-out words", "same prompt"
    ]  # fmt: skip
    card["quality"]["near_duplicates"] |= {"action": "off", "found": 0, "dropped": 0, "examples": []}
    card["quality"]["overlap"] |= {"action": "report", "dropped": 1}
    _, near, overlap = data_section.findings(card)
    assert (near["summary"], near["method"]) == ("Not looked for.", "")
    assert overlap["summary"] == "6 rows found, 1 of them dropped."
    assert [pair["left"][0] for pair in overlap["pairs"]] == ["stays", "dropped"]


def test_columns_in_the_split_are_set_as_code(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert "one conversation, by column <code>thread</code>, never stands" in text
    assert data_section.ticked("by `a` and `b`") == [(False, "by "), (True, "a"), (False, " and "), (True, "b")]


def test_many_turns_share_a_bar_and_the_widest_bar_is_the_largest_count():
    assert data_section.bars([("a", 50), (True, 200), ("", 1)]) == [
        {"name": "a", "count": 50, "width": 25.0},
        {"name": "true", "count": 200, "width": 100.0},
        {"name": "(empty)", "count": 1, "width": 0.5},
    ]
    card = {"turns": {str(n): n for n in range(1, 21)}, "roles": {}, "first_words": {"prompt": [], "reply": []}}
    (chart,) = data_section.counted(card | {"columns": {}})
    assert [bar["name"] for bar in chart["bars"]] == [*map(str, range(1, 9)), "9 or more"]
    assert sum(bar["count"] for bar in chart["bars"]) == sum(range(1, 21))


def test_token_examples_show_loss_white_space_and_control_tokens(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    page = Page(text[text.index('<section id="loss"') : text.index('<section id="lengths"')])
    tokenize = read_json(next((finished.parent / "stages" / "tokenize").iterdir()) / "tokenize.json")
    examples = data_section.token_examples(tokenize)
    assert [(one["id"], one["total"], one["left_out"]) for one in examples] == [
        ("tickets:1", 57, 0), ("support-chats:7", 56, 0), ("notes:3", 2019, 719),
    ]  # fmt: skip
    first = {token["text"]: token for token in examples[0]["tokens"]}
    assert first["<|im_end|>"]["special"] and first["·JSON"] and first["··"] and first["↵\n↵\n"]
    assert not first["·JSON"]["on"] and first["_status"]["on"] and not first["_status"]["special"]
    assert {t["text"] for t in examples[1]["tokens"] if t["special"]} >= {"<think>", "</tool_call>"}
    # As many marked tokens on the page as carry loss, and one in the sentence that explains the mark.
    marked = [attrs for tag, attrs in page.tags if tag == "span" and "on" in (attrs.get("class") or "").split()]
    assert len(marked) == 1 + sum(one["labelled"] for one in examples)
    assert "… 719 tokens …" in page.words and "·w899" in page.words and "·w900" not in page.words


@pytest.mark.parametrize(
    ("text", "shown"),
    [(" a\n", "·a↵\n"), ("\t\r", "⇥␍"), ("\u200b", "[ZWSP]"), ("<|im_end|>", "<|im_end|>")],
)
def test_white_space_in_tokens_is_seen(text, shown):
    assert data_section.visible(text) == shown


@pytest.mark.parametrize(
    ("text", "special"),
    [("<|im_start|>", True), ("</s>", True), ("[INST]", True), ("<｜end▁of▁sentence｜>", True), ("<0x0A>", True),
     ("a < b > c", False), ("[1]", False), ("{", False)],
)  # fmt: skip
def test_control_tokens_are_told_by_their_look(text, special):
    assert bool(data_section.SPECIAL.fullmatch(text)) is special


def blocks_of(markdown: str) -> tuple[list[str], list[str]]:
    """The lines outside of fenced blocks, and the blocks' contents, read as CommonMark does."""
    outside, blocks, fence = [], [], None
    for line in markdown.split("\n"):
        ticks = re.match(r"`{3,}", line)
        if fence is None and ticks:
            fence, content = ticks.group(), []
        elif fence is not None and re.fullmatch(rf"`{{{len(fence)},}}\s*", line):
            blocks.append("\n".join(content))
            fence = None
        elif fence is None:
            outside.append(line)
        else:
            content.append(line)
    assert fence is None
    return outside, blocks


def test_card_says_where_the_data_came_from_and_what_is_in_it(finished):
    card = (finished / "card.md").read_text(encoding="utf-8")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "license": ["apache-2.0", "cc0-1.0", "mit"], "pretty_name": "default", "size_categories": ["1K<n<10K"],
        "tags": ["adder", "conversational"], "task_categories": ["text-generation"],
    }  # fmt: skip
    for words in (
        "980 conversations to train on and 200 held out", "| notes | data/notes.jsonl | not stated | 80 | 2 | text |",
        "| support-chats | commit | 3f1c3f1c", "| Near-duplicates | 9 |", "| content is empty | 1 |",
        "MinHash with 128 permutations", "arXiv:2411.15124", "- Column urgent: false (900), true (180)",
        "- First word of prompts: hi (410)", "| Reply, characters | 3 |", "Sequences have 256 tokens; 3 examples",
    ):  # fmt: skip
        assert words in body, words
    _, blocks = blocks_of(body)
    assert "Refunds take five working days.\nFour ticks: ````" in blocks
    assert any(block.endswith("```text\nSTATUS: on its way\n```") for block in blocks)


def test_nothing_from_data_breaks_out_of_the_card(tmp_path):
    card = (make(tmp_path, hostile=True, heldout=30) / "card.md").read_text(encoding="utf-8")
    _, head, body = card.split("---\n", 2)
    assert HOSTILE in yaml.safe_load(head)["pretty_name"]
    outside, blocks = blocks_of(body)
    assert not [line for line in outside if "<" in line]
    assert sum("<script>" in block for block in blocks) >= 4
    tables = [line for line in outside if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    assert widths and set(widths) <= {3, 4, 8, 9}
    assert data_card.text("a|b\n`c` *d* [e](f) <g> #h") == r"a\|b \`c\` \*d\* \[e\](f) &lt;g&gt; \#h"


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


def test_tool_calls_in_a_prompt_are_shown():
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert samples_section.turn_text(turn) == 'get_weather({"city": "Oslo"})'
    row = {"id": "a:1", "prompt": [{"role": "user", "content": "Weather?"}, turn], "reference": "Rain", "reply": "Rain"}
    row |= {"exact_match": 1, "loss": 0.1}
    shown = samples_section.prepare({"id": "a:1", "base": row, "tuned": row}, 0, None)
    assert [one["content"] for one in shown["turns"]] == ["Weather?", 'get_weather({"city": "Oslo"})']


def test_weighed_lengths_are_drawn_as_far_as_they_are_in_sight():
    drawn = plots.histogram([0, 100, 200], [3, 4], 150, "Lengths", "tokens", [64, 128, 150, 4096])
    assert drawn.count('class="weighed"') == 2 and "weighed: 128 tokens" in drawn


def test_plots_escape_their_labels():
    part = {"name": HOSTILE, "count": 3, "kind": "tuned"}
    drawn = [
        plots.flow(3, [part], HOSTILE),
        plots.bars([{"name": HOSTILE, "value": 1.0, "kind": "plain", "note": HOSTILE}], str, HOSTILE),
        plots.lines([{"name": HOSTILE, "kind": "tuned", "points": [(1, 1.0), (2, 2.0)]}], HOSTILE, str, HOSTILE),
        plots.histogram([0, 1, 2], [3, 4], 1, HOSTILE, HOSTILE),
        plots.stacked([part], HOSTILE),
        plots.change({"value": 0.1, "ci95": [0.0, 0.2]}, -0.1, 0.3, HOSTILE),
    ]
    for svg in drawn:
        assert "<script" not in svg
        page = Page(svg)
        assert page.stack == [] and page.tags[0][1]["aria-label"] == HOSTILE


def section(out, name: str) -> str:
    """The words of one section of the page."""
    text = (out / "report.html").read_text(encoding="utf-8")
    start = text.index(f'<section id="{name}"')
    return " ".join(" ".join(Page(text[start : text.index("\n</section>", start)] + "</section>").text).split())


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
        pieces = training_section.with_settings(text)
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
    assert training_section.mentioned("train.epochs: 1, train.keep: best, train.epochs: 2") == [
        "train.epochs", "train.keep"
    ]  # fmt: skip


def test_the_filmstrip_shows_each_prompt_from_the_base_to_the_reference(tmp_path):
    out = make(tmp_path, course="overfitted", heldout=20)
    text, film = (out / "report.html").read_text(encoding="utf-8"), section(out, "filmstrip")
    frames = re.findall(r'<section class="frame([^"]*)">\s*<h4>(.*?)</h4>(.*?)</section>', text, re.S)
    heads = [" ".join("".join(Page(head).text).split()) for _, head, _ in frames[:6]]
    assert heads == [
        "Base ✗ differs", "Step 31 ✗ differs", "Step 62 ✓ matches kept", "Step 93 ✗ differs", "Step 122 ✗ differs",
        "Reference",
    ]  # fmt: skip
    assert len(frames) == 18 and [kind for kind, _, _ in frames[:3]] == ["", "", " kept"]
    assert "<mark>urgent</mark>" in frames[1][2] and "Cut off: it did not end by itself" in frames[0][2]
    assert "As before." in frames[8][2] and "<mark>" not in frames[8][2]
    assert "The same 3 held-out prompts" in film and "Step 93: differs" not in film
    assert text.count('class="frames" tabindex="0" role="region"') == 3


def test_long_filmstrips_are_thinned_but_keep_base_last_and_kept_step(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=20)
    row = next(read_jsonl(inputs["train"] / "samples.jsonl"))
    rows = [{**row, "step": step, "id": f"tickets:{n}"} for step in range(0, 101) for n in range(20)]
    write_jsonl(inputs["train"] / "samples.jsonl", rows)
    facts = report_data.load(inputs)
    facts["train"]["kept"]["value"] = 37
    film = training_section.filmstrip(facts)
    steps = [frame["step"] for frame in film["strips"][0]["frames"]]
    assert (steps[0], steps[-1], 37 in steps) == (0, 100, True) and len(steps) <= 13 and len(film["strips"]) == 12
    facts["train"]["kept"] = None
    view = report.build_view(settings, facts, report_data.build_metrics(settings, facts))
    words = " ".join(Page(html_page.render("report", view, ("report.css",))).words.split())
    assert "Of 101 evaluations 12 are shown" in words and "Shown are the first 12" in words


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
    facts = report_data.load(inputs)
    assert training_section.step_marks(settings, facts) == [
        {"x": 62, "kind": "best", "label": "best, kept, overfitting: step 62"}
    ]
    facts["train"]["kept"]["value"], facts["train"]["diagnoses"] = 122, []
    labels = [mark["label"] for mark in training_section.step_marks(settings, facts)]
    assert labels == ["best: step 62", "kept: step 122"]
    loss, exact = training_section.curves(settings, facts)[:2]
    assert all(label in loss["plot"] and label in exact["plot"] for label in labels)
    assert exact["unit"] == "of 3 sampled replies" and "step 0 · exact match 0\u00a0%" in exact["plot"]
    assert "step 62 · exact match 67\u00a0%" in exact["plot"] and "step 62 · held-out loss 0.325" in loss["plot"]
    for row in settings["resolved"]:
        row["value"] = "exact_match" if row["key"] == "train.best_by" else row["value"]
    facts["curve"] = [row | ({"exact_match": 1.0} if row.get("exact_match") and row["step"] == 31 else {})
                      for row in facts["curve"]]  # fmt: skip
    assert training_section.best_step(settings, facts) == 31


def test_evaluations_stand_in_numbers_too(tmp_path):
    _, inputs = write_stage_folders(tmp_path / "stages", heldout=5)
    rows = training_section.evaluation_rows(report_data.load(inputs))
    assert [row["step"] for row in rows] == [0, 31, 62, 93, 122]
    assert rows[0] == {"step": 0, "loss": None, "eval_loss": None, "exact_match": 0.0}
    assert 0.2 < rows[1]["loss"] < 0.6 and rows[-1]["exact_match"] == 1.0


def test_metrics_hold_what_the_schema_promises(finished):
    metrics = read_json(finished / "metrics.json")
    assert metrics["schema_version"] == 2 and metrics["run"] == "default"
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
    found = metrics["data"]
    assert found["rows_in"] == sum(found[name] for name in report_data.DATA_CLASSES)
    assert (found["tests"], found["near_duplicates"], found["left_out"], found["repeats"]) == (40, 9, 210, 50)
    assert (found["overlap_found"], found["not_tokenized"], metrics["lengths"]["dropped"]) == (6, 1, 3)
    assert metrics["lengths"]["max_seq_length"] == 256 and metrics["lengths"]["packing"] is True


def test_too_few_rows_to_tell(tmp_path):
    out = make(tmp_path, heldout=12, right=0.2)
    verdict = read_json(out / "metrics.json")["verdict"]
    assert verdict["verdict"] == "can't tell" and verdict["needed_n"] > 12
    text = (out / "report.html").read_text(encoding="utf-8")
    assert 'class="verdict unsure"' in text and verdict["sentence"] in page_of(out).words


def test_only_a_sure_difference_gets_a_colour():
    sure = {"value": 0.4, "ci95": [0.2, 0.6], "p": 0.001}
    assert evaluation_section.tone(sure, True) == "good" and evaluation_section.tone(sure, False) == "bad"
    for unsure in (sure | {"p": 0.06}, sure | {"ci95": [-0.1, 0.9]}, sure | {"ci95": [0.2, None]}, None):
        assert evaluation_section.tone(unsure, True) == ""


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
    samples = report_scores.paired_samples(inputs["evaluate_base"], inputs["evaluate_tuned"])
    chosen = samples_section.select_samples(samples, 30)
    marks = [row["tuned"]["right"] for row in chosen["rows"]]
    assert marks == [False] * 20 + [True] * 10
    losses = [row["loss"] for row in chosen["rows"][:20]]
    assert losses == sorted(losses, reverse=True)
    assert (chosen["shown"], chosen["total"], chosen["wrong"] + chosen["right"]) == (30, 100, 100)
    few_right = [s | {"tuned": s["tuned"] | {"exact_match": int(n < 3)}} for n, s in enumerate(samples)]
    assert [r["tuned"]["right"] for r in samples_section.select_samples(few_right, 30)["rows"]].count(True) == 3


def test_loss_counts_each_row_by_its_tokens():
    rows = [{"loss": 1.0, "labelled_tokens": 30}, {"loss": 4.0, "labelled_tokens": 10}]
    assert report_scores.per_row("loss", rows).mean() == pytest.approx((30 + 40) / 40)


def test_only_the_differing_value_is_marked_whatever_the_order_of_keys():
    reference = '{"intent": "refund", "amount": 19.99, "date": "2026-05-03"}'
    marked, unlike = samples_section.mark(
        reference, '{"date": "2026-05-04", "amount": 19.99, "intent": "refund"}', False
    )
    assert not unlike
    assert [(kind, text) for kind, text in marked if kind != "same"] == [
        ("missing", "2026-05-03"), ("wrong", "2026-05-04"),
    ]  # fmt: skip
    assert samples_section.mark(reference, "I am sorry to hear that.", False) == (
        [("same", "I am sorry to hear that.")], True,
    )  # fmt: skip
    assert samples_section.mark(reference, "", False) == ([("same", "")], False)


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


def test_ticks_are_round_and_inside():
    assert plots.ticks(0, 2.3, 4) == [0, 1, 2]
    assert plots.ticks(1, 122, 7) == [20, 40, 60, 80, 100, 120]
    assert plots.ticks(5, 5) == [5]


def test_an_axis_has_no_power_of_ten_beside_plain_numbers():
    def labels(top):
        points = {"name": "rate", "kind": "plain", "points": [(1, 0.0), (2, top)]}
        drawn = plots.lines([points], "step", formatting.number, "Rate")
        return re.findall(r'class="tick end" x="48"[^>]*>([^<]+)<', drawn)

    assert labels(0.0018) == ["0", "0.0005", "0.001", "0.0015"]
    assert labels(2e-4) == ["0", "1×10⁻⁴", "2×10⁻⁴"]


def test_no_minus_stands_before_a_zero():
    assert [merge_section.signed(value) for value in (-4e-5, 4e-5, -0.0001)] == ["0.0000", "0.0000", "−0.0001"]
    assert evaluation_section.change(-1e-6, share=True) == "+0.0 points"


def test_replies_on_the_page_are_counted_as_such(tmp_path, finished):
    words = section(finished, "replies")
    assert "Shown" not in words and "shown, the worst" not in words
    assert "On this page are 60, those that went worst first; all stand" in words
    assert "60 of 60 shown" in words
    assert "All are on this page, the worst first." in section(make(tmp_path, heldout=12), "replies")


def test_a_tab_has_its_sections_name(finished):
    words = page_of(finished).words
    assert "Filmstrip" not in words and words.count("Replies while training") == 2


def test_a_curve_with_holes_or_a_single_point_is_drawn():
    series = {"name": "loss", "kind": "tuned", "points": [(1, 2.0), (2, float("nan")), (3, 1.0)]}
    assert plots.lines([series], "step", str, "Loss").count('class="hit"') == 2
    assert "polyline" in plots.lines([series | {"points": [(1, 2.0)]}], "step", str, "Loss")
    assert plots.lines([series | {"points": []}], "step", str, "Loss") == ""
    long = series | {"points": [(n, float(n)) for n in range(100_000)]}
    assert len(plots.lines([long], "step", str, "Loss")) < 150_000


def test_one_spike_does_not_flatten_the_curve():
    level = [(n, 1.0 + 0.5 * (n % 7) / 7) for n in range(1, 101)]
    spiked = [(x, 400.0 if x == 60 else y) for x, y in level]
    series = {"name": "loss", "kind": "tuned", "points": spiked}
    drawn = plots.lines([series], "step", str, "Loss", adapt=True)
    assert "1 value above the axis, up to 400.0" in drawn and drawn.count('class="over tuned"') == 1
    assert "step 60 · loss 400.0" in drawn
    heights = [float(pair.split(",")[1]) for pair in re.search(r'polyline[^>]*points="([^"]*)"', drawn)[1].split()]
    assert sorted(heights)[50] < 100, "the usual values use the height of the plot"
    assert "above the axis" not in plots.lines([series], "step", str, "Loss")
    # A loss that climbs for good, or begins high, is no outlier.
    climbed = [1.0] * 50 + [9.0] * 50
    assert plots.usual_top(climbed) == 9.0 and plots.usual_top(climbed[::-1]) == 9.0
    assert plots.usual_top([0.0, 0.0, 0.0]) == 0.0


def test_losses_of_very_different_sizes_get_a_logarithmic_axis():
    falling = [(n, 3.0 * 0.9**n) for n in range(100)]
    held = {"name": "held-out loss", "kind": "heldout", "points": [(99, 0.01)], "dots": True}
    series = [{"name": "loss", "kind": "tuned", "points": falling}, held]
    drawn = plots.lines(series, "step", str, "Loss", adapt=True)
    assert "logarithmic axis" in drawn and "above the axis" not in drawn
    heights = [float(pair.split(",")[1]) for pair in re.search(r'polyline[^>]*points="([^"]*)"', drawn)[1].split()]
    steps = [after - before for before, after in zip(heights, heights[1:], strict=False)]
    assert max(steps) - min(steps) < 0.3, "a constant ratio is a straight line"
    zero = [{"name": "loss", "kind": "tuned", "points": [*falling, (100, 0.0)]}]
    assert "nan" not in plots.lines(zero, "step", str, "Loss", adapt=True)
    assert plots.log_ticks(0.01, 3.5) == [0.01, 0.03, 0.1, 0.3, 1, 3]
    assert plots.log_ticks(1e-4, 1e4) == [1e-4, 0.01, 1, 100, 1e4]


def test_a_thinned_curve_keeps_its_spikes():
    points = [(n, 40.0 if n == 5_557 else 1.0) for n in range(20_000)]
    drawn = plots.lines([{"name": "loss", "kind": "tuned", "points": points}], "step", str, "Loss", marks=[
        {"x": 777, "label": HOSTILE, "kind": "best"}
    ])  # fmt: skip
    assert "step 5,557 · loss 40.0" in drawn and "step 777 · loss 1.0" in drawn and "<script" not in drawn
    heights = [float(pair.split(",")[1]) for pair in re.search(r'polyline[^>]*points="([^"]*)"', drawn)[1].split()]
    assert min(heights) < max(heights) - 100 and len(heights) <= plots.MAX_DRAWN


def test_labels_of_marks_stay_on_the_plot():
    series = {"name": "loss", "kind": "tuned", "points": [(n, 1.0 + n) for n in range(101)]}
    marks = [{"x": x, "label": f"gradient explodes, loss spikes, best and kept: step {x}", "kind": "best"} for x in (
        0, 45, 55, 100
    )]  # fmt: skip
    drawn = plots.lines([series], "step", str, "Loss", marks=marks)
    labels = re.findall(r'<text class="mark best (start|end)" x="([\d.]+)" y="([\d.]+)">([^<]*)', drawn)
    assert len(labels) == 4 and len({y for _, _, y, _ in labels}) == 4
    for anchor, x, _, label in labels:
        left = float(x) - (6.0 * len(label) if anchor == "end" else 0)
        assert 0 <= left and left + 6.0 * len(label) <= plots.WIDTH


def test_the_header_counts_what_was_trained_on_and_of_how_many(tmp_path):
    facts = {"format": {"train": 980, "train_rows": 980}, "lengths": {"tokens": {"count": 980}, "dropped": 0}}
    assert report.trained_on(facts) == "980"
    facts["lengths"] = {"tokens": {"count": 300}, "dropped": 2}  # train.max_examples: 300, two of which are too long
    assert report.trained_on(facts) == "298 of 980"
    assert "977 of 1,030 training and 12 held-out conversations" in page_of(make(tmp_path, heldout=12)).words


def test_what_stages_write_has_the_signs_of_the_figures_beside_it(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=12, merge_bases=True)
    proof = read_json(inputs["merge"] / "proof.json")
    proof["base"]["reason"] = "run-2 and 1e-05: the two differ by -0.0038 (95 % interval -0.0049 to +0.0002)"
    write_json(inputs["merge"] / "proof.json", proof)
    words = page_of(make_again(tmp_path, settings, inputs)).words
    assert "differ by −0.0038 (95 % interval −0.0049 to +0.0002)" in words and "un-2 and 1e-05" in words
    assert formatting.cell(("loss", -3)) == "−3"
