"""What a plan holds: the tables of a tensor that follow from base and experts alone, and how each is made.

In C++ where there is a compiler (`plan.cpp`), else in numpy, with the same bits on any number of threads.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergetune.merging import native, spectral
from mergetune.merging.elementwise import SPAN, Source, lane_sum, row_length, variance, wide

# Densities live on this grid, so that one table serves a whole study.
DENSITY_STEP = 0.01
GRID = tuple(step / 100 for step in range(1, 101))
_ROW_BLOCK = 1 << 18  # entries whose softmax is taken at a time

Array = NDArray[Any]


@dataclass(frozen=True)
class Kind:
    """A kind of table.

    Attributes:
        name: what it is called on disk.
        is_joint: whether it is of all experts together, or else of each expert by itself.
        layout: dtype and shape of a table, from the base's tensor and the number of sources.
        fill: writes a table, which is zeros before, from the base's tensor and the sources.
    """

    name: str
    is_joint: bool
    layout: Callable[[Tensor, int], tuple[str, tuple[int, ...]]]
    fill: Callable[[Array, Tensor, Sequence[Source]], None]


def grid_place(value: float) -> int | None:
    """Return the place in `GRID` of a density, or None where it is not on the grid."""
    step = round(value / DENSITY_STEP)
    return step - 1 if abs(step * DENSITY_STEP - value) < 1e-9 and step >= 1 else None


@functools.cache
def bands_kind(gamma: float) -> Kind:
    """Return the kind of table that holds `bands` for each density of the grid."""
    return Kind(
        f"bands-{gamma:g}",
        False,
        lambda base, _: (_wide_dtype(base), (len(GRID), 2)),
        lambda out, base, sources: np.copyto(out, bands(base, sources[0], GRID, gamma)),
    )


def bands(base: Tensor, source: Source, densities: Sequence[float], gamma: float) -> Array:
    """Return the magnitudes low and high between which (low ≤ |τ| < high) entries stay: (n_densities, 2).

    Of n entries the ⌊gamma · n⌋ largest are left out, fewer where density + gamma > 1, and of the rest the
    max(1, ⌊density · n⌋) largest are kept. Entries equal to `low` are all kept, and those equal to `high`
    all left out.
    """
    n = base.numel()
    kept = [max(1, int(density * n)) for density in densities]
    skipped = [min(int(gamma * n), n - each) for each in kept]
    positions = [top + count - 1 for top, count in zip(skipped, kept, strict=True)]
    positions += [max(top - 1, 0) for top in skipped]
    low, high = np.split(_largest_magnitudes(base, source, positions), 2)
    return np.stack([low, np.where(np.array(skipped) > 0, high, np.inf)], axis=1)


def _largest_magnitudes(
    base: Tensor, source: Source, positions: Sequence[int], scales: Tensor | None = None
) -> Array:
    """Return the values of |τ|, times the scale of their row, at positions in order, 0 being the largest."""
    wanted, places = np.unique(np.array(positions, np.int64), return_inverse=True)
    if (job := _job(base, [source])) is not None:
        if scales is not None:
            job.n_rows, job.row_length = len(scales), base.numel() // len(scales)
            job.scales = native.by_rows([scales])
        return _selected("select_magnitudes", job, wanted)[places]
    magnitudes = _vector(base, source).abs()
    if scales is not None:
        magnitudes = magnitudes.reshape(len(scales), -1) * scales
    return np.sort(_flat(magnitudes))[::-1][wanted][places]  # numpy sorts with SIMD, torch does not


GRAM = Kind(
    "gram",
    True,
    lambda _, n: ("float64", (1, n + 1, n + 1)),
    lambda out, base, sources: _fill_grams(out, base, sources),
)
GRAM_BY_ROWS = Kind(
    "gram-by-rows",
    True,
    lambda base, n: ("float64", (_n_rows(base), n + 1, n + 1)),
    lambda out, base, sources: _fill_grams(out, base, sources),
)


def _fill_grams(out: Array, base: Tensor, sources: Sequence[Source]) -> None:
    """Write the inner products of θ₀, τ₁ … τₙ, by rows: (n_rows, n + 1, n + 1)."""
    if (job := _job(base, sources)) is not None:
        job.n_rows, job.row_length = len(out), base.numel() // len(out)
        native.loaded().sum_products(ctypes.byref(job), ctypes.c_void_p(out.ctypes.data))
        return
    vectors = [_flat(wide(base)), *(_flat(_vector(base, source)) for source in sources)]
    rows = [vector.reshape(len(out), -1) for vector in vectors]
    for row, gram in enumerate(out):
        for begin in range(0, rows[0].shape[1], SPAN):
            block = [each[row, begin : begin + SPAN].astype(np.float64) for each in rows]
            for i, first in enumerate(block):
                for j, second in enumerate(block[: i + 1]):
                    gram[i, j] += lane_sum(first * second)
        gram += np.tril(gram, -1).T


RANKS = Kind(
    "ranks",
    False,
    lambda base, _: ("uint16" if row_length(base) <= 1 << 16 else "uint32", tuple(base.shape)),
    lambda out, base, sources: _fill_ranks(out, base, sources[0]),
)


def _fill_ranks(out: Array, base: Tensor, source: Source) -> None:
    """Write the rank of each entry's magnitude in its row, 0 being the least, equal ones by position."""
    if (job := _job(base, [source])) is not None:
        job.row_length, job.rank_bytes = row_length(base), out.itemsize
        native.loaded().rank_magnitudes(ctypes.byref(job), ctypes.c_void_p(out.ctypes.data))
        return
    rows = _flat(_vector(base, source).abs()).reshape(-1, row_length(base))
    order = np.argsort(rows, axis=-1, kind="stable")
    np.put_along_axis(out.reshape(rows.shape), order, np.arange(rows.shape[1])[None], axis=-1)


