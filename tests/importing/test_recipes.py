"""Configurations of mergekit as recipes: the same merges, and what has no counterpart."""

from __future__ import annotations

import contextlib
import itertools
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mergekit.common import ModelReference
from mergekit.config import ConfigReader, MergeConfiguration, OutputSliceDefinition
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.parameter_resolver import resolve_parameter

from helpers import cache_model, mergetune, train_adapter
from imported import read_merge, refusal, take
from mergetune.errors import MergetuneError
from mergetune.importing.importer import import_file
from mergetune.space.recipe import MergeRecipe, assign_groups
from mergetune.space.stack import Stack
from mergetune.study.export import merge_recipe
from mergetune.weights.checkpoint import Checkpoint

CONFIGS = Path(__file__).parent


def files(kind: str) -> list[Any]:
    found = sorted((CONFIGS / kind).glob("*.yaml"))
    return [pytest.param(path, id=path.stem) for path in found]


def merge_theirs(text: str, out: Path, **options: Any) -> Checkpoint:
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    LoaderCache().loaders.clear()  # it keeps models by name, whatever folder they were relative to
    run_merge(config, str(out), MergeOptions(quiet=True, random_seed=0, write_model_card=False, **options))
    return Checkpoint(out)


def merge_ours(text: str, folder: Path) -> Checkpoint:
    take(text, folder / "recipe.yaml")
    merge_recipe(folder / "recipe.yaml", folder / "ours")
    return Checkpoint(folder / "ours")


def check_equal(ours: Checkpoint, theirs: Checkpoint, largest_share: float = 0.0) -> None:
    """Compare all tensors; a share of the entries may differ, where a threshold falls on one of them."""
    assert set(ours.names) == set(theirs.names)
    for name in ours.names:
        are_close = torch.isclose(ours.tensor(name), theirs.tensor(name), rtol=1e-6, atol=1e-6)
        assert float((~are_close).float().mean()) <= largest_share, name


def check_same(text: str, folder: Path) -> None:
    """Merge a configuration by mergekit and as a recipe, and compare all tensors."""
    text = textwrap.dedent(text)
    check_equal(merge_ours(text, folder), merge_theirs(text, folder / "theirs"))


@pytest.mark.parametrize("file", files("merges"))
def test_a_public_configuration_is_the_same_merge(file: Path, here: Path, tmp_path: Path) -> None:
    found = import_file(file, tmp_path / "ours")
    texts = file.read_text().split("\n---\n")
    assert len(found.files) == len(texts)
    for number, (recipe, text) in enumerate(zip(found.files, texts, strict=True)):
        before = str(tmp_path / f"theirs{number - 1}")
        theirs = merge_theirs(
            text.replace("./models/gradient-slerp\n", f"{before}\n"), tmp_path / f"theirs{number}"
        )
        merge_recipe(recipe, recipe.with_suffix(""))
        is_fusion = "arcee_fusion" in text  # whose threshold falls on an entry
        check_equal(Checkpoint(recipe.with_suffix("")), theirs, 2e-4 if is_fusion else 0.0)


@pytest.mark.parametrize("file", files("random"))
def test_a_public_configuration_with_random_masks_drops_as_much(
    file: Path, here: Path, tmp_path: Path
) -> None:
    """The masks are others, so that shares and sizes are compared: 5 standard errors are 0.02 of 40,000."""
    text = file.read_text()
    ours, theirs, base = (
        merge_ours(text, tmp_path),
        merge_theirs(text, tmp_path / "theirs"),
        Checkpoint(here / "base"),
    )
    matrices = [name for name in base.names if base.tensor(name).ndim == 2]
    moved = [
        torch.cat([(merged.tensor(name) - base.tensor(name)).flatten() for name in matrices])
        for merged in (ours, theirs)
    ]
    assert len(moved[0]) > 40_000
    shares = [float((each != 0).float().mean()) for each in moved]
    sizes = [float(each.abs().mean()) for each in moved]
    assert shares[0] == pytest.approx(shares[1], abs=0.02)
    assert sizes[0] == pytest.approx(sizes[1], rel=0.03)
    remarks = [str(each) for each in import_file(file, tmp_path / "again").remarks]
    assert any("at random by another generator" in remark for remark in remarks)


