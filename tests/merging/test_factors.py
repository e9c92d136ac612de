"""Adapters as factors: the bits of their products, without a whole product, and nothing for a lambda of 0."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mergetune.merging.derivative import coefficient_slopes
from mergetune.merging.elementwise import (
    AnySource,
    Numbers,
    Source,
    Step,
    merge_chunk,
    merge_tensor,
)
from mergetune.merging.memory_model import MemoryAdapter, MemoryModel
from mergetune.merging.merger import Merger
from mergetune.merging.methods import RULES, Coefficients
from mergetune.space.method_table import METHODS, MethodName
from mergetune.space.recipe import MergeRecipe
from mergetune.weights import low_rank
from mergetune.weights.low_rank import LowRank

VALUES = {"density": 0.37, "gamma": 0.02, "epsilon": 0.2, "t": 0.3, "select_topk": 0.4, "scale": 1.2}
CASES: list[tuple[MethodName, dict[str, str]]] = [
    (name, {option.name: choice})
    for name, method in METHODS.items()
    for option in method.options
    for choice in option.choices
] + [(name, {}) for name, method in METHODS.items() if not method.options]


class Formed(MemoryAdapter):
    """Hands over products in the place of factors."""

    def factors(self, name: str) -> None:
        """It has none."""


def update(out: int, inside: int, rank: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    b, a = (torch.randn(shape, generator=generator) for shape in ((out, rank), (rank, inside)))
    return LowRank(b * 0.02, a * 0.05)


def models(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Any]:
    """A base, two adapters and a full fine-tune of it."""
    generator = torch.Generator().manual_seed(0)
    base = 0.05 * torch.randn(shape, generator=generator)
    tuned = base + 0.003 * torch.randn(shape, generator=generator)
    return [
        MemoryModel("base", {"w": base.to(dtype)}),
        MemoryAdapter("a", {"w": update(*shape, 5, 1)}),
        MemoryAdapter("b", {"w": update(*shape, 16, 2)}),
        MemoryModel("c", {"w": tuned.to(dtype)}),
    ]


def products_first(found: Sequence[Any]) -> list[Any]:
    return [Formed(each.name, each.updates) if isinstance(each, MemoryAdapter) else each for each in found]


def recipe(method: MethodName, experts: Sequence[str], options: dict[str, str] | None = None) -> MergeRecipe:
    group: dict[str, Any] = {"name": "all"}
    for parameter in METHODS[method].parameters:
        value = 0.002 if method in ("nearswap", "ram", "ramplus_tl") else VALUES.get(parameter.name, 0.7)
        values = dict.fromkeys(experts, value)
        if parameter.name == "lambda":
            values = {expert: 0.7 - 0.1 * i for i, expert in enumerate(experts)}
        group[parameter.name] = values if parameter.is_per_expert else value
    return MergeRecipe.model_validate(
        {
            "method": method,
            "base": {"path": "base"},
            "experts": {name: {"path": name} for name in experts},
            "options": options or None,
            "groups": [group],
        }
    )


def merged(found: Sequence[Any], wanted: MergeRecipe, is_plain: bool = False) -> Tensor:
    base, *experts = found
    return dict(Merger(base, experts, is_plain).merge(wanted))["w"]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_CPU_BLOCK", 1 << 12)


@pytest.mark.parametrize(
    ("method", "options"), CASES, ids=lambda case: "-".join(case.values()) if isinstance(case, dict) else case
)
def test_every_method_has_the_bits_of_products_formed_first(
    method: MethodName, options: dict[str, str], small_blocks: None
) -> None:
    """Of adapters alone and beside a full fine-tune, in C++ and in torch."""
    low, high = METHODS[method].min_experts, METHODS[method].max_experts
    for n_experts in range(max(1, low), min(3, high or 3) + 1):
        found = models((150, 96), torch.bfloat16)[: 1 + n_experts]
        wanted = recipe(method, [each.name for each in found[1:]], options)
        expected = merged(products_first(found), wanted)
        assert torch.equal(merged(found, wanted), expected)
        assert torch.equal(merged(found, wanted, is_plain=True), expected)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("shape", [(333, 1500), (1, 40), (70, 1)])
def test_a_product_is_within_rounding_of_the_exact_one(shape: tuple[int, int], is_transposed: bool) -> None:
    """Each entry within that of a float32 sum of as many terms as the rank."""
    found = update(*shape, 24, 3)
    found = found.transposed if is_transposed else found
    b, a = found.b.double(), found.a.double()
    error = (found.product().double() - b @ a).abs()
    assert (error <= 24 * 2**-24 * (b.abs() @ a.abs())).all()


def test_rows_and_threads_change_no_bits_of_a_product(two_threads: None) -> None:
    found = update(300, 5000, 24, 3)
    both = found.product()
    torch.set_num_threads(1)
    assert torch.equal(found.product(), both)
    for rows in (slice(0, 1), slice(7, 30), slice(62, 131), slice(298, 300)):
        assert torch.equal(LowRank(found.b[rows], found.a).product(), both[rows])


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "della", "arcee_fusion"])
def test_a_slice_has_the_bits_of_the_whole(method: MethodName, small_blocks: None) -> None:
    base, *experts = models((150, 96))[: 2 if METHODS[method].max_experts == 1 else 4]
    wanted = recipe(method, [expert.name for expert in experts])
    operands = Merger(base, experts).operands(wanted, "w")
    step = RULES[method](operands, Coefficients(wanted.groups[0].coefficients, wanted.choices, wanted.seed))
    sources = list(operands.sources.values())
    whole, rows = torch.empty_like(operands.base), slice(11, 130)
    merge_tensor(step, operands.base, sources, whole)
    part: list[AnySource] = [
        LowRank(each.b[rows], each.a) if isinstance(each, LowRank) else each._replace(data=each.data[rows])
        for each in sources
    ]
    out = torch.empty_like(operands.base[rows])
    merge_tensor(step.of_rows(rows, 96), operands.base[rows], part, out)
    assert torch.equal(out, whole[rows])


class LargestFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    """The largest memory in float32 that any operation of torch returned, in bytes."""

    n_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(each, Tensor) and each.dtype == torch.float32:
                self.n_bytes = max(self.n_bytes, each.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "breadcrumbs", "della", "sce"])
@pytest.mark.parametrize("is_formed", [False, True], ids=["blocks", "products first"])
def test_no_candidate_forms_a_whole_product(method: MethodName, is_formed: bool) -> None:
    """The counterpart, products first, shows that one would be seen."""
    found = models((1024, 1024), torch.bfloat16)[:3]
    base, *experts = products_first(found) if is_formed else found
    merger, wanted = Merger(base, experts), recipe(method, ["a", "b"])
    into = {"w": torch.empty_like(base.tensors["w"])}
    dict(merger.merge(wanted, into=into))  # makes the plan
    with LargestFloat32() as largest:  # type: ignore[no-untyped-call]  # torch
        dict(merger.merge(wanted, into=into))
    assert (largest.n_bytes >= 4 * 1024**2) == is_formed


def slopes(
    found: Sequence[Any], wanted: MergeRecipe, gradient: Tensor
) -> tuple[dict[tuple[str, str], float], int]:
    """Return slopes and the largest memory in float32."""
    base, *experts = found
    operands = Merger(base, experts).operands(wanted, "w")
    coefficient_slopes(operands, wanted, wanted.groups[0], gradient)  # makes the plan
    with LargestFloat32() as largest:  # type: ignore[no-untyped-call]  # torch
        return coefficient_slopes(operands, wanted, wanted.groups[0], gradient), largest.n_bytes


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "dare_linear", "breadcrumbs", "ties"])
def test_slopes_of_factors_are_those_of_their_products(method: MethodName) -> None:
    found = models((1024, 1024), torch.bfloat16)
    wanted = recipe(method, ["a", "b", "c"])
    gradient = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(5)).bfloat16()
    own, n_bytes = slopes(found, wanted, gradient)
    expected, _ = slopes(products_first(found), wanted, gradient)
    scale = max(abs(slope) for slope in expected.values())
    assert own.keys() == expected.keys()
    assert own == pytest.approx(expected, rel=1e-4, abs=1e-5 * scale)
    assert n_bytes < 4 * 1024**2


def test_slopes_of_plain_adapters_are_inner_products() -> None:
    found = models((300, 200))[:3]
    wanted = recipe("task_arithmetic", ["a", "b"])
    gradient = torch.randn(300, 200, generator=torch.Generator().manual_seed(5))
    own, _ = slopes(found, wanted, gradient)
    for expert in found[1:]:
        b, a = (each.double() for each in (expert.updates["w"].b, expert.updates["w"].a))
        assert own["lambda", expert.name] == pytest.approx(float((gradient.double() * (b @ a)).sum()))


@pytest.mark.parametrize(
    ("keep", "combine"),
    [
        *itertools.product(["all", "trim", "random"], ["sum", "count", "weights", "none"]),
        *(("all", "shares"), ("trim", "overlap")),
    ],
)
@pytest.mark.parametrize("lambdas", [(0.0, 0.7, 0.0), (0.5, -0.0, 0.3), (0.0, 0.0, 0.0)])
def test_an_expert_of_lambda_zero_is_left_out_and_changes_no_bits(
    keep: Any, combine: Any, lambdas: tuple[float, ...]
) -> None:
    """It may even be NaN; where rules read it unweighted it is read."""
    base, *experts = models((40, 96))
    start = base.tensors["w"]
    start[3] = -0.0
    vectors = [each.updates["w"].product() for each in experts[:2]]
    sources = [*(Source(each, "vector") for each in vectors), Source(experts[2].tensors["w"], "weights")]
    numbers = Numbers(
        lambdas, low=[0.002] * 3, factors=[0.1, 0.2, 0.3], limits=[0, 2**30, -(2**30)], keys=[1, 2, 3]
    )
    expected, flat = torch.empty_like(start), [each.data.view(-1) for each in sources]
    are_vectors = [True, True, False]
    merge_chunk(expected.view(-1), start.view(-1), flat, are_vectors, keep, combine, numbers)
    is_read = combine in ("shares", "overlap")
    given = [
        each if is_read or weight != 0 else each._replace(data=each.data * float("nan"))
        for each, weight in zip(sources, lambdas, strict=True)
    ]
    for is_plain in (False, True):
        out = torch.empty_like(start)
        merge_tensor(Step(numbers, keep, combine), start, given, out, is_plain)
        assert torch.equal(out.view(torch.int32), expected.view(torch.int32))
