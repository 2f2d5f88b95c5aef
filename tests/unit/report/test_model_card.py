"""The model card: what the hub reads of it is right, what people read is what was measured, and nothing breaks out."""

import re

import pytest
import yaml
from huggingface_hub import ModelCard

from adder.core.files import read_json, write_json
from adder.report import regression_guard
from adder.report.data_card import text
from adder.report.doubts import Doubt
from adder.report.facts import load
from adder.report.model_card import LICENSES, _modelfile, came_as, model_card
from adder.report.run import about
from adder.report.run_metrics import build_metrics
from report_fixture import HOSTILE, write_stage_folders

MODELS = {
    "hub": {"source": "org/base", "kind": "hub", "revision": "ab" * 20, "license": "llama3.1", "sha256": None},
    "wheel": {},
}


def make(tmp_path, model: str = "wheel", change=None, **how) -> tuple[str, dict, dict]:
    """The card of a made-up run, the facts behind it and its metrics; `change` may edit the facts."""
    settings, inputs = write_stage_folders(tmp_path / "stages", **how)
    path = inputs["model"] / "source.json"
    write_json(path, read_json(path) | MODELS[model])
    facts = load(inputs, settings.shows)
    if change:
        change(facts)
    metrics = build_metrics(settings, facts)
    return model_card(settings, facts, metrics), facts, metrics


def test_the_hub_reads_what_the_model_is(tmp_path):
    card, _, metrics = make(tmp_path, "hub", tasks=("gsm8k", "my_tone"))
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "llama3.1")
    assert (data.base_model, data["base_model_relation"]) == ("org/base", "finetune")
    assert data.datasets == ["example/support-chats"]  # ids of the hub only
    assert data.language is None  # two sources are anybody's
    assert data.tags == ["adder", "conversational", "lora", "qlora"]
    assert data.model_name == "default"
    found = {(one.dataset_type, one.metric_type): one.metric_value for one in data.eval_results}
    heldout = metrics["heldout"]
    assert found["private", "exact_match"] == heldout["exact_match"]["tuned"]["value"] == pytest.approx(0.9, abs=0.1)
    assert found["private", "f1"] == heldout["field_f1"]["tuned"]["value"]
    assert found["gsm8k", "exact_match"] == metrics["tasks"][0]["tuned"]["value"]
    assert len(found) == len(heldout) + 2
    for one in data.eval_results:
        assert one.task_type == "text-generation" and one.dataset_name and one.metric_name
    # What the client writes back is what it read: nothing in it is malformed.
    again = ModelCard(str(ModelCard(card))).data
    assert again.to_dict() == data.to_dict()


def test_people_read_what_was_measured(tmp_path):
    card, _, metrics = make(tmp_path, "hub", tasks=("gsm8k",), judged=True, merge_bases=True)
    assert metrics["verdict"]["sentence"] in card
    assert "[org/base](https://huggingface.co/org/base)" in card and "ab" * 20 in card
    exact = re.search(r"\| Exact match \| (.*) \| (.*) \| (.*) \| (.*) \| 200 \|", card)
    assert exact.groups() == ("0.0 %", "90.0 %", "+90.0 points", "+84.7 to +93.5")
    assert "| gsm8k, exact\\_match | 4.8 % | 2.4 %" in card
    assert "A judge (judge-large) compared replies blind" in card
    for source, license in (("tickets", "CC0-1.0"), ("support-chats", "apache-2.0"), ("notes", "not stated")):
        assert re.search(rf"\| {source} \| .* \| {re.escape(license)} \|", card)
    assert "| exam |" not in card  # a test set, which the model has nothing of
    assert "Not every licence is stated" in card
    assert "rank 16, alpha 32" in card and "at most 256 tokens" in card


def test_settings_that_differ_from_the_defaults_stand_there_and_no_others(tmp_path):
    card, _, _ = make(tmp_path)
    assert "| train.learning\\_rate | 0.0001 |" in card  # of the run
    assert "| train.epochs | 2 |" in card  # of the configuration
    assert re.search(r"\| lengths\.max\\_seq\\_length \| 256 \| 256 is the smallest multiple", card)  # chosen
    assert "train.lora" not in card and "warmup" not in card  # defaults
    assert "data.heldout" not in card and "evaluate." not in card