REFUSED = {
    "mergekit_gradient_slerp": [
        "line 12: `parameters.t.0.pattern: self_attn`",
        "line 14:",
        "Say `filter: …`",
    ],
    "mergekit_ranked_ties": [
        "line 11: `merge_method: ranked_ties`: is no method of mergetune",
        "`dare_ties`",
    ],
    "mergekit_chipalign": ["line 3: `models.0.model: a`: `weight` must be given", "line 4:"],
    "merge_tools": ["line 6: `slices.0.sources.1.model: b`: `weight` must be given"],
    "aivillage": ["line 2: `merge_method: frankenmerge`: is no method of mergetune"],
    "btx_moe": ["mergekit-moe", "Build it with mergekit"],
}


@pytest.mark.parametrize("file", files("refused"))
def test_what_has_no_counterpart_is_refused_by_line(file: Path, here: Path, tmp_path: Path) -> None:
    message = refusal(file.read_text(), tmp_path / "out")
    for part in REFUSED[file.stem]:
        assert part in message


def config_of(method: str, shared: str = "", per_model: tuple[str, ...] = (), base: str = "base") -> str:
    """Write a configuration of as many models as there are parameters, each of these in flow style."""
    models = [
        {"model": name, "parameters": yaml.safe_load(f"{{{own}}}")}
        for name, own in zip("abc", per_model, strict=False)
    ]
    data: dict[str, Any] = {"models": models, "merge_method": method, "dtype": "float32"}
    data |= {"base_model": base} if base else {}
    return yaml.safe_dump(data | {"parameters": yaml.safe_load(f"{{{shared}}}")})


WEIGHTS = ("weight: 0.7", "weight: -0.4", "weight: 1.2")
THINNED = ("weight: 0.7, density: 0.3", "weight: -0.4, density: 0.8", "weight: 1.2, density: 1.5")
KEPT = tuple(f"{weight}, density: 1" for weight in WEIGHTS)
BARE = ("", "", "")


@pytest.mark.parametrize(
    ("method", "shared", "per_model", "base"),
    [
        ("linear", "", WEIGHTS, ""),
        ("linear", "normalize: false", ("weight: 0.3", "weight: 0.7"), ""),
        ("linear", "weight: 0.5", BARE[:2], "base"),  # mergekit takes the base into the mean
        ("task_arithmetic", "", THINNED, "base"),
        ("task_arithmetic", "normalize: true, lambda: 0.5", WEIGHTS, "base"),
        *((name, "", THINNED, "base") for name in ("ties", "breadcrumbs", "breadcrumbs_ties")),
        ("ties", "normalize: false, lambda: -0.6", THINNED, "base"),
        ("ties", "normalize: true, lambda: 0.6, weight: 0.5, density: 0.4", BARE, "base"),
        ("ties", "lambda: 0.6", THINNED[:1], "base"),
        ("ties", "", ("weight: 0.7, density: 0", "weight: 0.5, density: 0.5"), "base"),
        ("breadcrumbs", "normalize: 1.0, gamma: 0.1, lambda: 0.6", THINNED, "base"),
        *(
            (name, f"lambda: 0.6, normalize: {flag}", KEPT, "base")
            for name in ("dare_linear", "della_linear")
            for flag in ("true", "false")
        ),
        *((name, "normalize: true", KEPT, "base") for name in ("dare_ties", "della")),
        ("dare_ties", "rescale: false, lambda: 2", KEPT, "base"),
        ("ram", "", BARE, "base"),
        ("ramplus_tl", "epsilon: 1e-4", BARE, "base"),
        ("ramplus_tl", "r: 0.5, alpha: [0.1, 0.9]", BARE[:2], "base"),
        ("model_stock", "filter_wise: true", BARE, "base"),
        ("nuslerp", "", ("weight: 0.3", "weight: 0.9"), "base"),
        ("nuslerp", "nuslerp_flatten: false", ("weight: 0.3", "weight: 0.9"), ""),
        ("nuslerp", "", ("weight: 0.5", "weight: -0.5"), ""),
        ("multislerp", "", ("weight: 0.3", "weight: 0.9", "weight: 0.2"), "base"),
        ("multislerp", "normalize_weights: false", ("weight: 0.3", "weight: 0.7"), ""),
        ("karcher", "max_iter: 1000, tol: 1e-9", BARE, ""),
        ("karcher", "", BARE[:2], "base"),
        ("nearswap", "t: [0.001, 1e-4]", BARE[:1], "base"),
        ("passthrough", "", ("scale: [{filter: q_proj, value: 0.5}]",), ""),
        ("slerp", "t: {filter: '*', value: 0.3}", BARE[:1], "base"),
    ],
)
def test_methods_and_parameters_are_the_same(
    method: str, shared: str, per_model: tuple[str, ...], base: str, here: Path, tmp_path: Path
) -> None:
    check_same(config_of(method, shared, per_model, base), tmp_path)


