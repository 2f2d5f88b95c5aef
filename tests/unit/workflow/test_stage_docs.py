"""What documentation and profile say of the stages is what these declare."""

import yaml

from adder.workflow.stage_docs import cluster_resources, table
from adder.workflow.stages import SPECS


def test_every_stage_has_a_row():
    rows = table().splitlines()[2:]
    assert [row.split(" ")[1] for row in rows] == list(SPECS)
    train = rows[list(SPECS).index("train")]
    assert "`train_adapter` | `adder.training.run` | lengths: `packs.parquet`;" in train
    assert train.endswith("| all cores, 8 GB and 2 bytes a parameter, 1440 min, a GPU |")


def test_a_cluster_is_asked_for_a_gpu_by_the_stages_that_use_one():
    profile = yaml.safe_load(cluster_resources())
    assert {rule for rule, asked in profile["set-resources"].items() if asked["gpu"]} == {
        spec.rule for spec in SPECS.values() if spec.gpu
    }
    assert not profile["set-threads"].keys() & {spec.rule for spec in SPECS.values() if spec.local}
