"""The merge methods on tensors: against mergekit, at every parameter's ends, and by their algebra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_tensors
from torch import Tensor

from mergetune.errors import MergetuneError, TrialError
from mergetune.merging.memory_model import MemoryModel
from mergetune.merging.merger import Merger
from mergetune.space.method_table import METHODS, MethodName, Parameter, SearchInterval
from mergetune.space.recipe import MergeRecipe

lambda_lists = st.lists(st.floats(-2, 2, allow_nan=False, width=32), min_size=3, max_size=3)
densities = st.floats(0.01, 1.0)


def random_models(n: int, shape: tuple[int, ...] = (24, 16), seed: int = 0) -> list[Tensor]:
    """A base and n fine-tunes of one tensor, each farther from the base than the one before."""
    generator = torch.Generator().manual_seed(seed)
    base, *noise = (torch.randn(shape, generator=generator) for _ in range(n + 1))
    return [base, *(base + 0.1 * (i + 1) ** 2 * vector for i, vector in enumerate(noise))]


def merge(
    models: Sequence[Tensor],
    method: str,
    coefficients: dict[str, list[float] | float],
    options: dict[str, str] | None = None,
    seed: int = 0,
) -> Tensor:
    """Merge a base and experts given as single tensors; a list of numbers has one for each expert."""
    base, *experts = (MemoryModel(f"e{i}", {"w": model}) for i, model in enumerate(models))
    names = [expert.name for expert in experts]
    recipe = MergeRecipe.model_validate(
        {
            "method": method,
            "base": {"path": "base"},
            "experts": {name: {"path": name} for name in names},
            "options": options,
            "seed": seed,
            "groups": [
                {
                    "name": "all",
                    **{
                        name: dict(zip(names, given, strict=True)) if isinstance(given, list) else given
                        for name, given in coefficients.items()
                    },
                }
            ],
        }
    )
    return dict(Merger(base, experts).merge(recipe))["w"]


def close(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


THREE: dict[str, Any] = {"weight": [0.3, -0.7, 1.2], "density": [0.25, 0.5, 0.75]}
WITH_MERGEKIT: list[tuple[str, int, dict[str, Any], dict[str, str], dict[str, Any], bool]] = [
    # method, number of experts, coefficients, options; mergekit's parameters, and whether it takes the base
    ("linear", 3, {"lambda": [0.5, 0.2, -0.4]}, {}, {"weight": [0.5, 0.2, -0.4]}, False),
    ("task_arithmetic", 3, {"lambda": [0.3, -0.7, 1.2]}, {}, {"weight": [0.3, -0.7, 1.2]}, True),
    *(
        (
            "ties",
            3,
            {"lambda": THREE["weight"], "density": THREE["density"]},
            {"normalize": ours},
            {**THREE, "normalize": theirs},
            True,
        )
        for ours, theirs in (("weights", True), ("none", False))
    ),
    *(
        (
            "ties",
            3,
            {"lambda": [0.7] * 3, "density": [density] * 3},
            {},
            {"weight": 1.0, "density": density, "lambda": 0.7, "normalize": True},
            True,
        )
        for density in (0.05, 0.2, 0.29, 1.0)
    ),
    *(
        (
            method,
            3,
            {"lambda": THREE["weight"], "density": THREE["density"], "gamma": [gamma] * 3},
            options,
            {**THREE, "gamma": gamma},
            True,
        )
        for method, options in (("breadcrumbs", {}), ("breadcrumbs_ties", {"normalize": "none"}))
        for gamma in (0.0, 0.01, 0.1, 0.6)
    ),
    *(
        (
            method,
            3,
            {"lambda": THREE["weight"], "density": [1.0] * 3},
            {"rescale": "l1", **options},
            {"weight": THREE["weight"], "density": 1.0},
            True,
        )
        for method, options in (("dare_linear", {}), ("dare_ties", {"normalize": "none"}))
    ),
    *(
        (
            method,
            3,
            {"lambda": THREE["weight"], "density": [1.0] * 3, "epsilon": [0.1] * 3},
            {"rescale": "l1", **options},
            {"weight": THREE["weight"], "density": 1.0, "normalize": normalize},
            True,
        )
        for method, options, normalize in (
            ("della_linear", {}, False),
            ("della", {"normalize": "weights"}, True),
        )
    ),
    *(("sce", 3, {"select_topk": topk}, {}, {"select_topk": topk}, True) for topk in (0.1, 0.5, 1.0)),
    *(
        ("ram", 3, {"lambda": [1.0] * 3, "epsilon": epsilon}, {}, {"epsilon": epsilon}, True)
        for epsilon in (0.0, 1e-5, 0.2, 10.0)
    ),
    *(
        (
            "ramplus_tl",
            3,
            {"lambda": [1.0] * 3, "epsilon": epsilon, "r": 0.4, "alpha": alpha},
            {},
            {"epsilon": epsilon, "r": 0.4, "alpha": alpha},
            True,
        )
        for epsilon in (0.0, 0.2)
        for alpha in (0.3, 50.0)
    ),
    ("model_stock", 3, {}, {}, {}, True),
    ("model_stock", 2, {}, {"granularity": "rows"}, {"filter_wise": True}, True),
    *(
        ("nuslerp", 2, {"t": t}, {"origin": origin}, {"weight": [1 - t, t]}, origin == "base")
        for t in (0.0, 0.3, 1.0)
        for origin in ("base", "zero")
    ),
    # mergekit's `nuslerp_row_wise` takes columns; its rows come where both switches are off.
    (
        "nuslerp",
        2,
        {"t": 0.3},
        {"granularity": "rows"},
        {"weight": [0.7, 0.3], "nuslerp_flatten": False},
        True,
    ),
    *(
        ("multislerp", 3, {"lambda": [0.5, 0.2, 0.9]}, {"origin": origin}, {"weight": [0.5, 0.2, 0.9]}, base)
        for origin, base in (("base", True), ("zero", False))
    ),
    ("karcher", 3, {}, {}, {}, False),
    *(("nearswap", 1, {"t": t}, {}, {"t": t}, True) for t in (0.0, 0.03, 10.0)),
    ("arcee_fusion", 1, {}, {}, {}, True),
]


@pytest.mark.parametrize("shape", [(24, 16), (64,)], ids=["matrix", "vector"])
@pytest.mark.parametrize(
    ("method", "n_experts", "coefficients", "options", "parameters", "has_base"),
    WITH_MERGEKIT,
    ids=[f"{row[0]}-{i}" for i, row in enumerate(WITH_MERGEKIT)],
)
def test_methods_agree_with_mergekit(
    method: str,
    n_experts: int,
    coefficients: dict[str, Any],
    options: dict[str, str],
    parameters: dict[str, Any],
    has_base: bool,
    shape: tuple[int, ...],
) -> None:
    models = random_models(n_experts, shape)
    theirs = merge_tensors(
        models if has_base else models[1:],
        method,
        parameters=parameters,
        base_index=0 if has_base else None,
    )
    close(merge(models, method, coefficients, options or None), theirs)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_agrees_with_mergekit(t: float) -> None:
    models = random_models(2)
    close(
        merge(models, "slerp", {"t": t}),
        merge_tensors(models[1:], "slerp", parameters={"t": t}, base_index=0),
    )


def test_every_method_is_compared_with_mergekit_or_has_its_own_test() -> None:
    spectral = {"tsv_merge", "iso_c", "svc"}  # in `test_spectral.py`
    assert {row[0] for row in WITH_MERGEKIT} | {"slerp", "passthrough"} | spectral == set(METHODS)


def ends(parameter: Parameter) -> tuple[float, ...]:
    """The ends of what a parameter may be, or of what is searched where that has no ends."""
    valid, searched = parameter.valid, parameter.default
    low, high = valid.low, valid.high
    if isinstance(searched, SearchInterval):
        low = low if low in valid else searched.low
        high = high if high in valid else searched.high
    return (low if low in valid else 0.0, high if high in valid else 0.99)


def middle(method: MethodName, n_experts: int) -> dict[str, list[float] | float]:
    """Coefficients of a method somewhere in the middle."""
    found: dict[str, list[float] | float] = {}
    for parameter in METHODS[method].parameters:
        value = parameter.default if isinstance(parameter.default, float) else parameter.default.high / 2
        found[parameter.name] = [value] * n_experts if parameter.is_per_expert else value
    return found


@pytest.mark.parametrize(
    ("method", "parameter"),
    [(name, parameter) for name, method in METHODS.items() for parameter in method.parameters],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_parameter_works_at_its_ends(method: MethodName, parameter: Parameter) -> None:
    spec = METHODS[method]
    n_experts = spec.max_experts or 2
    models = random_models(n_experts)
    for end in ends(parameter):
        values = [end] + [0.5] * (n_experts - 1)
        given = {**middle(method, n_experts), parameter.name: values if parameter.is_per_expert else end}
        if given == {"lambda": [0.0]}:
            continue
        merged = merge(models, method, given)
        assert merged.shape == models[0].shape
        assert torch.isfinite(merged).all()


@pytest.mark.parametrize(
    ("method", "option", "choice"),
    [
        (name, option.name, choice)
        for name, method in METHODS.items()
        for option in method.options
        for choice in option.choices
    ],
)
def test_every_choice_of_an_option_changes_the_result(method: MethodName, option: str, choice: str) -> None:
    n_experts = METHODS[method].max_experts or 3
    models = random_models(n_experts)
    given = middle(method, n_experts)
    if "lambda" in given:
        given["lambda"] = [0.3, 0.9, 0.5][:n_experts]
    others = next(found.choices for found in METHODS[method].options if found.name == option)
    merged = {each: merge(models, method, given, {option: each}) for each in others}
    assert all(torch.isfinite(tensor).all() for tensor in merged.values())
    assert all(not torch.equal(merged[choice], merged[each]) for each in others if each != choice)


def test_ends_give_what_they_mean() -> None:
    models = random_models(2)
    base, first, second = models
    for method in ("slerp", "nuslerp"):
        close(merge(models, method, {"t": 0.0}), first)
        close(merge(models, method, {"t": 1.0}), second)
    close(merge(models, "linear", {"lambda": [0.0, 3.0]}), second)
    close(merge(models, "task_arithmetic", {"lambda": [0.0, 0.0]}), base)
    close(merge(models[:2], "passthrough", {"scale": 1.0}), first)
    close(merge(models[:2], "passthrough", {"scale": -0.5}), -0.5 * first)
    close(merge(models[:2], "nearswap", {"t": 1e6}), first)
    assert torch.equal(merge(models[:2], "nearswap", {"t": 0.0}), base)
    plain = merge(models, "task_arithmetic", {"lambda": [0.5, 0.9]})
    dense: dict[str, list[float] | float] = {"lambda": [0.5, 0.9], "density": [1.0, 1.0]}
    assert torch.equal(merge(models, "dare_linear", dense), plain)
    close(merge(models, "della_linear", {**dense, "epsilon": [0.1, 0.1]}), plain)
    close(merge(models, "breadcrumbs", {**dense, "gamma": [0.5, 0.5]}), plain)
    assert torch.equal(merge(models, "dare_ties", dense), merge(models, "ties", dense))
    trimmed: dict[str, list[float] | float] = {"lambda": [0.5, 0.9], "density": [0.3, 0.4]}
    assert torch.equal(
        merge(models, "breadcrumbs_ties", {**trimmed, "gamma": [0.0, 0.0]}), merge(models, "ties", trimmed)
    )


def kept(merged: Tensor, base: Tensor, vector: Tensor) -> Tensor:
    """The factor that each entry of a single expert's task vector got; 0 where it was dropped."""
    return (merged - base) / vector


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_random_dropping_keeps_the_share_and_the_mean(method: str, density: float) -> None:
    base, ones = torch.zeros(1000, 100), torch.ones(1000, 100)
    given: dict[str, list[float] | float] = {"lambda": [1.0], "density": [density]}
    if method == "della_linear":
        given["epsilon"] = [0.05]
    merged = merge([base, ones], method, given)
    share = (merged != 0).float().mean().item()
    assert share == pytest.approx(density, abs=4 * (density * (1 - density) / 1e5) ** 0.5)
    assert merged.mean().item() == pytest.approx(1.0, abs=0.05)