@pytest.mark.parametrize(
    ("method", "shared", "per_model", "base", "parts"),
    [
        ("linear", "normalize: false", WEIGHTS, "", ["`parameters.normalize: false`", "sum to 1", "1.5"]),
        ("linear", "", ("weight: 1", "weight: -1"), "", ["sum to 0"]),
        ("linear", "", WEIGHTS[:2], "base", ["`base_model: base`: `weight` must be given"]),
        ("ties", "lambda: 0.6", THINNED, "base", ["`parameters.lambda: 0.6`", "Make it 1"]),
        ("ties", "rescale: true", THINNED, "base", ["`parameters.rescale: true`", "does not rescale"]),
        (
            "ties",
            "normalize: [{filter: mlp, value: true}, {value: false}]",
            KEPT,
            "base",
            ["one for all tensors"],
        ),
        ("dare_ties", "weight: 1, density: x", BARE, "base", ["`parameters.density: x`: must be a number"]),
        ("ties", "weight: [1, {value: 2}]", BARE, "base", ["not both"]),
        ("ties", "weight: 1, normalize: maybe", BARE, "base", ["must be true or false"]),
        ("nuslerp", "nuslerp_flatten: false, nuslerp_row_wise: true", WEIGHTS[:2], "", ["nuslerp_row_wise"]),
        ("nuslerp", "", ("weight: 1", "weight: -3"), "", ["`t` of a recipe must be in [0, 1], but is 1.5"]),
        ("nuslerp", "", WEIGHTS, "", ["takes 2 models, but here are 3"]),
        ("multislerp", "normalize_weights: false", WEIGHTS, "", ["sum to 1.5"]),
        ("karcher", "max_iter: 2", BARE, "", ["Make it 10 or more"]),
        ("slerp", "t: 0.5", BARE[:2], "base", ["takes 2 models, but here are 3"]),
        ("slerp", "t: 1.5", BARE[:1], "base", ["`parameters.t: 1.5`", "must be in [0, 1]"]),
        ("slerp", "", BARE[:1], "base", ["`t` must be given"]),
        ("model_stock", "", BARE[:1], "base", ["at least 2 models beside the base, but here are 1"]),
        ("task_arithmetic", "", WEIGHTS, "", ["must have a `base_model`"]),
        ("task_arithmetic", "weight: {filter: mlp, value: 1}", BARE, "base", ["for the tensors `all-rest`"]),
        ("passthrough", "", BARE[:2], "", ["takes 1 model, but here are 2"]),
        ("consensus_ta", "", BARE, "base", ["is no method of mergetune"]),
    ],
)
def test_parameters_without_a_counterpart_are_refused(
    method: str,
    shared: str,
    per_model: tuple[str, ...],
    base: str,
    parts: list[str],
    here: Path,
    tmp_path: Path,
) -> None:
    message = refusal(config_of(method, shared, per_model, base), tmp_path / "out")
    for part in parts:
        assert part in message


