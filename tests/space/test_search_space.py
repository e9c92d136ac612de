"""Search spaces: presets that fit real models, groups that cover them, points and recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import FloatDistribution

from mergetune.errors import MergetuneError, TrialError
from mergetune.files.library import presets
from mergetune.files.yaml_io import validate
from mergetune.space.method_table import METHODS
from mergetune.space.recipe import MergeRecipe, Source, assign_groups
from mergetune.space.search_space import SearchSpace
from mergetune.space.search_space_config import SearchSpaceConfig, read_search_space

BASE = Source(path="base")
EXPERTS = {"a": Source(path="a"), "b": Source(path="b")}
PARTS = ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(12) for part in PARTS),
    "model.norm.weight",
    "lm_head.weight",
]
CHANGED = {"a": NAMES, "b": NAMES}


def space(**data: Any) -> SearchSpace:
    config = validate(
        {"description": "test", "method": "task_arithmetic", **data}, SearchSpaceConfig, "s.yaml"
    )
    return SearchSpace(config, BASE, EXPERTS, CHANGED, NAMES)


def lambdas(recipe: MergeRecipe, expert: str) -> list[float]:
    """The expert's lambda in each layer."""
    groups = assign_groups(recipe.groups, NAMES)
    return [groups[f"model.layers.{i}.mlp.up_proj.weight"].per_expert("lambda")[expert] for i in range(12)]


@pytest.mark.parametrize("path", presets("search_spaces").values(), ids=lambda path: path.stem)
def test_every_preset_fits_a_model_and_explains_itself(path: Path) -> None:
    config = read_search_space(path)
    n_experts = METHODS[config.method].max_experts or 2
    experts = dict(list(EXPERTS.items())[:n_experts])
    bound = SearchSpace(config, BASE, experts, {name: NAMES for name in experts}, NAMES)
    assert 1 <= len(bound.distributions) <= 24
    assert len(config.description) > 30
    middle = {
        key: (d.low + d.high) / 2
        for key, d in bound.distributions.items()
        if isinstance(d, FloatDistribution)
    }
    assert assign_groups(bound.recipe(middle).groups, NAMES)


def test_every_method_with_something_to_tune_has_a_preset() -> None:
    covered = {read_search_space(path).method for path in presets("search_spaces").values()}
    assert covered == {name for name, method in METHODS.items() if method.parameters}


def test_options_reach_the_recipe() -> None:
    found = space(method="ties", options={"normalize": "weights"}, groups=[{"name": "all"}])
    point = {key: 0.5 for key in found.distributions}
    assert found.recipe(point).choices == {"normalize": "weights"}


def test_held_parameters_stand_in_the_recipe_and_are_not_searched() -> None:
    found = space(method="breadcrumbs", groups=[{"name": "all"}])
    assert not any("gamma" in key for key in found.distributions)
    recipe = found.recipe({key: 0.5 for key in found.distributions})
    assert recipe.groups[0].per_expert("gamma") == {"a": 0.01, "b": 0.01}


def test_defaults_are_those_of_the_documentation() -> None:
    found = space(method="ties", groups=[{"name": "all"}]).distributions
    assert found["lambda.all.a"] == FloatDistribution(0.0, 2.0)
    assert found["density.all.b"] == FloatDistribution(0.1, 1.0, step=0.01)


def test_a_shared_range_is_one_dimension_and_a_number_none() -> None:
    found = space(method="ties", groups=[{"name": "all"}], density={"low": 0.2, "high": 0.8, "shared": True})
    assert sorted(found.distributions) == ["density.all", "lambda.all.a", "lambda.all.b"]
    fixed = space(
        groups=[{"name": "in", "match": "layers"}, {"name": "out", "match": "^(?!.*layers)", "lambda": 1.0}]
    )
    recipe = fixed.recipe({"lambda.in.a": 0.3, "lambda.in.b": 0.4})
    assert [group.per_expert("lambda") for group in recipe.groups] == [
        {"a": 0.3, "b": 0.4},
        {"a": 1.0, "b": 1.0},
    ]


