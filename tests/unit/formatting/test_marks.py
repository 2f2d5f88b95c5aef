"""Marks that say "don't learn this"."""

import pytest

from adder.formatting.marks import JUDGEMENTS, LEARNT, UNLEARNT, is_learnt, is_mark, is_undesired, learns
from adder.formatting.rejected import Rejected, Undesired
from format_stage import format_rows, qa, read, reply, user


@pytest.mark.parametrize("key", LEARNT)
@pytest.mark.parametrize("no", [False, 0, 0.0])
def test_a_reply_marked_not_to_be_learnt(key, no):
    assert not is_learnt({key: no}, "m")
    assert is_learnt({key: True}, "m") and is_learnt({key: 1.0}, "m") and is_learnt({key: None}, "m")


@pytest.mark.parametrize("key", UNLEARNT)
def test_a_reply_that_is_masked(key):
    assert not is_learnt({key: True}, "m") and is_learnt({key: False}, "m")


@pytest.mark.parametrize("mark", [0.5, "no", [0, 1], {}])
def test_a_mark_that_is_neither_is_refused(mark):
    with pytest.raises(Rejected, match="other than 0 and 1"):
        is_learnt({"loss": mark}, "m")


@pytest.mark.parametrize("no", [False, "false", "False"])
@pytest.mark.parametrize("key", JUDGEMENTS)
def test_a_row_judged_undesired(key, no):
    assert is_undesired({key: no}) == key
    assert is_undesired({key: True}) is None and is_undesired({key: "spam"}) is None


@pytest.mark.parametrize(
    ("row", "mark"),
    [({"kto_tag": 0}, "kto_tag"), ({"label": 0}, None), ({"weight": 0.0}, "weight"), ({"loss": 0.0}, None),
     ({"loss": False}, "loss"), ({"mask": True}, "mask"), ({"train": False}, "train"), ({"trainable": True}, None)],
)  # fmt: skip
def test_marks_of_rows_are_numbers_only_where_that_leaves_no_doubt(row, mark):
    assert is_undesired(row) == mark


@pytest.mark.parametrize(
    "row",
    [
        lambda n: {"messages": [user(f"q {n}"), reply(f"a {n}")]},
        lambda n: {"prompt": f"q {n}", "completion": f"a {n}"},
        lambda n: {"prompt": f"q {n}", "response": f"a {n}"},
        lambda n: {"conversations": [{"from": "human", "value": f"q {n}"}, {"from": "gpt", "value": f"a {n}"}]},
    ],
)
@pytest.mark.parametrize("mark", ["label", "kto_tag"])
def test_undesired_replies_are_counted_and_in_neither_split(tmp_path, row, mark):
    rows = [{**row(n), mark: n % 2 == 0} for n in range(20)]
    formatted = format_rows(tmp_path, rows, {"size": 2}, max_rejected=0.1)
    assert (formatted.card["undesired"], formatted.card["rejected"]) == (10, 0)
    replies = {one["messages"][-1]["content"] for one in formatted.train + formatted.heldout}
    assert replies == {f"a {n}" for n in range(0, 20, 2)}
    assert formatted.card["by_source"]["rows"]["undesired"] == 10


@pytest.mark.parametrize("label", [0, 1, 1.0, -1, "good", "bad"])
def test_a_label_that_may_be_a_judgement_is_asked_about(label):
    row = qa("q", "a", label=label)
    with pytest.raises(
        Rejected, match="the column label may say which replies are not to be learnt, or something else"
    ):
        read(row)
    assert read(row, "question_answer")["messages"][-1] == reply("a")
    if label in (1, "good"):
        assert read(row, columns={"kto_tag": "label"})["messages"][-1] == reply("a")
    else:
        with pytest.raises(Undesired):
            read(row, columns={"kto_tag": "label"})


