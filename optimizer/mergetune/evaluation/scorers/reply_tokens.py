"""The scorer `reply_tokens`: what a reply costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from mergetune.evaluation.items import Item
from mergetune.evaluation.scorers.scorer import BaseScorer


class ReplyTokensScorer(BaseScorer):
    """How many tokens of the model's own a reply has, thoughts among them; fewer are better."""

    needs = "no `answer`"
    scores = "the number of the reply's tokens, thoughts among them; better when low"
    asks = "tokens"
    higher_is_better = False

    kind: Literal["reply_tokens"] = "reply_tokens"

    @property
    def metric(self) -> str:
        """See `BaseScorer`."""
        return self.kind

    def score(self, items: Sequence[Item], replies: Sequence[Any]) -> list[float]:  # noqa: ARG002
        """See `BaseScorer.score`."""
        return [float(count) for count in replies]

    def check_item(self, item: Item, stop: Sequence[str] = (), *, is_example: bool = False) -> str | None:  # noqa: ARG002
        """See `BaseScorer.check_item`."""
        return self.lacking(item, is_example=True) if is_example else None

    def target_text(self, item: Item) -> str:  # noqa: ARG002
        """See `BaseScorer.target_text`."""
        return "a short reply"

    def wanted_reply(self, item: Item) -> None:
        """See `BaseScorer.wanted_reply`: a length is no text."""
