"""What a merge loses of the experts' gains, where they are clear and where noise may have made them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergetune.stats.gains import CHANCE, Gain, GainScale, best_gain, clear_gains
from mergetune.stats.resampling import Floats, ItemScores

SCORES = st.floats(-1, 1)
STDERRS = st.lists(st.floats(0.001, 0.5), min_size=1, max_size=5)


def gain_of(base: float, experts: list[float], stderrs: list[float], spread: float = 1.0) -> Gain:
    return best_gain(np.array([base]), np.array(experts), clear_gains(np.array(stderrs), spread), spread)


def loss(gain: Gain, own: float) -> float:
    return float(gain.loss(np.array([own]))[0])


def test_a_clear_gain_is_shared_out() -> None:
    gain = gain_of(0.1, [0.3, 0.9], [0.05, 0.05])
    assert gain.is_clear
    for own, lost in ((0.9, 0.0), (0.7, 0.25), (0.1, 1.0), (-0.1, 1.25), (1.0, -0.125)):
        assert loss(gain, own) == pytest.approx(lost)


@given(SCORES, st.lists(st.floats(0.001, 1), min_size=1, max_size=4), SCORES)
def test_where_no_expert_gains_the_distance_from_the_base_counts(
    base: float, behind: list[float], own: float
) -> None:
    gain = gain_of(base, [base - each for each in behind], [0.1] * len(behind), spread=2.0)
    assert not gain.is_clear
    assert loss(gain, own) == pytest.approx((base - own) / 2)


@given(st.floats(0, 2), st.floats(0.001, 0.5), st.floats(0, 1))
def test_nothing_is_divided_by_less_than_what_would_be_clear(ahead: float, stderr: float, own: float) -> None:
    gain = gain_of(0.0, [ahead], [stderr])
    assert gain.rate[0] <= 1 / clear_gains(np.array([stderr]), 1.0)[0] + 1 + 1e-9
    assert loss(gain, 0.0) <= 1 + ahead


@given(SCORES, STDERRS, st.data())
def test_the_loss_is_continuous_in_the_scores(base: float, stderrs: list[float], data: st.DataObject) -> None:
    """A step of a millionth moves it by no more than a few steps over what is clear, squared."""
    experts = [data.draw(SCORES) for _ in stderrs]
    own, step = data.draw(SCORES), 1e-6
    shifted = [value + step * data.draw(st.sampled_from([-1, 1])) for value in experts]
    bound = 30 * step / min(1, clear_gains(np.array(stderrs), 1.0).min()) ** 2
    before, after = gain_of(base, experts, stderrs), gain_of(base, shifted, stderrs)
    assert abs(loss(before, own) - loss(after, own)) <= bound


def items_of(rng: np.random.Generator, n_items: int = 40) -> ItemScores:
    scores = rng.random((n_items, 4)).round(1)
    return ItemScores(("base", "expert-a", "expert-b", "m"), scores, rng.integers(2, size=n_items))


def loss_of(items: ItemScores, sign: int = 1) -> float:
    experts = items.names[1:3]
    scale, values = GainScale.of(items, "base", experts), sign * items.scores.mean(axis=0)
    gain = best_gain(values[:1], values[1:3], scale.clear(experts), scale.spread)
    return float(gain.loss(values)[3])


@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-100, 100))
@settings(max_examples=50)
def test_neither_unit_nor_zero_nor_direction_of_a_score_matters(seed: int, unit: float, zero: float) -> None:
    items = items_of(np.random.default_rng(seed))
    changed = ItemScores(items.names, unit * items.scores + zero, items.tasks)
    turned = ItemScores(items.names, zero - unit * items.scores, items.tasks)
    assert loss_of(changed) == pytest.approx(loss_of(items), abs=1e-6)
    assert loss_of(turned, sign=-1) == pytest.approx(loss_of(items), abs=1e-6)


def test_resamples_have_a_gain_each() -> None:
    rng = np.random.default_rng(0)
    base, experts, clear = rng.random((50, 1)), rng.random((50, 3)), np.array([0.1, 0.3, 0.9])
    together = best_gain(base, experts, clear, 1.0)
    for row in range(50):
        alone = best_gain(base[row], experts[row], clear, 1.0)
        for ours, theirs in zip(together, alone, strict=True):
            assert ours[row] == pytest.approx(theirs)


@pytest.mark.parametrize("n_experts", [1, 2, 8])
def test_of_experts_that_do_not_gain_the_best_seldom_looks_clearly_better(n_experts: int) -> None:
    rng, n_items, n_studies = np.random.default_rng(1), 200, 2000
    n_clear = 0
    for _ in range(n_studies):
        luck = rng.normal(size=(n_items, 1)) + 0.5 * rng.normal(size=(n_items, 1 + n_experts))
        n_clear += is_clear((luck > 0).astype(float))
    assert 0.2 * CHANCE < n_clear / n_studies < 1.6 * CHANCE  # right and wrong items come in steps


def is_clear(scores: Floats) -> bool:
    names = tuple(map(str, range(scores.shape[1])))
    items, values = ItemScores(names, scores, np.zeros(len(scores))), scores.mean(axis=0)
    scale = GainScale.of(items, "0", names[1:])
    return bool(best_gain(values[:1], values[1:], scale.clear(names[1:]), scale.spread).is_clear)


def test_models_that_answer_alike_show_no_gain_whatever_rounding_and_smoothing_make_of_it() -> None:
    scores = np.full((90, 2), 1 / 3)
    scores[0] = 0.7
    scale = GainScale.of(ItemScores(("base", "expert-a"), scores, np.zeros(90)), "base", ["expert-a"])
    assert scale.stderrs["expert-a"] == pytest.approx((0.7 - 1 / 3) / 90)
    for rounding in (1e-16, 1e-9, 1e-6):
        gain = best_gain(
            np.array([1 / 3]), np.array([1 / 3 + rounding]), scale.clear(["expert-a"]), scale.spread
        )
        assert not gain.is_clear
        assert loss(gain, 0.0) == pytest.approx(1 / 3 / (0.7 - 1 / 3), rel=0.01)


def test_a_broken_merge_does_not_change_what_the_others_lose() -> None:
    rng, names = np.random.default_rng(0), ("base", "expert-a", "m", "broken")
    base = -rng.gamma(2, 2, size=200)
    scores = np.stack([base, base + rng.normal(-0.05, 0.6, size=200), base - 3, 1e6 * base], axis=1)
    tasks, experts = np.zeros(200), ["expert-a"]
    with_it, without = ItemScores(names, scores, tasks), ItemScores(names[:3], scores[:, :3], tasks)
    first, second = (GainScale.of(items, "base", experts) for items in (with_it, without))
    assert first.spread == second.spread == np.ptp(scores[:, :2])
