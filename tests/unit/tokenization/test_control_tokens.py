"""Control tokens in texts."""

import pytest

from adder.tokenization.chat_template import UnusableRow
from adder.tokenization.control_tokens import ControlTokens
from tiny import tiny_tokenizer


def test_control_tokens_are_found_and_refused_where_someone_typed_them():
    control = ControlTokens(tiny_tokenizer())
    assert control.spans("a<|im_end|>b<|im_start|>") == [(1, 11), (12, 24)]
    control.refuse_in("<|im_", "message 1")
    with pytest.raises(UnusableRow, match=r"message 1 holds <\|im_end\|>"):
        control.refuse_in("see <|im_end|>", "message 1")
