"""What methods draw from whole tensors: against mergekit, plain loops, sorts and the methods' rules."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit import sparsify
from mergekit.merge_methods import merge_tensors
from torch import Tensor

from mergetune.merging.elementwise import Source, keep_probabilities, merge_chunk, variance
from mergetune.merging.methods import Coefficients, arcee_fusion, keep_line
from mergetune.merging.methods import sce as sce_step
from mergetune.merging.operands import Operands
from mergetune.merging.plan import Plan
from mergetune.merging.tables import RANKS

shapes = pytest.mark.parametrize("shape", [(40,), (24, 16)])


def random_tensors(n: int, shape: tuple[int, ...] = (24, 16), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(0.5 + i) * torch.randn(shape, generator=generator) for i in range(n)]


def operands_of(base: Tensor, sources: Sequence[Source]) -> Operands:
    experts = {f"e{i}": source for i, source in enumerate(sources)}
    return Operands("w", base, tuple(experts), experts, Plan(lambda _: None))


def vectors_on_zero(vectors: Sequence[Tensor]) -> Operands:
    return operands_of(torch.zeros_like(vectors[0]), [Source(vector, "vector") for vector in vectors])


def della_probabilities(vector: Tensor, density: float, epsilon: float) -> Tensor:
    operands = vectors_on_zero([vector])
    ranks = torch.from_numpy(operands.table(RANKS, "e0"))
    return keep_probabilities(ranks, *keep_line(density, epsilon, operands.row_length))


def sce(vectors: Sequence[Tensor], select_topk: float) -> Tensor:
    operands = vectors_on_zero(vectors)
    step = sce_step(operands, Coefficients({"select_topk": select_topk}, {}, 0))
    out = torch.empty_like(vectors[0])
    merge_chunk(
        out, operands.base, vectors, [True] * len(vectors), step.keep, step.combine, step.numbers, step.ranks
    )
    return out


def sce_mask(vectors: Sequence[Tensor], select_topk: float) -> Tensor:
    operands = vectors_on_zero(vectors)
    step = sce_step(operands, Coefficients({"select_topk": select_topk}, {}, 0))
    if step.keep == "all":
        return torch.ones_like(vectors[0], dtype=torch.bool)
    return variance(vectors) >= step.numbers.low[0]


def arcee_fusion_mask(weights: Tensor, base: Tensor) -> Tensor:
    operands = operands_of(base, [Source(weights, "weights")])
    numbers = arcee_fusion(operands, Coefficients({}, {}, 0)).numbers
    assert numbers.scales is not None
    vector = (weights - base).reshape(len(numbers.scales), -1)
    return (vector.abs() * numbers.scales >= numbers.low[0]).reshape(base.shape)


# --- DELLA ------------------------------------------------------------------------------------------


def della_by_loop(row: list[float], density: float, epsilon: float) -> list[float]:
    half = min(epsilon, density, 1 - density)
    probabilities = [density] * len(row)
    for rank, index in enumerate(sorted(range(len(row)), key=lambda i: abs(row[i]))):
        if len(row) > 1:
            probabilities[index] = density - half + 2 * half * rank / (len(row) - 1)
    return probabilities


@given(
    st.lists(st.floats(-2, 2, width=16), min_size=1, max_size=12),
    st.floats(0.01, 1),
    st.floats(0, 0.6),
)
@settings(max_examples=100)
def test_della_probabilities_are_the_rule_written_as_a_loop(
    row: list[float], density: float, epsilon: float
) -> None:
    tensor = torch.tensor([row, row[::-1]])
    ours = della_probabilities(tensor, density, epsilon)
    expected = [della_by_loop(values, density, epsilon) for values in (row, row[::-1])]
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.mean(dim=-1), torch.full((2,), density), rtol=1e-5, atol=1e-6)
    assert ((ours >= 0) & (ours <= 1)).all()


def test_della_keeps_what_mergekit_keeps_as_often() -> None:
    row = random_tensors(1, (20,))[0]
    draws = 4000
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kept = torch.stack([sparsify.della_magprune(row, 0.4, 0.3) != 0 for _ in range(draws)])
    expected = della_probabilities(row, 0.4, 0.3)
    standard_error = (expected * (1 - expected) / draws).sqrt()
    assert ((kept.float().mean(dim=0) - expected).abs() < 4 * standard_error).all()


def test_della_ranks_ties_by_position_and_rows_apart() -> None:
    tensor = torch.tensor([[1.0, -1, 1, 1, 0], [5, 4, 3, 2, 1]])
    expected = [[0.4, 0.5, 0.6, 0.7, 0.3], [0.7, 0.6, 0.5, 0.4, 0.3]]
    torch.testing.assert_close(della_probabilities(tensor, 0.5, 0.2), torch.tensor(expected))


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (7,), (2, 3, 4)])
def test_della_keeps_all_at_density_one_and_every_shape(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    probabilities = della_probabilities(tensor, 1.0, 0.2)
    assert torch.equal(probabilities, torch.ones(shape))
    assert della_probabilities(tensor, 0.9, 0.5).max() <= 1


# --- SCE --------------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("select_topk", [0.001, 0.05, 0.1, 0.5, 0.9, 1.0])
def test_sce_agrees_with_mergekit(shape: tuple[int, ...], count: int, select_topk: float) -> None:
    vectors = random_tensors(count, shape)
    theirs = merge_tensors(
        [torch.zeros(shape), *vectors], "sce", parameters={"select_topk": select_topk}, base_index=0
    )
    torch.testing.assert_close(sce(vectors, select_topk), theirs, rtol=1e-6, atol=1e-7)


def test_sce_agrees_with_mergekit_where_experts_agree_or_are_zero() -> None:
    first, second, third = random_tensors(3)
    first[:8] = second[:8] = third[:8] = 1.0  # no variance: selected at 1.0 only
    for vectors in ([first, second, third], [first, second, torch.zeros_like(first)], [first]):
        for select_topk in (0.3, 1.0):
            theirs = merge_tensors(
                [torch.zeros_like(first), *vectors],
                "sce",
                parameters={"select_topk": select_topk},
                base_index=0,
            )
            ours = sce(vectors, select_topk)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_sce_by_hand() -> None:
    first, second = torch.tensor([3.0, 1.0, -1.0, 0.0]), torch.tensor([1.0, -2.0, 1.0, 0.0])
    # Energies 11 and 6; elected +, -, + (a sum of 0 elects +), and nothing survives last.
    expected = torch.tensor([(11 * 3 + 6 * 1) / 17, -2.0, 1.0, 0.0])
    torch.testing.assert_close(sce([first, second], 1.0), expected)
    # Half of the three positions that vary is one: the second, of variance 2.25; energies 1 and 4.
    assert sce([first, second], 0.5).tolist() == [0.0, -2.0, 0.0, 0.0]


def test_sce_weighs_short_task_vectors_by_their_energy_as_long_ones() -> None:
    vectors = random_tensors(3)
    short = sce([1e-4 * vector for vector in vectors], 0.5)
    torch.testing.assert_close(short, 1e-4 * sce(vectors, 0.5), rtol=1e-5, atol=1e-9)


def test_sce_of_zero_task_vectors_is_zero() -> None:
    assert not sce([torch.zeros(3, 2)] * 2, 1.0).any()


def test_sce_mask_keeps_all_that_tie_with_the_last_selected() -> None:
    first = torch.tensor([[0.0, 2.0, -2.0], [1.0, 4.0, 2.0]])
    second = torch.zeros(2, 3)
    variances = torch.tensor([[0.0, 1.0, 1.0], [0.25, 4.0, 1.0]])
    for select_topk, least in ((0.2, 4.0), (0.4, 1.0), (0.6, 1.0), (0.99, 1.0), (0.1, 9.0)):
        assert torch.equal(sce_mask([first, second], select_topk), variances >= least)
    assert sce_mask([first, second], 1.0).all()


def test_sce_does_not_depend_on_the_order_of_the_experts() -> None:
    vectors = random_tensors(4)
    shuffled = [vectors[i] for i in (2, 0, 3, 1)]
    torch.testing.assert_close(sce(vectors, 0.4), sce(shuffled, 0.4))


# --- Arcee Fusion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (7,), (40,), (24, 16), (3, 5, 8), (1000, 100)])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_arcee_fusion_agrees_with_mergekit_bit_by_bit(shape: tuple[int, ...], scale: float) -> None:
    base, change = random_tensors(2, shape)
    weights = base + scale * change
    theirs = merge_tensors([base, weights], "arcee_fusion", base_index=0)
    mask = arcee_fusion_mask(weights, base)
    assert mask.dtype == torch.bool
    assert torch.equal(base + (weights - base) * mask.float(), theirs)


def test_arcee_fusion_takes_the_outliers_and_all_of_what_did_not_change() -> None:
    base, change = random_tensors(2, (50, 40))
    mask = arcee_fusion_mask(base + 0.01 * change, base)
    assert 0 < mask.float().mean() < 0.25
    assert arcee_fusion_mask(base, base).all()