STACKS = {
    "goliath": """
        slices:
          - sources: [{model: a, layer_range: [0, 3]}]
          - sources: [{model: b, layer_range: [1, 4]}]
        merge_method: passthrough
        dtype: float32
    """,
    "left_out": """
        slices: [{sources: [{model: a, layer_range: [0, 3]}]}]
        merge_method: passthrough
        dtype: float32
    """,
    "scaled_copies": """
        slices:
          - sources: [{model: a, layer_range: [0, 2]}]
          - sources:
              - model: b
                layer_range: [0, 3]
                parameters:
                  scale: [{filter: o_proj, value: [0, 0.5]}, {filter: down_proj, value: 0.5}, {value: 1}]
          - sources: [{model: a, layer_range: [2, 4], parameters: {scale: 0.9}}]
        merge_method: passthrough
        dtype: float32
    """,
    "scaled_in_place": """
        slices:
          - sources: [{model: a, layer_range: [0, 2]}]
          - sources: [{model: b, layer_range: [2, 4], parameters: {scale: 0.5}}]
        merge_method: passthrough
        base_model: base
        dtype: float32
    """,
    "task_vectors_of_repeated_layers": """
        slices:
          - sources: &first
              - {model: base, layer_range: [0, 3]}
              - {model: a, layer_range: [0, 3], parameters: {weight: [0.2, 0.9]}}
              - {model: b, layer_range: [0, 3], parameters: {weight: 0.4}}
          - sources: *first
        merge_method: task_arithmetic
        base_model: base
        dtype: float32
    """,
    "between_moved_layers": """
        slices:
          - sources: [{model: base, layer_range: [0, 2]}, {model: a, layer_range: [1, 3]}]
          - sources: [{model: base, layer_range: [1, 4]}, {model: a, layer_range: [1, 4]}]
        merge_method: slerp
        base_model: base
        parameters: {t: [0.2, 0.7]}
        dtype: float32
    """,
}


@pytest.mark.parametrize("text", STACKS.values(), ids=STACKS)
def test_slices_that_move_layers_are_the_same_merge_of_stacks(text: str, here: Path, tmp_path: Path) -> None:
    check_same(text, tmp_path)
    recipe = MergeRecipe.read(tmp_path / "recipe.yaml")
    assert all(isinstance(each.path, Stack) for each in (recipe.base, *recipe.experts.values()))


SLICES = """
    slices:
      - sources:
          - model: base
            layer_range: [0, 1]
          - {{model: a, layer_range: [0, 1], parameters: {{weight: 0.3, density: [0.2, 0.9]}}}}
          - {{model: b, layer_range: [0, 1]}}
      - sources:
          - {{model: base, layer_range: [1, 4]}}
          - {{model: b, layer_range: [1, 4], parameters: {{weight: [{{filter: mlp, value: [1, 2]}}]}}}}
        parameters:
          weight: [{{filter: q_proj, value: [0.1, 0.4]}}]
          normalize: 0
    merge_method: {method}
    base_model: base
    parameters: {{weight: [0.6, 0.8], lambda: {{filter: lm_head, value: 2}}, normalize: false}}
    dtype: float32
"""


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "breadcrumbs"])
def test_slices_filters_and_scopes_are_resolved_as_mergekit_does(
    method: str, here: Path, tmp_path: Path
) -> None:
    check_same(SLICES.format(method=method), tmp_path)


def test_layers_of_several_models_are_shares_of_one_and_zero(here: Path, tmp_path: Path) -> None:
    text = """
        merge_method: passthrough
        dtype: float32
        slices:
          - sources: [{model: a, layer_range: [0, 1]}]
          - sources: [{model: b, layer_range: [1, 3]}]
          - sources: [{model: a, layer_range: [3, 4]}]
    """
    check_same(text, tmp_path)
    assert MergeRecipe.read(tmp_path / "recipe.yaml").method == "linear"


def test_slices_of_slerp_may_begin_at_either_model(here: Path, tmp_path: Path) -> None:
    """As mergekit-evolve writes its best configuration."""
    text = """
        merge_method: slerp
        dtype: float32
        slices:
          - base_model: b
            parameters: {t: 0.2}
            sources: [{model: b, layer_range: [0, 2]}, {model: a, layer_range: [0, 2]}]
          - base_model: a
            parameters: {t: 0.3}
            sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
    """
    check_same(text, tmp_path)


