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


@pytest.fixture(scope="module")
def inputs(tiny_base: Path, tiny_experts: dict[str, Path]) -> Inputs:
    return open_inputs(tiny_base, tiny_experts)


def recipe(inputs: Inputs, method: str, inner: dict[str, Any], outer: dict[str, Any]) -> MergeRecipe:
    groups = [
        {"name": "first", "layers": [0, 0], **inner},
        {"name": "rest", "match": r"^(?!model\.layers\.0\.)", **outer},
    ]
    sources = {"base": inputs.base_source, "experts": inputs.expert_sources}
    return MergeRecipe.model_validate({"method": method, **sources, "groups": groups})


def both(a: float, b: float) -> dict[str, float]:
    return {"a": a, "b": b}


@pytest.mark.parametrize(
    ("method", "inner", "outer"),
    [
        ("linear", {"lambda": both(0.2, 0.8)}, {"lambda": both(0.6, 0.7)}),
        ("task_arithmetic", {"lambda": both(1.3, -0.4)}, {"lambda": both(0.6, 0.7)}),
        ("slerp", {"t": 0.25}, {"t": 0.75}),
        (
            "ties",
            {"lambda": both(1.5, 1.5), "density": both(0.2, 0.7)},
            {"lambda": both(0.5, 0.5), "density": both(0.5, 0.5)},
        ),
    ],
)
def test_mergekit_makes_the_same_model(
    inputs: Inputs, tmp_path: Path, method: str, inner: dict[str, Any], outer: dict[str, Any]
) -> None:
    wanted = recipe(inputs, method, inner, outer)
    text = mergekit_yaml(wanted, inputs)
    assert text is not None
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    run_merge(config, str(tmp_path / "theirs"), MergeOptions(quiet=True))
    theirs = Checkpoint(tmp_path / "theirs")
    for name, tensor in Merger(inputs.base, inputs.experts).merge(wanted):
        torch.testing.assert_close(tensor, theirs.tensor(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "coefficients"),
    [
        ("dare_ties", {"lambda": both(1, 1), "density": both(0.5, 0.5)}),
        ("ties", {"lambda": both(1, 0.5), "density": both(0.5, 0.5)}),
    ],
)
def test_what_mergekit_cannot_express_is_not_exported(
    inputs: Inputs, method: str, coefficients: dict[str, Any]
) -> None:
    assert mergekit_yaml(recipe(inputs, method, coefficients, coefficients), inputs) is None


def test_the_card_names_recipe_and_sources(inputs: Inputs, tmp_path: Path) -> None:
    wanted = recipe(inputs, "task_arithmetic", {"lambda": both(0.1, 0.2)}, {"lambda": both(0.3, 0.4)})
    write_merged(tmp_path / "out", Merger(inputs.base, inputs.experts), wanted, inputs)
    card = (tmp_path / "out" / "README.md").read_text()
    assert wanted.digest in card
    assert str(inputs.experts[1].digest) in card
    header = yaml.safe_load(card.split("---")[1])
    assert header["tags"] == ["merge", "mergetune"]
    assert MergeRecipe.read(tmp_path / "out" / "recipe.yaml") == wanted
    assert (tmp_path / "out" / "mergekit.yaml").exists()
