"""Replies that are none are counted, and others aren't."""

import pytest

from adder.evaluation.degenerate_replies import circles, echoes, faults_of, find_faults, in_words, turns


@pytest.mark.parametrize(
    "text",
    [
        "........",
        "ha ha ha ha ha ha",
        "I see. " + "The cat sat. " * 6,
        "word " * 9 + "wo",
        "so it goes and goes on " * 30,
    ],
)
def test_what_runs_in_circles(text):
    assert circles(text.strip())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "...",
        "no no",
        "0000",
        "1, 2, 3, 4, 5, 6, 7, 8",
        '{"name": "A", "value": 1, "unit": null, "count": null}',
        "Add the flour, then add the milk, then add the eggs, and stir until it is smooth.",
        "Dear customer, thank you very much for your letter. "
        + " ".join(f"item {n} costs {n} euros;" for n in range(30)),
    ],
)
def test_what_does_not(text):
    assert not circles(text)


def test_each_fault_is_counted_and_named():
    references = [f"reference {n}" for n in range(20)]
    dots = find_faults(["........"] * 20, references, [False] * 20)
    assert dots[:7] == (20, 20, 0, 20, 20, 0, 20) and dots.share == 1
    assert len(in_words(dots)) == 3 and "20 of 20 replies were cut off" in in_words(dots)[0]
    empty = find_faults([""] * 3 + references[3:], references, [True] * 20)
    assert (empty.empty, empty.alike, empty.faulty) == (3, 0, 3) and in_words(empty, 0.2) == []
    good = find_faults(references, references, [True] * 20)
    assert good.faulty == 0 and in_words(good) == []


def test_one_reply_to_everything_is_a_fault_unless_the_references_are_so():
    yes = find_faults(["yes"] * 20, ["yes"] * 12 + ["no"] * 8, [True] * 20)
    assert yes.alike == 20
    assert find_faults(["yes"] * 20, ["yes"] * 19 + ["no"], [True] * 20).alike == 0
    assert find_faults(["yes"] * 3, ["no"] * 3, [True] * 3).alike == 0  # too few to say


def test_what_references_are_like_is_no_fault():
    rule = "-" * 40
    found = find_faults([rule, ""], [rule, ""], [True, True])
    assert found.faulty == 0


def test_long_replies_are_counted_quickly():
    assert circles("ab" * 100_000) and not circles("".join(chr(97 + n * n % 25) for n in range(1000)) + "xyz" * 3)


VARIED = [
    f"{word} {other}" for word in ("red", "green", "blue", "grey") for other in ("sea", "sky", "hill", "road", "moss")
]


@pytest.mark.parametrize(
    ("replies", "said"),
    [
        (["I can't say."] * 20, "one and the same text"),
        (["I can't say.", "Who knows?"] * 10, "one of 2 texts"),
        ([f"Ticket {n} is open!" for n in range(20)], "one and the same text but for numbers and marks"),
        ([f"{'Yes' if n % 2 else 'No'}, number {n}." for n in range(20)], "one of 2 texts but for numbers and marks"),
    ],
)
def test_replies_of_hardly_any_texts_are_alike_where_their_references_are_not(replies, said):
    found = find_faults(replies, VARIED, [True] * 20)
    assert found.alike == 20 and found.alike_as == said and in_words(found) == [f"20 of 20 replies are {said}"]
    assert find_faults(replies, replies, [True] * 20).alike == 0


def test_replies_that_are_nearly_one_text_are_alike_where_their_references_are_not():
    sorry = [f"I am sorry, but I can't say anything about the {word}." for word in VARIED]
    found = find_faults(sorry, VARIED, [True] * 20)
    assert found.alike == 20 and found.alike_as == "nearly one and the same text"
    assert find_faults(sorry, sorry[::-1], [True] * 20).alike == 0  # what references are like
    tickets = [f'{{"intent": "{word}", "order": {n}, "place": "{n * 7} {word}"}}' for n, word in enumerate(VARIED)]
    assert find_faults(tickets, tickets[::-1], [True] * 20).alike == 0
    assert find_faults(VARIED, tickets, [True] * 20).alike == 0
    asked = [f"You are asking about the {word}." for word in VARIED]  # of one form too, though shorter
    assert find_faults(sorry, asked, [True] * 20).alike == 0


