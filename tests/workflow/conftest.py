"""One finished tiny run that the workflow tests change things on."""

import pytest

from project import Project, write_rows


@pytest.fixture(scope="session")
def project(tmp_path_factory, tiny_model_dir) -> Project:
    folder = tmp_path_factory.mktemp("project")
    config = {
        "model": {"source": str(tiny_model_dir)},
        "data": {"sources": [{"path": "rows.jsonl"}], "heldout": {"share": 0.2}},
        "train": {"epochs": 1, "lora_r": 4, "eval_samples": 2, "compute_dtype": "float32"},
        "evaluate": {"max_new_tokens": 8},
    }
    write_rows(folder / "rows.jsonl", 60)
    project = Project(folder, config)
    project.first_run = project.run()
    return project
