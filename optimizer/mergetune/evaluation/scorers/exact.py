"""The scorer `exact`: the reply is the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mergetune.evaluation.items import Item
from mergetune.evaluation.scorers.scorer import BaseScorer, each_text, folded, plain_problem, stop_problem


class ExactScorer(BaseScorer):
    """The reply is the answer, or any of a list of answers."""

    needs = "`answer`: text, a number, true or false, or a list of these"
    scores = "1 if the reply is the answer, or one of a list of answers"

    kind: Literal["exact"] = "exact"
    ignore_case: bool = False

    def score(self, items: Sequence[Item], replies: Sequence[str]) -> list[float]:
        """See `BaseScorer.score`."""
        return [float(self._is_right(item, reply)) for item, reply in zip(items, replies, strict=True)]

    def check_item(self, item: Item, stop: Sequence[str] = (), *, is_example: bool = False) -> str | None:
        """See `BaseScorer.check_item`."""
        return (
            self.lacking(item, is_example=is_example)
            or plain_problem(item.answer, "any of which is right")
            or stop_problem(each_text(item.answer), stop, self.ignore_case)
        )

    def answer_text(self, item: Item) -> str:
        """See `BaseScorer.answer_text`."""
        return "" if item.answer is None else each_text(item.answer)[0]

    def _is_right(self, item: Item, reply: str) -> bool:
        right = {folded(text, self.ignore_case) for text in each_text(item.answer)}
        return folded(reply, self.ignore_case) in right