def test_dare_divides_by_the_density_or_matches_the_magnitude() -> None:
    base, expert = random_models(1, (200, 100))
    vector = expert - base
    given: dict[str, list[float] | float] = {"lambda": [1.0], "density": [0.4]}
    factors = kept(merge([base, expert], "dare_linear", given), base, vector)
    dropped = factors.abs() < 0.5
    torch.testing.assert_close(factors[~dropped], torch.full_like(factors[~dropped], 2.5), rtol=1e-2, atol=0)
    matched = merge([base, expert], "dare_linear", given, {"rescale": "l1"}) - base
    assert matched.abs().sum().item() == pytest.approx(vector.abs().sum().item(), rel=1e-4)
    plain = merge([base, expert], "dare_linear", given, {"rescale": "none"}) - base
    close(plain[~dropped], vector[~dropped])
    close(plain[dropped], torch.zeros_like(plain[dropped]))


def test_della_keeps_large_entries_more_often() -> None:
    base = torch.zeros(400, 100)
    vector = torch.arange(1.0, 101.0).expand(400, 100)
    given: dict[str, list[float] | float] = {"lambda": [1.0], "density": [0.5], "epsilon": [0.3]}
    share = (merge([base, vector], "della_linear", given) != 0).float().mean(dim=0)
    assert share[:10].mean().item() == pytest.approx(0.2 + 0.6 * 4.5 / 99, abs=0.03)
    assert share[-10:].mean().item() == pytest.approx(0.8 - 0.6 * 4.5 / 99, abs=0.03)


