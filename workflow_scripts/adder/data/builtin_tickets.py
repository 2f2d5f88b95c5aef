"""The built-in data set: a customer's message in, a JSON ticket out, written by a small grammar.

The two parts speak differently on purpose. `train` and `heldout` have their own products, names, sentences, greetings,
ways to press and to reassure, and no order number or amount in common (`UNSEEN_EVERY`), so a model that scores on
`heldout` has learned the task and not the list. Months, days, colours and two of the ways to write a date are shared.
Both parts were written by the same hand, and the held-out phrases were revised while the grammar was developed: the
score on them shows that the workflow works, not what the model would do on real customers' messages.
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from adder.core.errors import UserError
from adder.data.builtin_ticket_words import VOCABULARIES, Words

SYSTEM_PROMPT = "Extract the ticket as JSON."
INTENTS = ("refund", "replace", "cancel", "track", "invoice")
PARTS = ("train", "heldout")

# Order numbers and amounts (in cents) that this divides are kept for the held-out part: any digit may stand anywhere
# in both parts, and no number is in both.
UNSEEN_EVERY = 7
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
COLOURS = ("black", "white", "red", "blue", "green", "grey", "yellow", "pink", "brown", "small", "large")

# How often a message has each thing.
HAS_ORDER, HAS_PRODUCT, HAS_AMOUNT, HAS_DATE = 0.65, 0.8, 0.3, 0.3
IS_URGENT, IS_CALM = 0.4, 0.12
HAS_OPENING, HAS_CLOSING, HAS_REMARK = 0.25, 0.2, 0.04
IS_CASUAL, HAS_TYPO = 0.25, 0.12
MISSES_ALLOWED = 1000


@dataclass(frozen=True)
class Ticket:
    """What a message says, in the order of the reply's keys; None for what it does not. amount: a decimal as text."""

    intent: str
    order: str | None
    product: str | None
    amount: str | None
    date: str | None
    urgent: bool


