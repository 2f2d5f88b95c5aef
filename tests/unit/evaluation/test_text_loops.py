"""Repetitions that don't end: found late enough to be sure, early enough to save the rest."""

import torch

from adder.evaluation import speculative_decoding
from adder.evaluation.text_loops import EVERY, LONGEST_PERIOD, LOOP_TOKENS, continue_loop, has_loop, loop_period
from decoding_cases import make, prompts


def repeated(period, length, lead=0):
    return [*range(1000, 1000 + lead), *(number % period for number in range(length))]


def test_a_loop_of_any_short_period_is_found_once_it_has_lasted():
    for period in (1, 3, 7, LONGEST_PERIOD):
        ids = repeated(period, 2 * LOOP_TOKENS, lead=5)
        found = [end for end in range(len(ids) + 1) if loop_period(ids[:end], 1) == period]
        assert found and found[0] < LOOP_TOKENS + 5 + EVERY
        assert continue_loop(ids[: found[0]], period, len(ids)) == ids


def test_long_periods_short_repetitions_and_numbered_lists_are_no_loops():
    assert not has_loop(repeated(LONGEST_PERIOD + 1, 3 * LOOP_TOKENS))
    assert not has_loop([*repeated(2, LOOP_TOKENS - EVERY), *range(2000, 2000 + LOOP_TOKENS)])
    assert not has_loop([token for number in range(200) for token in (5, 6, 100 + number, 7)])
    assert has_loop(repeated(2, 2 * LOOP_TOKENS, lead=9))


def looping_model():
    """One whose next token depends on the last one alone, so that it must come to write the same again and again."""
    model = make("Llama", num_hidden_layers=1)
    layer = model.base_model.layers[0]
    layer.self_attn.o_proj.weight.data.zero_()
    layer.mlp.down_proj.weight.data.zero_()
    return model


def greedy(model, token, count):
    """What it writes after a token."""
    ids = []
    for _ in range(count):
        token = int(model(torch.tensor([[token]])).logits[0, -1].argmax())
        ids.append(token)
    return ids


def test_a_loop_is_cut_short_in_time_and_not_in_text():
    model = looping_model()
    limit = 3 * LOOP_TOKENS
    asked = prompts(4)
    requests = [speculative_decoding.Request(prompt, len(prompt)) for prompt in asked]
    found = speculative_decoding.generate(model, requests, [], limit, 4, lambda _: None)
    assert [reply.ids for reply in found] == [greedy(model, prompt[-1], limit) for prompt in asked]
    for reply in found:
        assert reply.looped is not None and LOOP_TOKENS <= reply.computed == reply.looped < 2 * LOOP_TOKENS
        assert not reply.ended


def test_a_reply_whose_reference_repeats_itself_is_written_to_its_end():
    model = looping_model()
    prompt = prompts(1)[0]
    request = speculative_decoding.Request([*prompt, 90, *repeated(2, 2 * LOOP_TOKENS)], len(prompt))
    (reply,) = speculative_decoding.generate(model, [request], [], 2 * LOOP_TOKENS, 1, lambda _: None)
    assert reply.looped is None and len(reply.ids) == 2 * LOOP_TOKENS