SELECTIONS = Kind(
    "selections",
    True,
    lambda _, n: ("float64", (len(GRID), 1 + n)),
    lambda out, base, sources: np.copyto(out, selections(base, sources, GRID)),
)


def selections(base: Tensor, sources: Sequence[Source], shares: Sequence[float]) -> Array:
    """Return SCE's variance threshold and each expert's Σ τ² above it, by share: (n_shares, 1 + n_experts).

    Selected are the first k = ⌊share · m⌋ of the m positions whose variance is not zero, and all that tie
    with the last of them. Where k is 0 the threshold is NaN, which no variance reaches; share 1 selects
    every position, from -∞ on.
    """
    energies_of = _Energies(base, sources)
    counts = [int(share * energies_of.n_varying + 1e-9) if share < 1 else None for share in shares]
    wanted = sorted({k - 1 for k in counts if k}, reverse=True)
    thresholds = energies_of.variances_at(wanted)  # ascending
    found = dict(zip(wanted, thresholds, strict=True))
    bounds = np.unique(thresholds)
    above = np.add.accumulate(energies_of.by_bin(bounds)[::-1], axis=0)[::-1]  # row b: b bounds or more
    out = np.zeros((len(shares), 1 + len(sources)))
    for row, k in zip(out, counts, strict=True):
        if k == 0:
            row[0] = np.nan
        elif k is None:
            row[0], row[1:] = -np.inf, above[0]
        else:
            row[0] = found[k - 1]
            row[1:] = above[np.searchsorted(bounds, row[0]) + 1]
    return out


class _Energies:
    """Variances across experts, and squares of the entries by variance."""

    def __init__(self, base: Tensor, sources: Sequence[Source]) -> None:
        self._job = _job(base, sources)
        self._n_experts = len(sources)
        if self._job is not None:
            self.n_varying = int(native.loaded().count_varying(ctypes.byref(self._job)))
            return
        vectors = [_vector(base, source) for source in sources]
        self._vectors, self._variance = [_flat(vector) for vector in vectors], _flat(variance(vectors))
        self.n_varying = int(np.count_nonzero(self._variance))

    def variances_at(self, positions: Sequence[int]) -> Array:
        """Return the variances at positions in order, 0 being the largest."""
        if self._job is not None:
            ascending = np.array(positions[::-1], np.int64)
            return _selected("select_variances", self._job, ascending)[::-1]
        return np.sort(self._variance)[::-1][np.array(positions, np.int64)]

    def by_bin(self, bounds: Array) -> Array:
        """Return Σ τ² of each expert's entries whose variance reaches 0, 1, … of the bounds."""
        out = np.zeros((len(bounds) + 1, self._n_experts))
        if self._job is not None:
            given = np.ascontiguousarray(bounds, np.float32)
            addresses = ctypes.c_void_p(given.ctypes.data), len(given), ctypes.c_void_p(out.ctypes.data)
            native.loaded().sum_energies(ctypes.byref(self._job), *addresses)
            return out
        bins = np.searchsorted(bounds, self._variance, side="right")
        for column, vector in zip(out.T, self._vectors, strict=True):
            column += np.bincount(bins, vector.astype(np.float64) ** 2, len(out))
        return out


IMPORTANCE = Kind(
    "importance",
    False,
    lambda base, _: (_wide_dtype(base), (_n_rows(base) + 1,)),
    lambda out, base, sources: _fill_importance(out, base, sources[0]),
)


