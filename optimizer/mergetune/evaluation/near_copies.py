"""Near copies of a question in other texts, found by shared n-grams and judged by their words.

Texts are compared by their words, whatever case, punctuation and white space. Brown et al. (2020,
appendix C) call an item contaminated if it shares one n-gram with the training data, n being the 5th
percentile of the items' length in words, at least 8 (to avoid spurious collisions) and at most 13, and
find many false alarms among long items: a passage is shared, the question about it is not. Therefore a
shared 8-gram only makes a candidate here, as the 10-gram does in Cosmopedia's decontamination (Ben Allal
et al. 2024), and the words decide:

- Exact: all words of the question in a row; questions of fewer than 8 words must be a whole line of the
  text, for within a line they may stand by accident.
- Near: questions of 20 words or more may differ in one word of twenty, but in four words at most (the
  skips that Touvron et al. 2023, appendix A.6, allow) and in no number: a problem with other numbers is
  another problem.

Not found are paraphrases (Yang et al. 2023), translations and questions in another form.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import chain

_N = 8  # words of an n-gram, and of a prompt that may be found within a line
_FEWEST_WORDS = 3  # "Yes" and "Go on" are in every training file
_WORDS_PER_DIFFERENCE = 20
_MOST_DIFFERENCES = 4
MOST_HOLDERS = 20  # what more questions than this have is a phrase of the task

# A word; a Chinese or Japanese character, which stand without spaces; an operator between two numbers.
_OPERATOR = r"(?<=\d)[^\S\n]*[-+*/^%<=>×÷−][^\S\n]*(?=\d)"
_CHARACTER = r"[\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff]"
_WORD = re.compile(rf"{_CHARACTER}|(?:(?!{_CHARACTER})[^\W_])+|{_OPERATOR}")
_ASCII_WORD = re.compile(rf"[a-z0-9]+|{_OPERATOR}")

Words = tuple[str, ...]


def normalize(text: str) -> str:
    """Return the words of a text, case and compatibility forms (NFKC) folded, joined by single spaces."""
    return " ".join(words_of(text))


def words_of(text: str) -> Words:
    """Return the words of a text; see `normalize`."""
    if text.isascii():
        found = _ASCII_WORD.findall(text.lower())
    else:
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        found = _WORD.findall(folded)
    return tuple(" ".join(found).split())  # operators come with the spaces around them


def _grams(words: Words) -> Iterator[int]:
    return map(hash, zip(*(words[k:] for k in range(_N)), strict=False))


@dataclass(frozen=True)
class Question:
    """What is looked for.

    `words` are the prompt's own, or the target's where all or many items of the task have the prompt;
    `exact` has also what all prompts of the task share. Each of `also` must stand in the same training text:
    what the user said before, and the target where several items have the prompt. `apart` tells questions
    of the suite apart.
    """

    words: Words
    exact: Words
    also: tuple[Words, ...]
    apart: tuple[str, ...]

    @property
    def n_differences(self) -> int:
        """How many words may be others."""
        return min(len(self.words) // _WORDS_PER_DIFFERENCE, _MOST_DIFFERENCES)

    def is_near(self, text: Words) -> bool:
        """Say whether a text holds the words, but for as many as may be others."""
        return self.n_differences > 0 and _differences(self.words, text) <= self.n_differences


class Finder:
    """Questions by the n-grams that they hold: a text is held against those few that share one."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.questions = questions
        self._sets = [frozenset(question.words) for question in questions]
        grams = [set(_grams(question.words)) for question in questions]
        counts = Counter(gram for held in grams for gram in held)
        self._by_gram: dict[int, list[int]] = {}
        self._by_line: dict[str, list[int]] = {}
        for index, question in enumerate(questions):
            for gram in grams[index]:
                if counts[gram] <= MOST_HOLDERS:
                    self._by_gram.setdefault(gram, []).append(index)
            for words in {question.words, question.exact}:
                self._by_line.setdefault(" ".join(words), []).append(index)

    def find(self, texts: Iterable[str]) -> set[int]:
        """Return which questions stand in one of the texts, the same or nearly."""
        found: set[int] = set()
        for text in texts:
            lines = [words_of(line) for line in text.split("\n")]
            words = tuple(chain.from_iterable(lines))
            there = {
                index
                for line in lines
                if len(line) >= _FEWEST_WORDS
                for index in self._by_line.get(" ".join(line), ())
            }
            candidates = self._sharing(words) - found
            if not candidates and not there:
                continue
            folded = f" {' '.join(words)} "
            there |= {
                i
                for i in candidates
                if _stands_in(self.questions[i].words, folded) or self.questions[i].is_near(words)
            }
            found |= {i for i in there if all(_stands_in(each, folded) for each in self.questions[i].also)}
        return found

    def groups(self) -> list[list[int]]:
        """Return the questions, those together that are the same or nearly."""
        leader: list[int] = []
        for index, question in enumerate(self.questions):
            same = self._by_line.get(" ".join(question.exact), []) + sorted(self._sharing(question.words))
            others = (other for other in same if other < index and self._are_same(other, index))
            leader.append(min((leader[other] for other in others), default=index))
        groups: dict[int, list[int]] = {}
        for index, first in enumerate(leader):
            groups.setdefault(first, []).append(index)
        return list(groups.values())

    def _sharing(self, words: Words) -> set[int]:
        """Return the questions that share an n-gram with a text, and enough of its words."""
        by_gram = self._by_gram
        if by_gram.keys().isdisjoint(_grams(words)):
            return set()
        sharing = {index for gram in by_gram.keys() & set(_grams(words)) for index in by_gram[gram]}
        present = frozenset(words)
        # A word that is nowhere in the text differs; letters that number choices do not count.
        return {i for i in sharing if _n_telling(self._sets[i] - present) <= self.questions[i].n_differences}

    def _are_same(self, one: int, other: int) -> bool:
        a, b = self.questions[one], self.questions[other]
        return a.apart == b.apart and (a.exact == b.exact or (a.is_near(b.words) and b.is_near(a.words)))


def _stands_in(words: Words, folded: str) -> bool:
    """Say whether words stand in a row within a text, folded and with a space at either end."""
    return f" {' '.join(words)} " in folded if words else True


def _differences(words: Words, text: Words) -> float:
    """Count the words that are not where they belong in the part of a text most like them.

    A number that is another is a difference beyond any bound.
    """
    matcher = SequenceMatcher(None, words, text, autojunk=False)
    longest = matcher.find_longest_match()
    start = max(longest.b - longest.a - _MOST_DIFFERENCES, 0)
    part = text[start : longest.b + len(words) - longest.a + _MOST_DIFFERENCES]
    matcher.set_seq2(part)
    matched = {i for block in matcher.get_matching_blocks() for i in range(block.a, block.a + block.size)}
    others = [word for index, word in enumerate(words) if index not in matched]
    if any(char.isdigit() for word in others for char in word):
        return float("inf")
    return _n_telling(others)


def _n_telling(words: Iterable[str]) -> int:
    return sum(len(word) > 1 or word.isdigit() for word in words)
