"""The scorer `choice`: the likeliest of the item's choices is the answer."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any, Literal

from mergetune.evaluation.items import Item
from mergetune.evaluation.scorers.scorer import BaseScorer, shown


class ChoiceScorer(BaseScorer):
    """The likeliest choice is the answer, by log-likelihood, or by that per character (`per_character`).

    The answer is a choice's index from 0, its text or its letter.
    """

    needs = "`choices`, and `answer`: the right one by its index from 0, its text or its letter"
    scores = (
        "1 if the right one of the item's `choices` has the greatest log-likelihood after the prompt and a "
        "space (without the space if all prompts of the file end in white space or are empty)"
    )
    asks = "likelihoods"

    kind: Literal["choice"] = "choice"
    per_character: bool = False

    @property
    def metric(self) -> str:
        """See `BaseScorer`."""
        return "acc_norm" if self.per_character else "acc"

    def score(self, items: Sequence[Item], replies: Sequence[Sequence[float]]) -> list[float]:
        """See `BaseScorer.score`; of choices that are as likely the first one counts."""
        return [float(self._is_right(item, own)) for item, own in zip(items, replies, strict=True)]

    def check_item(self, item: Item, stop: Sequence[str] = (), *, is_example: bool = False) -> str | None:  # noqa: ARG002
        """See `BaseScorer.check_item`."""
        texts = [choice.strip() for choice in item.choices]
        if len(texts) < 2 or "" in texts or len(set(texts)) < len(texts):
            return (
                "the scorer `choice` needs two `choices` or more, each with a text of its own, "
                f"but got {shown(list(item.choices))}."
            )
        if choice_index(item.choices, item.answer) is None:
            return (
                "the scorer `choice` needs `answer`, the right choice by its index from 0, its text or its "
                f"letter, but got {shown(item.answer)} for {len(item.choices)} choices."
            )
        return None

    def target_text(self, item: Item) -> str:
        """See `BaseScorer.target_text`: the right choice."""
        index = choice_index(item.choices, item.answer)
        assert index is not None  # check_item
        return item.choices[index]

    def _is_right(self, item: Item, log_likelihoods: Sequence[float]) -> bool:
        lengths = [len(choice) if self.per_character else 1 for choice in item.choices]
        weighed = [own / length for own, length in zip(log_likelihoods, lengths, strict=True)]
        return weighed.index(max(weighed)) == choice_index(item.choices, item.answer)


def choice_index(choices: Sequence[str], answer: Any) -> int | None:
    """Return which choice an answer names, by its index from 0, its text or its letter; None: none."""
    if isinstance(answer, str):
        text, texts = answer.strip(), [choice.strip() for choice in choices]
        index = texts.index(text) if text in texts else _letter(text)
    elif isinstance(answer, bool) or not isinstance(answer, (int, float)) or answer != int(answer):
        return None
    else:
        index = int(answer)
    return index if index in range(len(choices)) else None


def _letter(text: str) -> int:
    return string.ascii_uppercase.find(text) if len(text) == 1 else -1
