"""Which libraries can change a stage, and what is said of those that made a finished one."""

from adder.core.files import write_json
from adder.workflow.library_versions import installed_versions, libraries, other_versions, recorded_versions
from adder.workflow.stages import SPECS


def test_a_stage_depends_on_the_libraries_that_its_code_imports():
    assert {"torch", "transformers", "peft", "trl", "bitsandbytes"} <= set(libraries("adder.training.run"))
    assert "lm-eval" in libraries("adder.evaluation.tasks.run") and "trl" not in libraries("adder.evaluation.run")
    assert "tokenizers" in libraries("adder.tokenization.run")  # beneath transformers
    assert libraries("adder.formatting.run") == libraries("adder.report.run") == ()


def test_what_other_versions_made_is_said_once_a_library(tmp_path):
    versions = installed_versions(SPECS["train"])
    write_json(tmp_path / "same.json", {"versions": versions})
    write_json(tmp_path / "old.json", {"versions": {**versions, "peft": "0.1"}})
    train, merge = SPECS["train"], SPECS["merge"]
    records = [(train, tmp_path / "same.json"), (merge, tmp_path / "same.json"), (train, tmp_path / "not there.json")]
    assert other_versions(records) == []
    found = other_versions([(train, tmp_path / "old.json"), (merge, tmp_path / "old.json"), *records])
    assert found == [f"merge, train: made with peft 0.1; {versions['peft']} is installed"]


def test_a_record_has_every_version_that_can_matter():
    assert set().union(*(installed_versions(spec) for spec in SPECS.values())) <= recorded_versions().keys()