def test_the_one_module_of_a_model_of_text_is_the_model(here: Path, tmp_path: Path) -> None:
    """As mergekit writes configurations into model cards."""
    text = """
        base_model: base
        dtype: float32
        merge_method: ties
        modules:
          default:
            parameters: {density: 0.5}
            slices:
              - sources:
                  - {layer_range: [0, 4], model: a, parameters: {weight: [0.9, 0.2, 0.95]}}
                  - {layer_range: [0, 4], model: b, parameters: {weight: 1.0, density: 0.7}}
                  - {layer_range: [0, 4], model: base}
        parameters: {density: 0.1, normalize: 1.0}
    """
    check_same(text, tmp_path)


def test_the_base_among_the_models_has_no_weight(here: Path, tmp_path: Path) -> None:
    text = """
        models:
          - {model: base, parameters: {weight: 5}}
          - {model: a, parameters: {weight: 0.5}}
        merge_method: ties
        base_model: base
        parameters: {density: 0.3, normalize: true}
        dtype: float32
    """
    check_same(text, tmp_path)
    remarks = take(text, tmp_path / "again.yaml").remarks
    assert any("`models.0.parameters.weight: 5`: left out: the base" in str(remark) for remark in remarks)


def test_adapters_of_the_base_are_experts(here: Path, tmp_path: Path) -> None:
    adapter = train_adapter(here / "base", tmp_path / "lora", r=4, target_modules=["q_proj", "down_proj"])
    text = f"""
        models:
          - {{model: base+{adapter}, parameters: {{weight: 0.5}}}}
          - {{model: a, parameters: {{weight: 0.3}}}}
        merge_method: task_arithmetic
        base_model: base
        dtype: float32
    """
    text = textwrap.dedent(text)
    theirs = merge_theirs(text, tmp_path / "theirs", lora_merge_cache=str(tmp_path / "cache"))
    check_equal(merge_ours(text, tmp_path), theirs)
    other = text.replace("model: base+", "model: a+")
    assert "an adapter must be one of the base, `base`" in refusal(other, tmp_path / "out")


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_models_in_bfloat16_differ_by_mergekits_own_rounding(
    method: str, half_model_folder: Path, tmp_path: Path
) -> None:
    """mergekit rounds task vectors, products and sums to bfloat16 (8 bits each); the recipe rounds once."""
    weights = ("weight: 0.3", "weight: 0.7")
    text = config_of(method, "", weights, "" if method == "linear" else "base").replace("float32", "bfloat16")
    with contextlib.chdir(half_model_folder):
        ours, theirs = merge_ours(text, tmp_path), merge_theirs(text, tmp_path / "theirs")
    models = [Checkpoint(half_model_folder / name) for name in ("base", "a", "b")]
    for name in ours.names:
        first, second = ours.tensor(name), theirs.tensor(name)
        assert first.dtype == second.dtype == torch.bfloat16
        spacing = 2**-6 * torch.stack([each.tensor(name).abs().float() for each in models]).amax(0)
        assert bool(((first.float() - second.float()).abs() <= spacing).all()), name


@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_of_models_in_bfloat16_another_hundredth_is_trimmed(
    method: str, half_model_folder: Path, tmp_path: Path
) -> None:
    """Where magnitudes equal the threshold; the dtype is float32, so that nothing else is rounded."""
    text = config_of(method, "normalize: false", ("weight: 0.6, density: 0.5", "weight: 0.7, density: 0.3"))
    with contextlib.chdir(half_model_folder):
        ours = merge_ours(text, tmp_path)
        theirs = merge_theirs(f"{text}out_dtype: bfloat16\n", tmp_path / "theirs")
    are_equal = torch.cat([(ours.tensor(name) == theirs.tensor(name)).flatten() for name in ours.names])
    assert 0.98 < float(are_equal.float().mean()) < 1
    remarks = take(text, tmp_path / "again.yaml").remarks
    assert any("all are kept, by mergekit some" in remark.text for remark in remarks)


