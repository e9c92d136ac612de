"""The merger on real checkpoints: exact, deterministic, group by group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts
from optuna.distributions import FloatDistribution
from torch import Tensor

from helpers import build_llama, fine_tune, merge_with_peft, train_adapter
from mergetune.errors import MergetuneError, TrialError
from mergetune.files.library import presets
from mergetune.merging.inputs import Inputs, open_inputs
from mergetune.merging.memory_model import MemoryModel
from mergetune.merging.merger import Merger
from mergetune.space.method_table import METHODS
from mergetune.space.recipe import MergeRecipe
from mergetune.space.search_space import SearchSpace
from mergetune.space.search_space_config import read_search_space
from mergetune.weights.checkpoint import Checkpoint
from mergetune.weights.models import demo_model


def recipe(inputs: Inputs, method: str, *groups: dict[str, Any], seed: int = 0) -> MergeRecipe:
    sources = {"base": inputs.base_source, "experts": inputs.expert_sources}
    return MergeRecipe.model_validate({"method": method, **sources, "groups": groups, "seed": seed})


def merge(inputs: Inputs, method: str, *groups: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    return dict(Merger(inputs.base, inputs.experts).merge(recipe(inputs, method, *groups, seed=seed)))


def both(**values: float) -> dict[str, float]:
    return {"a": values.get("a", 0.5), "b": values.get("b", 0.5)}


def weights_of(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


def test_one_expert_at_lambda_one_gives_its_weights(inputs: Inputs, tiny_experts: dict[str, Path]) -> None:
    merged = merge(inputs, "task_arithmetic", {"name": "all", "lambda": both(a=0, b=1)})
    for name, tensor in weights_of(tiny_experts["b"]).items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-7)


def test_each_layer_group_has_its_own_coefficients(
    inputs: Inputs, tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    merged = merge(
        inputs,
        "task_arithmetic",
        {"name": "first", "layers": [0, 0], "lambda": both(a=1, b=0)},
        {"name": "second", "layers": [1, 1], "lambda": both(a=0, b=1)},
        {"name": "rest", "match": r"^(?!model\.layers)", "lambda": both(a=0, b=0)},
    )
    expected = {"model.layers.0.": tiny_experts["a"], "model.layers.1.": tiny_experts["b"]}
    for name, tensor in merged.items():
        folder = next((path for prefix, path in expected.items() if name.startswith(prefix)), tiny_base)
        torch.testing.assert_close(tensor, weights_of(folder)[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "group", "parameters"),
    [
        ("linear", {"lambda": both(a=0.3, b=0.9)}, {"weight": [0.3, 0.9]}),
        ("task_arithmetic", {"lambda": both(a=0.3, b=-0.9)}, {"weight": [0.3, -0.9]}),
        (
            "ties",
            {"lambda": both(a=0.8, b=0.8), "density": both(a=0.3, b=0.6)},
            {"weight": 1.0, "density": [0.3, 0.6], "lambda": 0.8, "normalize": True},
        ),
    ],
)
def test_whole_models_agree_with_mergekit(
    inputs: Inputs,
    tiny_base: Path,
    tiny_experts: dict[str, Path],
    method: str,
    group: dict[str, Any],
    parameters: dict[str, Any],
) -> None:
    states = {name: weights_of(folder) for name, folder in tiny_experts.items()}
    if method != "linear":
        states = {"base": weights_of(tiny_base), **states}
    base = "base" if "base" in states else None
    theirs = merge_state_dicts(states, method, parameters=parameters, base=base)
    for name, tensor in merge(inputs, method, {"name": "all", **group}).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_the_same_recipe_gives_the_same_bits_on_any_number_of_threads(inputs: Inputs, method: str) -> None:
    group = {"name": "all", "lambda": both(), "density": both(a=0.3, b=0.7)}
    first = merge(inputs, method, group)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        second = merge(inputs, method, group)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_seed_changes_the_masks_and_nothing_else(inputs: Inputs) -> None:
    group = {"name": "all", "lambda": both(), "density": both(a=0.5, b=0.5)}
    first, second = (merge(inputs, "dare_linear", group, seed=seed) for seed in (0, 1))
    assert not all(torch.equal(first[name], second[name]) for name in first)
    dense = {"name": "all", "lambda": both(), "density": both(a=1, b=1)}
    plain, seeded = merge(inputs, "dare_linear", dense), merge(inputs, "dare_linear", dense, seed=1)
    assert all(torch.equal(plain[name], seeded[name]) for name in plain)


def test_thresholds_from_the_table_are_those_of_a_sort(inputs: Inputs) -> None:
    merger = Merger(inputs.base, inputs.experts)
    low, high = (
        dict(
            merger.merge(recipe(inputs, "ties", {"name": "all", "lambda": both(), "density": both(a=d, b=d)}))
        )
        for d in (0.37, 0.3700001)  # on the grid: from the table; off it: by a sort
    )
    assert all(torch.equal(low[name], high[name]) for name in low)


def test_an_adapter_merges_like_the_model_it_makes(tiny_base: Path, tiny_adapter: Path) -> None:
    inputs = open_inputs(tiny_base, {"lora": tiny_adapter})
    merged = merge(inputs, "task_arithmetic", {"name": "all", "lambda": {"lora": 1.0}})
    theirs = merge_with_peft(tiny_base, tiny_adapter)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


def test_bfloat16_is_cast_once_from_float32(tmp_path: Path, tiny_base: Path) -> None:
    narrow = fine_tune(tiny_base, tmp_path / "base", seed=5, std=0.0, dtype=torch.bfloat16)
    expert = fine_tune(narrow, tmp_path / "expert", seed=6, std=0.02, dtype=torch.bfloat16)
    inputs = open_inputs(narrow, {"only": expert})
    merged = merge(inputs, "task_arithmetic", {"name": "all", "lambda": {"only": 0.3}})
    base, tuned = weights_of(narrow), weights_of(expert)
    for name, tensor in merged.items():
        exact = base[name].float() + 0.3 * (tuned[name].float() - base[name].float())
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, exact.to(torch.bfloat16))


def test_coefficients_that_overflow_fail_the_trial_and_name_the_tensor(
    tmp_path: Path, tiny_base: Path
) -> None:
    half = fine_tune(tiny_base, tmp_path / "base", seed=5, std=0.0, dtype=torch.float16)
    expert = fine_tune(half, tmp_path / "expert", seed=6, std=0.02)
    inputs = open_inputs(half, {"only": expert})
    with pytest.raises(TrialError, match=r"lm_head\.weight"):
        merge(inputs, "task_arithmetic", {"name": "all", "lambda": {"only": 1e9}})


def test_a_recipe_for_other_experts_is_refused(
    inputs: Inputs, tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    other = open_inputs(tiny_base, {"a": tiny_experts["a"]})
    wanted = recipe(inputs, "task_arithmetic", {"name": "all", "lambda": both()})
    with pytest.raises(MergetuneError, match="b"):
        dict(Merger(other.base, other.experts).merge(wanted))


@pytest.mark.parametrize("path", presets("search_spaces").values(), ids=lambda path: path.stem)
def test_every_preset_merges_real_models(
    path: Path, tiny_base: Path, tiny_experts: dict[str, Path], tiny_adapter: Path
) -> None:
    config = read_search_space(path)
    given = {"lora": tiny_adapter, **tiny_experts}
    given = dict(list(given.items())[: METHODS[config.method].max_experts or 3])
    found = open_inputs(tiny_base, given)
    space = SearchSpace(
        config, found.base_source, found.expert_sources, found.changed, found.base.names, seed=1
    )
    point = {
        key: (d.low + d.high) / 2
        for key, d in space.distributions.items()
        if isinstance(d, FloatDistribution)
    }
    wanted = space.recipe(point)
    merged = dict(Merger(found.base, found.experts).merge(wanted))
    plain = dict(Merger(found.base, found.experts, is_plain=True).merge(wanted))
    assert all(torch.equal(merged[name], plain[name]) for name in found.base.names)
    assert any(not torch.equal(merged[name], found.base.tensor(name)) for name in found.base.names)


def test_adapters_give_the_same_bits_on_any_number_of_threads(tmp_path: Path) -> None:
    base = build_llama(tmp_path / "base", hidden_size=256, intermediate_size=512)
    adapter = train_adapter(base, tmp_path / "lora", r=16, target_modules=["q_proj", "down_proj"])
    inputs = open_inputs(base, {"lora": adapter})
    group = {"name": "all", "lambda": {"lora": 0.7}}
    first = merge(inputs, "task_arithmetic", group)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        second = merge(inputs, "task_arithmetic", group)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("method", "group", "parameters"),
    [
        ("task_arithmetic", {"lambda": both(a=0.3, b=0.9)}, {"weight": [0.3, 0.9]}),
        (
            "ties",
            {"lambda": both(a=0.7, b=0.7), "density": both(a=0.2, b=0.5)},
            {"weight": 1.0, "density": [0.2, 0.5], "lambda": 0.7, "normalize": True},
        ),
        (
            "breadcrumbs",
            {"lambda": both(a=0.3, b=0.9), "density": both(a=0.2, b=0.5), "gamma": both(a=0.05, b=0.01)},
            {"weight": [0.3, 0.9], "density": [0.2, 0.5], "gamma": [0.05, 0.01]},
        ),
    ],
)
def test_real_weights_in_float32_agree_with_mergekit(
    method: str, group: dict[str, Any], parameters: dict[str, Any]
) -> None:
    """One layer of SmolLM2-135M; only entries that equal a threshold may differ, where mergekit takes any."""
    checkpoint = Checkpoint(demo_model())
    names = [name for name in checkpoint.names if ".layers.7." in name]
    base = {name: checkpoint.tensor(name, torch.float32) for name in names}
    generator = torch.Generator().manual_seed(0)
    experts = {
        expert: {name: w + 1e-3 * torch.randn(w.shape, generator=generator) for name, w in base.items()}
        for expert in "ab"
    }
    theirs = merge_state_dicts({"base": base, **experts}, method, parameters=parameters, base="base")
    wanted = MergeRecipe.model_validate(
        {
            "method": method,
            "base": {"path": "base"},
            "experts": {"a": {"path": "a"}, "b": {"path": "b"}},
            "groups": [{"name": "all", **group}],
        }
    )
    models = [MemoryModel(name, tensors) for name, tensors in experts.items()]
    merged = dict(Merger(MemoryModel("base", base), models).merge(wanted))
    differing = sum(int((~torch.isclose(merged[n], theirs[n], rtol=1e-6, atol=1e-7)).sum()) for n in names)
    n_entries = sum(tensor.numel() for tensor in base.values())
    assert differing <= (0 if method == "task_arithmetic" else 1e-5 * n_entries)
