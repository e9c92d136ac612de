"""Low-rank updates: stacking is exact, and a cut is the nearest matrix of its rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergetune.weights.low_rank import LowRank, nearest, stacked


def drawn(out: int, inside: int, rank: int, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(out, rank, generator=generator), torch.randn(rank, inside, generator=generator)
    )


def best_error(matrix: torch.Tensor, rank: int) -> float:
    """The least distance of a matrix of this rank, by numpy (Eckart & Young)."""
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    return float(np.linalg.norm(values[rank:]))


sizes = st.integers(1, 12)


@given(out=sizes, inside=sizes, ranks=st.tuples(sizes, sizes), weights=st.tuples(*[st.floats(-2, 2)] * 2))
def test_stacked_factors_are_the_sum_of_the_products(
    out: int, inside: int, ranks: tuple[int, int], weights: tuple[float, float]
) -> None:
    terms = [(w, drawn(out, inside, rank, i)) for i, (w, rank) in enumerate(zip(weights, ranks, strict=True))]
    found = stacked(terms)
    wanted = sum((w * each.b @ each.a for w, each in terms), torch.zeros(out, inside))
    torch.testing.assert_close(found.b @ found.a, wanted, rtol=1e-4, atol=1e-4)
    assert found.rank == sum(ranks)
    assert found.norm == pytest.approx(float(wanted.norm()), rel=1e-4, abs=1e-4)


@given(out=sizes, inside=sizes, own=sizes, rank=sizes)
def test_a_cut_is_the_nearest_and_knows_its_distance(out: int, inside: int, own: int, rank: int) -> None:
    update = drawn(out, inside, own)
    found, error = update.cut(rank)
    product = update.b.double() @ update.a.double()
    assert found.rank == min(rank, own, out, inside)
    assert error == pytest.approx(best_error(product, rank), abs=1e-5)
    assert error == pytest.approx(float((product - found.b.double() @ found.a.double()).norm()), abs=1e-4)


def test_what_two_experts_share_takes_rank_once() -> None:
    update = drawn(20, 30, 4)
    found, error = stacked([(0.5, update), (0.25, update)]).cut(64)
    assert found.rank == 4
    assert error < 1e-6
    torch.testing.assert_close(found.b @ found.a, 0.75 * update.b @ update.a, rtol=1e-4, atol=1e-5)


def test_an_update_of_nothing_is_cut_to_nothing() -> None:
    found, error = LowRank(torch.zeros(4, 3), torch.ones(3, 5)).cut(2)
    assert (found.rank, error) == (1, 0.0)
    assert not (found.b @ found.a).any()


@pytest.mark.parametrize("shape", [(30, 40), (400, 300), (300, 400)], ids=["whole", "tall", "wide"])
def test_the_nearest_of_a_matrix_is_as_near_as_any(shape: tuple[int, int]) -> None:
    """Of fine-tuning's kind: a few strong directions, and noise on every entry."""
    strong = drawn(*shape, 6)
    matrix = strong.b @ strong.a + torch.randn(shape, generator=torch.Generator().manual_seed(3))
    found, error = nearest(matrix, 8)
    assert found.rank == 8
    assert error == pytest.approx(float((matrix - found.b @ found.a).norm()), rel=1e-5)
    assert error <= 1.005 * best_error(matrix, 8)
    again, _ = nearest(matrix, 8)
    assert torch.equal(found.b, again.b)
