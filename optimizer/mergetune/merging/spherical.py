"""Merges that are linear combinations Σ wᵢ vᵢ whose weights follow from inner products alone.

SLERP, NuSLERP, multi-SLERP, the Karcher mean and model stock see the vectors only through their Gram
matrix G = V Vᵀ: a combination c has the norm √(cᵀGc). Each function maps G (float64, shape (…, n, n),
computed once per tensor) and its parameters to the weights (float64, shape (…, n)) of one weighted
sum. Leading dimensions are independent problems: the rows of a row-wise merge, otherwise there are
none. A zero vector has no direction; each function says what it then does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A weighted mean of unit vectors shorter than this share of its weights has no direction: the
# rounding of a float64 Gram matrix alone makes about 1e-8, and weights of 1/1e-6 would make noise.
_BALANCED = 1e-6


def slerp(gram: Tensor, t: float) -> Tensor:
    """Interpolate on the arc between two vectors: sin((1-t)Ω)/sinΩ, sin(tΩ)/sinΩ (Shoemake 1985).

    Ω is the angle between the two. Where they are nearly parallel (|cos Ω| > 0.9995), or one is zero,
    the straight line 1-t, t is taken. (mergekit takes a zero vector as orthogonal to the other.)
    """
    cosine = _cosines(gram)[..., 0, 1]
    has_zero = (_norms(gram) == 0).any(dim=-1)
    return _arc_or_line(cosine, (cosine.abs() > 0.9995) | has_zero, t)


def nuslerp(gram: Tensor, t: float, *, eps: float = 1e-4) -> Tensor:
    """Interpolate on the arc between two vectors, however small the angle (NuSLERP; mergekit).

    For task vectors or weights; t = w₂ / (w₁ + w₂) where a recipe has weights. The straight line is
    taken only where the two are colinear, sin Ω ≤ `eps`; mergekit's own 1e-8 comes to 2e-4, as its
    float32 cosine rounds to ±1. A zero vector counts as orthogonal to the other, as in mergekit.
    """
    cosine = _cosines(gram)[..., 0, 1]
    return _arc_or_line(cosine, 1 - cosine.square() <= eps**2, t)


def multislerp(gram: Tensor, weights: Sequence[float]) -> Tensor:
    """Interpolate barycentrically on the sphere, times the weighted mean norm (multi-SLERP; Goddard 2025).

    The unit vectors are projected to the tangent space at m = μ/‖μ‖, μ = Σ wᵢ uᵢ, averaged there, and
    carried back by the exponential map. As Σ wᵢ (uᵢ - ⟨uᵢ, m⟩ m) = μ - ⟨μ, m⟩ m = 0, the result is m
    itself: the weight of vᵢ is wᵢ/‖vᵢ‖ · Σ wⱼ‖vⱼ‖ / ‖μ‖, with the weights normalized to sum 1. A zero
    vector takes no part in the direction but does in the mean norm.

    Two balanced vectors (antipodal, of equal weight), or none that is not zero, give the straight
    line: the normalized weights.

    Raises:
        ValueError: the weights sum to zero, or three or more unit vectors balance out (μ = 0).
    """
    shares = _normalized(weights, gram)
    norms = _norms(gram)
    mean = shares * _inverse(norms)  # (..., n): μ as a combination of the vectors
    takes_part = mean != 0
    square = _square(gram, mean)
    balanced = square <= (_BALANCED * (shares * takes_part).abs().sum(dim=-1, keepdim=True)).square()
    if bool((balanced & (takes_part.sum(dim=-1, keepdim=True) > 2)).any()):
        raise ValueError(
            "`norm(sum of weight * unit vector) > 0` must hold, but the vectors balance out with "
            f"weights={list(weights)}. Change a weight, or merge with `karcher` or `linear`."
        )
    mean_norm = (shares * norms).sum(dim=-1, keepdim=True)
    length = square.where(~balanced, 1.0).sqrt()  # a root has no slope at zero
    return torch.where(balanced, shares, mean * mean_norm / length)


def karcher(
    gram: Tensor, weights: Sequence[float] | None = None, *, max_iter: int = 10, tol: float = 1e-5
) -> Tensor:
    """Return the Karcher mean on the unit sphere, times the weighted mean norm (Wang et al. 2026).

    arXiv 2603.04972: m ← exp_m(Σ wᵢ log_m(uᵢ)) from m = Σ wᵢ uᵢ / ‖·‖ until a step is under `tol`, at
    most `max_iter` times. The weights are normalized to sum 1; None: all alike. A zero vector takes
    no part in the direction but does in the mean norm; a vector opposite to m pulls to no side. Where
    the unit vectors balance out (their mean is shorter than `tol`), the first that takes part is the
    start, as in mergekit: there alone the order of the vectors matters.

    Raises:
        ValueError: a weight is negative, or all are zero.
    """
    if weights is not None and min(weights) < 0:
        raise ValueError(
            f"`min(weights) >= 0` must hold, but got weights={list(weights)}. "
            "Raise the negative ones to 0, or merge with `multislerp`."
        )
    shares = _normalized([1.0] * gram.shape[-1] if weights is None else weights, gram)
    norms = _norms(gram)
    mean_norm = (shares * norms).sum(dim=-1, keepdim=True)
    shares = shares.where(norms > 0, 0.0)
    shares = shares * _inverse(shares.sum(dim=-1, keepdim=True))
    mean = _start(gram, shares, norms, tol)
    for _ in range(max_iter):
        tangent = _mean_logarithm(gram, shares, norms, mean, tol)
        distance = _length(gram, tangent)
        moves = distance >= tol
        if not bool(moves.any()):
            break
        moved = torch.cos(distance) * mean + torch.sin(distance) / distance * tangent
        mean = torch.where(moves, moved / _length(gram, moved), mean)
    return mean_norm * mean


def model_stock(gram: Tensor) -> Tensor:
    """Return t/N for each of N task vectors, t = N·cosθ / (1 + (N-1)·cosθ) (Jang et al. 2024).

    The merged weights are θ₀ + Σ (t/N) τᵢ = t · mean(θᵢ) + (1-t) · θ₀; cosθ is the mean over the pairs
    of task vectors. A zero vector's cosines are 0; where the denominator vanishes, t is 0. (mergekit
    divides by norms' products of at least 1e-6, which lowers the cosines of short task vectors.)

    Raises:
        ValueError: there are fewer than two task vectors.
    """
    count = gram.shape[-1]
    if count < 2:
        raise ValueError(
            f"Model stock needs at least 2 task vectors for an angle, but got {count}. Add an expert."
        )
    pairs = _cosines(gram).triu(diagonal=1)
    cosine = pairs.sum(dim=(-2, -1)) / (count * (count - 1) / 2)
    denominator = 1 + (count - 1) * cosine
    ratio = torch.where(denominator.abs() < 1e-6, 0.0, count * cosine / denominator)
    return (ratio / count).unsqueeze(-1).repeat_interleave(count, dim=-1)


def _arc_or_line(cosine: Tensor, is_line: Tensor, t: float) -> Tensor:
    """Return the weights of slerp, (..., 2), or 1-t, t where `is_line`."""
    angle = torch.arccos(cosine.where(~is_line, 0.0))
    arc = torch.sin(torch.stack([(1 - t) * angle, t * angle], dim=-1)) / torch.sin(angle).unsqueeze(-1)
    return torch.where(is_line.unsqueeze(-1), _vector([1 - t, t], arc), arc)


def _start(gram: Tensor, shares: Tensor, norms: Tensor, tol: float) -> Tensor:
    """Return the unit vector of the weighted mean direction, or the first where it has none."""
    mean = shares * _inverse(norms)
    length = _length(gram, mean)
    first = (shares > 0).to(torch.int8).argmax(dim=-1, keepdim=True)
    fallback = torch.zeros_like(mean).scatter(-1, first, _inverse(norms).gather(-1, first))
    return torch.where(length < tol, fallback, mean / length)


def _mean_logarithm(gram: Tensor, shares: Tensor, norms: Tensor, mean: Tensor, tol: float) -> Tensor:
    """Return Σ wᵢ log_m(uᵢ) with log_m(u) = θ/sinθ · (u - cosθ · m); 0 where u is m or opposite to it."""
    cosines = (_inverse(norms) * (gram @ mean.unsqueeze(-1)).squeeze(-1)).clamp(-1, 1)  # ⟨uᵢ, m⟩
    angles = torch.arccos(cosines)
    sines = torch.sin(angles)
    factors = torch.where(sines < tol, 0.0, shares * angles / sines)
    return factors * _inverse(norms) - (factors * cosines).sum(dim=-1, keepdim=True) * mean


def _normalized(weights: Sequence[float], gram: Tensor) -> Tensor:
    total = sum(weights)
    if total == 0:
        raise ValueError(
            f"`sum(weights) != 0` must hold, but got weights={list(weights)}. Change one of them."
        )
    return _vector([weight / total for weight in weights], gram)


def _vector(values: Sequence[float | Tensor], like: Tensor) -> Tensor:
    """Return numbers as one vector of the dtype and on the device of `like`; autograd follows tensors."""
    return torch.stack([torch.as_tensor(value, dtype=like.dtype, device=like.device) for value in values])


def _cosines(gram: Tensor) -> Tensor:
    """Return the cosines between the vectors, (..., n, n); 0 with a zero vector."""
    inverse = _inverse(_norms(gram))
    return (gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)).clamp(-1, 1)


def _norms(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()


def _inverse(values: Tensor) -> Tensor:
    """Return 1/x, and 0 where x is 0."""
    return torch.where(values == 0, 0.0, 1 / values)


def _length(gram: Tensor, combination: Tensor) -> Tensor:
    """Return the norm √(cᵀGc) of a combination of the vectors, (..., 1)."""
    return _square(gram, combination).sqrt()


def _square(gram: Tensor, combination: Tensor) -> Tensor:
    """Return cᵀGc, (..., 1)."""
    return (combination.unsqueeze(-2) @ gram @ combination.unsqueeze(-1)).squeeze(-1).clamp(min=0)
