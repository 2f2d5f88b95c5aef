"""What a row asks, and whether training saw it so."""

from adder.evaluation.heldout_rows import HeldoutRow


def test_a_prompt_is_as_trained_token_for_token():
    row = HeldoutRow("x:1", [5, 6, 7, 8], [5, 6, 7, 8], "", prompt_ids=[5, 6])
    assert row.is_as_trained()
    row.prompt_ids = [5, 7]
    assert not row.is_as_trained()


def test_a_prompt_is_cut_where_prompt_and_reply_pass_the_context():
    row = HeldoutRow("x:1", [5, 6, 7, 8], [5, 6, 7, 8], "", prompt_ids=[5, 6])
    assert row.is_cut(9, 10) and not row.is_cut(8, 10)
