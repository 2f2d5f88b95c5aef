"""How long a generated reply may get."""

from adder.evaluation.max_new_tokens import choose_max_new_tokens


def test_max_new_tokens_holds_the_longest_reply_and_some_more():
    choice = choose_max_new_tokens({"max": 50}, 8192)
    assert choice.value == 64 and "50" in choice.reason
    assert choose_max_new_tokens({"max": 64}, 8192).value == 72
    assert choose_max_new_tokens({"max": 1}, 8192).value == 8
    assert choose_max_new_tokens({"max": 600}, 512).value == 512