def test_depth_fractions_become_layers() -> None:
    found = space(
        groups=[
            {"name": "lower", "depth": [0, 0.25]},
            {"name": "upper", "depth": [0.25, 1]},
            {"name": "rest", "match": "^(?!.*layers)"},
        ]
    )
    recipe = found.recipe({key: 1.0 if "lower" in key else 2.0 for key in found.distributions})
    assert lambdas(recipe, "a") == [1.0] * 3 + [2.0] * 9


def test_anchors_are_interpolated_over_depth() -> None:
    found = space(anchors=3)
    params = {f"lambda.anchor{i}.{name}": float(i) for i in range(3) for name in "ab"}
    recipe = found.recipe(params)
    expected = [2 * i / 11 for i in range(12)]
    assert lambdas(recipe, "a") == pytest.approx(expected)
    groups = assign_groups(recipe.groups, NAMES)
    assert groups["model.embed_tokens.weight"].per_expert("lambda")["a"] == 0.0
    assert (
        groups["lm_head.weight"].per_expert("lambda")["a"]
        == groups["model.norm.weight"].per_expert("lambda")["a"]
        == 2.0
    )


def test_interpolated_densities_stay_on_the_grid() -> None:
    found = space(method="dare_linear", anchors=2)
    params = {key: 0.13 if "anchor0" in key else 0.97 for key in found.distributions}
    for group in found.recipe(params).groups:
        assert all(
            round(density * 100) == pytest.approx(density * 100)
            for density in group.per_expert("density").values()
        )


def test_constant_points_are_those_inside_the_space() -> None:
    ties = space(method="ties", groups=[{"name": "all"}])
    assert ties.constant({"a": 0.0, "b": 1.0}, density=1.0) == {
        "lambda.all.a": 0.0,
        "lambda.all.b": 1.0,
        "density.all.a": 1.0,
        "density.all.b": 1.0,
    }
    assert ties.constant({"a": -0.1, "b": 1.0}, density=1.0) is None
    shared = space(groups=[{"name": "all", "lambda": {"low": 0, "high": 1, "shared": True}}])
    assert shared.constant({"a": 0.0, "b": 1.0}, density=1.0) is None
    assert shared.constant({"a": 0.5, "b": 0.5}, density=1.0) == {"lambda.all": 0.5}
    slerp = space(method="slerp", groups=[{"name": "all"}])
    assert slerp.constant({"a": 1.0, "b": 0.0}, density=1.0) == {"t.all": 0.0}
    linear = space(method="linear", groups=[{"name": "all"}])
    for averages in (slerp, linear):  # no average of the experts is the base
        assert averages.constant({"a": 0.0, "b": 0.0}, density=1.0) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "either `groups` or `anchors`"),
        ({"anchors": 3, "groups": [{"name": "all"}]}, "either `groups` or `anchors`"),
        ({"anchors": 3, "density": 0.5}, "`task_arithmetic` has no `density`"),
        ({"groups": [{"name": "x", "lambda": {"low": 2, "high": 1}}]}, "`low <= high` must hold"),
        ({"groups": [{"name": "x"}, {"name": "x"}]}, "given twice: x"),
        ({"groups": [{"name": "x", "depth": [0.5, 0.2]}]}, "0 <= depth"),
        (
            {"groups": [{"name": "x", "layer": [0, 1]}]},
            r"`groups\.0\.layer`: unknown key. Did you mean `layers`",
        ),
        ({"groups": [{"name": "x", "lamda": 1}]}, r"`groups\.0\.lamda`: unknown key. Did you mean `lambda`"),
        ({"lamda": 1, "anchors": 3}, r"`lamda`: unknown key. Did you mean `lambda`"),
        (
            {"method": "ties", "options": {"rescale": "l1"}, "anchors": 3},
            r"`options\.rescale`: unknown key\. Valid: normalize",
        ),
        ({"options": {"rescale": "l1"}, "anchors": 3}, "`task_arithmetic` has no options"),
        (
            {"anchors": 3, "lambda": [0, 1]},
            r"`lambda`: must be `key: value` pairs \(low, high, step, shared\) or a number, but got \[0, 1\]",
        ),
        ({"anchors": 3, "lambda": {"low": 0, "hgh": 1}}, r"`lambda\.hgh`: unknown key\. Did you mean `high`"),
        ({"method": "slerp", "groups": [{"name": "x", "t": {"low": 0, "high": 2}}]}, r"`t` ∈ \[0, 1\]"),
        ({"method": "tis", "anchors": 3}, "`method`"),
        ({"groups": [{"name": "x", "roles": ["mlp"]}]}, r"none takes model\.embed_tokens\.weight"),
        (
            {"method": "ties", "anchors": 3, "density": {"low": 0.0, "high": 1.0}},
            r"`density` ∈ \(0, 1\] must hold, but got 0",
        ),
    ],
)
def test_a_wrong_search_space_is_refused_with_the_reason(data: dict[str, Any], message: str) -> None:
    with pytest.raises(MergetuneError, match=message):
        space(**data)


