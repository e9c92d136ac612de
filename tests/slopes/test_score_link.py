"""The law from losses to scores, on models whose law is known."""

from __future__ import annotations

import math

import pytest

from mergetune.slopes.score_link import ScoreLink, fit_link


def share(link: ScoreLink, loss: float) -> float:
    return 1 / (1 + math.exp(link.log_odds(loss)))


@pytest.mark.parametrize("half", [0.05, 0.7, 3.0])
@pytest.mark.parametrize("steepness", [1.0, 2.5])
def test_a_law_is_found_again_from_its_own_scores(half: float, steepness: float) -> None:
    truth = ScoreLink(half, steepness)
    losses = [half * factor for factor in (0.1, 0.3, 0.8, 1.0, 1.5, 3.0, 10.0)]
    found = fit_link(losses, [share(truth, loss) for loss in losses])
    assert found.half == pytest.approx(half, rel=0.1)
    assert found.steepness == pytest.approx(steepness, rel=0.2)


def test_the_slope_of_the_odds_is_their_derivative() -> None:
    link, step = ScoreLink(0.4, 1.7), 1e-6
    numeric = (link.log_odds(0.9 + step) - link.log_odds(0.9 - step)) / (2 * step)
    assert link.log_odds_slope(0.9) == pytest.approx(numeric, rel=1e-6)
    assert share(link, 0.4) == pytest.approx(0.5)
    assert math.isfinite(link.log_odds_slope(0.0))


def test_two_models_are_enough_and_half_lies_between_them() -> None:
    found = fit_link([2.0, 0.1], [0.0, 1.0])
    assert 0.1 < found.half < 2.0
    assert share(found, 0.1) > 0.8
    assert share(found, 2.0) < 0.2


def test_a_loss_that_does_not_foretell_the_score_is_worth_little() -> None:
    clear = fit_link([0.1, 0.2, 1.0, 2.0], [1.0, 1.0, 0.0, 0.0])
    muddled = fit_link([0.1, 0.2, 1.0, 2.0], [0.0, 1.0, 0.0, 1.0])
    assert muddled.steepness < 0.6 * clear.steepness
