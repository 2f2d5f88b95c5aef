"""The report: what stands in it, that nothing from data can break out of it, and that it needs nothing but itself."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import yaml

from adder import plots, report, report_card, report_data, report_dataset, report_samples, report_text, report_training
from adder.errors import UserError
from adder.files import read_json, read_jsonl, write_json, write_jsonl
from adder.progress import Progress
from report_fixture import HOSTILE, write_stage_folders

VOID = {"meta", "link", "input", "br", "img", "hr", "wbr"}
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
        "Field by field", "Training", "Where the rows went", "Sequence length and packing", "What the model sees",
        "The merged model is what was trained", "What Adder chose, and why", "Every setting", "Provenance and cost",
    ):  # fmt: skip
        assert heading in words
    assert "256 is the smallest multiple of 64" in words
    assert "This CPU has neither AVX512-BF16 nor AMX" in words
    assert "Why rows were rejected rows no assistant turn2 content is empty1" in words


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
    names = [name for name, _, _ in report_dataset.fates(facts)]
    assert not {"Copies", "Test sets", "Near-duplicates", "Left out"} & set(names)
    parts = report_dataset.flow_parts(card)
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
    _, near, overlap = report_dataset.findings(card)
    assert near["summary"] == "9 rows found, 9 of them dropped." and "MinHash" in near["method"]
    assert near["pairs"][0]["left"][:2] == ("dropped", "tickets:20") and near["pairs"][0]["right"][0] == "kept"
    assert [pair["note"] for pair in overlap["pairs"]] == [
        "8-word overlap: 85\u00a0% of the held-out words", "same prompt"
    ]  # fmt: skip
    card["quality"]["near_duplicates"] |= {"action": "off", "found": 0, "dropped": 0, "examples": []}
    card["quality"]["overlap"] |= {"action": "report", "dropped": 1}
    _, near, overlap = report_dataset.findings(card)
    assert (near["summary"], near["method"]) == ("Not looked for.", "")
    assert overlap["summary"] == "6 rows found, 1 of them dropped."
    assert [pair["left"][0] for pair in overlap["pairs"]] == ["stays", "dropped"]


def test_many_turns_share_a_bar_and_the_widest_bar_is_the_largest_count():
    assert report_dataset.bars([("a", 50), (True, 200), ("", 1)]) == [
        {"name": "a", "count": 50, "width": 25.0},
        {"name": "true", "count": 200, "width": 100.0},
        {"name": "(empty)", "count": 1, "width": 0.5},
    ]
    card = {"turns": {str(n): n for n in range(1, 21)}, "roles": {}, "first_words": {"prompt": [], "reply": []}}
    (chart,) = report_dataset.counted(card | {"columns": {}})
    assert [bar["name"] for bar in chart["bars"]] == [*map(str, range(1, 9)), "9 or more"]
    assert sum(bar["count"] for bar in chart["bars"]) == sum(range(1, 21))


def test_token_examples_show_loss_white_space_and_control_tokens(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    page = Page(text[text.index('<section id="loss"') : text.index('<section id="lengths"')])
    tokenize = read_json(next((finished.parent / "stages" / "tokenize").iterdir()) / "tokenize.json")
    examples = report_dataset.token_examples(tokenize)
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
    assert report_dataset.visible(text) == shown


@pytest.mark.parametrize(
    ("text", "special"),
    [("<|im_start|>", True), ("</s>", True), ("[INST]", True), ("<｜end▁of▁sentence｜>", True), ("<0x0A>", True),
     ("a < b > c", False), ("[1]", False), ("{", False)],
)  # fmt: skip
def test_control_tokens_are_told_by_their_look(text, special):
    assert bool(report_dataset.SPECIAL.fullmatch(text)) is special


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
    assert report_card.text("a|b\n`c` *d* [e](f) <g> #h") == r"a\|b \`c\` \*d\* \[e\](f) &lt;g&gt; \#h"


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
    assert report_samples.turn_text(turn) == 'get_weather({"city": "Oslo"})'
    row = {"id": "a:1", "prompt": [{"role": "user", "content": "Weather?"}, turn], "reference": "Rain", "reply": "Rain"}
    row |= {"exact_match": 1, "loss": 0.1}
    shown = report_samples.prepare({"id": "a:1", "base": row, "tuned": row}, 0, None)
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
    assert words.index("held-out conversations; bars are 95 %") < words.index("nothing found")
    assert words.index("nothing found") < words.index("Replies before and after")
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
        pieces = report_training.with_settings(text)
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
    assert report_training.mentioned("train.epochs: 1, train.keep: best, train.epochs: 2") == [
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
    film = report_training.filmstrip(facts)
    steps = [frame["step"] for frame in film["strips"][0]["frames"]]
    assert (steps[0], steps[-1], 37 in steps) == (0, 100, True) and len(steps) <= 13 and len(film["strips"]) == 12
    facts["train"]["kept"] = None
    view = report.build_view(settings, facts, report_data.build_metrics(settings, facts))
    words = " ".join(Page(report.render(view)).words.split())
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
        "Layers reached 210 of 210", "Time expected 5 min 18 s for the steps; the whole stage took 5 min 43 s",
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
    assert report_training.step_marks(settings, facts) == [
        {"x": 62, "kind": "best", "label": "best, kept, overfitting: step 62"}
    ]
    facts["train"]["kept"]["value"], facts["train"]["diagnoses"] = 122, []
    labels = [mark["label"] for mark in report_training.step_marks(settings, facts)]
    assert labels == ["best: step 62", "kept: step 122"]
    loss, exact = report_training.curves(settings, facts)[:2]
    assert all(label in loss["plot"] and label in exact["plot"] for label in labels)
    assert exact["unit"] == "of 3 sampled replies" and "step 0 · exact match 0\u00a0%" in exact["plot"]
    assert "step 62 · exact match 67\u00a0%" in exact["plot"] and "step 62 · held-out loss 0.325" in loss["plot"]
    for row in settings["resolved"]:
        row["value"] = "exact_match" if row["key"] == "train.best_by" else row["value"]
    facts["curve"] = [row | ({"exact_match": 1.0} if row.get("exact_match") and row["step"] == 31 else {})
                      for row in facts["curve"]]  # fmt: skip
    assert report_training.best_step(settings, facts) == 31


def test_evaluations_stand_in_numbers_too(tmp_path):
    _, inputs = write_stage_folders(tmp_path / "stages", heldout=5)
    rows = report_training.evaluations(report_data.load(inputs))
    assert [row["step"] for row in rows] == [0, 31, 62, 93, 122]
    assert rows[0] == {"step": 0, "loss": None, "eval_loss": None, "exact_match": 0.0}
    assert 0.2 < rows[1]["loss"] < 0.6 and rows[-1]["exact_match"] == 1.0


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
    assert set(first) == {"report.html", "card.md", "metrics.json", "run.yaml"}


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
