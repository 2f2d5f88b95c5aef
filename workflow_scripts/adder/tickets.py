"""The built-in data set: a customer's message in, a JSON ticket out, written by a small grammar.

The two parts speak differently on purpose. `train` and `heldout` have their own products, names, sentences, greetings,
ways to press and to reassure, and no order number or amount in common (`UNSEEN_EVERY`), so a model that scores on
`heldout` has learned the task and not the list. Months, days, colours and two of the ways to write a date are shared.
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from adder.errors import UserError

SYSTEM_PROMPT = "Extract the ticket as JSON."
FIELDS = ("intent", "order", "product", "amount", "date", "urgent")
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
class Words:
    """What one part can say. Slots: {it} the thing, {n} an order number, {ref} a way to name an order, {name}."""

    products: tuple[str, ...]
    names: tuple[str, ...]
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    requests: dict[str, tuple[str, ...]]
    urgent: tuple[str, ...]
    calm: tuple[str, ...]
    remarks: tuple[str, ...]
    refs: tuple[str, ...]
    leads: tuple[str, ...]
    things: tuple[str, ...]
    bought: tuple[str, ...]
    facts: dict[str, tuple[str, ...]]  # by kind (order, amount, date): a clause of its own
    tags: dict[str, tuple[str, ...]]  # by kind: hung on a product ("the kettle from 3 May")
    order_tags: dict[str, tuple[str, ...]]  # by kind: hung on an order ("my order from 3 May")
    deal_tags: dict[str, tuple[str, ...]]  # by kind: hung on a purchase ("I bought a kettle on 3 May")
    amounts: tuple[str, ...]
    dates: tuple[str, ...]
    unseen: bool  # whether its numbers are those that UNSEEN_EVERY divides


def _list(text: str) -> tuple[str, ...]:
    """The comma-separated entries of a text that may run over several lines."""
    return tuple(" ".join(entry.split()) for entry in text.split(","))


TRAIN = Words(
    products=_list(
        """kettle, toaster, desk lamp, yoga mat, backpack, coffee grinder, office chair, phone case, rice cooker,
        bike helmet, raincoat, blender, bookshelf, keyboard, suitcase, wool scarf, garden hose, picture frame, tent,
        alarm clock, frying pan, tablet stand, hair dryer, water bottle, doormat, wall clock, skateboard, printer,
        winter jacket, baby monitor, chess set, cutting board, ceiling fan, lunch box, drill, guitar strap, mirror,
        vacuum cleaner, night light, beach towel, running watch, pillow, teapot, shower curtain, bread knife, radio,
        laptop bag, sofa cover, dog bed, coat rack, memory card, salad bowl, handbag, hammock, extension cord, rug,
        ironing board, paint set, tripod, leather belt, step ladder, cat tree, juicer, webcam, wine rack, sleeping bag,
        bath mat, mixing bowl, router, umbrella, football, puzzle, cardigan, bird feeder, tool box, waffle iron,
        hand mixer, dress, floor lamp, measuring tape, hard drive, pencil case, car seat, bed frame, hoodie, jigsaw,
        electric shaver, toothbrush, saucepan, ukulele, projector, camping stove, swimsuit, tea towel, wardrobe"""
    ),
    names=_list(
        """Anna, Tom, Priya, Luis, Marta, James, Chen, Fatima, Oliver, Nina, Samuel, Ingrid, Kofi, Laura, Ben, Yuki,
        Sofia, Daniel, Aisha, Peter, Elena, Marcus, Julia, Hassan, Emma, Victor, Ruth, Diego, Claire, Jonas, Mei,
        Rob Ellis, Jane Porter, Ali Khan, Maria Costa, Tim Novak, Sara Lind, Paul Weber, Lucy Hart, Omar Said"""
    ),
    openings=("Hi,", "Hello,", "Hi there,", "Hey,", "Good morning,", "Dear team,", "Hello!", "Hi, {name} here.",
              "This is {name}.", "Hey team,", "Dear Sir or Madam,"),
    closings=("Thanks", "Thank you!", "Regards, {name}", "Thanks, {name}", "{name}", "Best, {name}", "Cheers",
              "Thanks in advance", "Best wishes, {name}", "Thank you, {name}"),
    requests={
        "refund": (
            "I want my money back for {it}", "please refund {it}", "can I get a refund for {it}?",
            "{it} stopped working after a week and I want a refund", "I sent {it} back ages ago, still no refund",
            "I returned {it} and haven't got my money back", "I'd like to return {it} and get my money back",
            "{it} is not what I expected, refund please", "how do I get a refund on {it}?",
            "not happy with {it}, I want a full refund", "you still owe me a refund for {it}",
            "{it} is rubbish. Give me my money back", "when will I get the money for {it}? I returned it",
            "{it} is too small for me. Can you pay me back?", "refund {it} please, I never used it",
            "I asked for a refund of {it}, nothing came", "what about my refund for {it}?",
            "I regret buying {it}, money back please",
        ),
        "replace": (
            "{it} arrived broken, please send a new one", "{it} came in the wrong colour, can I swap it?",
            "can you replace {it}? It came damaged", "{it} has a crack in it, I'd like a replacement",
            "I'd like to exchange {it} for another one", "{it} is faulty, could I have a new one?",
            "parts are missing from {it}, please send another", "{it} doesn't work, I want one that does",
            "please swap {it}, it's bent", "{it} is the wrong model, please exchange it",
            "{it} was smashed when I opened the box. New one please",
            "{it} broke on the first day, can you send me another?", "{it} is torn, I need a replacement",
            "there's a hole in {it}, please replace it", "can I exchange {it}? It's the wrong size",
            "a replacement for {it} please, it's broken", "{it} got damaged on the way, I need a new one",
            "will you replace {it}? It is scratched",
        ),
        "cancel": (
            "please cancel {it}", "I want to cancel {it}", "I changed my mind about {it}, please cancel",
            "can you cancel {it} before it ships?", "I ordered {it} by mistake, cancel it please",
            "I no longer need {it}, cancel it", "is it too late to cancel {it}?",
            "I found {it} cheaper elsewhere, so cancel mine", "don't send {it}, I don't need it any more",
            "how can I cancel {it}?", "I ordered {it} twice by accident, please cancel one",
            "we are moving, so we have to cancel {it}", "stop the shipment of {it}, I don't want it now",
            "can {it} still be cancelled?", "I have to cancel {it}, money is tight", "cancel {it}",
            "my wife already bought one, please cancel {it}", "I need to cancel {it}, wrong size",
        ),
        "track": (
            "where is {it}?", "{it} still hasn't arrived", "when will {it} be delivered?",
            "tracking for {it} hasn't moved in days", "any news on {it}? It was due last week",
            "has {it} been shipped yet?", "can you tell me when {it} gets here?", "I'm still waiting for {it}",
            "no sign of {it} yet, what's going on?", "the courier says {it} was delivered but it wasn't",
            "how long until {it} arrives?", "could I have a tracking number for {it}?", "{it} is late again",
            "I never received {it}", "when does {it} arrive?", "{it} was due on Monday, where is it?",
            "is {it} on the way?", "what's the delivery status of {it}?",
        ),
        "invoice": (
            "please send me an invoice for {it}", "I need a receipt for {it}", "can I get the invoice for {it}?",
            "my boss wants a receipt for {it}", "the invoice for {it} wasn't in the box",
            "could you email the invoice for {it}?", "I lost the receipt for {it}, can you resend it?",
            "for my taxes I need the invoice for {it}", "no receipt came with {it}", "I need a VAT invoice for {it}",
            "can you put my company name on the invoice for {it}?", "how do I print a receipt for {it}?",
            "where do I find the invoice for {it}?", "the receipt for {it} is missing",
            "a copy of the invoice for {it} please", "I can't find my receipt for {it}, please help",
        ),
    },
    urgent=(
        "I need this sorted today", "please hurry", "this is urgent", "ASAP please", "as quickly as you can please",
        "I need it by tomorrow", "it's for a birthday tomorrow", "we leave tonight", "answer me right away",
        "quick answer please", "I need an answer today", "we fly out tonight", "my deadline is tomorrow",
        "please treat this as urgent", "I need it right now", "be quick please", "I need help today",
        "our guests arrive tonight", "please do it immediately", "this needs to happen today",
        "the deadline is today", "urgent!", "as soon as possible please", "please hurry, I leave tomorrow",
        "it has to be done by tonight", "I must know by tomorrow", "very urgent, please help", "I need a quick reply",
        "it must be done immediately", "I need it ASAP", "hurry please", "do it right away please",
        "this is really urgent for me", "please act immediately",
    ),
    calm=(
        "no rush", "take your time", "whenever you get a moment", "any time this month is fine", "when it suits you",
        "it can wait", "answer when you can", "there is no rush here", "you can take your time",
        "this can wait a while", "I can wait",
    ),
    remarks=("I've called 3 times", "I've been a customer for 5 years", "this is my second message", "love your shop",
             "your chat didn't work", "nobody picks up the phone", "I live on the 4th floor",
             "I like the shop otherwise", "I ordered from you 2 times before", "the website was confusing"),
    refs=("order {n}", "order #{n}", "order number {n}", "order no. {n}", "#{n}", "ref {n}", "order ID {n}"),
    leads=("{ref}:", "re {ref}:", "about {ref}:", "question about {ref}.", "problem with {ref}.", "it's about {ref}."),
    things=("my order", "this order", "my last order", "the order", "my recent order"),
    bought=("I bought {a}", "I ordered {a}", "I got {a}", "we ordered {a}", "bought {a}", "ordered {a}"),
    facts={
        "order": ("{ref}", "it's {ref}", "my order number is {n}", "order: {n}", "ref: {n}", "the order number: {n}"),
        "amount": ("I paid {amount}", "it cost {amount}", "the price was {amount}", "paid {amount}"),
        "date": ("ordered on {date}", "bought {date}", "I ordered it {date}", "the order is from {date}"),
    },
    tags={
        "order": (" ({ref})", " from {ref}", " in {ref}", ", {ref},", " [{ref}]"),
        "amount": (" for {amount}", " ({amount})", " that cost {amount}"),
        "date": (" from {date}", " I ordered on {date}", " I bought on {date}", " ordered {date}"),
    },
    order_tags={
        "amount": (" for {amount}", " ({amount})"),
        "date": (" from {date}", " of {date}", " I placed on {date}"),
    },
    deal_tags={
        "order": (" ({ref})", ", {ref}"),
        "amount": (" for {amount}", " ({amount})"),
        "date": (" on {date}", " {date}"),
    },
    amounts=("${}", "£{}", "€{}", "{} euros", "{} dollars", "{}€", "{} EUR"),
    dates=("{day} {month}", "{month} {day}", "{month} {day}{th}", "the {day}{th} of {month}", "{month} the {day}{th}"),
    unseen=False,
)  # fmt: skip

HELDOUT = Words(
    products=_list(
        """air fryer, bath robe, rain barrel, snow shovel, fire pit, electric scooter, egg timer, fishing rod, letter
        opener, oven glove, soup spoon, sun hat, travel mug, flower pot, power bank, fruit press, map, bucket, tree
        stand, music box, video camera, game console, card table, rock polisher, mail box, door bell, house plant,
        glass jar, paper shredder, stone vase, gold ring, ice maker, light bulb, water filter, fish tank, book light,
        key ring, wind chime, heart pendant, tool belt, bar stool, cup holder, hand saw, food processor, head lamp,
        plant stand, screen protector, camera strap, space heater, window blind, model train, pool pump, leaf blower,
        school bag, log basket, mouse trap, solar panel, train set, foot stool, spring mattress, star chart, air pump,
        box fan, photo album, phone charger, sound bar, gas grill"""
    ),
    names=_list(
        """Greta, Walter, Amara, Felix, Noor, Irene, Stefan, Bianca, Hugo, Leila, Conor, Tamsin, Ravi, Petra, Gavin,
        Dora Finch, Karl Meyer, Zoe Adams, Ivan Petrov, Lena Brandt"""
    ),
    openings=("Good evening,", "Greetings,", "Hiya,", "To whom it may concern,", "Hey folks,", "My name is {name}.",
              "Good afternoon,", "Hello support,", "{name} writing."),
    closings=("Many thanks, {name}", "Kind regards, {name}", "Ta!", "Yours, {name}", "Much appreciated", "- {name}",
              "Thx, {name}", "Sincerely, {name}"),
    requests={
        "refund": (
            "could you refund me for {it}?", "{it} was a disappointment, I'd like a refund",
            "I sent {it} back two weeks ago and got no refund", "please give me the money back for {it}",
            "what must I do to get my money back for {it}?", "{it} is useless, refund me",
            "I'm after a refund for {it}", "still no refund for {it}, though you have it back",
        ),
        "replace": (
            "{it} turned up broken, may I have a new one?", "please send me a replacement for {it}, it's damaged",
            "could you exchange {it}? It has a hole", "{it} is dented, please replace it",
            "the post damaged {it}, I need another one", "{it} fell apart on day one, send me a new one",
            "I'd like {it} replaced, the lid is cracked",
        ),
        "cancel": (
            "could {it} be cancelled? I picked the wrong one", "I'd like you to cancel {it}",
            "we found a better one, so please cancel {it}", "cancel {it}, my plans have changed",
            "my son ordered {it} without asking, can we cancel it?", "we won't be needing {it}, please cancel it",
            "I'd rather cancel {it}",
        ),
        "track": (
            "do you know where {it} is?", "{it} has not arrived so far", "what day will {it} arrive?",
            "I have been waiting for {it} for ages", "what's the delivery date of {it}?",
            "{it} should have been delivered last week", "did {it} get shipped? I've heard nothing",
        ),
        "invoice": (
            "accounting wants an invoice for {it}", "may I have a copy of the receipt for {it}?",
            "I threw away the receipt for {it}, could I have another?", "where can I download the invoice for {it}?",
            "please issue an invoice for {it} to my firm", "there was no receipt in the box with {it}",
        ),
    },
    urgent=(
        "I really need this today", "please hurry up", "it's rather urgent", "I leave tomorrow",
        "the party is tonight", "as quickly as possible please", "reply right away please", "my deadline is tonight",
        "I need help immediately", "please be quick about it", "sort it out today please", "help me ASAP",
        "this is quite urgent",
    ),
    calm=(
        "no rush from my side", "please take your time", "it can wait a bit", "reply when you have a moment",
        "there's really no rush",
    ),
    remarks=("I wrote to you 4 times", "I've shopped here for 8 years", "your phone line is always busy",
             "nice store by the way", "the search on your site is odd", "I already asked your bot"),
    refs=("order nr {n}", "order nr. {n}", "order code {n}", "order no {n}"),
    leads=("regarding {ref}:", "this concerns {ref}.", "issue with {ref}:", "concerning {ref}:"),
    things=("our order", "my latest order", "that order"),
    bought=("I purchased {a}", "my wife ordered {a}", "we bought {a}", "I have ordered {a}"),
    facts={
        "order": ("the order ID is {n}", "see {ref}", "this is {ref}", "order nr: {n}"),
        "amount": ("I was asked to pay {amount}", "it came to {amount}", "that was {amount}", "total {amount}"),
        "date": ("purchased on {date}", "I placed it on {date}", "order date {date}", "it was ordered {date}"),
    },
    tags={
        "order": (" under {ref}", " (see {ref})", " of {ref}"),
        "amount": (" costing {amount}", " at {amount}", " (price {amount})"),
        "date": (" purchased on {date}", " we ordered on {date}", " of {date}"),
    },
    order_tags={"amount": (" totalling {amount}", " worth {amount}"), "date": (" dated {date}", " placed on {date}")},
    deal_tags={
        "order": (" - {ref}", " under {ref}"),
        "amount": (" at {amount}", ", price {amount}"),
        "date": (" in the sale on {date}", " online on {date}"),
    },
    amounts=("{} pounds", "{} USD", "$ {}", "£ {}"),
    dates=("{day}{th} {month}", "the {day} {month}", "{month} {day}", "{day} {month}"),
    unseen=True,
)  # fmt: skip

VOCABULARIES = {"train": TRAIN, "heldout": HELDOUT}


def rows(count: int, part: str, seed: int) -> Iterator[dict]:
    """Yield `count` different conversations `{"messages": [user, assistant]}` of one part.

    The same arguments give the same rows on every machine, and a larger count only adds rows at the end. The reply is
    compact JSON with the keys of `FIELDS` in that order; what the message does not say is null.

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


