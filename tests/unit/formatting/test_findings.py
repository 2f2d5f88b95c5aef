"""Which rows are dropped or reported, what each matches, and what the card shows of it."""

import unicodedata

import pytest

from format_stage import (
    format_rows,
    qa,
    reply,
    system,
    user,
)


def test_duplicates_whatever_their_case_and_spacing_are_dropped_and_the_first_stays(tmp_path):
    rows = [qa("a b"), qa("b"), qa("a b"), qa(" A\n b"), qa("a b", "no"), qa("ab"), qa("A B")]
    formatted = format_rows(tmp_path, rows, {"size": 1})
    dropped = [(row["row"], row["matches"]) for row in formatted.duplicates]
    assert dropped == [(3, "rows:1"), (4, "rows:1"), (7, "rows:1")]
    example = formatted.card["quality"]["duplicates"]["examples"][0]
    assert example == {"id": "rows:3", "matches": "rows:1", "text": "user: a b\nassistant: yes"}


def test_duplicates_stay_when_asked(tmp_path):
    rows = [("train", qa("a")), ("train", qa("a")), ("heldout", qa("b"))]
    formatted = format_rows(tmp_path, rows, drop_duplicates=False)
    assert formatted.card["train"] == 2 and not formatted.duplicates


def test_training_copies_of_heldout_prompts_are_dropped(tmp_path):
    rows = [
        ("train", qa("What is  LoRA?", "x")),  # other case, spacing and answer
        ("train", {"messages": [system("s"), user("what is lora?"), reply("y")]}),  # a system message does not hide it
        ("train", qa("What is QLoRA?")),
        ("train", qa("What is QLoRA?")),
        ("heldout", qa("what is lora?", "z")),
        ("heldout", qa("what is lora?", "z")),
        ("heldout", qa("WHAT is lora?", "w")),
    ]
    numbered = [
        {"source": "chat" if "messages" in row else split, "row": n, "split": split, "data": row}
        for n, (split, row) in enumerate(rows, 1)
    ]
    formatted = format_rows(tmp_path, numbered)
    assert [(row["row"], row["matches"]) for row in formatted.leaked] == [(1, "heldout:5"), (2, "heldout:5")]
    assert [row["row"] for row in formatted.duplicates] == [4, 6]
    assert [row["id"] for row in formatted.train] == ["train:3"]
    assert [row["id"] for row in formatted.heldout] == ["heldout:5", "heldout:7"]
    assert formatted.card["heldout_in_train"] == 3  # as the data came, the repeated one included
    assert {(row["how"], row["share"]) for row in formatted.leaked} == {("same prompt", 1.0)}


def test_rows_of_a_test_set_only_protect(tmp_path):
    rows = [
        ("test", qa("What is LoRA?")),
        ("test", qa("What is LoRA?", 3)),  # neither a reply that is no text nor a repeated row matters
        ("test", qa("What is LoRA?")),
        ("train", qa("what is lora?")),
        ("train", qa("what is loss?")),
        ("heldout", qa("what is a rank?")),
    ]
    formatted = format_rows(tmp_path, rows)
    assert [(row["row"], row["matches"]) for row in formatted.leaked] == [(4, "rows:1")]
    assert formatted.card["tests"] == 3
    assert formatted.ids("train") == ["rows:5"] and formatted.ids("heldout") == ["rows:6"]


def test_rows_that_ask_nothing_do_not_leak(tmp_path):
    rows = [
        ("train", {"messages": [reply("one")]}),
        ("train", {"text": "two"}),
        ("heldout", {"messages": [reply("three")]}),
    ]
    records = [{"source": f"s{n}", "row": n, "split": split, "data": row} for n, (split, row) in enumerate(rows)]
    formatted = format_rows(tmp_path, records)
    assert formatted.card["train"] == 2
    assert formatted.card["samples"][0] in ([reply("one")], [{"role": "text", "content": "two"}])


LONG = "the quick brown fox jumps over the lazy dog and then sleeps under the old apple tree until {} o'clock in may"
LONGER = "Please read: " + LONG


