"""Low-rank updates of a matrix: products by blocks, stacked exactly, or the nearest of a rank.

ΔW (out, in) is what is added to a matrix, B (out, rank) and A (rank, in) are its factors with every scale
worked in: ΔW = B A. Norms are Frobenius norms. Of all matrices of rank r, the one of the r leading singular
triplets of ΔW is the nearest to it (Eckart & Young 1936).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CPU_BLOCK, _CUDA_BLOCK = 1 << 18, 1 << 24  # entries of a product that are formed at a time
_MIN_ROWS = 64  # of a block: with fewer, A is read more often than BLAS can hide
_ROW_STEP = 16  # BLAS treats a few rows otherwise, with other bits, so that blocks are multiples of these
_OVERSAMPLING, _N_ITERATIONS = 16, 4  # of the randomized decomposition
_EXACT_UP_TO = 4  # times the columns sought: a smaller matrix is decomposed as a whole


@dataclass(frozen=True)
class LowRank:
    """An update ΔW = B A of a matrix, in float32."""

    b: Tensor  # (out, rank)
    a: Tensor  # (rank, in)

    @property
    def rank(self) -> int:
        """The number of columns of B."""
        return len(self.a)

    @property
    def transposed(self) -> LowRank:
        """ΔWᵀ = Aᵀ Bᵀ."""
        return LowRank(self.a.T, self.b.T)

    def to(self, device: torch.device) -> LowRank:
        """Return the same on a device."""
        return LowRank(self.b.to(device), self.a.to(device))

    def blocks(self) -> Iterator[Tensor]:
        """Yield B A in blocks of some rows, from the first on, each in the place of the one before.

        The bits are those of all of B A at once, as far as those of BLAS are the same for any multiple of
        `_ROW_STEP` rows.
        """
        n_rows, length = len(self.b), self.block_rows
        b = torch.nn.functional.pad(self.b, (0, 0, 0, -n_rows % _ROW_STEP))
        block = b.new_empty(min(length, len(b)), self.a.shape[1])
        for i, part in enumerate(torch.split(b, length)):
            yield torch.mm(part, self.a, out=block[: len(part)])[: n_rows - i * length]

    def product(self) -> Tensor:
        """Return B A."""
        out = self.b.new_empty(len(self.b), self.a.shape[1])
        for rows, block in zip(torch.split(out, self.block_rows), self.blocks(), strict=True):
            rows.copy_(block)
        return out

    def inner(self, matrix: Tensor) -> float:
        """Return ⟨M, B A⟩ = Σ (M Aᵀ) ∘ B for a matrix M (out, in) of any dtype; B A is not formed.

        In float32, or float64 where M is in it; the sums of blocks of rows are added up in float64.
        """
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        b, a, length = self.b.to(dtype), self.a.to(dtype), self.block_rows
        pairs = zip(torch.split(matrix, length), torch.split(b, length), strict=True)
        sums = [((rows.to(dtype) @ a.T) * own).sum() for rows, own in pairs]
        return float(torch.stack(sums).sum(dtype=torch.float64))

    def of_rows(self, rows: slice) -> Tensor:
        """Return some rows of B A, with the bits that they have in all of it."""
        begin = rows.start // _ROW_STEP * _ROW_STEP
        return LowRank(self.b[begin : rows.stop], self.a).product()[rows.start - begin :]

    @property
    def block_rows(self) -> int:
        """The rows of a block, which do not depend on the number of all rows."""
        entries = _CUDA_BLOCK if self.a.is_cuda else _CPU_BLOCK
        n_rows = max(_MIN_ROWS, entries // max(1, self.a.shape[1]))
        return n_rows // _ROW_STEP * _ROW_STEP

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
