"""The betting test on a fixed set of items: its error rate, looked at after every item, and its power."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from mergetune.errors import MergetuneError
from mergetune.stats.without_replacement import log_evidence

ALPHA = 0.05
Gains = NDArray[np.float64]


def pairs(n: int, better: float, worse: float) -> Gains:
    """Return the gains of right or wrong items: such shares better and worse, the others alike."""
    gains = np.zeros(n)
    gains[: round(better * n)] = 1.0
    gains[round(better * n) : round(better * n) + round(worse * n)] = -1.0
    return gains


def shifted(gains: Gains, mean: float) -> Gains:
    return np.asarray(gains - gains.mean() + mean)


def rate(gains: Gains, n_drawn: int, n_draws: int, seed: int = 0) -> float:
    """Return how often a random order of the items shows a mean above 0."""
    rng = np.random.default_rng(seed)
    drawn = (rng.permutation(gains)[:n_drawn] for _ in range(n_draws))
    return float(np.mean([log_evidence(each, len(gains)) >= -math.log(ALPHA) for each in drawn]))


@pytest.mark.parametrize(
    "gains",
    [
        pairs(60, 0.2, 0.2),
        pairs(400, 0.25, 0.25),
        pairs(1000, 0.01, 0.01),
        shifted(np.random.default_rng(1).beta(0.3, 2.0, 300), 0.0),
        shifted(-np.random.default_rng(1).beta(0.3, 2.0, 300), 0.0),
    ],
)
def test_a_mean_of_zero_is_taken_for_more_as_rarely_as_said(gains: Gains) -> None:
    assert abs(gains.mean()) < 1e-9
    n_draws = 1500
    allowed = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / n_draws)
    assert rate(gains, len(gains), n_draws) <= allowed
    assert rate(shifted(gains * 0.9, -0.02), len(gains), 300) <= ALPHA


def test_the_error_level_is_nearly_used_up() -> None:
    """A test that never found anything would pass the one above."""
    assert rate(pairs(1000, 0.25, 0.25), 900, 600) > 0.02


def test_a_difference_is_found_early() -> None:
    assert rate(pairs(400, 0.3, 0.1), 200, 100) > 0.9
    assert rate(pairs(4000, 0.2, 0.1), 500, 100) > 0.9


def test_wealth_is_a_fair_bet_where_the_mean_is_zero() -> None:
    """Over all orders of a few items the wealth at the end is one on average."""
    gains = np.array([1.0, -1.0, 0.5, -0.5, 0.25, -0.25])
    stakes = (np.arange(64) + 0.5) / 64
    wealths = []
    for order in permutations(gains):
        wealth, left = np.ones(64), list(order)
        while left:
            mean = sum(left) / len(left)
            wealth = wealth * (1 + stakes * (left[0] - mean) / (1 + mean) if mean > -1 else 1.0)
            left.pop(0)
        wealths.append(wealth.mean())
        assert log_evidence(np.array(order), 6) >= math.log(wealths[-1]) - 1e-9  # the greatest on the way
    assert np.mean(wealths) == pytest.approx(1.0)


def test_what_is_left_cannot_change_the_sign_any_more() -> None:
    assert log_evidence(np.ones(60), 100) == math.inf
    assert log_evidence(np.ones(50), 100) < math.inf  # the others may make it 0
    assert log_evidence(-np.ones(60), 100) == 0.0
    assert log_evidence(np.zeros(0), 100) == 0.0


@pytest.mark.parametrize(("gains", "n_items"), [([1.5], 10), ([math.nan], 10), ([0.0, 0.0], 1)])
def test_what_is_no_gain_is_refused(gains: list[float], n_items: int) -> None:
    with pytest.raises(MergetuneError, match="of so many gains in \\[-1, 1\\]"):
        log_evidence(np.array(gains), n_items)