def test_ties_elects_the_heavier_side_and_averages_it() -> None:
    rows = ([0.0, 0, 0, 0], [3.0, -1, 2, 0], [-1.0, 2, 2, 0], [-1.0, 0, 2, 5])
    models = [torch.tensor(row) for row in rows]
    merged = merge(models, "ties", {"lambda": [1.0] * 3, "density": [1.0] * 3})
    assert merged.tolist() == [3.0, 2.0, 2.0, 5.0]


def test_exactly_balanced_signs_cancel() -> None:
    """mergekit elects the positive side there; with no side heavier we take none."""
    models = [torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([-1.0])]
    assert merge(models, "ties", {"lambda": [1.0, 1.0], "density": [1.0, 1.0]}).item() == 1.0


def test_trimming_keeps_ties_and_at_least_one_entry() -> None:
    models = [torch.zeros(5), torch.tensor([1.0, -1.0, 1.0, 0.5, 4.0])]
    for density, expected in ((0.4, [1.0, -1.0, 1.0, 0.0, 4.0]), (0.01, [0.0, 0.0, 0.0, 0.0, 4.0])):
        merged = merge(models, "ties", {"lambda": [1.0], "density": [density]})
        assert merged.tolist() == expected


def test_breadcrumbs_drop_ties_of_the_outliers() -> None:
    models = [torch.zeros(5), torch.tensor([4.0, -1.0, 4.0, 0.5, 2.0])]
    merged = merge(models, "breadcrumbs", {"lambda": [1.0], "density": [0.4], "gamma": [0.2]})
    assert merged.tolist() == [0.0, 0.0, 0.0, 0.0, 2.0]


