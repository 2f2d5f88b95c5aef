"""A Slurm that runs on this machine, and a project that submits to it."""

from collections.abc import Iterator

import pytest

import slurm_cluster
from project import write_rows
from slurm_cluster import Cluster
from slurm_project import SlurmProject


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def project(cluster, tmp_path_factory, tiny_model_dir) -> Iterator[SlurmProject]:
    folder = tmp_path_factory.mktemp("cluster")
    config = {
        "model": {"source": str(tiny_model_dir)},
        "data": {"sources": [{"path": "rows.jsonl"}], "heldout": {"share": 0.2}},
        "train": {"epochs": 1, "lora_r": 4, "eval_samples": 0, "samples": 0, "compute_dtype": "float32"},
        "evaluate": {"max_new_tokens": 8},
        "runtime": {"checkpoints": 1000},
    }
    write_rows(folder / "rows.jsonl", 60)
    project = SlurmProject(folder, config, cluster)
    yield project
    project.end_all()
