"""Skills on strings of letters, and their items; light enough for a process that does nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable

LETTERS = "abcdefghij"
SHORTEST, LONGEST = 2, 6  # letters; the suite has the longest strings alone

Example = tuple[str, str]  # prompt and answer


def _swap(letters: str) -> str:
    return "".join(letters[i ^ 1] for i in range(len(letters) & ~1)) + letters[len(letters) & ~1 :]


def _shift(letters: str) -> str:
    return "".join(LETTERS[(LETTERS.index(each) + i) % len(LETTERS)] for i, each in enumerate(letters))


SKILLS: dict[str, Callable[[str], str]] = {
    "reverse": lambda letters: letters[::-1],
    "sort": lambda letters: "".join(sorted(letters)),
    "shift": _shift,
    "swap": _swap,
}


def example(skill: str, length: int, rng: random.Random) -> Example:
    """Return an example of a skill."""
    letters = "".join(rng.choices(LETTERS, k=length))
    return f"{skill} {letters}:", SKILLS[skill](letters)


def distinct(skill: str, n: int, seed: str) -> list[Example]:
    """Return different examples of a skill, of the greatest length."""
    rng, found = random.Random(f"{seed} {skill}"), dict[str, str]()
    while len(found) < n:
        found.update([example(skill, LONGEST, rng)])
    return list(found.items())