scalars = st.floats(-2, 2).map(lambda value: round(value, 3))
gradients = st.lists(scalars, min_size=1, max_size=5)
filters = st.sampled_from(
    ["self_attn", "attn", "mlp", "q_proj", "lm_head", "layers.1.", "norm", "*", "weight"]
)
conditions = st.lists(
    st.fixed_dictionaries({"value": scalars | gradients}, optional={"filter": filters}),
    min_size=1,
    max_size=4,
)
parameters = st.none() | st.fixed_dictionaries({"weight": scalars | gradients | conditions})
NAMES = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{i}.{part}.weight"
        for i in range(4)
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "input_layernorm")
    ),
    "model.norm.weight",
    "lm_head.weight",
]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(outer=scalars, division=st.sampled_from([[4], [1, 3], [2, 2], [1, 1, 2]]), data=st.data())
def test_every_tensor_gets_the_weight_that_mergekit_resolves(
    here: Path, outer: float, division: list[int], data: st.DataObject
) -> None:
    slices, first = [], 0
    for length in division:
        sources = [
            {"model": name, "layer_range": [first, first + length], "parameters": data.draw(parameters)}
            for name in ("base", "a", "b")
        ]
        slices.append({"sources": sources, "parameters": data.draw(parameters)})
        first += length
    config: dict[str, Any] = {"slices": slices, "merge_method": "task_arithmetic", "base_model": "base"}
    config["parameters"] = {"weight": outer}
    recipe = read_merge(yaml.safe_dump(config))
    groups = assign_groups(recipe.groups, NAMES)
    theirs = MergeConfiguration.model_validate(config)
    for name in NAMES:
        for model in ("a", "b"):
            assert groups[name].per_expert("lambda")[model] == pytest.approx(
                weight_by_mergekit(theirs, name, model)
            )


def weight_by_mergekit(config: MergeConfiguration, name: str, model: str) -> float:
    """Resolve a weight as mergekit's planner does, which needs models for that."""
    from mergekit.merge_methods import get

    assert config.slices is not None
    parts: list[tuple[OutputSliceDefinition, float]] = []
    for each in config.slices:
        first, last = each.sources[0].layer_range
        n = last - first
        parts += [(each, i / (n - 1) if n > 1 else 1.0) for i in range(n)]
    number = name.split(".")[2] if ".layers." in name else None
    at_end = config.slices[0] if "embed" in name else config.slices[-1]
    own, t = parts[int(number)] if number else (at_end, 0.0)
    reader = ConfigReader(config=config, t=t, slice_out=own)
    weight = next(each for each in get("task_arithmetic").spec.parameters if each.name == "weight")
    scopes = reader.parameter_sources(ModelReference.parse(model))
    return float(resolve_parameter(weight, scopes, tensor_name=name, t=t))


def test_one_setting_for_all_is_one_layer_group_and_needs_no_model(tmp_path: Path) -> None:
    text = """
        models:
          - {model: acme/chat@main, parameters: {weight: 0.5}}
          - {model: acme/code.v2, parameters: {weight: 0.4}}
          - {model: other/code.v2, parameters: {weight: 0.1}}
        merge_method: task_arithmetic
        base_model: acme/base
    """
    take(text, tmp_path / "recipe.yaml")
    recipe = MergeRecipe.read(tmp_path / "recipe.yaml")
    assert [group.name for group in recipe.groups] == ["all"]
    assert {name: each.path for name, each in recipe.experts.items()} == {
        "chat": "acme/chat@main",
        "code-v2": "acme/code.v2",
        "code-v2-2": "other/code.v2",
    }
    assert recipe.base.path == "acme/base"


def test_a_gradient_over_models_that_are_not_here_needs_the_number_of_layers(
    hub_cache: Path, tmp_path: Path
) -> None:
    text = """
        models: [{model: acme/chat}]
        merge_method: slerp
        base_model: acme/base
        parameters: {t: [0, 1]}
    """
    assert "line 5: `parameters.t: [0, 1]`" in (message := refusal(text, tmp_path / "out"))
    assert "--layers N" in message
    take(text, tmp_path / "recipe.yaml", layers=3)
    groups = MergeRecipe.read(tmp_path / "recipe.yaml").groups
    assert {group.name: group.single("t") for group in groups} == {
        "outside": 0.0,
        "layer0": 0.0,
        "layer1": 0.5,
        "layer2": 1.0,
    }


