"""How long a generated reply may get."""

from adder.evaluation.max_new_tokens import choose_max_new_tokens, from_training_replies


def test_max_new_tokens_holds_the_longest_reply_and_some_more():
    choice = from_training_replies({"max": 50}, 8192)
    assert choice.value == 64 and "50" in choice.reason
    assert from_training_replies({"max": 64}, 8192).value == 72
    assert from_training_replies({"max": 1}, 8192).value == 8
    assert from_training_replies({"max": 600}, 512).value == 512


def test_half_of_the_context_stays_for_the_prompt():
    assert choose_max_new_tokens("auto", {"count": 1, "max": 40}, 512).value == 48
    limited = choose_max_new_tokens(400, {"count": 1, "max": 40}, 512)
    assert limited.value == 256 and limited.reason.endswith("(as set)")