def test_groups_that_overlap_are_refused_with_their_file(tmp_path: Path) -> None:
    path = tmp_path / "overlap.yaml"
    groups = "[{name: all}, {name: lower, depth: [0, 0.5]}]"
    path.write_text(f"description: x\nmethod: task_arithmetic\ngroups: {groups}\n")
    with pytest.raises(MergetuneError, match=r"overlap\.yaml: .* falls into `all` and `lower`"):
        SearchSpace(read_search_space(path), BASE, EXPERTS, CHANGED, NAMES)


def test_coefficients_that_touch_nothing_are_not_searched() -> None:
    config = read_search_space(presets("search_spaces")["task_arithmetic_layer_groups"])
    attention = [name for name in NAMES if "self_attn" in name]
    upper = [name for name in attention if int(name.split(".")[2]) >= 6]
    found = SearchSpace(config, BASE, EXPERTS, {"a": attention, "b": upper}, NAMES)
    assert {key for key in found.distributions if key.endswith(".a")} == {
        f"lambda.depth{i}.a" for i in range(1, 7)
    }
    assert {key for key in found.distributions if key.endswith(".b")} == {
        f"lambda.depth{i}.b" for i in range(4, 7)
    }
    base = found.constant({"a": 0.0, "b": 0.0}, density=1.0)
    assert base == dict.fromkeys(found.distributions, 0.0)


def test_slerp_takes_two_experts() -> None:
    config = read_search_space(presets("search_spaces")["slerp_layer_groups"])
    with pytest.raises(MergetuneError, match="exactly 2 experts, but got 3"):
        SearchSpace(config, BASE, {**EXPERTS, "c": Source(path="c")}, {**CHANGED, "c": NAMES}, NAMES)


def test_coefficients_are_those_of_the_file_and_the_trial_unless_interpolated() -> None:
    found = space(
        method="ties",
        groups=[{"name": "all"}],
        density={"low": 0.05, "high": 0.2, "step": 0.005, "shared": True},
    )
    recipe = found.recipe({**dict.fromkeys(found.distributions, 1.0), "density.all": 0.055})
    assert recipe.groups[0].per_expert("density") == {"a": 0.055, "b": 0.055}
    fixed = space(method="ties", groups=[{"name": "all"}], density=0.125)
    recipe = fixed.recipe(dict.fromkeys(fixed.distributions, 1.0))
    assert recipe.groups[0].per_expert("density") == {"a": 0.125, "b": 0.125}


def test_a_baseline_off_the_grid_is_no_point_of_the_space() -> None:
    found = space(groups=[{"name": "all"}], **{"lambda": {"low": 0, "high": 2, "step": 0.3}})
    assert found.constant({"a": 1.0, "b": 0.0}, density=1.0) is None
    assert found.constant({"a": 0.3, "b": 0.0}, density=1.0) is not None


def test_a_point_that_the_method_cannot_merge_fails_the_trial() -> None:
    found = space(method="linear", groups=[{"name": "all"}])
    with pytest.raises(TrialError, match="sum of the lambdas, which is 0"):
        found.recipe(dict.fromkeys(found.distributions, 0.0))
