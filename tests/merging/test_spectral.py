"""Merges by singular values: against plain versions of the authors' code, and by their algebra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mergetune.merging.elementwise import Source, merge_tensor
from mergetune.merging.methods import RULES, Coefficients
from mergetune.merging.operands import Operands
from mergetune.merging.plan import Plan
from mergetune.space.method_table import MethodName

SHAPES = [(24, 16), (16, 24), (17, 17), (5, 40)]
SCALES = (0.6, 1.0, 1.7)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def task_vectors(shape: tuple[int, ...], n: int = 3) -> list[Tensor]:
    """Task vectors with a shared part."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(shape, generator=generator)
    return [(1 + i) * (shared + torch.randn(shape, generator=generator)) for i in range(n)]


def added(vectors: Sequence[Tensor | None], method: MethodName, *lambdas: float, **given: float) -> Tensor:
    """What a merge adds to a base of zeros; None: the expert leaves it alone."""
    experts = tuple(f"e{i}" for i in range(len(vectors)))
    found = dict(zip(experts, vectors, strict=True))
    sources = {name: Source(vector, "vector") for name, vector in found.items() if vector is not None}
    base = torch.zeros_like(next(iter(sources.values())).data)
    operands = Operands("w", base, experts, sources, Plan(lambda _: None))
    values: dict[str, Any] = {"lambda": dict(zip(experts, lambdas, strict=True))} if lambdas else given
    out = torch.empty_like(base)
    merge_tensor(RULES[method](operands, Coefficients(values, {}, 0)), base, [*sources.values()], out)
    return out


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5)


def total(vectors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(vectors)).sum(dim=0)


def double(vectors: Sequence[Tensor]) -> list[Tensor]:
    """The same in the precision that the authors' code is run in here."""
    return [vector.double() for vector in vectors]


def authors_tsv_merge(vectors: Sequence[Tensor]) -> Tensor:
    """After `compute_and_sum_svd_mem_reduction` of AntoAndGar/task_singular_vectors."""
    n_kept = min(vectors[0].shape) // len(vectors)
    u, s, v = zip(*(torch.linalg.svd(vector, full_matrices=False) for vector in vectors), strict=True)
    left, right = torch.cat([each[:, :n_kept] for each in u], dim=1), torch.cat([each[:n_kept] for each in v])
    (u_u, _, v_u), (u_v, _, v_v) = (torch.linalg.svd(each, full_matrices=False) for each in (left, right))
    values = torch.cat([each[:n_kept] for each in s])
    made: Tensor = torch.linalg.multi_dot((u_u, v_u, torch.diag(values), u_v, v_v))
    return made


def authors_iso_c(vectors: Sequence[Tensor]) -> Tensor:
    """After `iso_c` of danielm1405/iso-merging."""
    u, s, v = torch.linalg.svd(total(vectors), full_matrices=False)
    made: Tensor = torch.linalg.multi_dot((u, torch.diag(torch.ones_like(s) * s.mean()), v))
    return made


def authors_svc(vectors: Sequence[Tensor], merged: Tensor, alpha: float) -> Tensor:
    """After `coef_cal_multi_ranks` and `Align` of lyymuwu/SVC."""
    u, s, v = torch.linalg.svd(merged, full_matrices=False)
    of_merged, of_experts = u.T @ merged, torch.einsum("mr,kmn->rkn", u, torch.stack(list(vectors)))
    norms = (of_experts * of_experts).sum(dim=-1).clamp_min(1e-12)
    coefficients = torch.einsum("rd,rkd->rk", of_merged, of_experts) / norms
    eta = torch.maximum(coefficients, torch.tensor(alpha, dtype=u.dtype)).mean(dim=1)
    made: Tensor = torch.linalg.multi_dot((u, torch.diag(s / eta), v))
    return made


@shapes
def test_tsv_merge_is_the_authors(shape: tuple[int, ...]) -> None:
    vectors = task_vectors(shape)
    close(added(vectors, "tsv_merge", *[1.0] * 3), authors_tsv_merge(double(vectors)))


@shapes
@pytest.mark.parametrize("scale", SCALES)
def test_iso_c_is_the_authors(shape: tuple[int, ...], scale: float) -> None:
    vectors = task_vectors(shape)
    close(added(vectors, "iso_c", scale=scale), scale * authors_iso_c(double(vectors)))


