"""The scorer `regex`: patterns are found in the reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import regex

from mergetune.errors import MergetuneError
from mergetune.evaluation.items import Item
from mergetune.evaluation.patterns import ReplyPattern
from mergetune.evaluation.scorers.scorer import BaseScorer

_SECONDS_TO_MATCH = 5.0  # for one pattern in one reply, which takes far less than a millisecond


class RegexScorer(BaseScorer):
    """The share of the patterns found in the reply: those given here and the item's own `patterns`.

    An item's `answer` is a good reply, as examples need it. Patterns are those of the package `regex`.
    """

    needs = "`patterns`, where the scorer has none; `answer`, a good reply, as an example"
    scores = "the share of the patterns found: the scorer's `patterns` and the item's own"

    kind: Literal["regex"] = "regex"
    patterns: tuple[ReplyPattern, ...] = ()
    ignore_case: bool = False

    def score(self, items: Sequence[Item], replies: Sequence[str]) -> list[float]:
        """See `BaseScorer.score`; an item whose pattern's search does not come to an end is an error."""
        return [self._share_found(item, reply) for item, reply in zip(items, replies, strict=True)]

    def check_item(self, item: Item, stop: Sequence[str] = (), *, is_example: bool = False) -> str | None:  # noqa: ARG002
        """See `BaseScorer.check_item`."""
        if is_example:
            return self.missing_answer(is_example) if item.answer is None else None
        has_some = self.patterns or item.patterns
        return None if has_some else "the scorer `regex` needs `patterns`, here or in the suite."

    def target_text(self, item: Item) -> str:
        """See `BaseScorer.target_text`: the patterns that the score counts."""
        return "\n".join(["the share met of these patterns:", *self.patterns, *item.patterns])

    def _share_found(self, item: Item, reply: str) -> float:
        every = [*self.patterns, *item.patterns]
        try:
            return sum(self._finds(pattern, reply) for pattern in every) / len(every)
        except TimeoutError as error:
            raise MergetuneError(f"The item {item.prompt[:80]!r} cannot be scored: {error}") from error

    def _finds(self, pattern: str, reply: str) -> bool:
        flags = regex.IGNORECASE if self.ignore_case else 0
        try:
            return regex.search(pattern, reply, flags, timeout=_SECONDS_TO_MATCH) is not None
        except TimeoutError as error:
            raise TimeoutError(
                f"the pattern {pattern!r} must come to an end, but was still searched for after "
                f"{_SECONDS_TO_MATCH:g} s in the reply {reply[:80]!r} ({len(reply)} characters). Mend the "
                "pattern: what is repeated in it should match a text in one way only, as (a|aa)+ does not."
            ) from error
