"""Spherical merges from the Gram matrix: against mergekit, which sees the tensors, and by their algebra."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_tensors
from mergekit.merge_methods.karcher import karcher_merge_tensors
from torch import Tensor

from mergetune.merging import spherical

SHAPE = (24, 16)
ts = pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
seeds = st.integers(0, 2**16)
weight_lists = st.lists(st.floats(0.05, 2), min_size=4, max_size=4)


def random_tensors(n: int, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> list[Tensor]:
    """Tensors of different lengths that are not orthogonal: a shared part gives cosines of about 0.2."""
    generator = torch.Generator().manual_seed(seed)
    shared = 0.5 * torch.randn(shape, generator=generator)
    return [(0.5 + i) * (shared + torch.randn(shape, generator=generator)) for i in range(n)]


def gram_of(tensors: Sequence[Tensor]) -> Tensor:
    rows = torch.stack([tensor.flatten() for tensor in tensors]).double()
    return rows @ rows.T


def combine(weights: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Σ wᵢ vᵢ in float32; the weights of row-wise merges hold one more dimension, the rows."""
    assert weights.dtype == torch.float64
    columns = weights.movedim(-1, 0)
    columns = columns.unsqueeze(-1) if weights.dim() > 1 else columns
    total = torch.zeros_like(tensors[0])
    for column, tensor in zip(columns, tensors, strict=True):
        total += column.float() * tensor
    return total


def row_grams(tensors: Sequence[Tensor]) -> Tensor:
    """One Gram matrix for each row: (rows, n, n)."""
    rows = torch.stack(list(tensors), dim=1).double()  # (rows, n, length)
    return rows @ rows.mT


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def mergekit_nuslerp(tensors: Sequence[Tensor], t: float, base: int | None = None, **options: bool) -> Tensor:
    parameters = {"weight": [1 - t, t], **options}
    merged: Tensor = merge_tensors(tensors, "nuslerp", parameters=parameters, base_index=base)
    return merged


# --- slerp and nuslerp ------------------------------------------------------------------------------


@ts
@pytest.mark.parametrize("seed", [0, 1])
def test_slerp_agrees_with_mergekit(t: float, seed: int) -> None:
    tensors = random_tensors(2, seed=seed)
    theirs = merge_tensors(tensors, "slerp", parameters={"t": t}, base_index=0)
    close(combine(spherical.slerp(gram_of(tensors), t), tensors), theirs)


@ts
def test_nuslerp_agrees_with_mergekit_with_and_without_a_base(t: float) -> None:
    base, *tensors = random_tensors(3)
    close(combine(spherical.nuslerp(gram_of(tensors), t), tensors), mergekit_nuslerp(tensors, t))
    vectors = [tensor - base for tensor in tensors]
    theirs = mergekit_nuslerp([base, *tensors], t, base=0)
    close(base + combine(spherical.nuslerp(gram_of(vectors), t), vectors), theirs)


@ts
@pytest.mark.parametrize(("row_wise", "dim"), [(True, 0), (False, -1)])
@pytest.mark.parametrize("shape", [(24, 16), (6, 4, 5)])
def test_mergekits_row_wise_nuslerp_takes_vectors_along_the_first_dimension(
    t: float, row_wise: bool, dim: int, shape: tuple[int, ...]
) -> None:
    tensors = random_tensors(2, shape)
    theirs = mergekit_nuslerp(tensors, t, nuslerp_row_wise=row_wise, nuslerp_flatten=False)
    lines = [tensor.movedim(dim, -1).flatten(end_dim=-2) for tensor in tensors]  # (rows, length)
    merged = combine(spherical.nuslerp(row_grams(lines), t), lines)
    if row_wise:  # `movedim` puts the vectors last and mergekit swaps: each vector is the same
        theirs = theirs.movedim(0, -1)
    close(merged, theirs.reshape(merged.shape))


def test_a_tensor_of_one_dimension_is_one_row_for_row_wise_nuslerp() -> None:
    tensors = random_tensors(2, (40,))
    theirs = mergekit_nuslerp(tensors, 0.3, nuslerp_row_wise=True, nuslerp_flatten=False)
    close(combine(spherical.nuslerp(gram_of(tensors), 0.3), tensors), theirs)