@pytest.mark.parametrize(
    ("name", "value", "mark"),
    [
        ("is_good", True, "kto_tag"), ("accepted", False, "kto_tag"), ("thumbs_up", True, "kto_tag"),
        ("Is Correct", True, "kto_tag"), ("feedback", "thumbs_down", "kto_tag"), ("verdict", "reject", "kto_tag"),
        ("is_trainable", False, "kto_tag"), ("skip_loss", True, "mask"), ("is_masked", False, "mask"),
    ],
)  # fmt: skip
def test_columns_whose_names_may_judge_a_reply_are_asked_about(name, value, mark):
    row = qa("q", "a", **{name: value})
    with pytest.raises(Rejected, match=f"the column {name} may say.*columns: {{{mark}: {name}}}"):
        read(row)
    undesired = value in (False, "thumbs_down", "reject") if mark == "kto_tag" else value
    if undesired:
        with pytest.raises(Undesired):
            read(row, columns={mark: name})
    else:
        assert read(row, columns={mark: name})["messages"][-1] == reply("a")
    assert read(row, "question_answer")["messages"][-1] == reply("a")


@pytest.mark.parametrize(
    ("name", "value"), [("rating", 5), ("score", 1), ("is_english", False), ("label", "spam"), ("feedback", "too long")]
)
def test_other_columns_are_no_judgement(name, value):
    assert read(qa("q", "a", **{name: value}))["messages"][-1] == reply("a")


@pytest.mark.parametrize(
    ("key", "no"),
    [
        ("learnable", False), ("train_on", 0), ("is_trainable", False), ("weights", 0.0), ("include_in_loss", False),
        ("supervised", False), ("loss_masked", True), ("is_masked", 1), ("mask_loss", True), ("skip", True),
        ("do_not_train", True), ("exclude_from_loss", True), ("train", "false"), ("weight", "0"),
    ],
)  # fmt: skip
def test_marks_under_names_of_the_same_kind(key, no):
    yes = {"false": "true", "0": "1"}[no] if isinstance(no, str) else not no
    assert not is_learnt({key: no}, "m") and is_learnt({key: yes}, "m") and is_mark(key, no)


def test_names_of_other_things_are_no_marks():
    assert is_learnt({"role": "x", "content": "y", "edited": False, "training_data": "z", "weights": [1]}, "m")
    assert learns("unmasked") is None and learns("train_detail") is None
    assert not is_mark("edited", False) and not is_mark("weights", [1])


@pytest.mark.parametrize("mark", ["loss_mask", "weight", "train"])
def test_a_mark_of_a_row_that_is_a_list_is_refused_with_what_to_write_instead(mark):
    with pytest.raises(Rejected, match=f"the column {mark}; say it on each message"):
        read({"messages": [user("q"), reply("a")], mark: [0, 1]})
    read({"messages": [user("q"), reply("a")], mark: []})


def test_a_label_beside_a_text_judges_no_reply():
    assert read({"text": "t", "label": False}, "text") == {"text": "t"}
    with pytest.raises(Undesired):
        read({"text": "t", "train": False}, "text")


def test_a_label_that_is_a_class_is_no_judgement_and_named(tmp_path):
    formatted = format_rows(tmp_path, [qa(f"q {n}", label="spam") for n in range(4)], {"size": 1})
    assert formatted.card["undesired"] == 0
    assert formatted.card["notes"] == [
        "rows: the column 'label' is neither true nor false, so nothing reads it (4 rows)"
    ]


@pytest.mark.parametrize(
    ("column", "line"),
    [("is_safe", "kto_tag"), ("good", "kto_tag"), ("is_toxic", "mask"), ("rejected_by_qa", "mask"), ("is_bad", "mask")],
)
def test_the_line_for_a_judgement_leaves_out_what_it_disapproves_of(column, line):
    row = {"question": "q", "answer": "a", column: True}
    with pytest.raises(Rejected, match=f"columns: {{{line}: {column}}}"):
        read(row)
    bad = {**row, column: line == "mask"}
    with pytest.raises(Undesired):
        read(bad, columns={line: column})
    assert read({**row, column: line != "mask"}, columns={line: column})["messages"][1]["content"] == "a"
