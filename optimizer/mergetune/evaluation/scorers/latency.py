"""The scorer `latency`: how long a reply takes."""

from __future__ import annotations

from typing import Literal

from mergetune.evaluation.items import Item
from mergetune.evaluation.scorers.cost import CostScorer


class LatencyScorer(CostScorer):
    """How many seconds a reply takes that is asked for alone, thoughts among it."""

    scores = (
        "the seconds from sending the request, alone, to the whole reply, thoughts among it; better when low"
    )
    asks = "seconds"

    kind: Literal["latency"] = "latency"

    def target_text(self, item: Item) -> str:  # noqa: ARG002
        """See `BaseScorer.target_text`."""
        return "a quick reply"