@given(lambda_lists)
@settings(max_examples=30)
def test_one_expert_at_weight_one_gives_it_back(lambdas: list[float]) -> None:
    models = random_models(2, seed=3)
    ones: dict[str, list[float] | float] = {"lambda": [1.0, 0.0]}
    close(merge(models, "task_arithmetic", ones), models[1])
    close(merge(models, "ties", {**ones, "density": [1.0, 1.0]}), models[1])


@given(lambda_lists, densities)
@settings(max_examples=30)
def test_the_order_of_experts_does_not_matter(lambdas: list[float], density: float) -> None:
    models = random_models(3, seed=4)
    order = [2, 0, 1]
    shuffled = [models[0], *(models[1 + i] for i in order)]
    for method, coefficients in (
        ("task_arithmetic", {"lambda": lambdas}),
        ("ties", {"lambda": lambdas, "density": [density] * 3}),
        ("breadcrumbs_ties", {"lambda": lambdas, "density": [density] * 3, "gamma": [0.1] * 3}),
    ):
        turned = {name: [values[i] for i in order] for name, values in coefficients.items()}
        close(merge(models, method, {**coefficients}), merge(shuffled, method, {**turned}))


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("model_stock", {}),
        ("karcher", {}),
        ("sce", {"select_topk": 0.5}),
        ("ram", {"lambda": [0.7] * 3, "epsilon": 0.2}),
        ("tsv_merge", {"lambda": [0.7] * 3}),
        ("iso_c", {"scale": 0.7}),
        ("svc", {"scale": 0.7, "alpha": 0.5}),
    ],
)
def test_symmetric_methods_do_not_see_the_order(method: str, given: dict[str, list[float] | float]) -> None:
    models = random_models(3)
    close(merge(models, method, given), merge([models[0], *reversed(models[1:])], method, given))