def test_few_right_labels_and_numbers_are_not_alike():
    labels = ["red", "green", "blue"] * 10
    assert find_faults(labels, labels[1:] + labels[:1], [True] * 30).alike == 0
    numbers = [str(n) for n in range(30)]
    assert find_faults(numbers, numbers[::-1], [True] * 30).alike == 0
    assert find_faults(["42"] * 30, numbers, [True] * 30).alike_as == "one and the same text"


def test_what_nobody_can_see_is_empty():
    found = find_faults(["\u200b\u2060", "\ufffd\ufffd", "\x07", "?", "."], ["a"] * 4 + ["\u200b"], [True] * 5)
    assert found.empty == 3


def test_a_long_stretch_need_not_come_again_so_often():
    assert circles(f"{VARIED}" * 3) and not circles("no, no, no" * 2)


ASKED = "Where is the parcel that I ordered on Monday? It should have been here by now."


@pytest.mark.parametrize(
    "reply",
    [
        ASKED,
        ASKED.upper().replace("?", ""),
        f"You asked: {ASKED}",
        f"{ASKED} It left Oslo this morning.",
        f"{ASKED}\n{ASKED}\n{ASKED}",
        ASKED.replace("Monday", "Tuesday"),
        "Where is the parcel that I ordered on",  # cut off
        "that I ordered on Monday? It should have been here by now.",
        f"Answer in one sentence, please. {ASKED}",
    ],
)
def test_a_reply_that_says_its_prompt_again_is_an_echo(reply):
    assert echoes(reply, ["Answer in one sentence, please.", ASKED])


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "...",
        "The parcel that you ordered on Monday left Oslo this morning.",
        '{"intent": "track", "date": "Monday"}',
        "on Monday",
        "Please",
    ],
)
def test_a_reply_that_speaks_of_its_prompt_is_none(reply):
    assert not echoes(reply, ["Answer in one sentence, please.", ASKED])


def test_short_and_unspaced_prompts_are_echoed_too():
    assert echoes("7 + 5", ["7 + 5"]) and echoes("Hello!", ["Be kind.", "hello"]) and not echoes("12", ["7 + 5"])
    assert echoes("我的包裹在哪里", ["我的包裹在哪里?"]) and not echoes("昨天已经寄出了", ["我的包裹在哪里?"])


def test_what_a_reference_repeats_of_its_prompt_a_reply_may():
    prompts = [[f"Correct this: he go to the {word} every day"] for word in VARIED]
    right = [f"He goes to the {word} every day" for word in VARIED]
    said = [prompt.partition(": ")[2] for (prompt,) in prompts]
    assert find_faults(said, right, [True] * 20, prompts).echoing == 0
    found = find_faults(said, ["Good."] * 20, [True] * 20, prompts)
    assert found.echoing == found.faulty == 20 and in_words(found) == ["20 of 20 replies repeat what their prompt says"]


def test_what_a_tool_has_said_may_be_quoted():
    said = "It is twelve degrees and sunny in Oslo today."
    for role, count in (("tool", 0), ("user", 1)):
        prompt = [{"role": "user", "content": "And the weather?"}, {"role": role, "content": said}]
        sample = {"reply": said, "reference": "Twelve degrees, sunny.", "prompt": prompt}
        assert faults_of([sample]).echoing == count  # type: ignore[list-item]
    assert faults_of([{"reply": None}]).replies == 0  # type: ignore[list-item]


@pytest.mark.parametrize(
    "rendered",
    [
        f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n",
        f"<s>[INST] {ASKED} [/INST]",
        f"<｜User｜>{ASKED}<｜Assistant｜>",
    ],
)
def test_the_turns_of_a_rendered_prompt_are_told_apart(rendered):
    assert echoes(ASKED, turns(rendered)) and not echoes("It left Oslo this morning.", turns(rendered))