def test_the_number_of_layers_is_read_from_the_models_configuration(
    hub_cache: Path, model_folder: Path, tmp_path: Path
) -> None:
    cache_model(hub_cache, "acme/base", model_folder / "base")
    text = """
        models: [{model: acme/chat}]
        merge_method: slerp
        base_model: acme/base
        parameters: {t: [0, 1]}
    """
    take(text, tmp_path / "recipe.yaml")
    assert len(MergeRecipe.read(tmp_path / "recipe.yaml").groups) == 5
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "config.json").write_text('{"vision_config": {}, "text_config": {}}')
    assert "of images and text" in refusal(text.replace("acme/base", "pictures"), tmp_path / "out")


def test_a_directory_that_is_not_here_is_said(tmp_path: Path) -> None:
    text = """
        models:
          - {model: ./models/absent, parameters: {weight: 1}}
          - {model: acme/chat, parameters: {weight: 1}}
        merge_method: linear
    """
    remarks = [str(remark) for remark in take(text, tmp_path / "recipe.yaml").remarks]
    assert any(
        "line 3: `models.0.model: ./models/absent`: there is no such directory here" in x for x in remarks
    )


def test_what_changes_nothing_is_said_by_line_and_kept_in_the_recipe(here: Path, tmp_path: Path) -> None:
    text = """\
        name: mine
        models:
          - {model: a, parameters: {weight: 0.5, epsilon: 0.1}, density: 0.5}
          - {model: b, parameters: {weight: 0.5, int8_mask: true}}
        merge_method: linear
        dtype: float32
        out_dtype: bfloat16
        tokenizer: {source: union, pad_to_multiple_of: 8}
        chat_template: auto
        parameters: {normalize: true, t: [0, 1]}
    """
    found = take(text, tmp_path / "recipe.yaml")
    assert [(remark.line, remark.key) for remark in found.remarks] == [
        (1, "name"),
        (1, "base_model"),
        (3, "models.0.density"),
        (3, "models.0.parameters.epsilon"),
        (4, "models.1.parameters.int8_mask"),
        (6, "dtype"),
        (7, "out_dtype"),
        (8, "tokenizer.source"),
        (8, "tokenizer.pad_to_multiple_of"),
        (9, "chat_template"),
        (10, "parameters.t"),
    ]
    written = (tmp_path / "recipe.yaml").read_text()
    assert all(f"# {remark}\n" in written for remark in found.remarks)


