"""Rows of a data set for retrieval-augmented generation: questions about passages, several about each."""

import random
from typing import Any

PLACES = ("river", "harbour", "bridge", "library", "market", "tower", "garden", "station", "museum", "square")
VERBS = ("was opened", "was rebuilt", "was painted", "was sold", "was measured", "was closed", "was lit", "was drawn")
WHOS = ("the mayor", "a guild", "two sisters", "the navy", "a school", "the painters", "a bank", "the gardeners")
ASKED = ("When", "By whom", "Why", "In which month", "How often", "For how much")


def passage(number: int) -> str:
    """A passage of three sentences, another one for each number."""
    draw = random.Random(number)
    sentences = [
        f"The {draw.choice(PLACES)} of quarter {number} {draw.choice(VERBS)} in {1700 + draw.randrange(300)} by "
        f"{draw.choice(WHOS)}, {draw.randrange(2, 90)} years after the {draw.choice(PLACES)} {draw.choice(VERBS)}."
        for _ in range(3)
    ]
    return " ".join(sentences)


def rag_rows(passages: int, questions: int) -> list[dict[str, Any]]:
    """So many questions about each of so many passages, with answers; no question is asked twice."""
    rows = []
    for number in range(passages):
        draw = random.Random(1000 + number)
        for asked in range(questions):
            place, verb = PLACES[asked % len(PLACES)], VERBS[(asked + number) % len(VERBS)]
            question = f"{draw.choice(ASKED)} is it that the {place} {verb}, as case {number}-{asked} tells?"
            answer = f"In {1700 + draw.randrange(300)}, for {draw.randrange(9000)} crowns."
            rows.append({"context": passage(number), "question": question, "answer": answer})
    return rows
