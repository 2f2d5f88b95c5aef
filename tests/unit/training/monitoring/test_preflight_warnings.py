"""Warnings of the first look: one for each thing that looks wrong, from figures and plan as they are on disk."""

from adder.training.monitoring.preflight_warnings import time_in_words, warnings
from training_stage import FIGURES


def test_a_sound_set_up_has_none():
    assert warnings(FIGURES, {}) == []


def test_each_thing_that_looks_wrong_is_one_sentence():
    wrong = FIGURES | {"base_loss": 8.0, "labelled_share": 0.001, "layers_without_gradient": ["layers.0.q_proj"]}
    wrong |= {"untrained_tokens": ["<|im_start|>", "<|im_end|>"]}
    plan = {
        "frozen_products": {"value": "fp8", "reason": "as set, though it changes much", "alternatives": []},
        "nf4_weights": {"value": "14% of the matrices", "reason": "86% stay in float32", "alternatives": []},
        "lora_pairs": {"value": "9% of the matrices", "reason": "the experts get no pairs", "alternatives": []},
    }
    found = warnings(wrong, plan)
    assert len(found) == 7
    assert "worse than guessing" in found[0] and "1 of 14 trained layers" in found[1] and "carry loss" in found[3]
    assert "the embeddings of <|im_start|>, <|im_end|> are zero, equal or the mean of all" in found[2]
    assert found[4:] == [
        "train.frozen_products: fp8, as set, though it changes much",
        "train.method: qlora, but 86% stay in float32",
        "train.target_modules: the experts get no pairs",
    ]


def test_a_base_that_came_in_4_bit_is_no_warning():
    choice = {"value": "as they came", "reason": "the base came in 4 bit", "alternatives": []}
    assert warnings(FIGURES, {"nf4_weights": choice}) == []


def test_fp8_that_a_comparison_found_harmless_is_fine():
    choice = {"value": "fp8", "reason": "faster", "alternatives": [{"products": "fp8", "within": True}]}
    assert warnings(FIGURES, {"frozen_products": choice}) == []


def test_times_are_in_the_unit_that_suits_them():
    assert time_in_words(0.2, 1).startswith("roughly 1 seconds for 1 steps, ")
    assert time_in_words(200, 1_000).startswith("roughly 3.3 minutes for 1,000 steps, ")
    assert time_in_words(20 * 3600, 5).startswith("roughly 20 hours for 5 steps, ")
