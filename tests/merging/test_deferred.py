"""Tensors that are merged when they are read: the bits of the whole, and no more read than is wanted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_plan_and_executor import CASES, DTYPES, models, recipe
from torch import Tensor

from mergetune.errors import TrialError
from mergetune.merging.deferred import DeferredTensor
from mergetune.merging.elementwise import part_of
from mergetune.merging.inputs import open_inputs
from mergetune.merging.memory_model import MemoryModel
from mergetune.merging.merger import Merge, Merger
from mergetune.space.method_table import METHODS, MethodName
from mergetune.space.recipe import MergeRecipe
from mergetune.weights.low_rank import LowRank

View = Callable[[Tensor], Tensor]
VIEWS: dict[str, list[View]] = {
    "matrix": [
        lambda w: w,
        lambda w: w.narrow(0, 11, 19),
        lambda w: w.narrow(1, 37, 90),
        lambda w: w[5:40].chunk(2, dim=1)[1],
        lambda w: w.t()[100:],
        lambda w: w.view(4, 12, 200)[1:3].transpose(1, 2),
        lambda w: w.reshape(-1)[300:777],
        lambda w: w[7],
        lambda w: w[7, 11:12],
    ],
    "cube": [
        lambda w: w[1],
        lambda w: w.narrow(1, 20, 20),
        lambda w: w.narrow(2, 12, 12),
        lambda w: w.transpose(1, 2).chunk(2, dim=2)[1].unbind()[2].narrow(0, 3, 9),
        lambda w: w[2].unsqueeze(0),
    ],
    "vector": [lambda w: w[2000:5000], lambda w: w.view(90, 100)[:, 3:50]],
    "scalar": [lambda w: w.reshape(1)],
    "empty": [lambda w: w[:, 1:3]],
}


def begin(found: list[MemoryModel], method: MethodName, is_plain: bool = False, **options: str) -> Merge:
    base, *experts = found
    return Merger(base, experts, is_plain).start(recipe(method, [each.name for each in experts], options))


@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize(
    ("method", "options"), CASES, ids=lambda case: "-".join(case.values()) if isinstance(case, dict) else case
)
def test_parts_have_the_bits_of_the_whole(
    method: MethodName, options: dict[str, str], is_plain: bool
) -> None:
    n_experts = METHODS[method].max_experts or 3
    dtype = DTYPES[len(method) % len(DTYPES)]
    found = models(n_experts, dtype)
    merge = begin(found, method, is_plain, **options)
    for name, views in VIEWS.items():
        whole, deferred = merge.tensor(name), merge.deferred(name)
        for view in views:
            assert torch.equal(view(deferred).clone(), view(whole)), name
    merge.check()


@pytest.mark.parametrize("method", ["dare_ties", "della_linear"])
def test_random_masks_of_columns_are_those_of_long_tensors(method: MethodName) -> None:
    """Many lines, so that chunks and tasks end amid the tensor."""
    shapes = {"w": (3000, 257)}
    generator = torch.Generator().manual_seed(0)
    found = [
        MemoryModel(name, {k: torch.randn(s, generator=generator) for k, s in shapes.items()})
        for name in ("base", "e0", "e1")
    ]
    whole = begin(found, method).tensor("w")
    for is_plain in (False, True):
        deferred = begin(found, method, is_plain).deferred("w")
        assert torch.equal(deferred[:, 100:].clone(), whole[:, 100:])
        assert torch.equal(deferred[2000:, :3].clone(), whole[2000:, :3])


def test_no_more_is_read_than_is_wanted() -> None:
    found = models(2)
    merge = begin(found, "ties")
    per_entry = 3 * 4  # the base and two experts in float32
    matrix, cube = merge.deferred("matrix"), merge.deferred("cube")
    views = [matrix[10:20], matrix[:, 50:100], matrix.t()[3:5], cube[1], cube[:, 3:5], cube[..., 7:9]]
    assert merge.read_bytes == 0
    for view in views:
        before = merge.read_bytes
        copied = torch.empty(view.shape)
        copied.copy_(view)
        assert merge.read_bytes - before == view.numel() * per_entry
    torch.empty(48, 200, device="meta").copy_(matrix)  # as vLLM counts what it will load
    assert merge.read_bytes == sum(view.numel() for view in views) * per_entry


def test_what_is_no_view_computes() -> None:
    found = models(2)
    merge = begin(found, "linear")
    whole, deferred = merge.tensor("matrix"), merge.deferred("matrix")
    assert isinstance(deferred, DeferredTensor)
    assert isinstance(deferred.t()[1:], DeferredTensor)
    for operation in (
        lambda w: w * 2,
        lambda w: w.to(torch.bfloat16),
        lambda w: w[:, 3:].contiguous(),
        lambda w: torch.cat([w, w[:5]]),
        lambda w: w.view(torch.int32),
        lambda w: w[[3, 1]],
    ):
        found_one = operation(deferred)
        assert type(found_one) is Tensor
        assert torch.equal(found_one, operation(whole))
    assert deferred[3, 4].item() == whole[3, 4].item()
    with pytest.raises(RuntimeError, match="cannot be written to"):
        deferred.mul_(2)


def test_adapters_are_merged_in_parts_too(
    tiny_base: Path, tiny_experts: dict[str, Path], tiny_adapter: Path
) -> None:
    inputs = open_inputs(tiny_base, {"full": tiny_experts["a"], "adapter": tiny_adapter})
    given = {"lambda": {"full": 0.4, "adapter": 0.9}, "density": {"full": 0.3, "adapter": 0.6}}
    wanted = MergeRecipe.of_one_group("dare_ties", inputs.base_source, inputs.expert_sources, given)
    whole, merge = dict(inputs.merger.merge(wanted)), inputs.merger.start(wanted)
    for name, tensor in whole.items():
        deferred = merge.deferred(name)
        assert torch.equal(deferred[1:17].clone(), tensor[1:17])
        assert torch.equal(deferred[..., 1:17].clone(), tensor[..., 1:17])


def test_rows_of_a_product_have_the_bits_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = LowRank(torch.randn(700, 12, generator=generator), torch.randn(12, 900, generator=generator))
    whole = factors.product()
    for rows in (slice(0, 700), slice(350, 700), slice(7, 8), slice(13, 650), slice(699, 700)):
        assert torch.equal(factors.of_rows(rows), whole[rows])


@pytest.mark.parametrize("where", [0, 40])
def test_a_part_that_is_not_finite_is_told_at_the_end(where: int) -> None:
    base, *experts = models(2)
    experts[0].tensors["matrix"][where, 3] = torch.inf
    merge = begin([base, *experts], "task_arithmetic")
    merge.deferred("matrix")[:24].clone()
    if where < 24:
        with pytest.raises(TrialError, match="makes `matrix` infinite or NaN"):
            merge.check()
    else:
        merge.check()


def test_what_cannot_be_merged_is_read_from_the_base() -> None:
    """Three vectors that balance out on the sphere have no mean direction."""
    vector = torch.ones(48, 200)
    base = MemoryModel("base", {"matrix": 0 * vector})
    experts = [MemoryModel(f"e{i}", {"matrix": sign * vector}) for i, sign in enumerate((1, -1, -1))]
    sources: dict[str, Any] = {name: {"path": name} for name in ("base", "e0", "e1", "e2")}
    weights = {"lambda": {"e0": 2.0, "e1": 1.0, "e2": 1.0}}
    wanted = MergeRecipe.of_one_group("multislerp", sources.pop("base"), sources, weights)
    merge = Merger(base, experts).start(wanted)
    assert torch.equal(merge.deferred("matrix")[3:].clone(), base.tensors["matrix"][3:])
    with pytest.raises(TrialError, match="`multislerp` cannot merge `matrix`"):
        merge.check()


def test_a_part_of_a_scalar_is_a_matrix() -> None:
    assert part_of(torch.tensor(3.0), slice(0, 1), slice(0, 1)).shape == (1, 1)
