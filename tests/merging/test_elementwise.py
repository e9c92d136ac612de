"""The elementwise pass: random numbers by place, and the same bits in any chunks, compiled or not."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergetune.merging.elementwise import (
    Numbers,
    compiled_merge_chunk,
    hash32,
    keep_limit,
    merge_chunk,
)
from mergetune.merging.memory_model import MemoryModel
from mergetune.merging.merger import Merger
from mergetune.merging.methods import hash_key
from mergetune.space.recipe import MergeRecipe

COEFFICIENTS = {
    "task_arithmetic": {"lambda": {"a": 0.3, "b": -0.9}},
    "ties": {"lambda": {"a": 0.3, "b": 0.9}, "density": {"a": 0.3, "b": 0.6}},
    "breadcrumbs": {
        "lambda": {"a": 0.3, "b": 0.9},
        "density": {"a": 0.3, "b": 0.6},
        "gamma": {"a": 0.1, "b": 0.0},
    },
    "dare_ties": {"lambda": {"a": 0.3, "b": 0.9}, "density": {"a": 0.3, "b": 0.6}},
}


def draw(n: int, expert: str = "a", name: str = "w", seed: int = 0) -> Tensor:
    stream, key = hash_key(seed, "", name), hash_key(seed, expert, name)
    return hash32(torch.arange(n, dtype=torch.int32), stream, key)


def hash_in_python(index: int, stream: int, key: int) -> int:
    """`hash32` in Python's own integers."""
    bits = (1 << 32) - 1
    value = (index * 0x9E3779B9 + stream) & bits
    value = ((value ^ (value >> 16)) * 0x7FEB352D + key) & bits
    return ((value ^ (value >> 15)) * 0x846CA68B) & bits


@pytest.mark.parametrize(("stream", "key"), [(0, 0), (-(2**31), 2**31 - 1), (123456789, -987654321)])
def test_the_hash_is_that_of_python_integers(stream: int, key: int) -> None:
    found = hash32(torch.arange(500, dtype=torch.int32), stream, key)
    expected = [hash_in_python(index, stream, key) for index in range(500)]
    assert [value % 2**32 for value in found.tolist()] == expected


def uniform_squares(first: Tensor, second: Tensor) -> float:
    """The chi-square statistic of pairs over 16 × 16 equal squares: 255 ± 22.6 if they are independent."""
    cells = ((first.long() + 2**31) >> 28) * 16 + ((second.long() + 2**31) >> 28)
    expected = len(cells) / 256
    return float((torch.bincount(cells, minlength=256) - expected).square().sum() / expected)


def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
    n = 1 << 18
    for seed in range(4):
        a, b = draw(n, "a", seed=seed), draw(n, "b", seed=seed)
        yield "two experts", a, b
        yield "two tensors", a, draw(n, "a", "v", seed)
        yield "two seeds", a, draw(n, "a", seed=seed + 100)
        for lag in (1, 2, 16, 576, 4096):
            yield f"neighbours at {lag}", a[:-lag], a[lag:]
            yield f"experts at {lag}", a[:-lag], b[lag:]


def test_random_numbers_are_uniform_and_independent() -> None:
    """Of 52 statistics none may be 5 standard deviations off; for true random numbers p < 1e-4."""
    assert {what: found for what, a, b in pairs() if not 150 < (found := uniform_squares(a, b)) < 380} == {}


def test_masks_are_nested_as_the_density_grows() -> None:
    values = draw(10_000)
    masks = [values <= keep_limit(density) for density in (0.01, 0.2, 0.6, 1.0)]
    for sparse, dense in itertools.pairwise(masks):
        assert (dense | ~sparse).all()
    assert masks[-1].all()
    assert [mask.float().mean().item() for mask in masks] == pytest.approx([0.01, 0.2, 0.6, 1.0], abs=0.02)


def models(dtype: torch.dtype, sizes: tuple[int, ...]) -> list[MemoryModel]:
    generator = torch.Generator().manual_seed(0)
    base = {f"w{i}": torch.randn(size, generator=generator) * 0.05 for i, size in enumerate(sizes)}
    tuned = [
        {name: w + 0.003 * torch.randn(w.shape, generator=generator) for name, w in base.items()}
        for _ in range(2)
    ]
    named = zip(("base", "a", "b"), (base, *tuned), strict=True)
    return [MemoryModel(name, {k: w.to(dtype) for k, w in tensors.items()}) for name, tensors in named]


