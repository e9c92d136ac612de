"""What a merge loses of the experts' gains, and how much a gain counts that may be noise.

One objective, its scores signed so that greater is better: b is the base's, yᵢ that of expert i of K, and y a
merge's. The best expert's gain is g = max(0, maxᵢ yᵢ − b), and the merge loses

    loss = (b + g − y) · (r / g + (1 − r) / d),    r = min(1, maxᵢ (yᵢ − b) / (z sᵢ))²

with r = 0 where no expert is ahead of the base. sᵢ is the standard error of yᵢ − b, paired by item, z the
normal quantile of 1 − 0.025 / K, and d the largest score of an item less the smallest: 1 where items are
right or wrong.

A gain is clear where an expert is z standard errors ahead: did no expert gain, noise alone would do that in
2.5 % of the studies (Bonferroni over the experts, for the best of several is too good to be true). Then r = 1
and the loss is the share of the gain that the merge does not keep. A gain that is not clear is no measure of
anything: by one item of 200, a merge that is two items behind would lose twice of all there is to gain. So
what it is divided by is never less than z sᵢ, and the less there is of it (r → 0) the more a merge is judged
by its plain distance from the best, as a share of the items' range d. The loss is continuous in the scores,
and neither the unit nor the zero of a score matters. What this does to choices: benchmarks/choosing.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mergetune.stats.paired import paired_stderrs
from mergetune.stats.resampling import Floats, ItemScores

CHANCE = 0.025  # how often noise alone passes for a clear gain
FEW = 10  # items that differ; fewer do not show how far a difference can be off
ROUNDING = 1e-9  # differences of scores this small, in shares of the scores, are none


@dataclass(frozen=True)
class GainScale:
    """How far differences to the base can be off on one objective, and how far its items reach.

    Attributes:
        stderrs: the paired standard error of each candidate's difference to the base, by candidate name;
            where few items differ, no less than what one of all items weighs, for equal answers to these
            items are no certainty.
        spread: the largest score of an item less the smallest, of the base and the experts, so that a broken
            merge does not stretch it; 1 where all are alike.
    """

    stderrs: Mapping[str, float]
    spread: float

    @classmethod
    def of(cls, items: ItemScores, base: str, experts: Sequence[str]) -> GainScale:
        """Return the scale of one objective, from what was measured."""
        column = items.scores[:, items.names.index(base)]
        known = items.of([base, *experts]).scores
        spread = float(np.nanmax(known) - np.nanmin(known)) or 1.0
        n_differ = (np.abs(items.scores - column[:, None]) > ROUNDING * spread).sum(axis=0)
        least = np.where(n_differ < FEW, spread / len(items.scores), 0.0)
        stderrs = np.maximum(paired_stderrs(items.scores, column, items.tasks), least)
        return cls(dict(zip(items.names, stderrs.tolist(), strict=True)), spread)

    def clear(self, experts: Sequence[str]) -> Floats:
        """Return how far ahead of the base each expert must be to gain clearly, (n_experts,)."""
        return clear_gains(np.array([self.stderrs[name] for name in experts]), self.spread)


class Gain(NamedTuple):
    """The best expert's gain over the base: where it ends, what a unit of score costs, whether it is clear.

    Each is (..., 1), to go with scores of candidates, (..., n_candidates).
    """

    goal: Floats
    rate: Floats
    is_clear: NDArray[np.bool_]

    def loss(self, own: Floats) -> Floats:
        """Return what is lost at signed scores, (..., n_candidates)."""
        return np.asarray((self.goal - own) * self.rate)


def clear_gains(stderrs: Floats, spread: float) -> Floats:
    """Return from where on gains are clear, z sᵢ above, by their standard errors, both (n_experts,)."""
    z = float(stats.norm.isf(CHANCE / max(len(stderrs), 1)))
    return np.asarray(z * np.maximum(stderrs, ROUNDING * spread))


def best_gain(base: Floats, experts: Floats, clear: Floats, spread: float) -> Gain:
    """Return the best expert's gain over the base.

    Args:
        base: the base's signed score, (..., 1).
        experts: the experts' signed scores, (..., n_experts).
        clear: from `GainScale.clear`, (n_experts,).
        spread: of the items' scores.
    """
    ahead = experts - base
    gain = np.max(ahead, axis=-1, keepdims=True, initial=0.0)
    sureness = np.max(ahead / clear, axis=-1, keepdims=True, initial=0.0)
    return Gain(base + gain, loss_rate(gain, sureness, spread), sureness >= 1)


def loss_rate(gain: Floats, sureness: Floats, spread: float) -> Floats:
    """Return what a unit of score costs: r / g + (1 − r) / d above.

    Args:
        gain: g.
        sureness: the gain over what would be a clear one; from 1 on it is clear.
        spread: d.
    """
    reliability = np.minimum(sureness, 1.0) ** 2
    by_gain = np.divide(reliability, gain, out=np.zeros_like(gain), where=gain > 0)
    return np.asarray(by_gain + (1 - reliability) / spread)
