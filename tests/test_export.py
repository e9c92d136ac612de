"""mergekit's YAML, run by mergekit, gives the weights that we merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from optimizer.export import mergekit_yaml, write_merged
from optimizer.merging.checkpoint import Checkpoint
from optimizer.merging.inputs import Inputs, open_inputs
from optimizer.merging.merger import Merger
from optimizer.recipe import MergeRecipe


def recipe(
    inputs: Inputs,
    method: str,
    inner: dict[str, Any],
    outer: dict[str, Any],
    options: dict[str, str] | None = None,
) -> MergeRecipe:
    groups = [
        {"name": "first", "layers": [0, 0], **inner},
        {"name": "rest", "match": r"^(?!model\.layers\.0\.)", **outer},
    ]
    sources = {"base": inputs.base_source, "experts": inputs.expert_sources}
    return MergeRecipe.model_validate({"method": method, **sources, "groups": groups, "options": options})


def both(a: float, b: float) -> dict[str, float]:
    return {"a": a, "b": b}


LAMBDAS = ({"lambda": both(1.3, -0.4)}, {"lambda": both(0.6, 0.7)})
TRIMMED = (
    {"lambda": both(1.3, -0.4), "density": both(0.2, 0.7)},
    {"lambda": both(0.6, 0.7), "density": both(0.5, 0.5)},
)
CRUMBS = tuple({**group, "gamma": both(0.05, 0.0)} for group in TRIMMED)


@pytest.mark.parametrize(
    ("method", "inner", "outer", "options"),
    [
        ("linear", *LAMBDAS, None),
        ("task_arithmetic", *LAMBDAS, None),
        ("slerp", {"t": 0.25}, {"t": 0.75}, None),
        ("nuslerp", {"t": 0.25}, {"t": 0.75}, None),
        ("nuslerp", {"t": 0.25}, {"t": 0.75}, {"origin": "zero"}),
        ("multislerp", *LAMBDAS, None),
        ("multislerp", *LAMBDAS, {"origin": "zero"}),
        ("karcher", {}, {}, None),
        ("model_stock", {}, {}, None),
        (
            "ties",
            {"lambda": both(1.5, 1.5), "density": both(0.2, 0.7)},
            {"lambda": both(0.5, 0.5), "density": both(0.5, 0.5)},
            None,
        ),
        ("ties", *TRIMMED, {"normalize": "weights"}),
        ("ties", *TRIMMED, {"normalize": "none"}),
        ("breadcrumbs", *CRUMBS, None),
        ("breadcrumbs_ties", *CRUMBS, {"normalize": "none"}),
    ],
)
def test_mergekit_makes_the_same_model(
    inputs: Inputs,
    tmp_path: Path,
    method: str,
    inner: dict[str, Any],
    outer: dict[str, Any],
    options: dict[str, str] | None,
) -> None:
    check_against_mergekit(inputs, recipe(inputs, method, inner, outer, options), tmp_path)


@pytest.mark.parametrize(
    ("method", "inner", "outer"),
    [
        ("nearswap", {"t": 0.001}, {"t": 0.0005}),
        ("passthrough", {"scale": 0.5}, {"scale": 1.5}),
    ],
)
def test_mergekit_makes_the_same_model_of_one_expert(
    tiny_base: Path,
    tiny_experts: dict[str, Path],
    tmp_path: Path,
    method: str,
    inner: dict[str, Any],
    outer: dict[str, Any],
) -> None:
    inputs = open_inputs(tiny_base, {"a": tiny_experts["a"]})
    check_against_mergekit(inputs, recipe(inputs, method, inner, outer), tmp_path)


def check_against_mergekit(inputs: Inputs, wanted: MergeRecipe, folder: Path) -> None:
    text = mergekit_yaml(wanted, inputs)
    assert text is not None
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    run_merge(config, str(folder / "theirs"), MergeOptions(quiet=True))
    theirs = Checkpoint(folder / "theirs")
    for name, tensor in Merger(inputs.base, inputs.experts).merge(wanted):
        torch.testing.assert_close(tensor, theirs.tensor(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "coefficients", "options"),
    [
        ("dare_ties", TRIMMED[0], None),
        ("della", {**TRIMMED[0], "epsilon": both(0.1, 0.1)}, {"normalize": "weights"}),
        ("ties", TRIMMED[0], None),
        ("sce", {"select_topk": 0.5}, None),
        ("model_stock", {}, {"granularity": "rows"}),
    ],
)
def test_what_mergekit_cannot_express_is_not_exported(
    inputs: Inputs, method: str, coefficients: dict[str, Any], options: dict[str, str] | None
) -> None:
    assert mergekit_yaml(recipe(inputs, method, coefficients, coefficients, options), inputs) is None


def test_the_card_names_recipe_and_sources(inputs: Inputs, tmp_path: Path) -> None:
    wanted = recipe(inputs, "task_arithmetic", {"lambda": both(0.1, 0.2)}, {"lambda": both(0.3, 0.4)})
    write_merged(tmp_path / "out", wanted, inputs)
    card = (tmp_path / "out" / "README.md").read_text()
    assert wanted.digest in card
    assert str(inputs.experts[1].digest) in card
    header = yaml.safe_load(card.split("---")[1])
    assert header["tags"] == ["merge", "mergetune"]
    assert MergeRecipe.read(tmp_path / "out" / "recipe.yaml") == wanted
    assert (tmp_path / "out" / "mergekit.yaml").exists()