@pytest.mark.parametrize("action", ["drop", "report", "off"])
def test_training_prompts_that_overlap_with_held_out_or_test_ones(tmp_path, action):
    rows = [
        ("train", qa(LONGER.format("three"), "1")),
        ("train", qa("something else that has nothing to do with any animal at all, nor with trees", "2")),
        ("heldout", qa(LONG.format("five"), "3")),
        ("test", qa("a prompt of a test set that nobody else has ever thought of at all", "4")),
        (
            "train",
            {"messages": [user("well, a prompt of a test set that nobody else has ever thought of"), reply("5")]},
        ),
    ]
    numbered = [
        {"source": "chat" if "messages" in row else "rows", "row": n, "split": split, "data": row}
        for n, (split, row) in enumerate(rows, 1)
    ]
    formatted = format_rows(tmp_path, numbered, overlap=action)
    found = [] if action == "off" else [(1, "rows:3", "8-word overlap"), (5, "rows:4", "8-word overlap")]
    assert [(row["row"], row["matches"], row["how"]) for row in formatted.leaked] == found
    assert all(0.5 < row["share"] < 1 for row in formatted.leaked)
    assert formatted.ids("train") == (["rows:2"] if action == "drop" else ["rows:1", "rows:2", "chat:5"])
    overlap = formatted.card["quality"]["overlap"]
    assert (overlap["found"], overlap["dropped"]) == (len(found), len(found) if action == "drop" else 0)
    if found:
        assert overlap["examples"][0]["train"]["id"] == "rows:1"
        assert overlap["examples"][0]["heldout"]["text"].startswith("user: the quick brown fox")


@pytest.mark.parametrize("action", ["drop", "report", "off"])
def test_near_duplicates_within_training(tmp_path, action):
    story = " ".join(f"word{n}" for n in range(80))
    rows = [
        ("heldout", qa("a held-out question about something else", "c")),
        ("train", qa(story + " one", "a")),
        ("train", qa("quite another question about another matter", "b")),
        ("heldout", qa(story + " two", "c")),  # never dropped, and no reason to drop another
        ("train", qa(story + " three", "d")),
        ("train", qa("a third question, which is like no other of them", "d")),
        ("train", qa(story + " four", "e")),
    ]
    formatted = format_rows(tmp_path, rows, near_duplicates=action)
    found = [] if action == "off" else [(5, "rows:2"), (7, "rows:2")]
    assert [(row["row"], row["matches"]) for row in formatted.near_duplicates] == found
    assert all(0.8 <= row["similarity"] <= 1 for row in formatted.near_duplicates)
    assert formatted.card["near_duplicates"] == (2 if action == "drop" else 0)
    assert formatted.ids("train") == [f"rows:{n}" for n in ([2, 3, 6] if action == "drop" else [2, 3, 5, 6, 7])]
    told = formatted.card["quality"]["near_duplicates"]
    assert (told["found"], told["dropped"]) == (len(found), formatted.card["near_duplicates"])
    if found:
        example = told["examples"][0]
        assert (example["a"]["id"], example["b"]["id"]) == ("rows:5", "rows:2")
        assert example["a"]["text"].startswith("user: word0 word1")


def test_multi_turn_prompts_leak_only_when_the_whole_prompt_is_the_same(tmp_path):
    talk = [user("hi"), reply("hello"), user("more?"), reply("no")]
    other = [user("hi"), reply("good day"), user("more?"), reply("no")]
    rows = [
        ("train", {"messages": talk}),
        ("train", {"messages": other}),
        ("heldout", {"messages": [*talk[:3], reply("yes")]}),
    ]
    formatted = format_rows(tmp_path, rows)
    assert [row["row"] for row in formatted.leaked] == [1]
    assert formatted.train[0]["messages"] == other


THINGS = "lamp kettle tent shoes radio ladder mirror carpet bicycle piano".split()
PLACES = "Oslo Rome Paris Bergen Lima Cairo Quito Dakar Hanoi Perth".split()


