"""Which rows are held out: the same ones when others are added, groups together, each value by its share."""

import json
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adder.core.errors import UserError
from adder.formatting.heldout_split import asked, choose_heldout, copies_of
from examples import examples
from format_stage import (
    QUESTIONS,
    format_rows,
    format_settings,
    qa,
)


def test_share_split_of_old_rows_is_untouched_by_new_ones(tmp_path):
    old = format_rows(tmp_path / "old", [qa(q) for q in QUESTIONS[:200]], {"share": 0.2})
    new = format_rows(tmp_path / "new", [qa(q) for q in reversed(QUESTIONS)], {"share": 0.2})
    assert old.prompts("heldout") == new.prompts("heldout") & set(QUESTIONS[:200])
    assert 20 <= len(old.heldout) <= 60
    assert 50 <= len(new.heldout) <= 110


def test_a_larger_share_only_adds_to_the_held_out_rows(tmp_path):
    small = format_rows(tmp_path / "small", [qa(q) for q in QUESTIONS], {"share": 0.1})
    large = format_rows(tmp_path / "large", [qa(q) for q in QUESTIONS], {"share": 0.3})
    assert small.prompts("heldout") < large.prompts("heldout")


@examples(40)
@given(
    st.lists(st.integers(0, 60).map(str), min_size=4, max_size=30),
    st.integers(0, 60).map(str),
    st.integers(1, 3),
    st.integers(0, 30),
)
def test_one_new_row_displaces_at_most_one_of_a_fixed_size(tmp_path_factory, questions, new, size, place):
    tmp_path = tmp_path_factory.mktemp("size")
    old_rows = [qa(q, f"answer {n % 2}") for n, q in enumerate(questions)]
    if len({json.dumps(row) for row in old_rows}) <= size or len(set(questions)) <= size:
        return
    new_rows = [*old_rows[:place], qa(new, "a new answer"), *old_rows[place:]]
    before = format_rows(tmp_path / "before", old_rows, {"size": size})
    after = format_rows(tmp_path / "after", new_rows, {"size": size})
    texts_before, texts_after = ({json.dumps(row["messages"]) for row in f.heldout} for f in (before, after))
    assert len(texts_before) == len(texts_after) == size
    assert len(texts_before - texts_after) <= 1


def test_a_prompt_never_stands_on_both_sides(tmp_path):
    rows = [qa(q.upper() if n % 2 else q, str(n)) for n, q in enumerate(QUESTIONS[:30] * 4)]
    for name, how in (("share", {"share": 0.3}), ("size", {"size": 37})):
        formatted = format_rows(tmp_path / name, rows, how)
        heldout, train = ({q.casefold() for q in formatted.prompts(split)} for split in ("heldout", "train"))
        assert not heldout & train
        assert heldout and train
    assert formatted.card["heldout"] == 37


def test_heldout_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="data.heldout.size is 3, but there are only 3 usable rows"):
        format_rows(tmp_path, [qa("a"), qa("b"), qa("c"), qa("c")], {"size": 3})


def test_groups_stay_together_and_stay_put(tmp_path):
    rows = [qa(q, author=f"author {n % 37}" if n % 5 else None) for n, q in enumerate(QUESTIONS)]
    author = {row["question"]: row["author"] for row in rows}
    small = format_rows(tmp_path / "small", rows[:200], {"share": 0.3, "group_by": "author"})
    large = format_rows(tmp_path / "large", rows, {"share": 0.3, "group_by": "author"})
    sized = format_rows(tmp_path / "sized", rows, {"size": 50, "group_by": "author"})
    for formatted in (small, large, sized):
        sides = {side: {author[q] for q in formatted.prompts(side)} for side in ("train", "heldout")}
        assert sides["train"] & sides["heldout"] == {None}  # those without an author go one by one
        assert len(sides["heldout"]) > 1
    assert small.prompts("heldout") == large.prompts("heldout") & {row["question"] for row in rows[:200]}
    assert sized.card["heldout"] == 50
    assert "'author'" in large.card["split"]
    # Which rows are of one author is told to the evaluation; those without one belong to none but themselves.
    heldout = pq.read_table(large.out / "heldout.parquet").to_pylist()
    by_group = {}
    for row in heldout:
        question = json.loads(row["conversation"])["messages"][0]["content"]
        by_group.setdefault(row["group"], []).append(author[question])
    assert all(len(set(found)) == 1 for found in by_group.values())
    assert sum(None in found for found in by_group.values()) == sum(found.count(None) for found in by_group.values())
    assert len(by_group) - sum(None in found for found in by_group.values()) == len(
        {author[q] for q in large.prompts("heldout")} - {None}
    )
    assert "group" not in pq.read_schema(large.out / "train.parquet").names


