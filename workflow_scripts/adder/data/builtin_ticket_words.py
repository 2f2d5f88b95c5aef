"""The words of the built-in data set: what each of its two parts can say. The grammar is in builtin_tickets.py."""

from dataclasses import dataclass


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
            "a copy of the invoice for {it} please", "I need another copy of the receipt for {it}",
            "the receipt for {it} got wet, can I have a new one?", "could I have another invoice for {it}?",
            "I can't find my receipt for {it}, please help",
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
        "this is really urgent for me", "please act immediately", "I need this ASAP", "ASAP!",
        "get back to me ASAP", "help me today please", "help, it's urgent", "I leave tonight",
        "we leave tomorrow morning", "the party is tomorrow", "deadline tonight",
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
