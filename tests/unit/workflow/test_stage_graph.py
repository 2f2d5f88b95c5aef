"""Keys: a pure function of settings and data, shared by runs that share settings."""

import contextlib
import json

import pytest

from adder.core.errors import UserError
from adder.core.file_digests import FileDigests, canonical
from adder.workflow import library_versions, stage_graph
from adder.workflow.settings import load, merged, resolved
from adder.workflow.stage_graph import (
    Stage,
    known_model,
    nearest,
    parameter_count,
    refuse_impossible,
    runs_of,
    stages_of_run,
)
from adder.workflow.stages import SPECS

STAGES = [
    "model",
    "data",
    "format",
    "tokenize",
    "lengths",
    "isolation",
    "train",
    "merge",
    "evaluate_base",
    "evaluate_tuned",
    "report",
]


EVERYTHING = {
    "evaluate": {
        "tasks": [{"name": "gsm8k", "limit": 20}, {"path": "task.yaml"}],
        "judge": {"base_url": "http://localhost:8000/v1", "model": "judge"},
    },
    "export": {"gguf": "q8_0"},
}


@pytest.fixture
def project(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path


def keys(project, change: dict | None = None, run: str = "default") -> dict[str, str]:
    base = {"model": {"source": "wheel:x==1"}, "data": {"sources": [{"path": "rows.jsonl"}]}}
    config = merged(base, change or {})
    return {name: stage.key for name, stage in stages_of(project, config, run).items()}


def stages_of(project, config: dict, run: str = "default") -> dict[str, Stage]:
    settings = load(config)[run]
    digests = FileDigests(project / "digests.json", project)
    return stages_of_run(run, settings, resolved(settings, config, run), digests)


def changed(before: dict, after: dict) -> list[str]:
    return [name for name in STAGES if before[name] != after[name]]


BELOW = {name: STAGES[STAGES.index(name) :] for name in STAGES}


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({}, []),
        ({"train": {"learning_rate": 2e-4}}, ["train", "merge", "evaluate_tuned", "report"]),
        ({"train": {"lora_r": 8}}, ["train", "merge", "evaluate_tuned", "report"]),
        ({"train": {"use_dora": True}}, ["isolation", "train", "merge", "evaluate_tuned", "report"]),
        ({"data": {"heldout": {"size": 1}}}, BELOW["format"]),
        ({"format": {"system_prompt": "Be brief."}}, BELOW["format"]),
        ({"lengths": {"max_seq_length": 512}}, ["lengths", "isolation", "train", "merge", "evaluate_tuned", "report"]),
        (
            {"train": {"effective_batch_size": 8}},
            ["lengths", "isolation", "train", "merge", "evaluate_tuned", "report"],
        ),
        ({"evaluate": {"max_new_tokens": 64}}, ["evaluate_base", "evaluate_tuned", "report"]),
        ({"merge": {"base": "original"}}, ["merge", "evaluate_tuned", "report"]),
        ({"report": {"price_per_hour": 2.5}}, ["report"]),
        ({"merge": {"tolerance": 1.0}}, ["merge", "evaluate_tuned", "report"]),
        ({"report": {"title": "Mine"}}, ["report"]),
        ({"model": {"source": "wheel:y==1"}}, [s for s in STAGES if s not in ("data", "format")]),
        ({"runtime": {"threads": 1, "device": "cpu", "checkpoints": 0}}, []),
    ],
)
def test_a_change_reaches_what_depends_on_it_and_nothing_else(project, change, stages):
    assert changed(keys(project), keys(project, change)) == stages


def test_order_of_keys_does_not_matter(project):
    one = {"train": {"epochs": 1, "lora_r": 8}, "format": {"system_prompt": "x"}}
    two = {"format": {"system_prompt": "x"}, "train": {"lora_r": 8, "epochs": 1.0}}
    assert keys(project, one) == keys(project, two)


def test_two_runs_share_what_they_have_in_common(project):
    change = {"runs": {"a": {}, "b": {"train": {"learning_rate": 2e-4}}}}
    a, b = keys(project, change, "a"), keys(project, change, "b")
    assert changed(a, b) == ["train", "merge", "evaluate_tuned", "report"]