def test_the_system_prompt_of_the_training_is_part_of_the_use(tmp_path):
    card, _, _ = make(tmp_path)
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    messages = next(line for line in code.splitlines() if line.startswith("messages = "))
    assert eval(messages.partition(" = ")[2])[0] == {
        "role": "system",
        "content": "Turn the customer's message into a JSON ticket.",
    }
    assert "max_new_tokens=69" in code
    compile(code, "card", "exec")


def modelfile(card: str) -> str:
    return re.search(r"named `Modelfile`.*?\n\n(`{3,})\n(.*?)\1\n", card, re.DOTALL)[2]


def test_the_modelfile_decodes_greedily_and_has_the_system_prompt(tmp_path):
    card, _, _ = make(tmp_path / "a")
    system = 'SYSTEM """Turn the customer\'s message into a JSON ticket."""\n'
    assert modelfile(card) == f"FROM .\nPARAMETER temperature 0\n{system}"
    _, facts, _ = make(tmp_path / "b")
    assert 'SYSTEM """Two lines,\n"quoted"."""' in _modelfile(facts, 'Two lines,\n"quoted".')
    for none in (None, 'Ends a text: """\nMore'):
        assert _modelfile(facts, none) == "FROM .\nPARAMETER temperature 0"


def only_texts(facts):
    del facts.tuned["max_new_tokens"]


def test_a_model_of_plain_texts_is_no_chat_model(tmp_path):
    card, _, _ = make(tmp_path, change=only_texts)
    assert "to continue plain texts" in card and "messages" not in card
    assert modelfile(card) == "FROM .\n"
    assert "conversational" not in ModelCard(card).data.tags
    compile(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], "card", "exec")


@pytest.mark.parametrize(
    ("stated", "license", "name"),
    [
        ("Apache-2.0", "apache-2.0", None),
        ("My Own: License", "other", "my-own-license"),
        ("other", "other", None),
        (None, None, None),
    ],
)
def test_a_licence_that_the_hub_does_not_know_is_named_beside(tmp_path, stated, license, name):
    def change(facts):
        facts.model["license"] = stated

    card, _, _ = make(tmp_path, change=change)
    data = ModelCard(card).data
    assert (data.license, data.license_name) == (license, name)
    assert f"| Its licence | {stated or 'not stated'} |" in card
    assert {"apache-2.0", "mit", "llama3.1", "gemma", "cc-by-nc-sa-4.0"} <= LICENSES


def test_what_is_not_known_is_said(tmp_path):
    sure, _, _ = make(tmp_path / "a", right=0.9)
    few, _, metrics = make(tmp_path / "c", heldout=4, right=0.3)
    assert metrics["verdict"]["verdict"] == "can't tell" and "can't be told from this many rows" in few
    assert "can't be told" not in sure

    def overlapping(facts):
        facts.doubts.append(Doubt("4 training rows are much like held-out ones", False))

    card, _, _ = make(tmp_path / "d", change=overlapping)
    assert "against the scores: 4 training rows are much like held-out ones" in card
    assert "against the scores" not in sure

    def dots(facts):
        facts.doubts.append(Doubt("20 of 20 tuned replies are cut off", True))

    card, _, _ = make(tmp_path / "e", change=dots)
    assert "against the scores: 20 of 20 tuned replies are cut off" in card
    assert "can't be told." in card and "this many rows" not in card


def test_the_guards_word_is_passed_on(tmp_path):
    card, _, metrics = make(tmp_path, tasks=("arc_easy",))
    assert metrics["guard"] == {"passed": False, "failed": ["arc_easy"]}
    assert text(regression_guard.check(metrics["tasks"])["sentence"]) in card


def test_only_english_by_our_own_generator_has_a_language(tmp_path):
    def change(facts):
        facts.data[:] = [source for source in facts.data if source["kind"] == "builtin"]

    card, _, _ = make(tmp_path, change=change)
    data = ModelCard(card).data
    assert data.language == ["en"] and data.datasets is None


