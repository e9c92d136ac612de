"""The merge methods: pure functions on tensors, in float32, each exact to its paper.

Every function takes one tensor of the model at a time. A task vector is `expert - base` (Ilharco et
al. 2023); `lambdas[i]` is the weight of `task_vectors[i]`. Shapes: every tensor of a call has the
same shape, and so has the result. The table of methods and their parameters is `recipe.METHODS`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear(experts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Average the experts' weights: Σ wᵢ θᵢ / Σ wᵢ (Wortsman et al. 2022, uniform soup for equal w).

    Raises:
        ValueError: the weights sum to zero.
    """
    total = sum(weights)
    if total == 0:
        raise ValueError(f"`sum(weights) != 0` must hold, but got weights={list(weights)}.")
    return weighted_sum(experts, [weight / total for weight in weights])


def task_arithmetic(base: Tensor, task_vectors: Sequence[Tensor], lambdas: Sequence[float]) -> Tensor:
    """Add scaled task vectors: θ = θ₀ + Σ λᵢ τᵢ (Ilharco et al. 2023, section 2); λ < 0 removes a task."""
    return base + weighted_sum(task_vectors, lambdas)


def ties(
    base: Tensor,
    task_vectors: Sequence[Tensor],
    lambdas: Sequence[float],
    thresholds: Sequence[float],
) -> Tensor:
    """Trim, elect sign, disjoint merge (TIES; Yadav et al. 2023, algorithm 1).

    `thresholds[i]` is the smallest magnitude of task vector i that is kept. With one λ for all
    experts the result is the paper's θ₀ + λ · mean of the entries that agree with the elected sign.
    """
    trimmed = [trim(vector, low) for vector, low in zip(task_vectors, thresholds, strict=True)]
    return base + disjoint_mean(trimmed, lambdas)


def dare_linear(
    base: Tensor,
    task_vectors: Sequence[Tensor],
    lambdas: Sequence[float],
    masks: Sequence[Tensor],
    densities: Sequence[float],
) -> Tensor:
    """Drop and rescale, then task arithmetic (DARE; Yu et al. 2024, equations 1 and 2)."""
    return task_arithmetic(base, _dropped(task_vectors, masks, densities), lambdas)


def dare_ties(
    base: Tensor,
    task_vectors: Sequence[Tensor],
    lambdas: Sequence[float],
    masks: Sequence[Tensor],
    densities: Sequence[float],
) -> Tensor:
    """Drop and rescale, then the sign election and disjoint merge of TIES (Yu et al. 2024, section 3.3)."""
    return base + disjoint_mean(_dropped(task_vectors, masks, densities), lambdas)


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Interpolate on the arc between two tensors taken as vectors (Shoemake 1985).

    θ = sin((1-t)Ω)/sinΩ · θ₁ + sin(tΩ)/sinΩ · θ₂ with Ω the angle between them; where they are
    nearly parallel (|cos Ω| > 0.9995), or one is zero, the straight line is the limit and is taken.
    """
    norms = first.norm(dtype=torch.float64) * second.norm(dtype=torch.float64)
    cosine = (first.double() * second.double()).sum() / norms if norms > 0 else torch.ones(())
    if cosine.abs() > 0.9995:
        return (1 - t) * first + t * second
    angle = torch.arccos(cosine)
    weights = torch.sin(torch.stack([(1 - t) * angle, t * angle])) / torch.sin(angle)
    return weighted_sum([first, second], weights.tolist())


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ wᵢ xᵢ, accumulated in the order given."""
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total


def trim(task_vector: Tensor, threshold: float) -> Tensor:
    """Set to zero what is smaller in magnitude than `threshold`; entries equal to it are all kept."""
    return task_vector.where(task_vector.abs() >= threshold, 0.0)


def drop(task_vector: Tensor, mask: Tensor, density: float) -> Tensor:
    """Keep where `mask` (True: kept) and divide by the density kept: E[result] = task vector."""
    return task_vector.where(mask, 0.0).div_(density)


def disjoint_mean(task_vectors: Sequence[Tensor], lambdas: Sequence[float]) -> Tensor:
    """Average, entry by entry, the λᵢ τᵢ whose sign is the elected one (TIES, steps 2 and 3).

    The sign elected is that of Σ λᵢ τᵢ, the side of greater total magnitude; entries that are zero
    take no part in the mean.
    """
    scaled = torch.stack([lam * vector for vector, lam in zip(task_vectors, lambdas, strict=True)])
    elected = torch.sign(scaled.sum(dim=0))
    agrees = (torch.sign(scaled) == elected) & (scaled != 0)  # (n_experts, *shape)
    count = agrees.sum(dim=0).clamp_(min=1)
    return scaled.where(agrees, 0.0).sum(dim=0) / count


def trim_thresholds(task_vector: Tensor, densities: Sequence[float]) -> list[float]:
    """Return, for each density, the magnitude of the k-th largest entry, k = max(1, ⌊density · n⌋).

    Exact: one sort serves every density.
    """
    magnitudes = task_vector.abs().flatten().sort(descending=True).values
    ranks = [max(1, int(density * magnitudes.numel() + 1e-9)) for density in densities]
    return [float(magnitudes[rank - 1]) for rank in ranks]


def keep_mask(shape: Sequence[int], density: float, key: int) -> Tensor:
    """Return DARE's random mask: True with probability `density`, a pure function of (key, index).

    The entry's index is hashed to a uniform number and compared with the density: masks of the same
    key are nested as the density grows, and no state, order or device enters.
    """
    size = 1
    for length in shape:
        size *= length
    uniform = _hash32(torch.arange(size, dtype=torch.int64), key).to(torch.float64) / 2**32
    return (uniform < density).reshape(tuple(shape))


def _dropped(
    task_vectors: Sequence[Tensor], masks: Sequence[Tensor], densities: Sequence[float]
) -> list[Tensor]:
    return [drop(*inputs) for inputs in zip(task_vectors, masks, densities, strict=True)]


def _hash32(index: Tensor, key: int) -> Tensor:
    """Hash int64 indices to uniform integers in [0, 2³²) (SplitMix64's finalizer; Steele et al. 2014)."""
    value = index * _signed(0x9E3779B97F4A7C15) + _signed(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ _shift_right(value, shift)) * _signed(factor)
    return _shift_right(value ^ _shift_right(value, 31), 32)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Shift int64 right and fill with zeros, as unsigned integers do."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """Map an unsigned 64-bit integer to the int64 of the same bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value