@ts
def test_slerp_and_nuslerp_of_identical_vectors_give_them_back(t: float) -> None:
    tensors = random_tensors(1) * 2
    gram = gram_of(tensors)
    close(combine(spherical.slerp(gram, t), tensors), tensors[0])
    close(combine(spherical.nuslerp(gram, t), tensors), tensors[0])
    close(combine(spherical.nuslerp(gram, t), tensors), mergekit_nuslerp(tensors, t))


@ts
def test_slerp_and_nuslerp_of_antipodal_vectors_are_the_straight_line(t: float) -> None:
    vector = torch.ones(16)  # its norm is exact in float32, so mergekit sees it as antipodal, too
    tensors = [vector, -2 * vector]
    theirs = merge_tensors(tensors, "slerp", parameters={"t": t}, base_index=0)
    close(combine(spherical.slerp(gram_of(tensors), t), tensors), theirs)
    close(combine(spherical.nuslerp(gram_of(tensors), t), tensors), mergekit_nuslerp(tensors, t))
    noisy = random_tensors(1)[0]
    line = torch.tensor([1 - t, t], dtype=torch.float64)
    torch.testing.assert_close(spherical.nuslerp(gram_of([noisy, -noisy / 3]), t), line)


@ts
def test_nuslerp_stays_on_the_arc_where_slerp_takes_the_line(t: float) -> None:
    first, other = random_tensors(2)
    tensors = [first, 1.5 * first + 0.01 * other]
    gram = gram_of(tensors)
    assert spherical.slerp(gram, t).tolist() == [1 - t, t]
    close(combine(spherical.nuslerp(gram, t), tensors), mergekit_nuslerp(tensors, t))


@ts
def test_slerp_with_a_zero_vector_is_the_line_and_nuslerp_takes_it_as_orthogonal(t: float) -> None:
    tensors = [random_tensors(1)[0], torch.zeros(SHAPE)]
    gram = gram_of(tensors)
    assert spherical.slerp(gram, t).tolist() == [1 - t, t]
    close(combine(spherical.nuslerp(gram, t), tensors), mergekit_nuslerp(tensors, t))


@given(seeds, st.floats(0, 1))
@settings(max_examples=30)
def test_swapping_the_vectors_of_slerp_swaps_t(seed: int, t: float) -> None:
    first, second = random_tensors(2, (6,), seed)
    for interpolate in (spherical.slerp, spherical.nuslerp):
        swapped = interpolate(gram_of([second, first]), 1 - t).flip(-1)
        torch.testing.assert_close(interpolate(gram_of([first, second]), t), swapped)


def test_rows_are_independent_of_each_other() -> None:
    tensors = random_tensors(2, (5, 8))
    tensors[1][2] = tensors[0][2]  # colinear
    tensors[1][3] = 0
    rows = row_grams(tensors)
    for interpolate in (spherical.slerp, spherical.nuslerp):
        one_by_one = [interpolate(gram, 0.3) for gram in rows]
        torch.testing.assert_close(interpolate(rows, 0.3), torch.stack(one_by_one))
    for mean in (spherical.karcher, spherical.model_stock, lambda gram: spherical.multislerp(gram, [1, 2])):
        torch.testing.assert_close(mean(rows), torch.stack([mean(gram) for gram in rows]))


# --- multi-SLERP ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights",
    [[1, 1], [1, 0], [0, 2], [0.2, 0.5, 0.3], [3, 1, 2], [2, -0.5, 1], [1, 0, 0, 0, 0], [1, 2, 3, 4, 5]],
)
def test_multislerp_agrees_with_mergekit_with_and_without_a_base(weights: list[float]) -> None:
    base, *tensors = random_tensors(len(weights) + 1)
    theirs = merge_tensors(tensors, "multislerp", parameters={"weight": weights})
    close(combine(spherical.multislerp(gram_of(tensors), weights), tensors), theirs)
    vectors = [tensor - base for tensor in tensors]
    theirs = merge_tensors([base, *tensors], "multislerp", parameters={"weight": weights}, base_index=0)
    close(base + combine(spherical.multislerp(gram_of(vectors), weights), vectors), theirs)


