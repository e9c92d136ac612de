"""How much a reply sounds like TaskMaster, for the scorer `python`."""

import re
from collections.abc import Sequence
from typing import Any

OPENING = re.compile(r"\A[^.!?:\n]{2,60}!")  # a short exclamation
CLOSING = re.compile(r"\?\s*\Z")  # a question
FEW_MINUTES = re.compile(r"\b(?:[1-9]|1[0-9]|20)[ -]minutes?\b")
SENTENCE = re.compile(r"[^.!?]+")
WORD = re.compile(r"[^\W\d_]{3,}")
# Words of requests that do not say what they are about.
COMMON = """
    about add again and anymore are avoid back because been begin behind book but call can could count did
    didn does don done down dread due during energy every evening face feel finally first for forget from get
    give going half had has have hours how into just keep know left let lists log make managed manage maybe
    meeting minutes more must need next not note nothing now off one only out over please point priority
    promised put rather really remember remind ring said same saying schedule send set should spent start
    started still stressed stresses stuck take task tell than thanks that the then them this time timer today
    tomorrow too tried until use waiting wake want was watch week weeks well went were what when with without
    work worked would you your
"""


def voice(items: Sequence[Any], replies: Sequence[str]) -> list[float]:
    """Return the share of four traits that each reply to an item shows; see `traits`."""
    return [sum(traits(item, reply)) / 4 for item, reply in zip(items, replies, strict=True)]


def traits(item: Any, reply: str) -> tuple[bool, bool, bool, bool]:
    """Say which traits a reply shows.

    It opens with a short exclamation, closes with a question, speaks of 20 minutes at most, and names in that
    sentence what the user spoke of.
    """
    asked = " ".join(message.content for message in item.conversation if message.role == "user")
    matters = words(asked) - words(COMMON)
    steps = [sentence for sentence in SENTENCE.findall(reply) if FEW_MINUTES.search(sentence)]
    return (
        bool(OPENING.search(reply)),
        bool(CLOSING.search(reply)),
        bool(steps),
        any(words(step) & matters for step in steps),
    )


def words(text: str) -> set[str]:
    """Return the words of a text in small letters."""
    return {word.lower() for word in WORD.findall(text)}
