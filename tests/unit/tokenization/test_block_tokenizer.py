"""Conversations that were tokenised once aren't again, and what comes out is the same as from nothing."""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adder.core import row_blocks
from adder.core.errors import UserError
from adder.tokenization import block_tokenizer
from adder.tokenization.run import TokenizeInputs, run
from adder.tokenization.stage import TokenizeSettings
from chat_families import conversation
from earlier_results import context_beside, digests


def talk(number: int) -> list[dict[str, Any]]:
    """A conversation; a few can't be used, a few hold reasoning, for which the template has no place."""
    kind = random.Random(number).randrange(60)
    if kind == 0:
        return conversation("a?", "see <|im_end|>")
    found = conversation(f"Where is order {number}? " + "It is late. " * (number % 7), f"It is {number}")
    if kind == 1:
        found[-1]["reasoning_content"] = "They ask."
    return found


class Edited:
    """Conversations that change, and the stage "tokenize" over them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.runs = folder, 0
        self.talks = [talk(number) for number in range(600)]
        (folder / "model").mkdir()
        os.symlink(model, folder / "model" / "model")

    def run(self, *earlier: Path, threads: int = 1, settings: TokenizeSettings | None = None) -> Path:
        """Run the stage; its folder."""
        self.runs += 1
        folder = self.folder / str(self.runs)
        (folder / "format").mkdir(parents=True)
        (folder / "out").mkdir()
        for split, talks in (("train", self.talks[20:]), ("heldout", self.talks[:20])):
            columns = {
                "id": pa.array([f"rows:{number}" for number in range(len(talks))]),
                "source": pa.array([f"s{number % 2}" for number in range(len(talks))]),
                "conversation": pa.array([str({"messages": one}).replace("'", '"') for one in talks]),
                "digest": pa.array(range(len(talks)), pa.int64()),
            }
            pq.write_table(pa.table(columns), folder / "format" / f"{split}.parquet", row_group_size=170)
        inputs = TokenizeInputs(folder / "format", self.folder / "model")
        run(settings or TokenizeSettings(), inputs, folder / "out", context_beside(*earlier, threads=threads))
        return folder / "out"


@pytest.fixture
def tokenized(monkeypatch) -> list[int]:
    """How many conversations were tokenised, block by block, in this process."""
    monkeypatch.setattr(row_blocks, "SIZE", 8000)
    counts: list[int] = []
    call = block_tokenizer.Worker.__call__

    def counted(worker: block_tokenizer.Worker, piece: block_tokenizer.Piece) -> block_tokenizer.TokenizedBlock:
        counts.append(piece.stop - piece.start)
        return call(worker, piece)

    monkeypatch.setattr(block_tokenizer.Worker, "__call__", counted)
    return counts


def test_after_any_edit_the_bytes_are_those_from_nothing(tmp_path, tiny_model_dir, tokenized):
    edited, choice = Edited(tmp_path, tiny_model_dir), random.Random(3)
    earlier = edited.run()
    assert sum(tokenized) == 600 and len(tokenized) > 10
    for number in range(8):
        place = choice.randrange(len(edited.talks))
        edited.talks[place : place + choice.randrange(3)] = [talk(10_000 + number)] * choice.randrange(3)
        del tokenized[:]
        kept = edited.run(earlier)
        assert sum(tokenized) < 200, f"edit {number}: {tokenized} conversations were tokenised"
        assert digests(kept) == digests(edited.run()), f"edit {number}"
        earlier = kept


def test_what_decides_the_tokens_has_them_made_anew(tmp_path, tiny_model_dir, tokenized, monkeypatch):
    edited = Edited(tmp_path, tiny_model_dir)
    first = edited.run()

    def count(**settings: Any) -> int:
        del tokenized[:]
        edited.run(first, settings=TokenizeSettings(**settings))
        return sum(tokenized)

    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}")
    assert count() == count(max_rejected=0.5) == 0
    assert count(loss_on="last") == 600
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
    )
    assert count(chat_template=str(template)) == 600
    monkeypatch.setattr(row_blocks, "versions", lambda *names: {"tokenizers": "another"})
    assert count() == 600


def test_rows_may_pass_from_one_split_to_the_other_and_processes_be_several(
    tmp_path, tiny_model_dir, tokenized, monkeypatch
):
    monkeypatch.setattr("adder.tokenization.run.ENOUGH", 50)
    monkeypatch.setattr("adder.tokenization.run.SCANNED_ENOUGH", 50)
    edited = Edited(tmp_path, tiny_model_dir)
    first = edited.run(threads=2)
    edited.talks = edited.talks[300:] + edited.talks[:300]
    assert digests(edited.run(first, threads=2)) == digests(edited.run())
    del tokenized[:]
    edited.run(first)
    assert sum(tokenized) < 250


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", '{"model": {"type": "Spiral"}, "added_tokens": []}'),
        ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {"5": "x"}}'),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused_in_one_sentence(tmp_path, tiny_model_dir, file, content):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "model" / file).write_text(content)
    with pytest.raises(UserError, match=r"can't load the model's tokenizer from .*: \w+: ") as told:
        block_tokenizer.load_tokenizer(tmp_path / "model")
    assert "\n" not in str(told.value)
