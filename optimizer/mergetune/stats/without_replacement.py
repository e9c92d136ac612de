"""Whether the mean over a fixed set of items is above zero, by those of them that were looked at so far.

The items are drawn in random order without replacement, and the claim is about this set alone. Had the mean
of all n items been 0, the next one would be mₜ = −(sum of those drawn)/(number of those left) on average, and
less if the mean is below 0. So whoever bets stakes g, spread evenly over (0, 1), on the next gain
xₜ ∈ [−1, 1] being above mₜ has the wealth W = ∫₀¹ Πₜ (1 + g·(xₜ − mₜ)/(1 + mₜ)) dg, which ever reaches 1/α
with probability α at most where the mean is 0 or less, however often one looks (Ville 1939). This is the
betting test of Waudby-Smith & Ramdas ("Estimating means of bounded random variables by betting", JRSS-B 2024,
section 5: sampling without replacement) with Cover's even stakes.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mergetune.errors import MergetuneError

_STAKES = (np.arange(64) + 0.5) / 64  # (n_stakes,)


def log_evidence(gains: NDArray[np.float64], n_items: int) -> float:
    """Return the logarithm of the greatest wealth reached: evidence that the mean of all items is above 0.

    It is above log(1/α) with probability α at most if the mean is 0 or less, at all looks together.

    Args:
        gains: (n_drawn,), in [−1, 1], in the order drawn.
        n_items: how many there are to be drawn.

    Raises:
        MergetuneError: a gain is not in [−1, 1], or there are more than there are items.
    """
    if len(gains) > n_items or not (np.abs(gains) <= 1).all():
        raise MergetuneError(
            f"Evidence on {n_items} items must be of so many gains in [-1, 1] at most, but got {len(gains)}."
        )
    if len(gains) == 0:
        return 0.0
    drawn = np.concatenate([[0.0], np.cumsum(gains)[:-1]])  # (n_drawn,), the sum before each
    expected = -drawn / (n_items - np.arange(len(gains)))  # mₜ, (n_drawn,)
    if (expected < -1).any():
        return math.inf  # whatever the others are, the mean is above 0
    room = 1 + expected  # 0 where the mean is 0 at least: nothing is left to bet on
    factors = np.divide(gains - expected, room, out=np.zeros_like(gains), where=room > 0)  # ≥ −1
    log_wealths = np.cumsum(np.log1p(np.multiply.outer(factors, _STAKES)), axis=0)  # (n_drawn, n_stakes)
    wealth = np.logaddexp.reduce(log_wealths, axis=1) - np.log(len(_STAKES))
    return max(float(wealth.max()), 0.0)
