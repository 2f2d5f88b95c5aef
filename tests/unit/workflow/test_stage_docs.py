"""What documentation and profile say of the stages is what these declare."""

from pathlib import Path

import yaml

from adder.workflow.stage_docs import cluster_partitions, table
from adder.workflow.stages import SPECS

ROOT = Path(__file__).resolve().parents[3]


def test_every_stage_has_a_row():
    rows = table().splitlines()[2:]
    assert [row.split(" ")[1] for row in rows] == list(SPECS)
    train = rows[list(SPECS).index("train")]
    assert "`train_adapter` | `adder.training.run` | lengths: `packs.parquet`;" in train
    assert train.endswith("| 8 cores, 8 GB and 2 bytes a parameter, 1440 min, GPUs |")


def test_rules_that_use_a_gpu_go_to_the_partition_that_has_them():
    profile = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
    assert {spec.rule: profile[".with_gpus"] for spec in SPECS.values() if spec.gpu} == profile["set-resources"]
    assert cluster_partitions().count("\n") == len(profile["set-resources"])
