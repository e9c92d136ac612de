"""From losses to scores: what a loss is worth, learned from models whose scores are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from mergetune.stats.resampling import Floats

TINY = 1e-6  # nats; a loss below is none
_LITTLE = 0.1  # of the loss at which half of a gain is kept
_STEEPNESS, _SPREAD = 1.5, 1.0  # prior of the steepness: log-normal, with this spread of its log
_WEIGHT = 8  # how many items each model counts as: a link is a rough law, however many were scored


@dataclass(frozen=True)
class ScoreLink:
    """A logistic law in the log of the loss: the share kept of a gain is 1 / (1 + odds).

    Attributes:
        half: the loss, in nats, at which half of the gain is kept.
        steepness: how many times more the odds of failure grow, in per cent, than the loss does.
    """

    half: float
    steepness: float

    def log_odds(self, loss: float) -> float:
        """Return the log of the odds of failure at a loss."""
        return self.steepness * math.log(max(loss, TINY) / self.half)

    def log_odds_slope(self, loss: float) -> float:
        """Return its derivative with respect to the loss; where little fails, as if a little more did."""
        return self.steepness / max(loss, _LITTLE * self.half)


def fit_link(losses: Sequence[float], shares: Sequence[float]) -> ScoreLink:
    """Fit the law to models whose loss and share of the gain are both known.

    It is a logistic regression of the share on the log of the loss with a weak prior, so that two models
    are enough, and none of them has to fail or succeed on all items.

    Args:
        losses: in nats, (n_models,).
        shares: of the gain between the worst and the best known score, in [0, 1], (n_models,).
    """
    logs = np.log(np.maximum(losses, TINY))
    kept = np.asarray(shares, dtype=np.float64)
    centre, width = float(logs.mean()), max(float(np.ptp(logs)), 1.0)

    def cost(theta: Floats) -> float:
        log_odds = math.exp(theta[1]) * (logs - theta[0])
        paid = special.xlogy(kept, special.expit(-log_odds)) + special.xlogy(
            1 - kept, special.expit(log_odds)
        )
        prior = ((theta[0] - centre) / width) ** 2 + ((theta[1] - math.log(_STEEPNESS)) / _SPREAD) ** 2
        return float(prior / 2 - _WEIGHT * paid.sum())

    found = optimize.minimize(
        cost, [centre, math.log(_STEEPNESS)], method="L-BFGS-B", bounds=[(None, None), (-2, 3)]
    )
    return ScoreLink(math.exp(found.x[0]), math.exp(found.x[1]))