def test_content_of_a_data_file_counts_and_its_time_stamp_does_not(project):
    before = keys(project)
    (project / "rows.jsonl").touch()
    assert keys(project) == before
    with (project / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "c", "completion": "d"}\n')
    assert changed(before, keys(project)) == BELOW["data"]


def test_a_model_directory_counts_by_its_content(project):
    (project / "model").mkdir()
    (project / "model" / "config.json").write_text("{}")
    before = keys(project, {"model": {"source": "model"}})
    (project / "model").rename(project / "moved")
    # Only the report, which shows the name of the source, is another.
    assert changed(before, keys(project, {"model": {"source": "moved"}})) == ["report"]
    (project / "moved" / "config.json").write_text('{"a": 1}')
    assert "model" in changed(before, keys(project, {"model": {"source": "moved"}}))


def test_missing_files_are_named(project):
    with pytest.raises(UserError, match="data.sources.0.path: no file matches 'gone.csv'"):
        keys(project, {"data": {"sources": [{"path": "gone.csv"}]}})
    with pytest.raises(UserError, match="tokenize.chat_template: there is no file 'gone.jinja'"):
        keys(project, {"tokenize": {"chat_template": "gone.jinja"}})
    with pytest.raises(UserError, match="model.source: './gone' is neither there"):
        keys(project, {"model": {"source": "./gone"}})


def test_every_stage_reads_the_parents_that_its_declaration_names(project):
    (project / "task.yaml").write_text("task: mine\n")
    base = {"model": {"source": "wheel:x==1"}, "data": {"sources": [{"path": "rows.jsonl"}]}}
    stages = stages_of(project, merged(base, EVERYTHING))
    assert {stage.name for stage in stages.values()} == SPECS.keys()
    for name, stage in stages.items():
        wanted = stages.keys() - {"report", "gguf"} if name == "report" else stage.spec.reads.keys()
        assert set(stage.parents) == set(wanted)
    assert stages["evaluate_base"].parents["model"] is stages["model"]
    assert stages["evaluate_tuned"].parents["model"] is stages["merge"]


def test_settings_of_a_stage_survive_the_way_to_its_job(project):
    """As JSON in Snakemake's parameters and back, for LoRA and for a full training, whose LoRA settings are unused."""
    for change in (EVERYTHING, {"train": {"method": "full"}}):
        (project / "task.yaml").write_text("task: mine\n")
        base = {"model": {"source": "wheel:x==1"}, "data": {"sources": [{"path": "rows.jsonl"}]}}
        for stage in stages_of(project, merged(base, change)).values():
            sent = json.loads(stage.parameters())["settings"]
            assert stage.spec.settings.model_validate(sent) == stage.settings


def test_an_upgrade_reruns_what_it_can_change_where_that_is_asked_for(project, monkeypatch):
    said = keys(project)
    rerun = {"runtime": {"upgrades": "rerun"}}
    before = keys(project, rerun)
    unversioned = {"data", "format"}
    assert set(changed(said, before)) == {*STAGES} - unversioned
    monkeypatch.setattr(library_versions, "version", lambda name: "9.9" if name == "peft" else "1.0")
    assert keys(project) == said
    one = keys(project, rerun)
    monkeypatch.setattr(library_versions, "version", lambda name: "9.10" if name == "peft" else "1.0")
    uses_peft = ["isolation", "train", "merge", "evaluate_base", "evaluate_tuned", "report"]
    assert changed(one, keys(project, rerun)) == uses_peft