def test_merges_that_build_on_each_other_are_written_in_their_order(here: Path, tmp_path: Path) -> None:
    text = """
        models: [{model: first, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]
        merge_method: linear
        dtype: float32
        ---
        name: first
        models: [{model: a, parameters: {weight: 1}}, {model: c, parameters: {weight: 1}}]
        merge_method: linear
        dtype: float32
    """
    found = take(text, tmp_path / "out")
    assert [path.name for path in found.files] == ["first.yaml", "out-config.yml.yaml".replace(".yml", "")]
    for recipe in found.files:
        merge_recipe(recipe, recipe.with_suffix(""))
    merged = Checkpoint(found.files[-1].with_suffix(""))
    a, b, c = (Checkpoint(here / name) for name in "abc")
    for name in merged.names:
        mean = (a.tensor(name) + c.tensor(name)) / 4 + b.tensor(name) / 2
        torch.testing.assert_close(merged.tensor(name), mean, rtol=1e-5, atol=1e-6)
    circle = text.replace("model: a,", "model: out-config,").replace(
        "models: [{model: first", "name: out-config\n        models: [{model: first"
    )
    assert "in a circle" in refusal(circle, tmp_path / "circle")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("merge_method: linear\n", ["must have either `models` or `slices`"]),
        ("merge_method: linear\nmodels: []\n", ["must have either `models` or `slices`"]),
        ("merge_method: linear\nmodels: a\n", ["line 2: `models: a`: must be a list"]),
        ("merge_method: linear\nmodels: [{model: a+b+c}]\n", ["`models.0.model: a+b+c`", "`model+adapter`"]),
        ("merge_method: linear\nmodels: [{parameters: {weight: 1}}]\n", ["`models.0.model`: is required"]),
        ("merge_method: karcher\nmodels: [{model: a}, {model: a}]\n", ["must be there once only"]),
        (
            "merge_method: karcher\nmodels: [{model: a}, {model: b}]\ntokenizer: {tokens: {x: {}}}\n",
            ["line 3: `tokenizer.tokens`", "no token other embeddings"],
        ),
        (
            "merge_method: linear\nmodules: {text: {models: []}, vision: {models: []}}\n",
            ["line 2: `modules`", "part by part"],
        ),
        (
            "merge_method: karcher\nslices: [{sources: [{model: a, layer_range: [0, 3]}, "
            "{model: b, layer_range: [0, 4]}]}]\n",
            ["`slices.0.sources.1.layer_range: [0, 4]`", "as many layers", "3"],
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a+x, layer_range: [1, 3]}]}]\n",
            ["line 2: `slices.0.sources.0.model: a+x`", "cannot be stacked"],
        ),
        (
            "merge_method: linear\nparameters: {weight: 1}\nslices:\n"
            "- sources: [{model: a, layer_range: [1, 3]}]\n- sources: [{model: b, layer_range: [1, 3]}]\n",
            ["line 3: `slices`", "every slice must have the same models"],
        ),
        (
            "merge_method: karcher\nslices: [{sources: [{model: a, layer_range: 3}]}]\n",
            ["the first layer and the one after the last"],
        ),
        (
            "merge_method: ties\nbase_model: base\nslices: [{sources: [{model: a, layer_range: [0, 4]}]}]\n",
            ["the base `base` must be among the sources"],
        ),
        ("a: 1\n", ["line 1: must be a merge of mergekit", "but has a"]),
        ("- 1\n", ["must be a merge of mergekit"]),
        ("", ["but is empty"]),
        ("merge_method: [\n", ["is not valid YAML: line"]),
    ],
)
def test_a_broken_configuration_is_explained(text: str, parts: list[str], here: Path, tmp_path: Path) -> None:
    message = refusal(text, tmp_path / "out")
    for part in parts:
        assert part in message


ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    "x",
    [],
    {},
    [[1]],
    [1, "a"],
    {"value": {"value": 1}},
    {"filter": 3, "value": [None]},
)


def places(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        yield (*place, key)
        yield from places(value, (*place, key))


@pytest.mark.parametrize(
    "kind", ["merges/parammyl_model_stock", "merges/mergekit_bio", "searches/yuiseki_coder"]
)
def test_whatever_stands_in_a_place_is_taken_or_explained(kind: str, here: Path, tmp_path: Path) -> None:
    text = (CONFIGS / f"{kind}.yaml").read_text()
    n_refused = 0
    for number, (place, odd) in enumerate(itertools.product(places(yaml.safe_load(text)), ODD)):
        data = inner = yaml.safe_load(text)
        for part in place[:-1]:
            inner = inner[part]
        inner[place[-1]] = odd
        try:
            take(yaml.safe_dump(data), tmp_path / f"out{number}")
        except MergetuneError:
            n_refused += 1
    assert n_refused > 100


def test_the_command_writes_says_and_refuses(here: Path, tmp_path: Path) -> None:
    file = CONFIGS / "merges" / "mergekit_bio.yaml"
    done = mergetune("import", file, "--out", tmp_path / "out", cwd=here)
    assert done.returncode == 0, done.stderr
    assert "line 15: `parameters.int8_mask: true`: left out" in done.stdout
    assert f"Next: mergetune merge {tmp_path / 'out' / 'recipe.yaml'} OUT" in done.stdout
    again = mergetune("import", file, "--out", tmp_path / "out", cwd=here)
    assert (again.returncode, again.stdout) == (3, "")
    assert "must be a new folder, but there is one already" in again.stderr
    refused = mergetune("import", CONFIGS / "refused" / "btx_moe.yaml", "--out", tmp_path / "moe", cwd=here)
    assert refused.returncode == 3
    assert refused.stderr.startswith("error: ")
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "moe").exists()
