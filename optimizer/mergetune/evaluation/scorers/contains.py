"""The scorer `contains`: the answer stands in the reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mergetune.evaluation.items import Item, Message
from mergetune.evaluation.scorers.scorer import (
    BaseScorer,
    each_text,
    folded,
    plain_problem,
    shown,
    stop_problem,
    text_of,
)


class ContainsScorer(BaseScorer):
    """The answer, or each of a list of answers, stands in the reply."""

    needs = "`answer`: text that is not empty, a number, true or false, or a list of these"
    scores = "1 if the reply contains the answer, or every answer of a list"

    kind: Literal["contains"] = "contains"
    ignore_case: bool = False

    def score(self, items: Sequence[Item], replies: Sequence[str]) -> list[float]:
        """See `BaseScorer.score`."""
        return [float(self._has_all(item, reply)) for item, reply in zip(items, replies, strict=True)]

    def check_item(self, item: Item, stop: Sequence[str] = (), *, is_example: bool = False) -> str | None:
        """See `BaseScorer.check_item`."""
        return (
            self.lacking(item, is_example=is_example)
            or plain_problem(item.answer, "all of which must stand in the reply")
            or _empty_problem(item)
            or stop_problem(each_text(item.answer), stop, self.ignore_case)
        )

    def answer_text(self, item: Item) -> str:
        """See `BaseScorer.answer_text`; of a list, all of it."""
        return "" if item.answer is None else ", ".join(each_text(item.answer))

    def wanted_reply(self, item: Item) -> Message | None:
        """See `BaseScorer.wanted_reply`; a list of words that count is none."""
        return None if isinstance(item.answer, list) else super().wanted_reply(item)

    def _has_all(self, item: Item, reply: str) -> bool:
        text = folded(reply, self.ignore_case)
        return all(folded(part, self.ignore_case) in text for part in each_text(item.answer))


def _empty_problem(item: Item) -> str | None:
    parts = item.answer if isinstance(item.answer, list) else [item.answer]
    empty = next((part for part in parts if not text_of(part)), None)
    if empty is None:
        return None
    return f"`answer` must not be empty, for every reply contains that, but is {shown(empty)}."
