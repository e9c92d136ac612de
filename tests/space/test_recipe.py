"""Recipes: complete, readable, and the same after a round trip through YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergetune.errors import MergetuneError
from mergetune.space.recipe import (
    LayerGroup,
    MergeRecipe,
    assign_groups,
    count_layers,
    single_layers,
    tensor_place,
)

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("self_attn.q_proj", "mlp.up_proj")),
    "model.norm.weight",
    "lm_head.weight",
]


def build(**changes: Any) -> MergeRecipe:
    data: dict[str, Any] = {
        "method": "task_arithmetic",
        "base": {"path": "/models/base", "digest": "00"},
        "experts": {"a": {"path": "/models/a", "digest": "01"}, "b": {"path": "/models/b"}},
        "groups": [{"name": "all", "lambda": {"a": 0.5, "b": -0.25}}],
    }
    return MergeRecipe.model_validate({**data, **changes})


@given(st.lists(st.floats(-3, 3, allow_nan=False), min_size=2, max_size=2))
def test_yaml_gives_the_same_recipe_back(
    tmp_path_factory: pytest.TempPathFactory, values: list[float]
) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe = build(groups=[{"name": "all", "lambda": dict(zip("ab", values, strict=True))}])
    recipe.write(path)
    assert MergeRecipe.read(path) == recipe
    assert MergeRecipe.read(path).digest == recipe.digest


def test_the_digest_is_that_of_the_weights_not_of_their_place() -> None:
    moved = build(base={"path": "/elsewhere", "digest": "00"})
    assert moved.digest == build().digest
    for change in ({"seed": 1}, {"base": {"path": "/models/base", "digest": "02"}}):
        assert build(**change).digest != build().digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": [{"name": "all", "lambda": {"a": 0.5}}]}, "lambda.*for a, b, but is for a"),
        ({"groups": [{"name": "all", "lambda": 0.5}]}, "for a, b, but is for all of them"),
        ({"method": "slerp", "groups": [{"name": "all", "t": {"a": 0.5}}]}, "must be one number"),
        ({"options": {"rescale": "l1"}}, "`task_arithmetic` has no options"),
        (
            {
                "method": "ties",
                "options": {"normalize": "yes"},
                "groups": [{"name": "all", "lambda": {"a": 1, "b": 1}, "density": {"a": 1, "b": 1}}],
            },
            "one of count, weights, none",
        ),
        (
            {
                "method": "ties",
                "groups": [{"name": "all", "lambda": {"a": 1, "b": 1}, "density": {"a": 0, "b": 1}}],
            },
            r"`density` ∈ \(0, 1\] must hold",
        ),
        ({"groups": [{"name": "all", "lamda": {"a": 1, "b": 1}}]}, "unknown key lamda"),
        ({"groups": [{"name": "all", "lambda": {"a": 1, "b": 1, "c": 1}}]}, "lambda"),
        ({"groups": [{"name": "all", "lambda": {"a": 1, "b": 1}, "t": 0.5}]}, "has no coefficient `t`"),
        ({"method": "ties"}, "density"),
        ({"method": "slerp", "groups": [{"name": "all"}]}, "`slerp` needs the coefficient `t`"),
        (
            {"method": "slerp", "experts": {"a": {"path": "a"}}, "groups": [{"name": "all", "t": 0}]},
            "2 experts",
        ),
        (
            {"method": "linear", "groups": [{"name": "all", "lambda": {"a": 1, "b": -1}}]},
            "sum of the lambdas",
        ),
        ({"groups": [{"name": "all", "match": "(", "lambda": {"a": 1, "b": 1}}]}, "regular expression"),
    ],
)
def test_a_recipe_that_its_method_cannot_use_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize(
    ("name", "layer", "role"),
    [
        ("model.embed_tokens.weight", None, "embeddings"),
        ("model.layers.11.self_attn.q_proj.weight", 11, "attention"),
        ("model.layers.0.self_attn.q_norm.weight", 0, "norms"),
        ("model.layers.0.post_attention_layernorm.weight", 0, "norms"),
        ("model.layers.7.mlp.experts.3.down_proj.weight", 7, "mlp"),
        ("model.layers.7.block_sparse_moe.experts.3.w1.weight", 7, "mlp"),
        ("transformer.h.2.attn.c_attn.weight", 2, "attention"),
        ("transformer.h.2.mlp.c_fc.weight", 2, "mlp"),
        ("transformer.h.2.ln_1.weight", 2, "norms"),
        ("transformer.ln_f.weight", None, "norms"),
        ("transformer.wte.weight", None, "embeddings"),
        ("gpt_neox.layers.4.attention.query_key_value.weight", 4, "attention"),
        ("gpt_neox.layers.4.mlp.dense_h_to_4h.weight", 4, "mlp"),
        ("model.norm.weight", None, "norms"),
        ("lm_head.weight", None, "head"),
    ],
)
def test_layer_and_role_are_read_off_the_name(name: str, layer: int | None, role: str) -> None:
    assert (tensor_place(name).layer, tensor_place(name).role) == (layer, role)


def test_a_tensor_of_unknown_role_is_other() -> None:
    assert tensor_place("model.layers.0.laurel.linear_left.weight").role == "other"  # Gemma 3n


def test_single_layers_come_in_the_order_of_depth() -> None:
    names = ["model.norm.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in (2, 10, 0))]
    groups = single_layers(names)
    assert [group.name for group in groups] == ["outside", *(f"layer{i}" for i in range(11))]
    assert {name: group.name for name, group in assign_groups(groups, names).items()} == dict(
        zip(names, ["outside", "layer2", "layer10", "layer0"], strict=True)
    )


def test_count_layers() -> None:
    assert count_layers(NAMES) == 3
    assert count_layers(["wte.weight"]) == 0


def group(name: str, **selectors: Any) -> LayerGroup:
    return LayerGroup.model_validate({"name": name, **selectors})


def test_every_tensor_falls_into_one_group() -> None:
    groups = [
        group("inside", layers=[0, 1]),
        group("last", layers=[2, 2]),
        group("outside", match=r"^(?!model\.layers)"),
    ]
    assigned = assign_groups(groups, NAMES)
    assert [assigned[name].name for name in NAMES] == [
        "outside",
        *["inside"] * 4,
        *["last"] * 2,
        *["outside"] * 2,
    ]


def test_a_tensor_in_no_group_is_named() -> None:
    with pytest.raises(MergetuneError, match=r"none takes model\.norm\.weight, lm_head\.weight"):
        assign_groups([group("x", match="layers|embed")], NAMES)


def test_a_tensor_in_two_groups_is_named_with_both() -> None:
    groups = [group("x", roles=["mlp"]), group("y", layers=[0, 2]), group("z", match="embed|norm|head")]
    with pytest.raises(MergetuneError, match=r"layers\.0\.mlp\.up_proj\.weight` falls into `x` and `y`"):
        assign_groups(groups, NAMES)


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("groups:", "group:", r"recipe\.yaml:(?s:.*)`group`: unknown key\. Did you mean `groups`"),
        ("lambda:", "lamda:", r"`groups\.0\.lamda`: unknown key\. Did you mean `lambda`"),
        ("normalize:", "normalise:", r"`options\.normalise`: unknown key\. Did you mean `normalize`"),
        ("path:", "pth:", r"`base\.pth`: unknown key\. Did you mean `path`"),
    ],
)
def test_a_recipe_file_with_a_misspelt_key_names_the_right_one(
    tmp_path: Path, right: str, wrong: str, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    pairs = {"lambda": {"a": 0.5, "b": 0.5}, "density": {"a": 0.5, "b": 0.5}}
    build(method="ties", options={"normalize": "count"}, groups=[{"name": "all", **pairs}]).write(path)
    path.write_text(path.read_text().replace(right, wrong))
    with pytest.raises(MergetuneError, match=message):
        MergeRecipe.read(path)
