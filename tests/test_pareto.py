"""Fronts and hypervolumes, against Optuna's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from optuna._hypervolume import compute_hypervolume

from optimizer import pareto


def point_sets(n_objectives: int) -> st.SearchStrategy[pareto.Points]:
    grid = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])  # a grid makes equal values common
    return arrays(np.float64, st.tuples(st.integers(1, 8), st.just(n_objectives)), elements=grid)


@given(st.integers(1, 4).flatmap(point_sets))
@settings(max_examples=80, deadline=None)
def test_the_front_is_what_nothing_dominates(points: pareto.Points) -> None:
    found = pareto.front(points)
    for i, point in enumerate(points):
        beaten = any(pareto.dominates(list(other), list(point)) for other in points)
        assert (i in found) is not beaten


@given(point_sets(3))
@settings(max_examples=40, deadline=None)
def test_front_and_hypervolume_do_not_depend_on_the_order(points: pareto.Points) -> None:
    order = np.random.default_rng(0).permutation(len(points))
    assert {tuple(points[i]) for i in pareto.front(points)} == {
        tuple(points[order][i]) for i in pareto.front(points[order])
    }
    floor = [0.0] * 3
    assert pareto.hypervolume(points, floor) == pytest.approx(pareto.hypervolume(points[order], floor))


@given(st.integers(1, 4).flatmap(point_sets))
@settings(max_examples=80, deadline=None)
def test_hypervolume_agrees_with_optuna(points: pareto.Points) -> None:
    floor = np.full(points.shape[1], -0.1)
    theirs = compute_hypervolume(-points, -floor)
    assert pareto.hypervolume(points, list(floor)) == pytest.approx(theirs)


def test_points_not_above_the_reference_add_nothing() -> None:
    points = np.array([[0.9, 0.1], [0.5, 0.5]])
    assert pareto.hypervolume(points, [0.4, 0.4]) == pytest.approx(0.01)
    assert pareto.hypervolume(points[:1], [0.4, 0.4]) == 0.0