def test_tasks_and_judge_are_stages_of_their_own(project):
    (project / "task.yaml").write_text("task: mine\n")
    before, after = keys(project), keys(project, EVERYTHING)
    assert changed(before, after) == ["report"]
    names = {"task_base_0", "task_tuned_0", "task_base_1", "task_tuned_1", "judge", "gguf"}
    assert after.keys() - before.keys() == names
    # One more task runs that task alone; training again leaves the base's scores as they are.
    tasks = EVERYTHING["evaluate"]["tasks"]
    more = keys(project, {**EVERYTHING, "evaluate": {"tasks": [*tasks, {"name": "ifeval"}]}})
    assert all(more[name] == after[name] for name in names if name.startswith("task"))
    trained = keys(project, {**EVERYTHING, "train": {"learning_rate": 3e-4}})
    assert {name for name in names if trained[name] != after[name]} == names - {"task_base_0", "task_base_1"}


def test_a_task_of_the_users_counts_by_its_content(project):
    (project / "task.yaml").write_text("task: mine\n")
    before = keys(project, EVERYTHING)
    (project / "task.yaml").write_text("task: mine\nnum_fewshot: 2\n")
    after = keys(project, EVERYTHING)
    assert {name for name in after if after[name] != before[name]} == {"task_base_1", "task_tuned_1", "report"}
    with pytest.raises(UserError, match="evaluate.tasks.0.path: there is no file 'gone.yaml'"):
        keys(project, {"evaluate": {"tasks": [{"path": "gone.yaml"}]}})
    with pytest.raises(UserError, match="data.test: no file matches 'gone.jsonl'"):
        keys(project, {"evaluate": {"tasks": [{"name": "gsm8k", "data": {"test": "gone.jsonl"}}]}})
    (project / "other.jsonl").write_text("{}\n")
    one, other = (
        {"name": "gsm8k", "data": {"test": a, "train": b}}
        for a, b in [("rows.jsonl", "other.jsonl"), ("other.jsonl", "rows.jsonl")]
    )
    found = [keys(project, {"evaluate": {"tasks": [task]}})["task_base_0"] for task in (one, other)]
    assert found[0] != found[1]


def test_another_limit_of_the_guard_runs_no_task_again(project):
    change = {"evaluate": {"tasks": [{"name": "gsm8k", "max_drop": 0.1}]}}
    before, after = keys(project, {"evaluate": {"tasks": [{"name": "gsm8k"}]}}), keys(project, change)
    assert {name for name in after if after[name] != before[name]} == {"report"}


def test_no_secret_in_the_judges_address(project):
    judge = {"base_url": "https://me:hunter2@example.org/v1", "model": "judge"}
    with pytest.raises(UserError, match="evaluate.judge.base_url: what stands before @") as caught:
        keys(project, {"evaluate": {"judge": judge}})
    assert "hunter2" not in str(caught.value)


def test_what_is_done_with_the_model_changes_no_report(project):
    assert changed(keys(project), keys(project, {"export": {"hub": "me/mine", "gguf": "q8_0"}})) == []


def test_a_gguf_file_that_cannot_be_written_is_refused_before_anything_runs(project):
    (project / "model").mkdir()
    (project / "model" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "n_positions": 1024}')
    config = {"model": {"source": "model"}, "data": {"sources": [{"path": "rows.jsonl"}]}}
    for gguf, refused in (("off", False), ("q8_0", True)):
        asked = merged(config, {"export": {"gguf": gguf}})
        run, stages = load(asked)["default"], stages_of(project, asked)
        with pytest.raises(UserError, match="GPT2LMHeadModel") if refused else contextlib.nullcontext():
            refuse_impossible("default", stages.values(), known_model(run, stages, project, project))


def test_what_is_no_causal_language_model_is_refused_before_anything_runs(project):
    (project / "model").mkdir()
    (project / "model" / "config.json").write_text('{"architectures": ["BertForMaskedLM"], "model_type": "bert"}')
    config = {"model": {"source": "model"}, "data": {"sources": [{"path": "rows.jsonl"}]}}
    run, stages = load(config)["default"], stages_of(project, config)
    with pytest.raises(UserError, match=r"model is BertForMaskedLM; Adder trains causal language models.*run default"):
        refuse_impossible("default", stages.values(), known_model(run, stages, project, project))


