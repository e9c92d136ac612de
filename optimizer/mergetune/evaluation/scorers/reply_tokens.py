"""The scorer `reply_tokens`: how long a reply is."""

from __future__ import annotations

from typing import Literal

from mergetune.evaluation.items import Item
from mergetune.evaluation.scorers.cost import CostScorer


class ReplyTokensScorer(CostScorer):
    """How many tokens of the model's own a reply has, thoughts among them."""

    scores = "the number of the reply's tokens, thoughts among them; better when low"
    asks = "tokens"

    kind: Literal["reply_tokens"] = "reply_tokens"

    def target_text(self, item: Item) -> str:  # noqa: ARG002
        """See `BaseScorer.target_text`."""
        return "a short reply"