def rows(count: int, part: str, seed: int) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yield `count` different conversations `{"messages": [user, assistant]}` of one part.

    The same arguments give the same rows on every machine, and a larger count only adds rows at the end. The reply is
    compact JSON with the fields of a Ticket as keys; what the message does not say is null.

    Raises UserError for an unknown part, a negative count, or more rows than the grammar has.
    """
    if part not in PARTS:
        raise UserError(f"built-in tickets: part is {part!r}; allowed are {', '.join(PARTS)}")
    if count < 0:
        raise UserError(f"built-in tickets: rows is {count}; it must be 0 or more")
    rng = random.Random(f"tickets/{part}/{seed}")
    seen: set[str] = set()
    misses = 0
    while len(seen) < count:
        message, ticket = _write(rng, VOCABULARIES[part])
        if message in seen:
            misses += 1
            if misses > MISSES_ALLOWED:
                raise UserError(f"built-in tickets: no more than about {len(seen)} different rows can be made")
            continue
        seen.add(message)
        yield {
            "messages": [
                {"role": "user", "content": message},
                {"role": "assistant", "content": reply(ticket)},
            ]
        }


def reply(ticket: Ticket) -> str:
    """The ticket as compact JSON. An amount stands as the customer wrote it (19.50, not 19.5): still a JSON number."""
    values = {field: json.dumps(value) for field, value in vars(ticket).items()}
    if ticket.amount is not None:
        values["amount"] = ticket.amount
    return "{" + ",".join(f'"{field}":{value}' for field, value in values.items()) + "}"


def _write(rng: random.Random, words: Words) -> tuple[str, Ticket]:
    """One message and its ticket."""
    intent = rng.choice(INTENTS)
    order = _number(rng, 10000, 99999, words) if rng.random() < HAS_ORDER else None
    product = _product(rng, words) if rng.random() < HAS_PRODUCT else None
    amount = _amount(rng, words) if rng.random() < HAS_AMOUNT else None
    day, month = rng.randint(1, 28), rng.choice(MONTHS)
    dated = rng.random() < HAS_DATE
    mood = rng.random()
    date = f"{day} {month}" if dated else None
    ticket = Ticket(intent, order, product, amount, date, urgent=mood < IS_URGENT)

    facts: dict[str, dict[str, str]] = {}  # kind of fact -> its slots
    if order:
        facts["order"] = {"n": order, "ref": rng.choice(words.refs).format(n=order)}
    if amount:
        facts["amount"] = {"amount": rng.choice(words.amounts).format(amount)}
    if dated:
        facts["date"] = {"date": rng.choice(words.dates).format(day=day, th=_ordinal(day), month=month)}
    sentences = _body(rng, words, intent, product, facts)
    last = len(sentences)
    if mood < IS_URGENT:
        sentences.insert(rng.choice((0, last, last)), rng.choice(words.urgent))
    elif mood < IS_URGENT + IS_CALM:
        sentences.insert(rng.choice((0, last, last)), rng.choice(words.calm))
    if rng.random() < HAS_REMARK:
        sentences.insert(rng.choice((0, last)), rng.choice(words.remarks))
    name = rng.choice(words.names)
    if rng.random() < HAS_OPENING:
        sentences.insert(0, rng.choice(words.openings).format(name=name))
    closing = rng.choice(words.closings).format(name=name) if rng.random() < HAS_CLOSING else ""
    return _style(rng, sentences, closing, product or ""), ticket


def _body(
    rng: random.Random, words: Words, intent: str, product: str | None, facts: dict[str, dict[str, str]]
) -> list[str]:
    """The sentences that ask and inform. Each fact stands in one place: a lead, a tag on the thing, or a tail."""
    bought = product if product is not None and rng.random() < 0.35 else None  # "I bought a kettle. Where is it?"
    tags_of = words.deal_tags if bought else words.tags if product else words.order_tags
    room = 2 if bought else 1  # for tags: more on one noun reads like a form
    lead, tags, tails = "", "", []
    kinds = list(facts)
    rng.shuffle(kinds)
    for kind in sorted(kinds, key="order".__eq__):  # an order number comes last: "on 3 May (order 12345)"
        slots, where = facts[kind], rng.random()
        if kind == "order" and not bought and where < 0.35:
            lead = rng.choice(words.leads).format(**slots)
        elif kind in tags_of and room and where < 0.75:
            tags += rng.choice(tags_of[kind]).format(**slots)
            room -= 1
        else:
            tails.append(rng.choice(words.facts[kind]).format(**slots))

    if bought:
        article = "an" if bought[0] in "aeiou" else "a"
        lead = rng.choice(words.bought).format(a=f"{article} {bought}") + tags
        thing = "it"
    elif product:
        thing = f"{rng.choice(('the', 'the', 'my', 'this'))} {product}" + tags
    else:
        thing = "it" if lead and not tags else rng.choice(words.things) + tags
    rng.shuffle(tails)
    sentences = [lead] if lead else []
    sentences.append(rng.choice(words.requests[intent]).format(it=thing))
    if tails:
        sentences.insert(len(sentences) if rng.random() < 0.75 else 0, ", ".join(tails))
    return sentences


def _style(rng: random.Random, sentences: list[str], closing: str, product: str) -> str:
    """Join the sentences in one tone, careful or casual (no capitals, loose punctuation); now and then with a typo."""
    casual = rng.random() < IS_CASUAL
    stops = (".", ".", ",", "!") if casual else (".",) * 9 + ("!",)
    parts = [
        s if s[-1] in ".:!?" or (s[-1] == "," and s != sentences[-1]) else s + rng.choice(stops) for s in sentences
    ]
    if not casual:
        parts = [part if part.startswith("#") else part[0].upper() + part[1:] for part in parts]
    text = " ".join(parts)
    text = re.sub(r",([.,:?!])", r"\1", text)
    if closing:
        text += f" {closing}"
    if casual:
        text = text.lower()
        text = text.rstrip(".!,")
        if rng.random() < 0.5:
            text = text.replace("'", "")
    if rng.random() < HAS_TYPO:
        text = _misspell(rng, text, product)
    return text


def _misspell(rng: random.Random, text: str, product: str) -> str:
    """Slip in one word of five letters or more, never in a value that the ticket repeats."""
    spared = {*product.lower().split(), *(month.lower() for month in MONTHS)}
    found = [m for m in re.finditer(r"[A-Za-z]{5,}", text) if m.group().lower() not in spared]
    if not found:
        return text
    word = rng.choice(found)
    at = word.start() + rng.randint(1, len(word.group()) - 3)
    a, b = text[at], text[at + 1]
    slip = rng.choice((b + a, b, a + a + b))
    return text[:at] + slip + text[at + 2 :]


def _product(rng: random.Random, words: Words) -> str:
    """A product, now and then with a colour or size that belongs to its name."""
    product = rng.choice(words.products)
    return f"{rng.choice(COLOURS)} {product}" if rng.random() < 0.25 else product


def _number(rng: random.Random, low: int, high: int, words: Words) -> str:
    """A whole number of this part."""
    while True:
        number = rng.randint(low, high)
        if (number % UNSEEN_EVERY == 0) == words.unseen:
            return str(number)


def _amount(rng: random.Random, words: Words) -> str:
    """A price between 5 and 300, as written: whole, or with two decimals."""
    step = 100 if rng.random() < 0.35 else 1
    cents = int(_number(rng, 500 // step, 30000 // step, words)) * step
    return str(cents // 100) if step == 100 else f"{cents // 100}.{cents % 100:02d}"


def _ordinal(day: int) -> str:
    """The ending of a day of the month: 1st, 2nd, 3rd, 11th."""
    return "th" if day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
