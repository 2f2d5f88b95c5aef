"""What docs/models.md says of each architecture is what happens, from training to the GGUF file."""

import pytest

import model_matrix
from adder.merging import verification

# One of each kind: dense, with windows, a mixture of experts, without torch.nn.Linear, recurrent, joined projections.
# `python tests/model_matrix.py` tries all architectures.
QUICK = ("llama", "gemma3_text", "qwen3_moe", "gpt2", "jamba", "phi3")


@pytest.fixture
def reply_in_this_process(monkeypatch):
    monkeypatch.setattr(verification, "reply_of_fresh_process", model_matrix.reply_here)


@pytest.mark.usefixtures("reply_in_this_process")
@pytest.mark.parametrize("name", QUICK)
def test_an_architecture_is_right_or_refused_as_the_table_says(tmp_path, name):
    found = model_matrix.row(name, tmp_path)
    assert not [cell for cell in found.values() if cell.startswith("fails")]
    assert model_matrix.documented().get(name, found) == found
