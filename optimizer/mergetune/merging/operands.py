"""One tensor of the base with what the experts make of it, and the tables that a study keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergetune.merging.elementwise import wide

# Densities live on this grid, so that one sort of a task vector serves a whole study.
DENSITY_STEP = 0.01
_GRID = tuple(step / 100 for step in range(1, 101))
_BLOCK = 1 << 20  # entries whose products are summed at a time


@dataclass
class Tables:
    """What follows from the inputs alone: computed at first use, kept for every later candidate."""

    thresholds: dict[tuple[str, str, float], list[tuple[float, float]]] = field(default_factory=dict)
    grams: dict[tuple[tuple[str, ...], str, bool], Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Operands:
    """One tensor of the base, and of each expert that changes it its weights or its task vector.

    Attributes:
        name: the tensor's name.
        base: the base's tensor, in its own dtype; read only.
        experts: all experts of the merge, in order.
        sources: of the experts that change this tensor, in the same order: the weights in their own
            dtype, or the task vector in float32; read only, on the device of `base`.
        vectors_of: the experts whose source is a task vector.
        seed: the recipe's seed, for random masks.
        tables: the study's tables.
    """

    name: str
    base: Tensor
    experts: tuple[str, ...]
    sources: dict[str, Tensor]
    vectors_of: frozenset[str]
    seed: int
    tables: Tables

    @property
    def changed(self) -> tuple[str, ...]:
        """The experts that change this tensor."""
        return tuple(self.sources)

    def vector(self, expert: str) -> Tensor:
        """Return an expert's task vector; zeros where it leaves the tensor as it is."""
        if expert not in self.sources:
            return torch.zeros(self.base.shape, device=self.base.device)
        source = self.sources[expert]
        start = wide(self.base)
        return source if expert in self.vectors_of else source.to(start.dtype) - start

    def band(self, expert: str, density: float, gamma: float = 0.0) -> tuple[float, float]:
        """Return the magnitudes low and high between which (low ≤ |τ| < high) an expert's entries stay.

        Of n entries the ⌊gamma · n⌋ largest are left out, fewer where density + gamma > 1, and of the
        rest the max(1, ⌊density · n⌋) largest are kept. Entries equal to `low` are all kept, and those
        equal to `high` all left out. Exact: one sort serves every density of the grid.
        """
        step = round(density / DENSITY_STEP)
        if not (_is_on_grid(density) and _is_on_grid(gamma)) or step < 1:
            return _bands(self.vector(expert), (density,), gamma)[0]
        key = (expert, self.name, gamma)
        if key not in self.tables.thresholds:
            self.tables.thresholds[key] = _bands(self.vector(expert), _GRID, gamma)
        return self.tables.thresholds[key][step - 1]

    def gram(self, by_rows: bool = False) -> Tensor:
        """Return the inner products of θ₀, τ₁ … τₙ for all experts, in float64: (n + 1, n + 1).

        `by_rows` gives them for each row of the tensor: (rows, n + 1, n + 1).
        """
        key = (self.experts, self.name, by_rows)
        if key not in self.tables.grams:
            vectors = [wide(self.base), *(self.vector(expert) for expert in self.experts)]
            self.tables.grams[key] = _gram(
                vectors, self.base.shape[-1] if by_rows and self.base.ndim else self.base.numel()
            )
        gram = self.tables.grams[key]
        return gram if by_rows else gram[0]


def _is_on_grid(value: float) -> bool:
    return abs(round(value / DENSITY_STEP) * DENSITY_STEP - value) < 1e-9


def _bands(vector: Tensor, densities: Sequence[float], gamma: float) -> list[tuple[float, float]]:
    magnitudes = np.sort(vector.abs().flatten().cpu().numpy())[::-1]  # numpy sorts with SIMD, torch does not
    n = len(magnitudes)
    bands = []
    for density in densities:
        kept = max(1, int(density * n))
        skipped = min(int(gamma * n), n - kept)
        high = float(magnitudes[skipped - 1]) if skipped else float("inf")
        bands.append((float(magnitudes[skipped + kept - 1]), high))
    return bands


def _gram(vectors: Sequence[Tensor], length: int) -> Tensor:
    """Return the Gram matrices of vectors cut into rows of this length: (rows, n, n), in float64.

    Summed block by block without BLAS, so that the bits do not depend on the number of threads.
    """
    rows = [vector.reshape(-1, length).cpu().numpy() for vector in vectors]
    total: NDArray[np.float64] = np.zeros((len(rows[0]), len(rows), len(rows)))
    for begin in range(0, length, _BLOCK):
        block = np.stack([row[:, begin : begin + _BLOCK] for row in rows]).astype(np.float64)
        total += np.einsum("irc,jrc->rij", block, block)
    return torch.from_numpy(total)
