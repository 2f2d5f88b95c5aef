"""Where a run's models are found, and what is said where they aren't."""

import json

import pytest
import yaml

from adder.core.errors import UserError
from adder.serving.run_models import RunModels, find


@pytest.fixture
def results(tmp_path):
    """A run's folder as the workflow leaves it: two bases were fetched, and its merge has read the second."""
    stages = tmp_path / "stages"
    for name, digest in (("aaa", "1"), ("bbb", "2")):
        folder = stages / "model" / name
        (folder / "model").mkdir(parents=True)
        outputs = {"model/config.json": {"digest": "c"}, "model/model.safetensors": {"digest": digest}}
        (folder / "stage.json").write_text(json.dumps({"outputs": outputs}))
    merge = stages / "merge" / "ccc"
    merge.mkdir(parents=True)
    read = {"model/config.json": "c", "model/model.safetensors": "2"}
    (merge / "stage.json").write_text(json.dumps({"inputs": {"model": read}}))
    run = tmp_path / "my-run"
    (run / "merged_model").mkdir(parents=True)
    (run / "merged_model" / "config.json").write_text("{}")
    (run / "stages.json").write_text(json.dumps({"merge": "ccc"}))
    (run / "run.yaml").write_text(yaml.safe_dump({"settings": {"format.system_prompt": {"value": "Be brief."}}}))
    return tmp_path


def test_the_base_is_the_model_that_the_merge_has_read(results):
    run = results / "my-run"
    assert find(run) == RunModels(run / "merged_model", results / "stages/model/bbb/model", "Be brief.")


def test_a_model_directory_is_talked_to_by_itself(results):
    folder = results / "my-run" / "merged_model"
    assert find(folder) == RunModels(folder, None, None)


def test_a_run_that_was_copied_without_its_stages_has_no_base(results):
    (results / "stages").rename(results / "elsewhere")
    assert find(results / "my-run").base is None


def test_a_folder_without_a_model_is_refused_with_the_runs_in_it(results):
    with pytest.raises(UserError, match=r"no merged_model/.*the runs in it are my-run"):
        find(results)
