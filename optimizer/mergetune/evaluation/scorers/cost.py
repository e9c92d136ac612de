"""What scorers of a reply's cost share: items need no answer, and lower is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergetune.evaluation.items import Item
from mergetune.evaluation.scorers.scorer import BaseScorer


class CostScorer(BaseScorer):
    """A number that a model's reply costs, 0 or more; it is taken as it is."""

    needs = "no `answer`"
    higher_is_better = False

    @property
    def metric(self) -> str:
        """See `BaseScorer`."""
        return self.kind

    def score(self, items: Sequence[Item], replies: Sequence[Any]) -> list[float]:  # noqa: ARG002
        """See `BaseScorer.score`."""
        return [float(cost) for cost in replies]

    def check_item(self, item: Item, stop: Sequence[str] = (), *, is_example: bool = False) -> str | None:  # noqa: ARG002
        """See `BaseScorer.check_item`."""
        return self.lacking(item, is_example=True) if is_example else None

    def wanted_reply(self, item: Item) -> None:
        """See `BaseScorer.wanted_reply`: a cost is no text."""
