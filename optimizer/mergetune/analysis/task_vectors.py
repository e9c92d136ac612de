"""Task vectors compared, part by part: lengths, redundancy, angles and sign conflicts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mergetune.merging.inputs import Inputs
from mergetune.space.recipe import LayerGroup, assign_groups

TOP_SHARE = 0.2  # TIES keeps this share of the entries by default (Yadav et al. 2023)
_CUT = NormalDist().inv_cdf(1 - TOP_SHARE / 2)
# The redundancy of independent Gaussian entries, ∫ z² φ(z) dz beyond ±_CUT: 0.65.
GAUSSIAN_REDUNDANCY = 2 * (_CUT * NormalDist().pdf(_CUT) + TOP_SHARE / 2)
# The overlap of independent Gaussian vectors, (E|z|)² / E z²: 0.64.
GAUSSIAN_OVERLAP = 2 / math.pi
_CHUNK = 1 << 16  # entries in float64 at a time, so that they stay in the processor's cache


@dataclass(frozen=True)
class VectorStatistics:
    """One expert's task vector in a part of the model; None where a figure is undefined.

    Attributes:
        norm: its Frobenius norm.
        relative_norm: `norm` over that of the base's matrices; over that of everything in a part
            without matrices.
        redundancy: the share of the squared norm in the largest 20 % of the entries of each
            tensor: 0.2 if all are alike, 0.65 for a Gaussian, 1 if the other four fifths are 0.
    """

    norm: float
    relative_norm: float | None
    redundancy: float | None


@dataclass(frozen=True)
class PairStatistics:
    """Two task vectors a and b in a part of the model; None where a figure is undefined.

    cosine = overlap · (1 − 2 · weighted_conflict), so that a conflict counts as far as the two
    change the same entries. None of the three depends on the lengths of a and b.

    Attributes:
        first: the name of a's expert.
        second: the name of b's expert.
        cosine: Σ ab / (‖a‖ ‖b‖), in [-1, 1]; near 0 for unrelated vectors.
        overlap: Σ |ab| / (‖a‖ ‖b‖), in [0, 1]: the cosine of the magnitudes. 0 if they change
            different entries, 0.64 for independent Gaussian vectors.
        sign_conflict: the share of the entries changed by both whose signs differ (Yadav et al.
            2023, section 3); 0.5 for unrelated vectors.
        weighted_conflict: the same, each entry counted with |ab|; 0.5 for unrelated vectors.
        norm_ratio: ‖a‖ / ‖b‖.
    """

    first: str
    second: str
    cosine: float | None
    overlap: float | None
    sign_conflict: float | None
    weighted_conflict: float | None
    norm_ratio: float | None


@dataclass(frozen=True)
class PartStatistics:
    """All task vectors in a part of the model: a layer group, or the whole of it."""

    name: str
    n_parameters: int
    experts: dict[str, VectorStatistics]
    pairs: tuple[PairStatistics, ...]


@dataclass(frozen=True)
class TaskVectorStatistics:
    """The task vectors in each layer group and in the whole model."""

    groups: tuple[PartStatistics, ...]
    whole: PartStatistics


class _Vector(NamedTuple):
    """Sums over one tensor of a task vector, in float64: Σ a², and that over its largest entries."""

    square: float = 0.0
    top_square: float = 0.0


class _Pair(NamedTuple):
    """Sums over one tensor of two task vectors: Σ ab, Σ |ab|, how many ab < 0, how many ab ≠ 0."""

    product: float = 0.0
    magnitude: float = 0.0
    n_opposed: float = 0.0
    n_shared: float = 0.0


@dataclass(frozen=True)
class _TensorSums:
    """The sums over one tensor; experts that leave it as it is are absent."""

    n: int
    base_square: float
    is_matrix: bool
    vectors: Mapping[str, _Vector]
    pairs: Mapping[tuple[str, str], _Pair]


def task_vector_statistics(inputs: Inputs, groups: Sequence[LayerGroup]) -> TaskVectorStatistics:
    """Compare the experts' task vectors in what the groups take; every tensor is read once, one at a time.

    Raises:
        MergetuneError: a tensor of the base falls into no layer group or into several.
    """
    experts = [expert.name for expert in inputs.experts]
    assigned = assign_groups(groups, inputs.base.names)
    sums: dict[str, list[_TensorSums]] = {group.name: [] for group in groups}
    for name in assigned:
        base = inputs.base.tensor(name)
        if base.is_floating_point():
            found = {expert.name: expert.task_vector(name, base) for expert in inputs.experts}
            changes = {expert: vector for expert, vector in found.items() if vector is not None}
            sums[assigned[name].name].append(_tensor_sums(base, changes))
    parts = [_statistics(group, tensors, experts) for group, tensors in sums.items() if tensors]
    whole = _statistics("whole model", list(itertools.chain(*sums.values())), experts)
    return TaskVectorStatistics(tuple(parts), whole)


def top_square(vector: Tensor) -> float:
    """Return the squared norm of the largest 20 % of the entries, exactly as many and at least one."""
    magnitudes = vector.flatten().abs().numpy()
    n_rest = magnitudes.size - max(1, int(TOP_SHARE * magnitudes.size + 1e-9))
    magnitudes.partition(n_rest)
    return float(np.square(magnitudes[n_rest:], dtype=np.float64).sum())


def _tensor_sums(base: Tensor, vectors: Mapping[str, Tensor]) -> _TensorSums:
    pairs = itertools.combinations(vectors, 2)
    return _TensorSums(
        base.numel(),
        _square(base.float()),
        base.ndim > 1,
        {name: _Vector(_square(vector), top_square(vector)) for name, vector in vectors.items()},
        {(one, two): _Pair(*_totals(_chunk_sums(vectors[one], vectors[two]))) for one, two in pairs},
    )


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _chunk_sums(first: Tensor, second: Tensor) -> Iterator[_Pair]:
    one, two = first.flatten(), second.flatten()
    for start in range(0, len(one), _CHUNK):
        products = one[start : start + _CHUNK].double() * two[start : start + _CHUNK].double()
        yield _Pair(
            float(products.sum()),
            float(products.abs().sum()),
            int((products < 0).sum()),
            int(products.count_nonzero()),
        )


def _statistics(name: str, tensors: Sequence[_TensorSums], experts: Sequence[str]) -> PartStatistics:
    matrices = sum(tensor.base_square for tensor in tensors if tensor.is_matrix)
    base_norm = math.sqrt(matrices or sum(tensor.base_square for tensor in tensors))
    vectors = {
        expert: _Vector(*_totals(tensor.vectors.get(expert, _Vector()) for tensor in tensors))
        for expert in experts
    }
    norms = {expert: math.sqrt(vector.square) for expert, vector in vectors.items()}
    return PartStatistics(
        name,
        sum(tensor.n for tensor in tensors),
        {
            expert: VectorStatistics(
                norms[expert],
                _ratio(norms[expert], base_norm),
                _ratio(vector.top_square, vector.square),
            )
            for expert, vector in vectors.items()
        },
        tuple(_pair(pair, tensors, norms) for pair in itertools.combinations(experts, 2)),
    )


def _pair(
    names: tuple[str, str], tensors: Sequence[_TensorSums], norms: Mapping[str, float]
) -> PairStatistics:
    sums = _Pair(*_totals(tensor.pairs.get(names, _Pair()) for tensor in tensors))
    first, second = names
    norm_product = norms[first] * norms[second]
    return PairStatistics(
        first,
        second,
        cosine=_ratio(sums.product, norm_product),
        overlap=_ratio(sums.magnitude, norm_product),
        sign_conflict=_ratio(sums.n_opposed, sums.n_shared),
        weighted_conflict=_ratio(sums.magnitude - sums.product, 2 * sums.magnitude),
        norm_ratio=_ratio(norms[first], norms[second]),
    )


def _totals(rows: Iterable[Sequence[float]]) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
