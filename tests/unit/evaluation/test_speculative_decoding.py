"""The decoding loop against transformers' generate, one prompt at a time, in fp32: the same tokens, fewer passes."""

import pytest
import torch
import transformers

from adder.core.labels import IGNORE_INDEX
from adder.evaluation import heldout_loss, speculative_decoding
from decoding_cases import FAMILIES, SIZES, STOPS, by_transformers, draft_of, make, prompts, requests_with_drafts


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("draft", ["none", "mixed"])
def test_replies_of_every_family_are_those_of_generate(family, draft):
    model = make(family)
    assert speculative_decoding.supports(model)
    expected, requests = requests_with_drafts(model, prompts(), draft, 12)
    found = speculative_decoding.generate(model, requests, STOPS, 12, 4, lambda _: None)
    assert [reply.ids for reply in found] == expected
    assert [reply.ended for reply in found] == [reply[-1] in STOPS for reply in expected]
    assert len({len(reply) for reply in expected}) > 1 or family not in ("Llama", "Qwen2")  # not all cut at the limit


@pytest.mark.parametrize("draft", ["none", "right", "short", "long", "wrong"])
@pytest.mark.parametrize("slots", [1, 3, 50])
@pytest.mark.parametrize("shared", [0, 7])
def test_neither_slots_nor_drafts_nor_a_common_beginning_change_a_reply(monkeypatch, draft, slots, shared):
    monkeypatch.setattr(speculative_decoding, "PREFILL_TOKENS", 60)  # several passes over prompts
    model = make("Llama")
    expected, requests = requests_with_drafts(model, prompts(7, shared), draft, 9)
    assert speculative_decoding.common_prefix_length(requests) == shared
    found = speculative_decoding.generate(model, requests, STOPS, 9, slots, lambda _: None)
    assert [reply.ids for reply in found] == expected


def test_losses_come_with_the_replies():
    model = make("Qwen3")
    requests = []
    for number, prompt in enumerate(prompts(5, 6)):
        ids = [*prompt, 20 + number, 30, 3, 40]  # the last one is unlabelled, as a line's end behind the end of turn
        labels = [IGNORE_INDEX] * len(prompt) + ids[len(prompt) : -1] + [IGNORE_INDEX]
        labels[9] = ids[9]  # an earlier reply's token, inside the prompt
        requests.append(speculative_decoding.Request(ids, len(prompt), labels))
    found = speculative_decoding.generate(model, requests, STOPS, 2, 2, lambda _: None)
    for request, reply in zip(requests, found, strict=True):
        with torch.no_grad():
            expected = heldout_loss.own_head_losses(model, request.ids, request.labels)
        # fp32 sums in another order, padded or not: 1e-5 of losses of about 5
        assert torch.allclose(reply.losses, expected, atol=5e-5) and len(expected) in (3, 4)


def test_a_common_beginning_keeps_off_labels_and_last_prompt_tokens():
    ids = [7, 8, 9, 10, 11]
    assert (
        speculative_decoding.common_prefix_length(
            [speculative_decoding.Request(ids, 5), speculative_decoding.Request(ids, 5)]
        )
        == 4
    )
    assert (
        speculative_decoding.common_prefix_length(
            [speculative_decoding.Request(ids, 5), speculative_decoding.Request([7, 8, 12, 13], 4)]
        )
        == 2
    )
    assert (
        speculative_decoding.common_prefix_length(
            [speculative_decoding.Request(ids, 1), speculative_decoding.Request(ids, 5)]
        )
        == 0
    )
    labelled = speculative_decoding.Request(ids, 5, [*[IGNORE_INDEX] * 3, 10, IGNORE_INDEX])
    assert (
        speculative_decoding.common_prefix_length([speculative_decoding.Request(ids, 5), labelled]) == 2
    )  # place 2 predicts the label at 3
    assert (
        speculative_decoding.common_prefix_length(
            [speculative_decoding.Request(ids, 5, [IGNORE_INDEX, 8, 9, *[IGNORE_INDEX] * 2])]
        )
        == 0
    )


