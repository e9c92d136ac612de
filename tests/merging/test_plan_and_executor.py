"""Plan and executor: the same bits in C++ and in torch, on any threads, in slices, and from disk."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergetune.errors import TrialError
from mergetune.merging import native, tables
from mergetune.merging.elementwise import Source, formed, magnitude_sums, merge_tensor
from mergetune.merging.inputs import Inputs
from mergetune.merging.memory_model import MemoryModel
from mergetune.merging.merger import Merger
from mergetune.merging.methods import RULES, Coefficients
from mergetune.merging.tables import (
    GRAM,
    GRAM_BY_ROWS,
    GRID,
    IMPORTANCE,
    RANKS,
    SELECTIONS,
    Array,
    Kind,
    bands_kind,
    overlaps_kind,
)
from mergetune.space.method_table import METHODS, MethodName
from mergetune.space.recipe import MergeRecipe

SHAPES = {"matrix": (48, 200), "cube": (3, 40, 24), "vector": (9000,), "scalar": (), "empty": (0, 4)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VALUES = {"density": 0.37, "gamma": 0.02, "epsilon": 0.2, "t": 0.3, "select_topk": 0.4, "scale": 1.2}
CHANGED = {("ram", "epsilon"), ("ramplus_tl", "epsilon")}  # as large as entries of the task vectors below
KINDS = (
    bands_kind(0.0),
    bands_kind(0.03),
    GRAM,
    GRAM_BY_ROWS,
    RANKS,
    SELECTIONS,
    IMPORTANCE,
    overlaps_kind(1e-5),
)
# Each method with each choice of its options, alone.
CASES: list[tuple[MethodName, dict[str, str]]] = [
    (name, {option.name: choice})
    for name, method in METHODS.items()
    for option in method.options
    for choice in option.choices
] + [(name, {}) for name, method in METHODS.items() if not method.options]


def models(n_experts: int, dtype: torch.dtype = torch.float32, digest: str = "") -> list[MemoryModel]:
    """A base and fine-tunes of it; the last leaves `vector` as it is."""
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tuned = [
        {
            name: w + 0.003 * (i + 1) ** 0.5 * torch.randn(w.shape, generator=generator)
            for name, w in base.items()
        }
        for i in range(n_experts)
    ]
    if n_experts > 1:
        tuned[-1]["vector"] = base["vector"]
    named = [("base", base), *((f"e{i}", each) for i, each in enumerate(tuned))]
    return [
        MemoryModel(name, {k: w.to(dtype) for k, w in each.items()}, digest=digest and digest + name)
        for name, each in named
    ]


def with_long(found: Sequence[MemoryModel]) -> list[MemoryModel]:
    """Add a tensor of more than a span."""
    return [
        replace(each, tensors={**each.tensors, "long": each.tensors["matrix"].repeat(8, 1)}) for each in found
    ]


def recipe(method: MethodName, experts: Sequence[str], options: dict[str, str] | None = None) -> MergeRecipe:
    group: dict[str, Any] = {"name": "all"}
    for parameter in METHODS[method].parameters:
        value = VALUES.get(parameter.name, 0.7)
        value = 0.002 if method == "nearswap" or (method, parameter.name) in CHANGED else value
        values = {expert: value * (1 - 0.01 * i) for i, expert in enumerate(experts)}
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


def merged(
    found: Sequence[MemoryModel],
    method: MethodName,
    options: dict[str, str] | None = None,
    is_plain: bool = False,
) -> dict[str, Tensor]:
    base, *experts = found
    wanted = recipe(method, [expert.name for expert in experts], options)
    return dict(Merger(base, experts, is_plain=is_plain).merge(wanted))


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(first[k].reshape(-1).view(torch.uint8), second[k].reshape(-1).view(torch.uint8))
        for k in first
    )


@pytest.mark.parametrize(
    ("method", "options"), CASES, ids=lambda case: "-".join(case.values()) if isinstance(case, dict) else case
)
def test_every_method_has_the_bits_of_plain_torch_with_any_number_of_experts(
    method: MethodName, options: dict[str, str]
) -> None:
    low, high = METHODS[method].min_experts, METHODS[method].max_experts
    for n_experts, dtype in zip((1, 2, 8, 9, 30), itertools.cycle(DTYPES), strict=False):
        if low <= n_experts <= (high or n_experts):
            found = models(n_experts, dtype)
            assert same_bits(merged(found, method, options, is_plain=True), merged(found, method, options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["ties", "della", "sce", "dare_ties"])
def test_every_dtype_has_the_bits_of_plain_torch(method: MethodName, dtype: torch.dtype) -> None:
    found = models(9, dtype)
    assert same_bits(merged(found, method, is_plain=True), merged(found, method))


@pytest.mark.parametrize(
    ("method", "options"),
    [("ties", {}), ("della", {"rescale": "l1"}), ("sce", {}), ("karcher", {}), ("ramplus_tl", {})],
)
def test_threads_change_no_bits(method: MethodName, options: dict[str, str], two_threads: None) -> None:
    found = with_long(models(3))
    both = merged(found, method, options)
    torch.set_num_threads(1)
    assert same_bits(both, merged(found, method, options))


@pytest.mark.parametrize(
    "method", ["ties", "dare_linear", "della", "sce", "nuslerp", "arcee_fusion", "ram", "tsv_merge"]
)
def test_a_slice_has_the_bits_of_the_whole(method: MethodName) -> None:
    base, *experts = models(METHODS[method].max_experts or 3)
    names = [expert.name for expert in experts]
    wanted = recipe(method, names, {"granularity": "rows"} if method == "nuslerp" else None)
    operands = Merger(base, experts).operands(wanted, "matrix")
    given = Coefficients(wanted.groups[0].coefficients, wanted.choices, wanted.seed)
    step = RULES[method](operands, given)
    sources = formed(operands.sources.values() if step.sources is None else step.sources)
    whole = torch.empty_like(operands.base)
    merge_tensor(step, operands.base, sources, whole)
    rows = slice(11, 30)
    numbers = step.numbers if step.numbers.n_rows is None else step.numbers.of_rows(rows)
    part = replace(
        step,
        numbers=numbers._replace(start=11 * operands.row_length),
        ranks=[each[rows] for each in step.ranks],
        sources=[Source(each.data[rows], each.kind) for each in sources],
    )
    for is_plain in (False, True):
        out = torch.empty_like(operands.base[rows])
        merge_tensor(part, operands.base[rows], [], out, is_plain)
        assert torch.equal(out, whole[rows])


def table(kind: Kind, base: Tensor, sources: Sequence[Source]) -> Array:
    dtype, shape = kind.layout(base, len(sources))
    out = np.zeros(shape, dtype)
    kind.fill(out, base, sources if kind.is_joint else sources[:1])
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["matrix", "cube", "vector", "scalar", "long"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_tables_have_the_bits_of_numpy(
    kind: Kind, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *experts = with_long(models(3, dtype))
    sources = [Source(expert.tensors[name], "weights") for expert in experts]
    found = table(kind, base.tensors[name], sources)
    monkeypatch.setattr(native, "library", lambda: None)
    assert found.tobytes() == table(kind, base.tensors[name], sources).tobytes()


def test_bands_are_those_of_a_sort() -> None:
    base, expert = models(1)
    source = Source(expert.tensors["matrix"], "weights")
    ordered = (expert.tensors["matrix"] - base.tensors["matrix"]).abs().flatten().sort(descending=True).values
    for density, (low, high) in zip(
        GRID, table(bands_kind(0.0), base.tensors["matrix"], [source]), strict=True
    ):
        assert low == ordered[max(1, int(density * len(ordered))) - 1]
        assert high == float("inf")


def test_sums_of_magnitudes_have_the_bits_of_numpy() -> None:
    base, *experts = models(2)
    wanted = recipe("dare_linear", ["e0", "e1"])
    operands = Merger(base, experts).operands(wanted, "vector")
    step = RULES["dare_linear"](operands, Coefficients(wanted.groups[0].coefficients, wanted.choices, 0))
    sources = list(operands.sources.values())
    assert magnitude_sums(step, operands.base, sources) == magnitude_sums(step, operands.base, sources, True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["task_arithmetic", "breadcrumbs", "dare_linear", "della_linear"])
def test_weights_that_are_not_finite_come_out_alike(method: MethodName, value: float) -> None:
    found = models(1)
    found[1].tensors["matrix"][3] = value
    results: list[dict[str, Tensor]] = []
    for is_plain in (True, False):
        wanted, into = (
            recipe(method, ["e0"]),
            {name: torch.zeros_like(w) for name, w in found[0].tensors.items()},
        )
        with pytest.raises(TrialError, match="infinite or NaN"):
            dict(Merger(found[0], found[1:], is_plain).merge(wanted, into=into))
        results.append(into)
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    native.library()  # compiled into the usual cache
    monkeypatch.setenv("MERGETUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    return tmp_path / "plans"


def files(cache: Path) -> list[Path]:
    return [path for path in sorted(cache.glob("*")) if path.suffix == ""]


@pytest.mark.parametrize(
    "method", ["ties", "slerp", "della", "sce", "arcee_fusion", "tsv_merge", "iso_c", "svc"]
)
def test_a_plan_from_disk_is_the_fresh_one(method: MethodName, cache: Path) -> None:
    n_experts = METHODS[method].max_experts or 2
    in_memory = merged(models(n_experts), method)
    assert not cache.exists()
    fresh = merged(models(n_experts, digest="d"), method)
    made = {path: path.stat().st_ino for path in files(cache)}
    assert made
    again = merged(models(n_experts, digest="d"), method)
    assert {path: path.stat().st_ino for path in files(cache)} == made
    assert same_bits(in_memory, fresh)
    assert same_bits(in_memory, again)


@pytest.mark.parametrize(("method", "made_by"), [("della", "_fill_ranks"), ("tsv_merge", "_fill_matrix")])
def test_a_merge_for_one_writes_no_table_as_large_as_weights_but_reads_those_there(
    method: MethodName, made_by: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *experts = models(2, digest="d")
    wanted = recipe(method, ["e0", "e1"])
    alone = dict(Merger(base, experts, is_for_one=True).merge(wanted))
    assert sum(path.stat().st_size for path in files(cache)) < base.tensors["matrix"].nbytes
    assert same_bits(alone, merged([base, *experts], method))
    assert sum(path.stat().st_size for path in files(cache)) > base.tensors["matrix"].nbytes
    monkeypatch.setattr(tables, made_by, None)
    assert same_bits(alone, dict(Merger(base, experts, is_for_one=True).merge(wanted)))


@pytest.mark.parametrize("harm", ["cut", "changed", "emptied"])
def test_a_damaged_file_is_set_aside_and_made_anew(harm: str, cache: Path) -> None:
    fresh = merged(models(2, digest="d"), "ties")
    for path in files(cache):
        content = path.read_bytes()
        middle = len(content) // 2
        wrong = {
            "cut": content[:-7],
            "changed": content[:middle] + b"\xff" + content[middle + 1 :],
            "emptied": b"",
        }
        path.write_bytes(wrong[harm])
    assert same_bits(fresh, merged(models(2, digest="d"), "ties"))
    assert len(list(cache.glob("*.damaged"))) == len(files(cache)) == 2


def test_other_inputs_have_another_plan(cache: Path) -> None:
    merged(models(2, digest="d"), "ties")
    merged(models(2, digest="other"), "ties")
    assert len(files(cache)) == 4


def test_plans_that_nobody_uses_are_removed_where_one_is_made(cache: Path) -> None:
    merged(models(2, digest="used"), "ties")
    used = files(cache)
    merged(models(2, digest="forgotten"), "ties")
    forgotten = set(files(cache)) - set(used)
    for path in files(cache):
        os.utime(path, (0, 0))
    merged(models(2, digest="used"), "ties")
    merged(models(2, digest="new"), "ties")
    assert set(used) < set(files(cache))
    assert not forgotten & set(files(cache))
    assert len(files(cache)) == 4


def test_a_cache_that_cannot_be_written_is_done_without(cache: Path) -> None:
    cache.parent.joinpath("plans").write_text("no folder")
    assert same_bits(merged(models(2), "ties"), merged(models(2, digest="d"), "ties"))


def test_models_on_disk_keep_their_plan_there(inputs: Inputs, cache: Path) -> None:
    wanted = recipe("ties", list(inputs.merger.experts))
    first = dict(Merger(inputs.base, inputs.experts).merge(wanted))
    assert files(cache)
    assert same_bits(first, dict(Merger(inputs.base, inputs.experts).merge(wanted)))
