"""Batches of texts: those that begin alike together, those of like lengths together.

What texts of a batch begin with alike is computed once, and shorter texts are padded to the longest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_DEEPEST = 20  # how often a group is divided by what follows its common beginning

Text = Sequence[int]  # tokens


def plan_batches(texts: Sequence[Text], batch_size: int, overhead: float) -> list[list[int]]:
    """Divide texts into batches that cost little together, those with the longest texts first.

    Args:
        texts: tokens of each.
        batch_size: the most texts of a batch.
        overhead: what a batch costs beside its tokens, in tokens.

    Returns:
        The numbers of the texts in each batch.
    """
    plan = _Planner([list(text) for text in texts], batch_size, overhead).plan(range(len(texts)), _DEEPEST)
    return sorted(plan.batches, key=lambda batch: max(len(texts[number]) for number in batch), reverse=True)


def joined_batches(
    texts: Sequence[Text], batches: Sequence[list[int]], batch_size: int, overhead: float
) -> list[list[list[int]]]:
    """Join batches whose replies are generated together: the numbers of the texts in each batch of each.

    Shorter texts are padded to the longest, which costs each step so many tokens; each step less saves
    `overhead`.

    Args:
        texts: tokens of each.
        batches: of their numbers, those with the longest texts first.
        batch_size: the most texts of batches joined.
        overhead: what a step costs beside the tokens that it looks back at, in these.
    """
    joined: list[list[list[int]]] = []
    for batch in batches:
        length = max(len(texts[number]) for number in batch)
        if joined:
            longest = max(len(texts[number]) for number in joined[-1][0])
            n_texts = sum(map(len, joined[-1])) + len(batch)
            if n_texts <= batch_size and len(batch) * (longest - length) <= overhead:
                joined[-1].append(batch)
                continue
        joined.append([batch])
    return joined


def common_length(texts: Sequence[Text]) -> int:
    """Return how many tokens all texts begin with alike."""
    first, last = min(texts, key=list), max(texts, key=list)  # what these share, all between them share
    pairs = enumerate(zip(first, last, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(last)))


@dataclass(frozen=True)
class _Plan:
    cost: float  # in tokens
    batches: list[list[int]]


class _Planner:
    def __init__(self, texts: Sequence[list[int]], batch_size: int, overhead: float) -> None:
        self._texts, self._batch_size, self._overhead = texts, batch_size, overhead

    def plan(self, numbers: Sequence[int], depth: int) -> _Plan:
        """Plan batches of some texts: all together, or by the token that follows their common beginning."""
        n_alike = common_length([self._texts[number] for number in numbers])
        together = self._by_length(numbers)
        parts: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number in numbers:
            parts[tuple(self._texts[number][n_alike : n_alike + 1])].append(number)
        if depth == 0 or len(parts) == 1 or len(parts) * self._overhead > together.cost:
            return together
        plans = [self.plan(part, depth - 1) for part in parts.values()]
        apart = _Plan(sum(plan.cost for plan in plans), [batch for plan in plans for batch in plan.batches])
        return min(together, apart, key=lambda plan: plan.cost)

    def _by_length(self, numbers: Sequence[int]) -> _Plan:
        """Cut texts, the longest first, where it costs least.

        What several texts in a row begin with alike is the least that two neighbours do.
        """
        order = sorted(numbers, key=lambda number: len(self._texts[number]), reverse=True)
        lengths = [len(self._texts[number]) for number in order]
        alike = [
            common_length([self._texts[one], self._texts[next_one]]) for one, next_one in pairwise(order)
        ]
        best: list[tuple[float, int]] = [(0.0, 0)]  # of the first n texts: the cost, and the last cut
        for end in range(1, len(order) + 1):
            costs, n_alike = [], lengths[end - 1]
            for start in range(end - 1, max(0, end - self._batch_size) - 1, -1):
                if start < end - 1:
                    n_alike = min(n_alike, alike[start])
                padded = (end - start) * (lengths[start] - n_alike)
                costs.append((best[start][0] + self._overhead + n_alike + padded, start))
            best.append(min(costs))
        batches, end = [], len(order)
        while end:
            start = best[end][1]
            batches.append(order[start:end])
            end = start
        return _Plan(best[-1][0], batches)