def test_multislerp_of_identical_orthogonal_and_zero_vectors_agrees_with_mergekit() -> None:
    first, second, third = random_tensors(3)
    orthogonal = [torch.eye(4)[0], 2 * torch.eye(4)[1], 3 * torch.eye(4)[2]]
    for tensors in (
        [first] * 3,
        orthogonal,
        [first, torch.zeros(SHAPE), third],
        [torch.zeros(SHAPE), second],
    ):
        weights = [1.0, 2.0, 3.0][: len(tensors)]
        theirs = merge_tensors(tensors, "multislerp", parameters={"weight": weights})
        close(combine(spherical.multislerp(gram_of(tensors), weights), tensors), theirs)


def test_multislerp_of_two_balanced_vectors_is_the_straight_line() -> None:
    exact = [torch.ones(16), -3 * torch.ones(16)]  # no rounding: mergekit misses others and scales noise
    theirs = merge_tensors(exact, "multislerp", parameters={"weight": 0.5})
    close(combine(spherical.multislerp(gram_of(exact), [0.5, 0.5]), exact), theirs)
    vector = random_tensors(1)[0]
    assert spherical.multislerp(gram_of([vector, -3 * vector]), [2, 2]).tolist() == [0.5, 0.5]
    unbalanced = spherical.multislerp(gram_of([vector, -vector]), [0.75, 0.25])
    close(combine(unbalanced, [vector, -vector]), vector)


def test_multislerp_refuses_more_vectors_that_balance_out() -> None:
    first, second = random_tensors(2)
    gram = gram_of([first, -2 * first, second, -second])
    with pytest.raises(ValueError, match=r"balance out with weights=\[1, 1, 2, 2\]. Change a weight"):
        spherical.multislerp(gram, [1, 1, 2, 2])
    assert spherical.multislerp(gram, [1, 1, 0, 0]).tolist() == [0.5, 0.5, 0, 0]  # two take part
    with pytest.raises(ValueError, match=r"`sum\(weights\) != 0` must hold"):
        spherical.multislerp(gram, [1, -1, 0, 0])


def test_multislerp_of_zero_vectors_is_zero_and_raises_nothing() -> None:
    assert spherical.multislerp(torch.zeros(3, 3, dtype=torch.float64), [1, 1, 2]).tolist() == [
        0.25,
        0.25,
        0.5,
    ]


# --- Karcher mean -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_karcher_agrees_with_mergekit(count: int, seed: int) -> None:
    tensors = random_tensors(count, seed=seed)
    close(combine(spherical.karcher(gram_of(tensors)), tensors), merge_tensors(tensors, "karcher"))


@pytest.mark.parametrize("weights", [[1, 0], [0, 1], [0.1, 0.9], [0.2, 0.5, 0.3], [0.1, 0.2, 0.3, 0.4]])
def test_weighted_karcher_agrees_with_mergekit(weights: list[float]) -> None:
    tensors = random_tensors(len(weights))
    theirs = karcher_merge_tensors(tensors, weights)
    close(combine(spherical.karcher(gram_of(tensors), [3 * w for w in weights]), tensors), theirs)


def test_karcher_stops_where_it_is_told_to() -> None:
    vectors = list(torch.tensor([[1.0, 0, 0], [-0.9, 0.4, 0], [0, 0.1, 3], [0.2, 1, -1]]))
    for max_iter, tol in ((0, 1e-5), (1, 1e-5), (3, 1e-5), (10, 0.2)):
        theirs = merge_tensors(vectors, "karcher", parameters={"max_iter": max_iter, "tol": tol})
        close(combine(spherical.karcher(gram_of(vectors), max_iter=max_iter, tol=tol), vectors), theirs)


def test_karcher_of_special_vectors_agrees_with_mergekit() -> None:
    first, second, third = random_tensors(3)
    orthogonal = [torch.eye(4)[0], 2 * torch.eye(4)[1], 3 * torch.eye(4)[2]]
    zero = torch.zeros(SHAPE)
    antipodal = [torch.ones(16), -3 * torch.ones(16)]
    for tensors in ([first] * 3, orthogonal, [first, zero, third], [zero, second], [zero] * 3, antipodal):
        close(combine(spherical.karcher(gram_of(tensors)), tensors), merge_tensors(tensors, "karcher"))


def test_karcher_of_two_vectors_halves_the_angle_as_slerp_does() -> None:
    tensors = [tensor.double() / tensor.double().norm() for tensor in random_tensors(2)]
    gram = gram_of(tensors)
    torch.testing.assert_close(spherical.karcher(gram), spherical.slerp(gram, 0.5), rtol=1e-9, atol=1e-9)


