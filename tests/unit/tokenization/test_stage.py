"""The declaration of the stage "tokenize"."""

import dataclasses

import pytest

from adder.core.errors import UserError
from adder.core.file_digests import FileDigests
from adder.tokenization.run import TokenizeInputs
from adder.tokenization.stage import TOKENIZE, TokenizeSettings


def test_what_the_stage_reads_is_what_it_is_given():
    assert {field.name for field in dataclasses.fields(TokenizeInputs)} == set(TOKENIZE.reads)


def test_a_template_of_the_users_counts_by_its_content(tmp_path):
    def identity(template):
        digests = FileDigests(tmp_path / "memory.json", tmp_path)
        assert TOKENIZE.identity is not None
        return TOKENIZE.identity(TokenizeSettings(chat_template=template), "tokenize", digests)

    (tmp_path / "a.jinja").write_text("one")
    (tmp_path / "b.jinja").write_text("one")
    (tmp_path / "c.jinja").write_text("two")
    assert identity("a.jinja") == identity("b.jinja") != identity("c.jinja")
    assert identity("chatml") == {
        "chat_template": "chatml",
        "loss_on": "assistant",
        "max_rejected": 0.1,
        "template_variables": {},
    }
    assert identity(None) == {
        "chat_template": None,
        "loss_on": "assistant",
        "max_rejected": 0.1,
        "template_variables": {},
    }
    with pytest.raises(UserError, match="tokenize.chat_template: there is no file 'd.jinja'"):
        identity("d.jinja")
