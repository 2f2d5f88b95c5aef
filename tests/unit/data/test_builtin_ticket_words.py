"""The words of the two parts of the built-in data set: none is in both."""

import itertools
import re

import pytest

from adder.data import builtin_ticket_words


@pytest.mark.parametrize(
    "name",
    ["products", "names", "openings", "closings", "urgent", "calm", "remarks", "leads", "refs", "things", "bought"],
)
def test_the_parts_share_no_word_list_entry(name):
    train, heldout = (
        {entry.lower() for entry in getattr(builtin_ticket_words.VOCABULARIES[part], name)}
        for part in ("train", "heldout")
    )
    assert train and heldout and not train & heldout


@pytest.mark.parametrize("name", ["requests", "facts", "tags", "order_tags", "deal_tags"])
def test_the_parts_share_no_phrasing(name):
    train, heldout = (
        set(itertools.chain.from_iterable(getattr(builtin_ticket_words.VOCABULARIES[part], name).values()))
        for part in ("train", "heldout")
    )
    shared = {"".join(re.findall(r"[a-z{} ]", entry.lower())) for entry in train}
    assert not {"".join(re.findall(r"[a-z{} ]", entry.lower())) for entry in heldout if "{ref}" not in entry} & shared
    assert not train & heldout


def test_no_heldout_product_hides_a_train_product():
    for heldout in builtin_ticket_words.HELDOUT.products:
        assert not [train for train in builtin_ticket_words.TRAIN.products if train in heldout or heldout in train]
