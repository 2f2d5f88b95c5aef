"""What the data card tells of the conversations."""

from format_stage import (
    QUESTIONS,
    format_rows,
    qa,
    reply,
    system,
    user,
)


def test_samples_are_three_training_conversations(tmp_path):
    formatted = format_rows(tmp_path, [qa(q) for q in QUESTIONS[:20]], {"size": 2})
    trained = [row["messages"] for row in formatted.train]
    assert len(formatted.card["samples"]) == 3
    assert all(sample in trained for sample in formatted.card["samples"])


def test_the_card_tells_what_the_conversations_are_like(tmp_path):
    rows = [
        (
            "train",
            {"messages": [system("s"), user("What now?"), reply("This."), user("And"), reply("That.")], "topic": "a"},
        ),
        ("train", {"messages": [user("what else"), reply("{}")], "topic": "b", "ok": True}),
        ("train", {"messages": [user("Why"), reply("Because of it")], "topic": "a", "ok": False, "id": 1}),
        ("train", {"messages": [user("Who"), reply("We")], "topic": "b", "ok": False, "id": 2}),
        ("heldout", {"messages": [user("Where"), reply("Here")], "topic": "a", "ok": True, "score": 0.5}),
    ]
    card = format_rows(tmp_path, rows).card
    assert card["roles"] == {"system": 1, "user": 5, "assistant": 5}
    assert card["turns"] == {"1": 3, "2": 1}
    assert card["first_words"]["prompt"] == [["what", 2], ["who", 1], ["why", 1]]
    assert card["first_words"]["reply"][0] == ["because", 1]
    assert card["characters"]["prompt"]["max"] == len("s" + "What now?" + "And")
    assert card["characters"]["reply"]["count"] == 4
    assert card["columns"] == {"topic": [["a", 3], ["b", 2]], "ok": [[False, 2], [True, 2]]}


def test_columns_that_utf8_cannot_hold_are_not_shown(tmp_path):
    odd = [{"topic": "a\ud800"}, {"topic": "b"}, {"x\ud800": "a"}, {"x\ud800": "b"}, {"n": 10**400}, {"n": 1}] * 2
    rows = [qa(f"q {n}", **more) for n, more in enumerate(odd)]
    assert format_rows(tmp_path, rows, {"size": 1, "group_by": "n"}).card["columns"] == {}


def test_plain_texts_have_no_prompt_and_no_turns(tmp_path):
    card = format_rows(tmp_path, [{"text": f"text {n}"} for n in range(5)], {"size": 1}).card
    assert card["turns"] == card["roles"] == {} and card["characters"]["prompt"] == {"count": 0}
    assert card["characters"]["reply"]["count"] == 4 and card["first_words"]["prompt"] == []
