"""Low-rank updates of a matrix: stacked exactly, or the nearest of a rank, by a singular value decomposition.

ΔW (out, in) is what is added to a layer's weight, B (out, rank) and A (rank, in) are its factors with every
scale worked in: ΔW = B A. Norms are Frobenius norms. Of all matrices of rank r, the one of the r leading
singular triplets of ΔW is the nearest to it (Eckart & Young 1936).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_OVERSAMPLING, _N_ITERATIONS = 16, 4  # of the randomized decomposition
_EXACT_UP_TO = 4  # times the columns sought: a smaller matrix is decomposed as a whole


@dataclass(frozen=True)
class LowRank:
    """An update ΔW = B A of a layer's weight, in float32."""

    b: Tensor  # (out, rank)
    a: Tensor  # (rank, in)

    @property
    def rank(self) -> int:
        """The number of columns of B."""
        return len(self.a)

    @property
    def norm(self) -> float:
        """‖B A‖, by ‖B A‖² = Σ (BᵀB) ∘ (A Aᵀ)."""
        b, a = self.b.double(), self.a.double()
        return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())

    def cut(self, rank: int) -> tuple[LowRank, float]:
        """Return the nearest update of a rank, and its distance to this one; B A is not formed.

        With B = Q R and Aᵀ = Q' R', the singular values are those of R R'ᵀ. Those that are zero but for
        rounding take no rank.
        """
        q_b, r_b = torch.linalg.qr(self.b.double())
        q_a, r_a = torch.linalg.qr(self.a.T.double())
        u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        n_real = int((s > s[0] * len(s) * torch.finfo(s.dtype).eps).sum())
        kept = max(1, min(rank, n_real))
        found = _balanced(q_b @ u[:, :kept], s[:kept], vt[:kept] @ q_a.T)
        return found, float(torch.linalg.vector_norm(s[kept:]))


def stacked(terms: Sequence[tuple[float, LowRank]]) -> LowRank:
    """Return Σ wᵢ BᵢAᵢ = [w₁B₁ …] [A₁; …], exact and of the sum of the ranks."""
    b = torch.cat([weight * each.b for weight, each in terms], dim=1)
    return LowRank(b, torch.cat([each.a for _, each in terms]))


def nearest(matrix: Tensor, rank: int) -> tuple[LowRank, float]:
    """Return the update of a rank that is nearest to a matrix (out, in), and its distance.

    A large matrix is decomposed within the range that it has after a few passes over random columns, always
    the same ones (Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1).
    """
    n_sought = rank + _OVERSAMPLING
    matrix = matrix.float()
    if min(matrix.shape) <= _EXACT_UP_TO * n_sought:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        columns = torch.randn(matrix.shape[1], n_sought, generator=torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(matrix @ columns).Q
        for _ in range(_N_ITERATIONS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        u, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    found = _balanced(u[:, :rank], s[:rank], vt[:rank])
    return found, float(torch.linalg.vector_norm(matrix - found.b @ found.a, dtype=torch.float64))


def _balanced(u: Tensor, s: Tensor, vt: Tensor) -> LowRank:
    """Return U √S and √S Vᵀ, so that neither factor is much larger than the other."""
    root = s.sqrt()
    return LowRank((u * root).float().contiguous(), (root[:, None] * vt).float().contiguous())
