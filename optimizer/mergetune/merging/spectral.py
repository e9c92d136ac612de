"""Merges of matrices by their singular values: TSV-Merge, Iso-C and singular value calibration.

τᵢ (out, in) is an expert's task vector of one matrix, and τᵢ = Uᵢ Σᵢ Vᵢᵀ its decomposition. What does not
depend on coefficients is computed here, once, in float64: the signs of singular vectors cancel in the
products, and what other machines and numbers of threads round otherwise seldom shows in float32.

Singular values that are zero but for rounding take no part in TSV-Merge and Iso-C, so that updates of low
rank, such as adapters, are merged in the space that they span, as in Core Space (Panariello et al. 2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ORTHONORMAL = 1e-8  # the precision of singular vectors that are computed in float64


def decorrelated(vectors: Sequence[Tensor]) -> Tensor:
    """Return task vectors with singular vectors that are orthogonal to each other's: (n_experts, out, in).

    Of each of n the max(1, ⌊min(out, in) / n⌋) leading singular triplets are kept. With U = [U₁ … Uₙ], V
    likewise, and Ũ, Ṽ the orthogonal matrices nearest to them, part i is Ũᵢ Σᵢ Ṽᵢᵀ. The parts sum up to the
    merge of TSV-Merge (Gargiulo et al. 2025).
    """
    n_kept = max(1, min(vectors[0].shape) // len(vectors))
    rounding = torch.finfo(vectors[0].dtype).eps
    triplets = [_decomposed(vector, rounding) for vector in vectors]
    left, right = (
        _orthogonal(torch.cat([triplet[side][:, :n_kept] for triplet in triplets], dim=1)) for side in (0, 2)
    )
    values = [s[:n_kept] for _, s, _ in triplets]
    sizes = [len(s) for s in values]
    parts = zip(torch.split(left, sizes, 1), values, torch.split(right, sizes, 1), strict=True)
    return torch.stack([(u * s) @ v.T for u, s, v in parts])


def isotropic(vectors: Sequence[Tensor]) -> Tensor:
    """Return Σ τᵢ with the mean of its singular values in the place of each (Iso-C; Marczak et al. 2025)."""
    u, s, v = _decomposed(_sum(vectors), torch.finfo(vectors[0].dtype).eps)
    return s.sum() / max(1, len(s)) * (u @ v.T)


def calibration(vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the directions of Σ τᵢ = U Σ Vᵀ, and how often each is counted in it, for `calibrated`.

    In the direction u, a column of U, expert i answers with aᵢ = uᵀτᵢ and the sum with a = σ vᵀ. The share
    ⟨a, aᵢ⟩ / ‖aᵢ‖² is above 1 where others add to what the expert does there (SVC; Li et al. 2026); it is 0
    where the expert does nothing.

    Returns:
        U (out, r), Σ Vᵀ (r, in) and the shares (r, n_experts), with r = min(out, in).
    """
    u, s, vt = torch.linalg.svd(_sum(vectors), full_matrices=False)
    rows = s[:, None] * vt
    answers = [u.T @ vector.double() for vector in vectors]
    pairs = [((rows * own).sum(dim=1), own.square().sum(dim=1)) for own in answers]
    shares = [torch.where(norm > 0, product / norm, 0.0) for product, norm in pairs]
    return u, rows, torch.stack(shares, dim=1)


def calibrated(u: Tensor, rows: Tensor, shares: Tensor, alpha: float) -> Tensor:
    """Return the sum with each singular value times γ = n / Σᵢ max(alpha, shareᵢ) (SVC; Li et al. 2026).

    In the dtype of `rows`; the product is taken in float64.
    """
    gamma = shares.shape[1] / shares.double().clamp(min=alpha).sum(dim=1)
    return ((u * gamma) @ rows.double()).to(rows.dtype)


def _sum(vectors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(vectors)).double().sum(dim=0)


def _orthogonal(columns: Tensor) -> Tensor:
    """Return the polar factor, which is the nearest orthogonal matrix (orthogonal Procrustes).

    Columns that depend on each other make it a partial isometry, in the space that they span.
    """
    u, _, v = _decomposed(columns, _ORTHONORMAL)
    return u @ v.T


def _decomposed(matrix: Tensor, rounding: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, rank), the singular values and V (in, rank) of what is more than rounding of entries."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    rank = int((s > s[:1] * rounding * math.sqrt(max(matrix.shape))).sum())
    return u[:, :rank], s[:rank], vt[:rank].T