def test_karcher_is_where_the_weighted_logarithms_cancel() -> None:
    vectors = torch.tensor([[1.0, 0, 0], [0.3, 1, 0], [0.5, 0.2, 1]], dtype=torch.float64)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    units = vectors / vectors.norm(dim=1, keepdim=True)
    mean = spherical.karcher(vectors @ vectors.T, weights.tolist(), max_iter=50, tol=1e-12) @ vectors
    assert mean.norm() == pytest.approx(float(weights @ vectors.norm(dim=1)))
    mean = mean / mean.norm()
    cosines = units @ mean
    angles = torch.arccos(cosines)
    logarithms = (angles / angles.sin()).unsqueeze(1) * (units - cosines.unsqueeze(1) * mean)
    assert (weights @ logarithms).norm() < 1e-9


@pytest.mark.parametrize(
    ("weights", "rule"), [([1, -0.5], r"min\(weights\) >= 0"), ([0, 0], r"sum\(weights\)")]
)
def test_karcher_refuses_weights_without_a_mean(weights: list[float], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        spherical.karcher(torch.eye(2, dtype=torch.float64), weights)


# --- model stock ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("shape", [(24, 16), (40,)])
def test_model_stock_agrees_with_mergekit(count: int, filter_wise: bool, shape: tuple[int, ...]) -> None:
    base, *experts = random_tensors(count + 1, shape)
    vectors = [expert - base for expert in experts]
    by_rows = filter_wise and len(shape) > 1
    weights = spherical.model_stock(row_grams(vectors) if by_rows else gram_of(vectors))
    theirs = merge_tensors(
        [base, *experts], "model_stock", parameters={"filter_wise": filter_wise}, base_index=0
    )
    close(base + combine(weights, vectors), theirs)


def test_model_stock_averages_identical_vectors_and_drops_orthogonal_ones() -> None:
    first = random_tensors(1)[0]
    assert spherical.model_stock(gram_of([first] * 4)).tolist() == pytest.approx([0.25] * 4)
    assert spherical.model_stock(torch.eye(3, dtype=torch.float64)).tolist() == [0, 0, 0]


def test_model_stock_keeps_the_base_where_no_ratio_is_finite() -> None:
    base, vector = random_tensors(2)
    vectors = [vector, -vector]
    theirs = merge_tensors([base, base + vector, base - vector], "model_stock", base_index=0)
    close(base + combine(spherical.model_stock(gram_of(vectors)), vectors), theirs)
    assert spherical.model_stock(gram_of(vectors)).tolist() == [0, 0]


def test_model_stock_with_a_zero_vector_agrees_with_mergekit() -> None:
    base, first, second = random_tensors(3)
    vectors = [first, second, torch.zeros(SHAPE)]
    theirs = merge_tensors([base, *(base + vector for vector in vectors)], "model_stock", base_index=0)
    close(base + combine(spherical.model_stock(gram_of(vectors)), vectors), theirs)


def test_model_stock_does_not_depend_on_the_length_of_the_task_vectors() -> None:
    gram = gram_of(random_tensors(3))
    torch.testing.assert_close(spherical.model_stock(1e-12 * gram), spherical.model_stock(gram))


def test_model_stock_refuses_a_single_task_vector() -> None:
    with pytest.raises(ValueError, match="at least 2 task vectors for an angle, but got 1"):
        spherical.model_stock(torch.ones(1, 1, dtype=torch.float64))


# --- order ------------------------------------------------------------------------------------------


@given(seeds, weight_lists, st.permutations(range(4)))
@settings(max_examples=50)
def test_permuting_the_vectors_permutes_their_weights(
    seed: int, weights: list[float], order: list[int]
) -> None:
    gram = gram_of(random_tensors(4, (12,), seed))
    shuffled, shuffled_weights = gram[order][:, order], [weights[i] for i in order]

    def same(merged: Tensor, of_shuffled: Tensor) -> None:
        torch.testing.assert_close(merged[order], of_shuffled, rtol=1e-5, atol=1e-5)

    same(spherical.multislerp(gram, weights), spherical.multislerp(shuffled, shuffled_weights))
    same(spherical.karcher(gram, weights), spherical.karcher(shuffled, shuffled_weights))
    same(spherical.model_stock(gram), spherical.model_stock(shuffled))