def test_infinite_perplexity_is_left_out(tmp_path):
    def change(facts):
        facts.tuned["heldout"]["perplexity"] = {"value": float("inf"), "ci95": None, "n": 200, "stderr": 0}

    card, _, _ = make(tmp_path, change=change)
    assert "perplexity" not in {one.metric_type for one in ModelCard(card).data.eval_results}


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_hostile_names_stay_text(tmp_path, method):
    breakers = "x | y\n# Not a heading\n---\n```\n[link](javascript:alert(1)) ![i](http://evil.example/x.png) <b>"

    def change(facts):
        facts.model["source"] = facts.data[0]["name"] = breakers
        facts.data[0]["license"] = breakers

    card, _, _ = make(
        tmp_path, change=change, hostile=True, tasks=("gsm8k",), judged=True, merge_bases=True, method=method
    )
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    assert yaml.safe_load(head)["model-index"][0]["name"] == f"tickets {HOSTILE}"
    assert yaml.safe_load(head)["license"] == "other"
    assert "<" not in body and "\n---\n" not in body
    assert "# Not a heading" not in {line.strip() for line in body.splitlines()}
    assert not re.search(r"(?<!\\)\[link|(?<!\\)!\[", body.replace("\\!", ""))
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert [line.lstrip("# ") for line in headings[1:]] == [
        "How to use it",
        "What it was made from",
        "How it was trained",
        "What was measured",
        "What was not",
    ]
    for row in re.findall(r"^\|.*\|$", body, re.MULTILINE):
        assert len(re.findall(r"(?<!\\)\|", row)) in (3, 4, 7)  # two, three or six cells
    assert body.count("```") == 8
    ModelCard(card)
    assert ("training of all weights" in card) == (method == "full")


def test_a_system_prompt_can_not_end_its_code(tmp_path):
    prompt = "Be kind.\n```\n# Now a heading\n'\"\\"

    settings, inputs = write_stage_folders(tmp_path / "stages")
    facts = load(inputs, settings.shows)
    row = next(row for row in settings.resolved if row.key == "format.system_prompt")
    row.value = prompt
    card = model_card(settings, facts, build_metrics(settings, facts))
    code = re.search(r"^(`{3,})python\n(.*?)\n\1$", card, re.DOTALL | re.MULTILINE)[2]
    messages = next(line for line in code.splitlines() if line.startswith("messages = "))
    assert eval(messages.partition(" = ")[2])[0]["content"] == prompt
    assert f'SYSTEM """{prompt}"""\n' == modelfile(card).partition("temperature 0\n")[2]
    assert "\n# Now a heading" not in re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", card, flags=re.DOTALL | re.MULTILINE)


def test_a_base_that_came_quantised_is_told_with_what_was_made_of_it(tmp_path):
    record = {"method": "FP8 in blocks", "weights": 3, "stored_bytes": 8_110_000_000, "dtype": "bfloat16"}

    def quantised(facts):
        facts.model["quantised"] = {**record, "trained_as_it_is": False}

    card, facts, _ = make(tmp_path, change=quantised)
    assert "| It came as | FP8 in blocks (8.11 GB), dequantised to bfloat16 |" in card
    facts.model["quantised"] = {**record, "trained_as_it_is": True}
    assert "QLoRA trains the 4-bit weights as they came" in (came_as(facts.model) or "")
    assert "came as" in dict(about(write_stage_folders(tmp_path / "again")[0], facts))["Base"]
    facts.model["quantised"] = None
    assert came_as(facts.model) is None


def test_a_training_that_went_on_from_an_adapter_says_so(tmp_path):
    def going_on(facts):
        facts.model["adapter"] = {"source": "org/first", "revision": "ab" * 20, "base": "org/base"}

    card, facts, _ = make(tmp_path, change=going_on)
    assert "| Goes on from | org/first |" in card
    assert dict(about(write_stage_folders(tmp_path / "again")[0], facts))["Method"].endswith("going on from org/first")


def test_a_source_with_a_share_held_out_is_named_and_makes_no_language(tmp_path):
    """Its rows are trained on and held out alike: `split` is null."""

    def shared(facts):
        facts.data[:] = [{**source, "split": None} for source in facts.data[1:3]]

    card, _, _ = make(tmp_path, "hub", change=shared)
    data = ModelCard(card).data
    assert data.language is None and data.datasets == ["example/support-chats"]
    assert "training and held out" in card and "support-chats" in card.split("What it was made from")[1]
    assert "held-out rows of support-chats, notes" in card


def test_a_card_tells_no_paths_of_this_machine(tmp_path):
    def local(facts):
        facts.model.update({"source": "/home/anna/models/base-7b", "kind": "directory"})
        facts.data[0] |= {"name": "/home/anna/data/tickets.jsonl", "path": "/home/anna/data/tickets.jsonl"}

    card, _, _ = make(tmp_path, change=local)
    assert "/home" not in card and "anna" not in card and "base-7b" in card and "tickets.jsonl" in card