@shapes
@pytest.mark.parametrize("alpha", [1 / 3, 1.0, 1.5])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_svc_is_the_authors_after_task_arithmetic(
    shape: tuple[int, ...], alpha: float, factor: float
) -> None:
    vectors = task_vectors(shape)
    wide = double(vectors)
    theirs = authors_svc(wide, factor * total(wide), alpha)
    close(added(vectors, "svc", scale=1.0, alpha=alpha / factor), theirs)


@pytest.mark.parametrize("shape", [(30,), (3, 4, 5)], ids=str)
def test_what_is_no_matrix_is_averaged_or_calibrated_as_one_direction(shape: tuple[int, ...]) -> None:
    vectors = task_vectors(shape)
    summed = total(vectors)
    weighted = sum(weight * vector for weight, vector in zip(SCALES, vectors, strict=True))
    close(added(vectors, "tsv_merge", *SCALES), torch.as_tensor(weighted) / 3)
    close(added(vectors, "iso_c", scale=0.7), 0.7 * summed / 3)
    row = [vector.reshape(1, -1) for vector in vectors]
    theirs = authors_svc(row, summed.reshape(1, -1), 0.5).reshape(shape)
    close(added(vectors, "svc", scale=1.0, alpha=0.5), theirs)


def test_experts_that_share_no_direction_are_left_as_they_are() -> None:
    """Iso-C evens out their singular values, which the others keep."""
    vectors = [torch.zeros(16, 16), torch.zeros(16, 16)]
    vectors[0][:8, :8], vectors[1][8:, 8:] = (2 * torch.eye(8), 3 * torch.eye(8))
    close(added(vectors, "tsv_merge", 0.5, -2.0), 0.5 * vectors[0] - 2 * vectors[1])
    close(added(vectors, "svc", scale=0.5, alpha=1.0), 0.5 * (vectors[0] + vectors[1]))
    close(added(vectors, "iso_c", scale=1.0), 2.5 * torch.eye(16))


def test_what_experts_share_counts_once() -> None:
    """Two copies of one expert make that expert, where task arithmetic makes twice its task vector."""
    vector = task_vectors((16, 16), 1)[0][:, :6] @ task_vectors((6, 24), 1)[0]
    close(added([vector, vector], "svc", scale=1.0, alpha=1.0), vector)
    close(added([vector, vector], "tsv_merge", 1.0, 1.0), vector)


def test_updates_of_low_rank_are_merged_in_the_space_that_they_span() -> None:
    """In the coordinates of that space the merge is the authors' own (Core Space; Panariello et al. 2025)."""
    generator = torch.Generator().manual_seed(0)
    factors = [[torch.randn(40, 4, generator=generator) for _ in range(2)] for _ in range(3)]
    vectors = [b @ a.T for b, a in factors]
    left, right = (torch.linalg.qr(torch.cat([pair[i] for pair in factors], dim=1)).Q for i in (0, 1))
    core = [left.T @ vector @ right for vector in vectors]  # (12, 12)
    for ours, theirs in (
        (added(vectors, "tsv_merge", *[1.0] * 3), authors_tsv_merge(core)),
        (added(vectors, "iso_c", scale=1.0), authors_iso_c(core)),
    ):
        torch.testing.assert_close(ours, left @ theirs @ right.T, rtol=1e-4, atol=1e-4)


def test_an_expert_that_leaves_a_matrix_alone_takes_no_part_in_calibration() -> None:
    vectors = task_vectors((12, 12), 2)
    given = {"scale": 1.0, "alpha": 0.5}
    close(added([vectors[0], None, vectors[1]], "svc", **given), added(vectors, "svc", **given))
    close(added([None, vectors[0]], "svc", **given), vectors[0])


def test_weights_that_are_not_finite_come_out_as_such() -> None:
    vectors = task_vectors((8, 8), 2)
    vectors[1][0, 0] = float("nan")
    assert added(vectors, "tsv_merge", 1.0, 1.0).isnan().all()
    assert added(vectors, "iso_c", scale=1.0).isnan().all()
    assert added(vectors, "svc", scale=1.0, alpha=0.5).isnan().all()
