"""What task vectors say before any evaluation: norms, cosines and sign conflicts by layer group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optimizer.merging.inputs import Inputs
from optimizer.recipe import LayerGroup, assign_groups


@dataclass
class PairStatistics:
    """Two experts' task vectors in one layer group.

    `cosine` is that of the angle between them; `sign_conflict` the share of the entries changed by
    both where their signs differ (Yadav et al. 2023, section 3).
    """

    first: str
    second: str
    cosine: float
    sign_conflict: float


@dataclass
class GroupStatistics:
    """One layer group: its size, and the norm of each task vector relative to the base's."""

    group: str
    n_parameters: int
    relative_norms: dict[str, float]
    pairs: list[PairStatistics]


@dataclass
class _Sums:
    """Running sums over the tensors of a group, in float64."""

    n: int = 0
    base: float = 0.0
    squares: dict[str, float] = field(default_factory=dict)
    products: dict[tuple[str, str], float] = field(default_factory=dict)
    conflicts: dict[tuple[str, str], int] = field(default_factory=dict)
    overlaps: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, base: Tensor, vectors: dict[str, Tensor]) -> None:
        self.n += base.numel()
        self.base += _dot(base, base)
        for name, vector in vectors.items():
            self.squares[name] = self.squares.get(name, 0.0) + _dot(vector, vector)
        for pair in itertools.combinations(vectors, 2):
            first, second = vectors[pair[0]], vectors[pair[1]]
            signs = torch.sign(first) * torch.sign(second)
            self.products[pair] = self.products.get(pair, 0.0) + _dot(first, second)
            self.conflicts[pair] = self.conflicts.get(pair, 0) + int((signs < 0).sum())
            self.overlaps[pair] = self.overlaps.get(pair, 0) + int((signs != 0).sum())


def task_vector_statistics(inputs: Inputs, groups: Sequence[LayerGroup]) -> list[GroupStatistics]:
    """Compare the experts' task vectors, layer group by layer group; reads every tensor once."""
    assigned = assign_groups(groups, inputs.base.names)
    sums = {group.name: _Sums() for group in groups}
    for name in inputs.base.names:
        base = inputs.base.tensor(name)
        if not base.is_floating_point():
            continue
        found = {expert.name: expert.task_vector(name, base) for expert in inputs.experts}
        vectors = {expert: v if v is not None else torch.zeros(()) for expert, v in found.items()}
        vectors = {expert: vector.expand(base.shape) for expert, vector in vectors.items()}
        sums[assigned[name].name].add(base.float(), vectors)
    return [_statistics(group.name, sums[group.name]) for group in groups if sums[group.name].n]


def _statistics(group: str, sums: _Sums) -> GroupStatistics:
    norms = {name: math.sqrt(square) for name, square in sums.squares.items()}
    base = math.sqrt(sums.base)
    pairs = [
        PairStatistics(
            first,
            second,
            product / (norms[first] * norms[second]) if norms[first] * norms[second] else 0.0,
            sums.conflicts[first, second] / max(1, sums.overlaps[first, second]),
        )
        for (first, second), product in sums.products.items()
    ]
    relative = {name: norm / base if base else math.nan for name, norm in norms.items()}
    return GroupStatistics(group, sums.n, relative, pairs)


def _dot(first: Tensor, second: Tensor) -> float:
    return float((first.double() * second.double()).sum())