def order(number: int, **other: str) -> dict:
    """A short question of which few words are its own, with a reply that no other row has."""
    verb = other.get("verb", "left")
    place, thing = PLACES[number // 10 % 10], THINGS[number % 10]
    return qa(f"My {thing} {verb} {place} {number} days ago", f"Ticket {number * 7919 % 10007} is open.")


@pytest.mark.parametrize("signed", ["report", "off"])
def test_heldout_rows_with_one_word_changed_do_not_stay_in_training(tmp_path, signed):
    """Twenty held-out rows stand in training once more, one word of the prompt another, the reply the same."""
    rows = [("heldout", order(n)) for n in range(20)]
    rows += [("train", order(n, verb="reached")) for n in range(20)]
    rows += [("train", order(n)) for n in range(100, 500)]
    formatted = format_rows(tmp_path, rows, near_duplicates=signed, overlap="drop")
    dropped = {row["row"] for row in formatted.leaked}
    assert dropped == set(range(21, 41)) and {row["how"] for row in formatted.leaked} == {"nearly the same row"}
    overlap = formatted.card["quality"]["overlap"]
    assert overlap["found"] == overlap["dropped"] == 20
    assert any("3-word" in one for one in overlap["looked_for"]) == (signed == "report")


@pytest.mark.parametrize(
    "change",
    [
        lambda words: words[: len(words) // 2 + 1],
        lambda words: words[len(words) // 2 :],
        lambda words: [*words, "Please", "answer", "me", "as", "soon", "as", "you", "can"],
        lambda words: words[::-1],
    ],
)
def test_heldout_rows_whose_prompt_was_cut_extended_or_turned_round_do_not_stay_in_training(tmp_path, change):
    rows = [("heldout", order(n)) for n in range(20)]
    rows += [("train", row | {"question": " ".join(change(row["question"].split()))}) for _, row in rows]
    rows += [("train", order(n)) for n in range(100, 500)]
    formatted = format_rows(tmp_path, rows, overlap="drop")
    assert {row["row"] for row in formatted.leaked} == set(range(21, 41)) and formatted.card["train"] == 400


def test_heldout_rows_written_in_another_way_do_not_stay_in_training(tmp_path):
    """In full width, with its marks apart, with soft hyphens: the same text for whoever reads it."""

    def wide(text):
        return "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in text)

    ways = [wide, lambda text: unicodedata.normalize("NFD", text), lambda text: text.replace("ö", "ö\u00ad")]
    texts = [f"Wie viele {thing} hört man in {place}?" for thing, place in zip(THINGS, PLACES, strict=True)]
    rows = [("heldout", qa(text, f"{n} davon")) for n, text in enumerate(texts)]
    rows += [("train", qa(way(text), f"Gut {n} {k}")) for n, text in enumerate(texts[:9]) for k, way in enumerate(ways)]
    rows += [("train", order(n)) for n in range(100)]
    formatted = format_rows(tmp_path, rows, overlap="drop", near_duplicates="off")
    assert {row["row"] for row in formatted.leaked} == set(range(11, 38))


def test_rows_that_differ_in_what_they_ask_stay(tmp_path):
    """One reply to many questions, and questions of one form with replies of their own."""
    rows = [("heldout", qa(f"Is {n} a prime number?", "yes" if n % 2 else "no")) for n in range(30)]
    rows += [("train", qa(f"Is {n} a prime number?", "yes" if n % 2 else "no")) for n in range(30, 400)]
    rows += [("heldout", order(n)) for n in range(30)] + [("train", order(n)) for n in range(30, 400)]
    formatted = format_rows(tmp_path, rows, overlap="drop", near_duplicates="report")
    assert formatted.leaked == [] and formatted.card["train"] == 740


def test_a_reply_that_stands_in_its_own_prompt_everywhere_is_named(tmp_path):
    rows = [("heldout", qa("Where?", "There."))]
    rows += [("train", qa(f"Ticket {n}, label: {THINGS[n % 10]}. Which label?", THINGS[n % 10])) for n in range(40)]
    formatted = format_rows(tmp_path / "all", rows)
    assert "in 40 of 40 training rows the reply stands in its own prompt" in " ".join(formatted.card["notes"])
    rows += [("train", qa(f"Where is {n}?", f"Behind the {THINGS[n % 10]}.")) for n in range(40)]
    assert "its own prompt" not in " ".join(format_rows(tmp_path / "half", rows).card["notes"])