def recipe(method: str) -> MergeRecipe:
    return MergeRecipe.model_validate(
        {
            "method": method,
            "base": {"path": "base"},
            "experts": {"a": {"path": "a"}, "b": {"path": "b"}},
            "groups": [{"name": "all", **COEFFICIENTS[method]}],
        }
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", COEFFICIENTS)
def test_the_native_kernel_has_the_bits_of_plain_torch(method: str, dtype: torch.dtype) -> None:
    base, *experts = models(dtype, (5_000, 300_001))
    base.tensors["w0"][::7] = -0.0
    plain = dict(Merger(base, experts, is_plain=True).merge(recipe(method)))
    native = dict(Merger(base, experts).merge(recipe(method)))
    for name, tensor in plain.items():
        assert torch.equal(tensor.view(torch.uint8), native[name].view(torch.uint8))


@pytest.mark.parametrize("method", COEFFICIENTS)
def test_chunks_and_threads_do_not_change_the_bits(method: str) -> None:
    base, *experts = models(torch.bfloat16, (400_003,))
    whole = dict(Merger(base, experts).merge(recipe(method)))["w0"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = dict(Merger(base, experts).merge(recipe(method)))["w0"]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, again)


def test_a_given_destination_is_written_to_and_another_shape_is_not() -> None:
    base, *experts = models(torch.bfloat16, (70, 80))
    into = {"w0": torch.empty(70, dtype=torch.bfloat16), "w1": torch.empty(80)}
    merged = dict(Merger(base, experts).merge(recipe("ties"), into=into))
    assert merged["w0"] is into["w0"]
    assert merged["w1"] is not into["w1"]
    fresh = dict(Merger(base, experts).merge(recipe("ties")))
    assert all(torch.equal(fresh[name], merged[name]) for name in fresh)


def test_the_function_that_gpus_get_compiled_has_the_bits_of_the_plain_one() -> None:
    """Compiled for the CPU here, where no multiply-adds are fused."""
    base, *experts = models(torch.bfloat16, (10_000,))
    numbers = Numbers(
        base_weight=1.0,
        lambdas=[1.0, 1.5],
        limits=[keep_limit(0.3), keep_limit(0.6)],
        keys=[hash_key(0, expert, "w0") for expert in "ab"],
        stream=hash_key(0, "", "w0"),
    )
    outs = [torch.empty(10_000, dtype=torch.bfloat16) for _ in range(2)]
    inputs = (base.view("w0"), [expert.weights("w0") for expert in experts], (False, False))
    peaks = [
        run(out, *inputs, "random", "count", numbers)
        for run, out in zip((merge_chunk, compiled_merge_chunk()), outs, strict=True)
    ]
    assert torch.equal(*outs)
    assert torch.equal(*peaks)


def test_a_compiler_without_float16_gives_the_same_bits(tmp_path: Path) -> None:
    """As GCC before 12; in a process of its own, since the kernel is looked for once."""
    program = (
        "import sys, torch; sys.path[:0] = ['tests', 'tests/merging']\n"
        "from test_elementwise import COEFFICIENTS, MemoryModel, Merger, models, recipe\n"
        "from mergetune.merging import native\n"
        "assert native.why_slow() is None, native.why_slow()\n"
        "base, *experts = models(torch.float16, (5_000, 65_536))\n"
        "every = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.float16)\n"
        "base.tensors['w1'] = torch.where(every.isfinite() & (every.abs() < 2e4), every, 0.0).half()\n"
        "for expert, scale in zip(experts, (0.9, 1.1)):\n"
        "    expert.tensors['w1'] = base.tensors['w1'] * scale\n"
        "for method in COEFFICIENTS:\n"
        "    plain = dict(Merger(base, experts, is_plain=True).merge(recipe(method)))\n"
        "    ours = dict(Merger(base, experts).merge(recipe(method)))\n"
        "    for name, tensor in plain.items():\n"
        "        assert torch.equal(tensor.view(torch.uint8), ours[name].view(torch.uint8)), (method, name)\n"
    )
    compiler = tmp_path / "old"
    compiler.write_text('#!/bin/sh\nexec c++ -U__FLT16_MANT_DIG__ "$@"\n')
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("compiler", ["", "false"], ids=["none", "broken"])
def test_without_a_compiler_the_same_bits_come_from_plain_torch(tmp_path: Path, compiler: str) -> None:
    """In a process of its own, since the kernel is looked for once."""
    program = (
        "import sys, torch; sys.path[:0] = ['tests', 'tests/merging']\n"
        "from test_elementwise import Merger, models, recipe\n"
        "from mergetune.merging import native\n"
        "base, *experts = models(torch.bfloat16, (5_000,))\n"
        "merged = dict(Merger(base, experts).merge(recipe('ties')))\n"
        "assert not native.can_merge((base.view('w0'), base.view('w0')))\n"
        "print(native.why_slow())\n"
        "torch.save(merged, sys.argv[1])"
    )
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    if compiler:
        (bin_folder / "c++").symlink_to("/bin/false")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "merged.pt")],
        env={**os.environ, "PATH": str(bin_folder), "CXX": "c++", "XDG_CACHE_HOME": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "plain torch" in done.stdout
    base, *experts = models(torch.bfloat16, (5_000,))
    ours = dict(Merger(base, experts).merge(recipe("ties")))
    assert torch.equal(ours["w0"], torch.load(tmp_path / "merged.pt")["w0"])