def reply(ticket: dict) -> str:
    """The ticket as compact JSON. An amount stands as the customer wrote it (19.50, not 19.5): still a JSON number."""
    values = {field: json.dumps(ticket[field]) for field in FIELDS}
    if ticket["amount"] is not None:
        values["amount"] = ticket["amount"]
    return "{" + ",".join(f'"{field}":{value}' for field, value in values.items()) + "}"


def _write(rng: random.Random, words: Words) -> tuple[str, dict]:
    """One message and its ticket (amount as a decimal string)."""
    intent = rng.choice(INTENTS)
    order = _number(rng, 10000, 99999, words) if rng.random() < HAS_ORDER else None
    product = _product(rng, words) if rng.random() < HAS_PRODUCT else None
    amount = _amount(rng, words) if rng.random() < HAS_AMOUNT else None
    day, month = rng.randint(1, 28), rng.choice(MONTHS)
    dated = rng.random() < HAS_DATE
    mood = rng.random()
    ticket = {
        "intent": intent,
        "order": order,
        "product": product,
        "amount": amount,
        "date": f"{day} {month}" if dated else None,
        "urgent": mood < IS_URGENT,
    }

    facts = {}  # kind of fact -> its slots
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


def _body(rng: random.Random, words: Words, intent: str, product: str | None, facts: dict) -> list[str]:
    """The sentences that ask and inform. Each fact stands in one place: a lead, a tag on the thing, or a tail."""
    told = product is not None and rng.random() < 0.35  # "I bought a kettle. Where is it?"
    tags_of = words.deal_tags if told else words.tags if product else words.order_tags
    room = 2 if told else 1  # for tags: more on one noun reads like a form
    lead, tags, tails = "", "", []
    kinds = list(facts)
    rng.shuffle(kinds)
    for kind in sorted(kinds, key="order".__eq__):  # an order number comes last: "on 3 May (order 12345)"
        slots, where = facts[kind], rng.random()
        if kind == "order" and not told and where < 0.35:
            lead = rng.choice(words.leads).format(**slots)
        elif kind in tags_of and room and where < 0.75:
            tags += rng.choice(tags_of[kind]).format(**slots)
            room -= 1
        else:
            tails.append(rng.choice(words.facts[kind]).format(**slots))

    if told:
        article = "an" if product[0] in "aeiou" else "a"
        lead = rng.choice(words.bought).format(a=f"{article} {product}") + tags
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
    parts = [s if s[-1] in ".:!?" or s[-1] == "," and s != sentences[-1] else s + rng.choice(stops) for s in sentences]
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
