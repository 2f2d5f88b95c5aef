"""proof.json has the keys of its record, and no others."""

import pytest

from adder.core.files import read_json
from adder.merging.records import FullProof, MergeProof
from merge_fixture import make_inputs, reply_in_this_process, run  # noqa: F401 (a fixture)
from tiny import save_tiny_model


@pytest.mark.usefixtures("reply_in_this_process")
def test_the_proof_of_a_merge(tmp_path, tiny_model_dir):
    run(make_inputs(tmp_path / "in", tiny_model_dir), tmp_path / "out")
    assert (
        set(read_json(tmp_path / "out" / "proof.json")) == MergeProof.__required_keys__ | MergeProof.__optional_keys__
    )


def test_the_proof_of_a_full_training(tmp_path, tiny_model_dir):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir, adapter=False)
    save_tiny_model(inputs["train"] / "model", seed=5)
    run(inputs, tmp_path / "out")
    assert set(read_json(tmp_path / "out" / "proof.json")) == FullProof.__required_keys__