def test_prompts_read_in_one_pass_are_bounded_by_their_own_tokens_and_by_memory():
    assert speculative_decoding.prompts_at_once(64, 0) == 64 and speculative_decoding.prompts_at_once(64, 32) == 128
    assert speculative_decoding.prompts_at_once(3050, 3000) == 10  # 30,500 keys and values, not 4,096 // 50 times 3,050
    assert speculative_decoding.prompts_at_once(9000, 0) == 1


class Counted:
    """Passes over a model's backbone, as the shapes of their ids."""

    def __init__(self, model):
        self.shapes = []
        model.base_model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module, args, options):
        self.shapes.append(tuple(options["input_ids"].shape))


def test_a_reply_that_equals_its_draft_takes_no_further_pass():
    model = make("Llama")
    asked = prompts(6, 5)
    requests = [
        speculative_decoding.Request(prompt + by_transformers(model, prompt, 9), len(prompt)) for prompt in asked
    ]
    passes = Counted(model)
    speculative_decoding.generate(model, requests, STOPS, 9, 8, lambda _: None)
    assert len(passes.shapes) == 2 and passes.shapes[0] == (1, 5)  # the common beginning, then all of the rest


def test_nothing_is_computed_for_a_reply_that_has_ended():
    model = make("Llama")
    asked = prompts(8, 0)
    lengths = [len(by_transformers(model, prompt, 20)) for prompt in asked]
    assert len(set(lengths)) > 2
    passes = Counted(model)
    speculative_decoding.generate(
        model, [speculative_decoding.Request(prompt, len(prompt)) for prompt in asked], STOPS, 20, 3, lambda _: None
    )
    steps = [shape for shape in passes.shapes if shape[1] == 1]
    assert sum(rows for rows, _ in steps) == sum(lengths) - len(lengths)  # the prompt's pass gives each its first token
    assert max(rows for rows, _ in steps) == 3


def test_progress_sees_every_state():
    model = make("Llama")
    seen = []
    requests = [speculative_decoding.Request(prompt, len(prompt)) for prompt in prompts(3)]
    speculative_decoding.generate(
        model, requests, STOPS, 4, 2, lambda found: seen.append(sum(len(reply.ids) for reply in found))
    )
    assert seen[0] == 0 and seen == sorted(seen) and seen[-1] > 3


def test_what_needs_more_than_keys_and_values_by_position_is_left_to_transformers():
    assert speculative_decoding.supports(make("Llama"))
    assert speculative_decoding.supports(make("Mistral", sliding_window=None))
    assert not speculative_decoding.supports(make("Mistral", sliding_window=16))
    assert not speculative_decoding.supports(make("Cohere"))
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert not speculative_decoding.supports(make("Llama", rope_parameters=dynamic))
    more = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1}
    gemma = transformers.Gemma2Config(**{**SIZES, "head_dim": 8})
    assert not speculative_decoding.supports(transformers.AutoModelForCausalLM.from_config(gemma))
    for config in (
        transformers.MambaConfig(**more),
        transformers.BloomConfig(**more, n_head=2),
        transformers.GPT2Config(),
    ):
        config.n_layer = 1
        assert not speculative_decoding.supports(transformers.AutoModelForCausalLM.from_config(config))


@pytest.mark.gpu
@pytest.mark.parametrize("draft", ["none", "mixed"])
def test_replies_on_a_gpu_are_those_of_generate(draft):
    model = make("Llama")
    asked = prompts(40, 7)
    expected = [by_transformers(model, prompt, 30) for prompt in asked]  # on the CPU
    drafts = [draft_of(draft, reply, number) for number, reply in enumerate(expected)]
    requests = [
        speculative_decoding.Request(prompt + more, len(prompt)) for prompt, more in zip(asked, drafts, strict=True)
    ]
    found = speculative_decoding.generate(model.cuda(), requests, STOPS, 30, 16, lambda _: None)
    assert [reply.ids for reply in found] == expected