def test_shares_that_balance_out_on_the_sphere_fail_the_trial() -> None:
    base = torch.zeros(3)
    rows = torch.tensor([[1.0, 0, 0], [-0.5, 0.75**0.5, 0], [-0.5, -(0.75**0.5), 0]])
    with pytest.raises(TrialError, match="multislerp"):
        merge([base, *rows], "multislerp", {"lambda": [1.0, 1.0, 1.0]})


def test_a_model_of_another_shape_is_refused() -> None:
    with pytest.raises(MergetuneError, match=r"must have the base's shape \(4, 8\), but has \(3, 8\)"):
        merge([torch.zeros(4, 8), torch.zeros(3, 8)], "task_arithmetic", {"lambda": [1.0]})


def test_ram_weighs_what_is_shared_and_what_is_alone() -> None:
    models = [torch.zeros(4), torch.tensor([1.0, 1.0, 0, 0]), torch.tensor([0, 1.0, 1.0, 0.1])]
    given: dict[str, list[float] | float] = {"lambda": [0.5, -2.0], "epsilon": 0.1}
    close(merge(models, "ram", given), torch.tensor([0.5, -0.75, -2.0, 0.0]))
    raised = {**given, "r": 0.5, "alpha": 0.4}
    close(merge(models, "ramplus_tl", raised), torch.tensor([0.6, -0.75, -2.4, 0.0]))


def test_ram_counts_the_same_with_a_table_of_the_plan() -> None:
    base, *experts = random_models(3)
    is_kept = torch.rand((3, *base.shape), generator=torch.Generator().manual_seed(0)) < 0.4
    models = [base, *(tuned.where(kept, base) for tuned, kept in zip(experts, is_kept, strict=True))]
    raised: dict[str, list[float] | float] = {"lambda": [1.0] * 3, "r": 2.0, "alpha": 9.0}
    planned, direct = (merge(models, "ramplus_tl", {**raised, "epsilon": e}) for e in (1e-5, 1.1e-5))
    assert torch.equal(planned, direct)


def test_tensors_may_lie_transposed_in_memory_or_be_empty() -> None:
    base, first, second = random_models(2)
    turned = [model.T.contiguous().T for model in (base, first, second)]
    given: dict[str, list[float] | float] = {"lambda": [0.3, 0.7], "density": [0.5, 0.5]}
    assert torch.equal(merge(turned, "ties", given), merge([base, first, second], "ties", given))
    assert merge([torch.zeros(0, 4)] * 3, "ties", given).shape == (0, 4)


def test_a_gamma_off_the_grid_is_exact_too() -> None:
    models = random_models(1, (100,))
    given: dict[str, list[float] | float] = {"lambda": [1.0], "density": [0.5]}
    on, off = (merge(models, "breadcrumbs", {**given, "gamma": [gamma]}) for gamma in (0.05, 0.0501))
    assert torch.equal(on, off)