SWEEP = {
    "a": {"train": {"learning_rate": 2e-4}},
    "b": None,
    "c": {"train": {"learning_rate": 2e-4}, "merge": {"base": "original"}},
    "d": {"data": {"heldout": {"size": 3}}, "train": {"effective_batch_size": 1}},
    "e": {"train": {"method": "full"}, "evaluate": {"tasks": [{"name": "arc_easy"}]}},
    "f": {"train": {"effective_batch_size": 1}, "lengths": {"reshuffle": True}, "export": {"gguf": "off"}},
}


def test_runs_of_a_sweep_are_what_each_is_alone_and_share_what_is_equal(project, monkeypatch):
    monkeypatch.chdir(project)
    base = {"model": {"source": "wheel:x==1"}, "data": {"sources": [{"path": "rows.jsonl"}]}, "train": {"lora_r": 4}}
    config = merged(base, EVERYTHING) | {"runs": SWEEP}
    (project / "task.yaml").write_text("task: mine\n")
    together = runs_of(config)
    for run, (settings, stages) in together.items():
        alone = stages_of_run(run, load(config)[run], resolved(settings, config, run), FileDigests.of_results(project))
        assert {name: (stage.key, stage.parameters()) for name, stage in stages.items()} == {
            name: (stage.key, stage.parameters()) for name, stage in alone.items()
        }
    objects = {id(stage): stage.folder for run in together.values() for stage in run.stages.values()}
    assert together["a"].stages["train"] is together["c"].stages["train"]
    assert together["a"].stages["evaluate_base"] is together["b"].stages["evaluate_base"]
    shared = sum(len(run.stages) for run in together.values()) - len(objects)
    assert shared >= len(SWEEP)  # whatever the stages are: the base's at least


def test_a_stages_parameters_are_canonical_json_of_all_that_decides_it(project):
    for stage in stages_of(project, {"model": {"source": "m"}, "data": {"sources": [{"path": "rows.jsonl"}]}}).values():
        told = {"settings": stage.settings.model_dump(mode="json"), "identity": stage.identity, "versions": {}}
        assert stage.parameters() == canonical(told)


def test_what_is_made_last_of_some_stages_is_made_from_all_others(project):
    (project / "task.yaml").write_text("task: mine\n")
    stages = stages_of(
        project, merged({"model": {"source": "m"}, "data": {"sources": [{"path": "rows.jsonl"}]}}, EVERYTHING)
    )
    for stage in stages.values():
        last = nearest(stage.parents)
        covered = {folder for one in last.values() for folder in (one.folder, *one.ancestors)}
        assert {parent.folder for parent in stage.parents.values()} <= covered
        assert all(one.folder not in other.ancestors for one in last.values() for other in last.values())
    # However many stages a run has, its report waits for those that nothing else is made from.
    tasks = {f"task_{model}_{number}" for model in ("base", "tuned") for number in (0, 1)}
    assert set(nearest(stages["report"].parents)) == {"judge", "isolation"} | tasks


def test_the_hub_is_asked_for_a_model_once_however_many_runs_there_are(project, monkeypatch):
    monkeypatch.chdir(project)
    asked = []
    monkeypatch.setattr(stage_graph, "folder_with_config", asked.append)
    rates = {f"r{n}": {"train": {"learning_rate": 1e-5 * n}} for n in range(1, 6)}
    runs_of({"model": {"source": "me/mine"}, "data": {"sources": [{"path": "rows.jsonl"}]}, "runs": rates})
    assert len(asked) == 1


@pytest.mark.parametrize("content", ["", '{"parameters": ', "null\n", "[]", "{}"])
def test_a_damaged_record_of_the_model_tells_no_parameters(tmp_path, content):
    stage = Stage(SPECS["model"], SPECS["model"].settings.model_construct(), {})
    folder = tmp_path / stage.folder
    assert parameter_count({"model": stage}, tmp_path) is None
    folder.mkdir(parents=True)
    (folder / "source.json").write_text(content)
    assert parameter_count({"model": stage}, tmp_path) is None
    (folder / "source.json").write_text('{"parameters": 7}')
    assert parameter_count({"model": stage}, tmp_path) == 7
