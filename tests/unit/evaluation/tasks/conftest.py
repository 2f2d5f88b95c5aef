"""What the tests of tasks share: a model to ask, a user's own tasks, and one arithmetic."""

import sys
from pathlib import Path

import pytest

from adder.core.choice import Choice
from adder.core.files import write_json, write_jsonl
from adder.evaluation.tasks import run as tasks
from task_stage import CHOICE, COMMON, HELPER, LIKELY, QUESTIONS, WRITTEN
from tiny import save_tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model with a context of 1,024, and its tokenizer, as the stages before leave them."""
    root = tmp_path_factory.mktemp("stages")
    tokenizer = tiny_tokenizer()
    # Weights as large as these make replies that differ from question to question.
    save_tiny_model(
        root / "model" / "model", max_position_embeddings=1024, tie_word_embeddings=False, initializer_range=0.3
    )
    tokenizer.save_pretrained(root / "tokenize" / "tokenizer")
    end = {"id": tokenizer.eos_token_id, "token": tokenizer.eos_token}
    write_json(root / "tokenize" / "tokenize.json", {"end_of_turn": end, "reply_ends": []})
    return {"model": root / "model", "tokenize": root / "tokenize"}


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    """A folder of a user's own tasks, their data beside them. What their code imports from it is forgotten."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "my tasks"
    (folder / "data").mkdir(parents=True)
    for name, text in {
        "capitals.yaml": CHOICE, "written.yaml": WRITTEN, "likely.yaml": LIKELY, "common.yaml": COMMON,
        "helper.py": HELPER,
    }.items():  # fmt: skip
        (folder / name).write_text(text)
    write_jsonl(folder / "data" / "one.jsonl", QUESTIONS)
    yield folder
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(folder):
            del sys.modules[name]


@pytest.fixture
def in_fp32(monkeypatch):
    """Scores to compare need one arithmetic."""
    monkeypatch.setattr(tasks.precision, "compute_dtype", lambda device: Choice("float32", "as set"))
