"""Fronts and hypervolumes, against Optuna's, plain loops, and inclusion and exclusion."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from optuna._hypervolume import compute_hypervolume

from helpers import dominates
from mergetune.stats import pareto

GRID = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])  # a grid makes equal values and equal points common
FLOORS = st.sampled_from([-0.1, 0.0, 0.25, 0.5])  # points on the reference and below it are common, too


def point_sets(
    n_objectives: int, elements: st.SearchStrategy[float] = GRID
) -> st.SearchStrategy[pareto.Points]:
    return arrays(np.float64, st.tuples(st.integers(1, 8), st.just(n_objectives)), elements=elements)


def by_inclusion_and_exclusion(points: pareto.Points, floor: float) -> float:
    """Add the boxes, take off what two share, add what three share, and so on."""
    boxes = np.maximum(points - floor, 0.0)
    return float(
        sum(
            (-1) ** (size + 1) * boxes[list(some)].min(axis=0).prod()
            for size in range(1, len(boxes) + 1)
            for some in itertools.combinations(range(len(boxes)), size)
        )
    )


def on_sphere(n_points: int, n_objectives: int) -> pareto.Points:
    """Points none of which dominates another."""
    directions = np.abs(np.random.default_rng(0).normal(size=(n_points, n_objectives)))
    return np.asarray(directions / np.linalg.norm(directions, axis=1, keepdims=True))


@given(st.integers(1, 5).flatmap(point_sets))
@settings(max_examples=150)
def test_the_front_is_what_nothing_dominates(points: pareto.Points) -> None:
    found = pareto.front(points)
    for i, point in enumerate(points):
        beaten = any(dominates(list(other), list(point)) for other in points)
        assert (i in found) is not beaten


@pytest.mark.parametrize("n_objectives", [1, 2, 3, 4, 5])
def test_of_many_points_the_front_is_what_nothing_dominates(n_objectives: int) -> None:
    points = np.random.default_rng(n_objectives).integers(0, 6, (300, n_objectives)).astype(np.float64)
    no_worse = (points[:, None] >= points[None]).all(axis=2)
    better = (points[:, None] > points[None]).any(axis=2)
    assert pareto.front(points) == np.flatnonzero(~(no_worse & better).any(axis=0)).tolist()


def test_no_points_have_no_front_and_no_volume() -> None:
    assert pareto.front(np.empty((0, 3))) == []
    assert pareto.hypervolume(np.empty((0, 3)), [0.0] * 3) == 0.0
    assert pareto.growing_hypervolumes(np.empty((0, 3)), [0.0] * 3).tolist() == []


@given(point_sets(3))
@settings(max_examples=40)
def test_front_and_hypervolume_do_not_depend_on_the_order(points: pareto.Points) -> None:
    order = np.random.default_rng(0).permutation(len(points))
    assert {tuple(points[i]) for i in pareto.front(points)} == {
        tuple(points[order][i]) for i in pareto.front(points[order])
    }
    floor = [0.0] * 3
    assert pareto.hypervolume(points, floor) == pytest.approx(pareto.hypervolume(points[order], floor))


@given(st.integers(1, 5).flatmap(point_sets))
@settings(max_examples=150)
def test_hypervolume_agrees_with_optuna(points: pareto.Points) -> None:
    floor = np.full(points.shape[1], -0.1)
    theirs = compute_hypervolume(-points, -floor)
    assert pareto.hypervolume(points, list(floor)) == pytest.approx(theirs)


@given(st.integers(1, 5).flatmap(point_sets), FLOORS)
@settings(max_examples=200)
def test_hypervolume_is_that_of_inclusion_and_exclusion(points: pareto.Points, floor: float) -> None:
    found = pareto.hypervolume(points, [floor] * points.shape[1])
    assert found == pytest.approx(by_inclusion_and_exclusion(points, floor), abs=1e-12)


@given(st.integers(1, 5).flatmap(lambda m: point_sets(m, st.floats(-1, 1, width=32))))
@settings(max_examples=100)
def test_hypervolume_of_any_numbers_is_that_of_inclusion_and_exclusion(points: pareto.Points) -> None:
    found = pareto.hypervolume(points, [0.0] * points.shape[1])
    assert found == pytest.approx(by_inclusion_and_exclusion(points, 0.0), abs=1e-12)


@given(st.integers(1, 5).flatmap(point_sets), FLOORS)
@settings(max_examples=100)
def test_growing_hypervolumes_are_those_of_the_first_points(points: pareto.Points, floor: float) -> None:
    reference = [floor] * points.shape[1]
    found = pareto.growing_hypervolumes(points, reference)
    each = [pareto.hypervolume(points[: i + 1], reference) for i in range(len(points))]
    assert found == pytest.approx(each, abs=1e-12)


def test_points_not_above_the_reference_add_nothing() -> None:
    points = np.array([[0.9, 0.1], [0.5, 0.5]])
    assert pareto.hypervolume(points, [0.4, 0.4]) == pytest.approx(0.01)
    assert pareto.hypervolume(points[:1], [0.4, 0.4]) == 0.0


@pytest.mark.parametrize("n_objectives", [4, 5])
def test_five_hundred_points_of_the_front_take_no_time(n_objectives: int) -> None:
    points = on_sphere(500, n_objectives)
    began = time.process_time()
    volume = pareto.hypervolume(points, [0.0] * n_objectives)
    volumes = pareto.growing_hypervolumes(points, [0.0] * n_objectives)
    assert time.process_time() - began < 2  # by slices of one objective: 16 s for four, for the first line
    assert volumes[-1] == pytest.approx(volume)
    assert len(pareto.front(points)) == 500