def test_a_value_is_one_group_however_it_is_written(tmp_path):
    rows = [qa(q, user=(7, 7.0, "7")[n % 3]) for n, q in enumerate(QUESTIONS[:30])]
    with pytest.raises(UserError, match="size is 5, but the smallest group of `group_by: user` has 30 rows"):
        format_rows(tmp_path, rows, {"size": 5, "group_by": "user"})


def test_each_value_is_held_out_by_the_same_share(tmp_path):
    rows = [qa(q, intent="rare" if n % 10 == 0 else "common", n=n) for n, q in enumerate(QUESTIONS)]
    intent = {row["question"]: row["intent"] for row in rows}
    for name, how in (("share", {"share": 0.25}), ("size", {"size": 100})):
        formatted = format_rows(tmp_path / name, rows, {**how, "stratify_by": "intent"})
        counts = Counter(intent[q] for q in formatted.prompts("heldout"))
        assert abs(counts["rare"] - 10) <= 1 and abs(counts["common"] - 90) <= 1
    assert formatted.card["heldout"] == 100

    added = format_rows(
        tmp_path / "added", [*rows, qa("a new question", intent="rare")], {"share": 0.25, "stratify_by": "intent"}
    )
    before = format_rows(tmp_path / "before", rows, {"share": 0.25, "stratify_by": "intent"})
    moved = before.prompts("heldout") - added.prompts("heldout")
    assert len(moved) <= 1 and all(intent[q] == "rare" for q in moved)


def test_values_of_few_rows_are_held_out_on_the_average():
    value = np.repeat(np.random.default_rng(1).integers(1, 2**63, 1000, dtype=np.uint64), 3)
    prompt, digest = np.random.default_rng(2).integers(1, 2**63, (2, 3000), dtype=np.uint64)
    held = choose_heldout(format_settings(share=0.1, stratify_by="x"), prompt, digest, value)
    assert 240 < held.sum() < 360


def test_no_way_to_hold_out_is_refused(tmp_path):
    with pytest.raises(UserError, match="needs one of share, size and sources"):
        format_rows(tmp_path, [qa("a"), qa("b")])


def test_weights_say_nothing_of_which_digests_are_drawn():
    """Samples take the lowest digests: half a source must not be its lower half."""
    digest = np.random.default_rng(1).integers(0, 2**63, 20_000, dtype=np.uint64) * np.uint64(2)
    kept = digest[copies_of(digest, np.full(len(digest), 0.5)) == 1]
    assert abs(len(kept) - 10_000) < 400
    assert abs((kept < 2**63).mean() - 0.5) < 0.03


def test_a_prompt_under_many_system_messages_asks_something_else_under_each():
    prompt = np.array([7, 7, 7, 7, 7, 7, 9, 9], np.uint64)
    system = np.array([1, 2, 3, 4, 5, 5, 1, 2], np.uint64)
    found, with_system = asked(prompt, system)
    assert with_system.tolist() == [True] * 6 + [False] * 2
    assert found[6:].tolist() == [9, 9] and len(set(found[:6].tolist())) == 5 and found[4] == found[5]
