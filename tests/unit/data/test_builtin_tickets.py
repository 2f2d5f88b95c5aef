"""The built-in tickets: deterministic, never repeating, and with a held-out part that training has not seen."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adder.core.errors import UserError
from adder.data import builtin_ticket_words, builtin_tickets

COUNT = 1500


@pytest.fixture(scope="module")
def parts() -> dict[str, list[tuple[str, dict]]]:
    """Message and parsed ticket of many rows of each part."""
    return {
        part: [
            (row["messages"][0]["content"], json.loads(row["messages"][1]["content"]))
            for row in builtin_tickets.rows(COUNT, part, seed=1)
        ]
        for part in builtin_tickets.PARTS
    }


def test_same_arguments_give_the_same_bytes_whatever_the_hash_seed():
    code = (
        "import hashlib, json; from adder.data import builtin_tickets as tickets;"
        "print(hashlib.sha256(json.dumps(list(tickets.rows(50, 'heldout', 7))).encode()).hexdigest())"
    )
    here = hashlib.sha256(json.dumps(list(builtin_tickets.rows(50, "heldout", 7))).encode()).hexdigest()
    scripts = Path(builtin_tickets.__file__).parents[2]
    for hash_seed in ("0", "1"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(scripts)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == here


def test_more_rows_only_add_rows_and_seeds_differ():
    few, many = list(builtin_tickets.rows(20, "train", 3)), list(builtin_tickets.rows(60, "train", 3))
    assert many[:20] == few and len(many) == 60
    assert list(builtin_tickets.rows(20, "train", 4)) != few
    assert list(builtin_tickets.rows(0, "train", 3)) == []


def test_shape_of_a_row():
    for row in builtin_tickets.rows(200, "train", 1):
        assert list(row) == ["messages"]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        reply = row["messages"][1]["content"]
        ticket = json.loads(reply)
        assert list(ticket) == ["intent", "order", "product", "amount", "date", "urgent"]
        assert ticket["intent"] in builtin_tickets.INTENTS and isinstance(ticket["urgent"], bool)
        assert '": ' not in reply and '", ' not in reply


@pytest.mark.parametrize("part", builtin_tickets.PARTS)
def test_no_message_twice_and_none_in_both_parts(parts, part):
    messages = [message for message, _ in parts[part]]
    assert len(set(messages)) == len(messages) == COUNT
    other = {message for name in builtin_tickets.PARTS if name != part for message, _ in parts[name]}
    assert not other & set(messages)


@pytest.mark.parametrize("part", builtin_tickets.PARTS)
def test_the_message_says_what_the_ticket_says(parts, part):
    for message, ticket in parts[part]:
        text = message.lower()
        numbers = re.findall(r"\d+(?:\.\d+)?", text)
        orders = [number for number in numbers if re.fullmatch(r"\d{5}", number)]
        assert orders == ([ticket["order"]] if ticket["order"] else [])
        if ticket["amount"] is not None:
            assert ticket["amount"] in map(float, numbers)
        assert bool(re.search(r"[$£€]|\b(euros?|eur|usd|dollars|pounds)\b", text)) <= (ticket["amount"] is not None)
        near_a_day = r"(?:\d|st|nd|rd|th|of) {0}\b|\b{0} (?:\d|the \d)"  # and not the "may" of "may I have"
        months = [month for month in builtin_tickets.MONTHS if re.search(near_a_day.format(month.lower()), text)]
        assert months == ([ticket["date"].split()[1]] if ticket["date"] else [])
        if ticket["date"]:
            assert re.search(rf"\b{ticket['date'].split()[0]}(st|nd|rd|th)?\b", text)
        products = [p for p in builtin_ticket_words.VOCABULARIES[part].products if re.search(rf"\b{p}\b", text)]
        if ticket["product"]:
            assert ticket["product"] in text
            assert any(ticket["product"].endswith(product) for product in products)
        else:
            assert not products


@pytest.mark.parametrize("part", builtin_tickets.PARTS)
def test_every_value_is_met_and_every_optional_field_is_sometimes_null(parts, part):
    found = [ticket for _, ticket in parts[part]]
    for intent in builtin_tickets.INTENTS:
        assert sum(ticket["intent"] == intent for ticket in found) > COUNT / len(builtin_tickets.INTENTS) * 0.7
    for field in ("order", "product", "amount", "date"):
        null = sum(ticket[field] is None for ticket in found) / COUNT
        assert 0.1 < null < 0.75, field
    assert 0.3 < sum(ticket["urgent"] for ticket in found) / COUNT < 0.5


def test_numbers_and_amounts_are_disjoint(parts):
    for field in ("order", "amount"):
        train, heldout = ({ticket[field] for _, ticket in parts[part]} - {None} for part in ("train", "heldout"))
        assert len(train) > 100 and len(heldout) > 100
        assert not train & heldout, field


def test_messages_are_short_and_urgency_is_no_single_word(parts):
    for part in builtin_tickets.PARTS:
        words = [len(message.split()) for message, _ in parts[part]]
        assert 12 < sum(words) / COUNT < 26 and max(words) < 65
        urgent = [message.lower() for message, ticket in parts[part] if ticket["urgent"]]
        for word in ("urgent", "today", "tonight", "tomorrow", "asap", "immediately", "hurry", "quick"):
            assert sum(word in message for message in urgent) < len(urgent) / 2


def test_an_amount_stands_as_written():
    ticket = builtin_tickets.Ticket("refund", None, None, "19.50", None, urgent=False)
    expected = '{"intent":"refund","order":null,"product":null,"amount":19.50,"date":null,"urgent":false}'
    assert builtin_tickets.reply(ticket) == expected


@pytest.mark.parametrize(("day", "ending"), [(1, "st"), (2, "nd"), (3, "rd"), (4, "th"), (11, "th"), (12, "th"),
                                             (13, "th"), (21, "st"), (22, "nd"), (23, "rd")])  # fmt: skip
def test_ordinals(day, ending):
    assert builtin_tickets._ordinal(day) == ending


def test_refused():
    with pytest.raises(UserError, match="part is 'test'"):
        list(builtin_tickets.rows(1, "test", 1))
    with pytest.raises(UserError, match="rows is -1"):
        list(builtin_tickets.rows(-1, "train", 1))


def test_a_grammar_that_is_spent_says_so(monkeypatch):
    ticket = builtin_tickets.Ticket("refund", None, None, None, None, urgent=False)
    monkeypatch.setattr(builtin_tickets, "_write", lambda rng, words: ("the same", ticket))
    with pytest.raises(UserError, match="no more than about 1"):
        list(builtin_tickets.rows(2, "train", 1))