def _fill_importance(out: Array, base: Tensor, source: Source) -> None:
    """Write KL(softmax(θ) ‖ softmax(θ₀)) of each row, and the importance from which entries are taken over.

    The importance |τ| · KL must reach the median + 1.5 · (Q3 − Q1) of the tensor (Arcee Fusion; Arcee AI
    2025). The quantile q of n values is number ⌊q · (n − 1)⌋ of them in order, over the whole tensor:
    mergekit samples a million with replacement where there are more. It adds 1e-8 to every probability.
    """
    length, n = row_length(base), base.numel()
    rows, block = base.reshape(-1, length), max(1, _ROW_BLOCK // length)
    given = source.data.reshape(-1, length)
    divergences = out[:-1]
    for begin in range(0, len(rows), block):
        here = slice(begin, begin + block)
        start, weights = wide(rows[here]), given[here].to(wide(rows[here]).dtype)
        weights = weights + start if source.kind == "vector" else weights
        p, q = (torch.softmax(tensor, dim=-1) + 1e-8 for tensor in (weights, start))
        divergences[here] = (p * torch.log(p / q)).sum(dim=-1).cpu().numpy()
    positions = [n - 1 - (n - 1) * quarter // 4 for quarter in (1, 2, 3)]
    scales = torch.from_numpy(np.array(divergences))[:, None].to(base.device)
    q1, median, q3 = _largest_magnitudes(base, source, positions, scales)
    out[-1] = median + out.dtype.type(1.5) * (q3 - q1)


@functools.cache
def overlaps_kind(epsilon: float) -> Kind:
    """Return the kind of table that holds `overlaps`."""
    return Kind(
        f"overlaps-{epsilon:g}",
        True,
        lambda _, n: ("int64", (n, 2)),
        lambda out, base, sources: np.copyto(out, overlaps(base, sources, epsilon)),
    )


def overlaps(base: Tensor, sources: Sequence[Source], epsilon: float) -> Array:
    """Return how many entries each expert changes together with others, and alone: (n_experts, 2).

    An entry is changed where |τ| > epsilon, in the precision of τ.
    """
    low = next_above(epsilon)
    total = torch.zeros(base.shape, dtype=torch.int32, device=base.device)
    for source in sources:
        total += _vector(base, source).abs() >= low
    changed = [total[_vector(base, source).abs() >= low] for source in sources]
    return np.array([[int((each > 1).sum()), int((each == 1).sum())] for each in changed])


DECORRELATED = Kind(
    "decorrelated",
    True,
    lambda base, n: (_wide_dtype(base), (n, *base.shape) if base.ndim == 2 else (0,)),
    lambda out, base, sources: _fill_matrix(out, base, sources, spectral.decorrelated),
)
ISOTROPIC = Kind(
    "isotropic",
    True,
    lambda base, _: (_wide_dtype(base), tuple(base.shape) if base.ndim == 2 else (0,)),
    lambda out, base, sources: _fill_matrix(out, base, sources, spectral.isotropic),
)
CALIBRATION = Kind(  # `spectral.calibration`, side by side: Uᵀ, Σ Vᵀ and the shares
    "calibration",
    True,
    lambda base, n: (_wide_dtype(base), (min(_sides(base)), sum(_sides(base)) + n)),
    lambda out, base, sources: _fill_matrix(out, base, sources, _calibration),
)


def _fill_matrix(
    out: Array, base: Tensor, sources: Sequence[Source], made: Callable[[Sequence[Tensor]], Tensor]
) -> None:
    """Write what is made of the task vectors of a matrix; NaN where one of their entries is not finite."""
    if out.size == 0:
        return
    vectors = [_vector(base, source).reshape(_sides(base)) for source in sources]
    is_finite = all(bool(vector.isfinite().all()) for vector in vectors)
    out[...] = made(vectors).cpu().numpy() if is_finite else np.nan


def _calibration(vectors: Sequence[Tensor]) -> Tensor:
    u, rows, shares = spectral.calibration(vectors)
    return torch.cat([u.T, rows, shares], dim=1)


def _sides(base: Tensor) -> tuple[int, int]:
    """Return the rows and columns of a matrix; anything else is taken as one row."""
    return (base.shape[0], base.shape[1]) if base.ndim == 2 else (1, base.numel())


def next_above(value: float) -> float:
    """Return the least float32 above a number: what a magnitude has at least that exceeds it."""
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


def _job(base: Tensor, sources: Sequence[Source]) -> native.Job | None:
    """Return a job for `plan.cpp`, or None where it does not take these tensors."""
    data = [source.data for source in sources]
    if base.numel() >= 1 << 32 or not native.can_merge((base, base, *data)):
        return None
    return native.job_of(base, data, [source.kind == "vector" for source in sources])


def _selected(function: str, job: native.Job, positions: Array) -> Array:
    """Return the values at positions, which ascend, 0 being the largest."""
    out = np.zeros(len(positions), np.float32)
    call = getattr(native.loaded(), function)
    addresses = ctypes.c_void_p(positions.ctypes.data), len(positions), ctypes.c_void_p(out.ctypes.data)
    call(ctypes.byref(job), *addresses)
    return out


def _vector(base: Tensor, source: Source) -> Tensor:
    start = wide(base)
    return source.data.to(start.dtype) - (start if source.kind == "weights" else 0)


def _flat(tensor: Tensor) -> Array:
    found: Array = tensor.reshape(-1).cpu().numpy()
    return found


def _wide_dtype(base: Tensor) -> str:
    return "float64" if base.dtype == torch.float64 else "float32"


def _n_rows(base: Tensor) -> int:
    return base.numel() // row_length(base)
