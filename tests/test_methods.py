"""The merge methods: against mergekit, against their papers' formulas, and by their algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_tensors
from torch import Tensor

from optimizer.merging import methods

lambdas = st.lists(st.floats(-2, 2, allow_nan=False, width=32), min_size=3, max_size=3)
densities = st.floats(0.01, 1.0)


def random_tensors(n: int, shape: tuple[int, ...] = (24, 16), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(n)]


@pytest.fixture(scope="module")
def models() -> list[Tensor]:
    """A base and three fine-tunes of one tensor, the third far longer than the others."""
    base, *noise = random_tensors(4)
    return [base, *(base + 0.1 * (i + 1) ** 2 * vector for i, vector in enumerate(noise))]


@pytest.fixture(scope="module")
def vectors(models: list[Tensor]) -> list[Tensor]:
    return [model - models[0] for model in models[1:]]


def close(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


def test_linear_agrees_with_mergekit(models: list[Tensor]) -> None:
    weights = [0.5, 0.2, -0.4, 1.0]
    close(methods.linear(models, weights), merge_tensors(models, "linear", parameters={"weight": weights}))


def test_task_arithmetic_agrees_with_mergekit(models: list[Tensor], vectors: list[Tensor]) -> None:
    weights = [0.3, -0.7, 1.2]
    theirs = merge_tensors(models, "task_arithmetic", parameters={"weight": weights}, base_index=0)
    close(methods.task_arithmetic(models[0], vectors, weights), theirs)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_ties_with_one_lambda_agrees_with_mergekit(
    models: list[Tensor], vectors: list[Tensor], density: float
) -> None:
    thresholds = [methods.trim_thresholds(vector, [density])[0] for vector in vectors]
    ours = methods.ties(models[0], vectors, [0.7] * 3, thresholds)
    theirs = merge_tensors(
        models,
        "ties",
        parameters={"weight": 1.0, "density": density, "lambda": 0.7, "normalize": True},
        base_index=0,
    )
    close(ours, theirs)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_agrees_with_mergekit(t: float) -> None:
    first, second = random_tensors(2, seed=7)
    close(
        methods.slerp(first, second, t),
        merge_tensors([first, second], "slerp", parameters={"t": t}, base_index=0),
    )


def test_slerp_of_nearly_parallel_tensors_is_the_straight_line() -> None:
    first = random_tensors(1)[0]
    close(methods.slerp(first, first * 1.5, 0.5), first * 1.25)
    zero = torch.zeros_like(first)
    close(methods.slerp(first, zero, 0.25), first * 0.75)


def test_dare_drops_the_share_it_should_and_keeps_the_mean(vectors: list[Tensor]) -> None:
    vector = torch.ones(1000, 100)
    mask = methods.keep_mask(vector.shape, 0.3, key=5)
    assert mask.float().mean().item() == pytest.approx(0.3, abs=0.005)  # 3 sigma: 0.0043
    assert methods.drop(vector, mask, 0.3).mean().item() == pytest.approx(1.0, abs=0.015)


def test_dare_masks_are_nested_and_differ_by_key() -> None:
    sparse, dense = (methods.keep_mask((200, 50), density, key=1) for density in (0.2, 0.6))
    assert (dense | ~sparse).all()
    other = methods.keep_mask((200, 50), 0.2, key=2)
    assert (sparse & other).float().mean().item() == pytest.approx(0.04, abs=0.01)
    assert methods.keep_mask((10, 10), 1.0, key=3).all()


def split_mix(index: int, key: int) -> int:
    """SplitMix64's finalizer in Python's own integers (Steele et al. 2014, figure 19)."""
    bits = (1 << 64) - 1
    z = (index * 0x9E3779B97F4A7C15 + key) & bits
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & bits
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & bits
    return z ^ (z >> 31)


@pytest.mark.parametrize("key", [0, 0x0123456789ABCDEF, 0xFEDCBA9876543210])
def test_dare_masks_are_split_mix_exactly(key: int) -> None:
    mask = methods.keep_mask((8, 50), 0.37, key)
    expected = [(split_mix(index, key) >> 32) / 2**32 < 0.37 for index in range(400)]
    assert mask.flatten().tolist() == expected


def test_dare_at_density_one_is_the_method_without_it(models: list[Tensor], vectors: list[Tensor]) -> None:
    masks = [methods.keep_mask(models[0].shape, 1.0, key) for key in range(3)]
    weights = [0.5, -0.2, 0.9]
    plain = methods.task_arithmetic(models[0], vectors, weights)
    assert torch.equal(methods.dare_linear(models[0], vectors, weights, masks, [1.0] * 3), plain)
    ties = methods.ties(models[0], vectors, weights, [0.0] * 3)
    assert torch.equal(methods.dare_ties(models[0], vectors, weights, masks, [1.0] * 3), ties)


def test_ties_elects_the_heavier_side_and_averages_it() -> None:
    base = torch.zeros(4)
    first, second, third = (torch.tensor(row) for row in ([3.0, -1, 2, 0], [-1.0, 2, 2, 0], [-1.0, 0, 2, 5]))
    merged = methods.ties(base, [first, second, third], [1.0, 1.0, 1.0], [0.5] * 3)
    assert merged.tolist() == [3.0, 2.0, 2.0, 5.0]


def test_trimming_keeps_ties_and_at_least_one_entry() -> None:
    vector = torch.tensor([1.0, -1.0, 1.0, 0.5, 4.0])
    low = methods.trim_thresholds(vector, [0.4, 0.01])
    assert low == [1.0, 4.0]
    assert methods.trim(vector, low[0]).tolist() == [1.0, -1.0, 1.0, 0.0, 4.0]


@given(lambdas)
@settings(max_examples=30, deadline=None)
def test_one_expert_at_weight_one_gives_it_back(weights: list[float]) -> None:
    base, *experts = random_tensors(3, seed=3)
    vectors = [expert - base for expert in experts]
    close(methods.task_arithmetic(base, vectors, [1.0, 0.0]), experts[0])
    close(methods.ties(base, vectors, [1.0, 0.0], [0.0, 0.0]), experts[0])
    close(methods.linear(experts, [0.0, 3.0]), experts[1])


@given(lambdas, densities)
@settings(max_examples=30, deadline=None)
def test_the_order_of_experts_does_not_matter(weights: list[float], density: float) -> None:
    base, *vectors = random_tensors(4, seed=4)
    low = [methods.trim_thresholds(vector, [density])[0] for vector in vectors]
    order = [2, 0, 1]
    shuffled = [vectors[i] for i in order], [weights[i] for i in order]
    close(methods.task_arithmetic(base, vectors, weights), methods.task_arithmetic(base, *shuffled))
    close(
        methods.ties(base, vectors, weights, low),
        methods.ties(base, *shuffled, [low[i] for i in order]),
    )


def test_linear_refuses_weights_that_sum_to_zero(models: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="sum"):
        methods.linear(models[:2], [1.0, -1.0])
