"""The merged model as others take it: a Hugging Face directory, its card, and mergekit's YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Template

from optimizer.errors import MergetuneError
from optimizer.evaluate import Score
from optimizer.library import shared_folder
from optimizer.merging.inputs import Inputs, open_inputs
from optimizer.merging.merger import Merger
from optimizer.merging.writer import write_model
from optimizer.models import find_model
from optimizer.recipe import MergeRecipe, RecipeGroup, assign_groups
from optimizer.yaml_io import to_yaml


def write_merged(
    folder: Path,
    merger: Merger,
    recipe: MergeRecipe,
    inputs: Inputs,
    scores: Mapping[str, Score] | None = None,
) -> None:
    """Write the merge of `recipe` as a model directory, whole or not at all.

    Beside the model stand `recipe.yaml`, a model card and, where mergekit can express the recipe,
    `mergekit.yaml`.

    Raises:
        MergetuneError: the disk is full, or the recipe does not fit the models.
    """
    notes = {
        "README.md": model_card(folder.name, recipe, inputs, scores or {}),
        "recipe.yaml": to_yaml(recipe),
    }
    if (foreign := mergekit_yaml(recipe, inputs)) is not None:
        notes["mergekit.yaml"] = foreign
    write_model(folder, merger.merge(recipe), inputs.base, notes)


def model_card(title: str, recipe: MergeRecipe, inputs: Inputs, scores: Mapping[str, Score]) -> str:
    """Return the model card: sources, scores with their standard errors, and the recipe."""
    template = Template((shared_folder("reports") / "model_card.md.j2").read_text(encoding="utf-8"))
    card: str = template.render(
        title=title,
        base_model=inputs.base.config.get("_name_or_path") or inputs.base.folder.name,
        sources={"base": recipe.base, **recipe.experts},
        scores=scores,
        recipe=recipe,
        recipe_yaml=to_yaml(recipe).strip(),
    )
    return card


def mergekit_yaml(recipe: MergeRecipe, inputs: Inputs) -> str | None:
    """Return mergekit's configuration of the same merge; None where mergekit cannot express it.

    mergekit scales DARE otherwise and draws other masks; its TIES divides by the sum of the weights,
    which is the paper's mean only where all experts of a group share one lambda.
    """
    groups = assign_groups(recipe.groups, inputs.base.names)
    if recipe.method.startswith("dare") or (
        recipe.method == "ties" and any(len(set(g.per_expert("lambda").values())) > 1 for g in recipe.groups)
    ):
        return None
    base = recipe.base.path
    experts = {
        expert.name: f"{base}+{expert.folder}" if _is_adapter(expert.folder) else str(expert.folder)
        for expert in inputs.experts
    }
    config: dict[str, Any] = {"merge_method": recipe.method}
    if recipe.method == "slerp":
        first, second = experts.values()
        config |= {
            "base_model": first,
            "models": [{"model": first}, {"model": second}],
            "parameters": {"t": _by_tensor(groups, lambda group: group.single("t"))},
        }
    else:
        config["models"] = [
            {"model": path, "parameters": _parameters(recipe, groups, name)} for name, path in experts.items()
        ]
        if recipe.method != "linear":
            config["base_model"] = base
        if recipe.method == "ties":
            scale = _by_tensor(groups, lambda group: next(iter(group.per_expert("lambda").values())))
            config["parameters"] = {"normalize": True, "lambda": scale}
    config |= {"dtype": "float32", "out_dtype": inputs.base.config.get("dtype", "float32")}
    return yaml.safe_dump(config, sort_keys=False)


def _parameters(recipe: MergeRecipe, groups: Mapping[str, RecipeGroup], expert: str) -> dict[str, Any]:
    if recipe.method == "ties":
        return {
            "weight": 1.0,
            "density": _by_tensor(groups, lambda group: group.per_expert("density")[expert]),
        }
    return {"weight": _by_tensor(groups, lambda group: group.per_expert("lambda")[expert])}


def _by_tensor(groups: Mapping[str, RecipeGroup], value: Any) -> Any:
    """Return one number where all tensors share it, else mergekit's list of name filters.

    mergekit takes the first filter that is a substring of the tensor's name; longer names go first,
    so that none is caught by a shorter one.
    """
    values = {name: value(group) for name, group in groups.items()}
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    ordered = sorted(values, key=len, reverse=True)
    return [{"filter": name, "value": values[name]} for name in ordered]


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def merge_recipe(recipe_file: Path, folder: Path) -> None:
    """Write the model of a recipe file, whose relative paths are taken from the file's folder.

    Raises:
        MergetuneError: an input is missing, or its weights are not those that the recipe names.
    """
    recipe = MergeRecipe.read(recipe_file)
    origin = recipe_file.resolve().parent
    experts = {name: find_model(source.path, origin) for name, source in recipe.experts.items()}
    inputs = open_inputs(find_model(recipe.base.path, origin), experts)
    found = {"base": inputs.base_source, **inputs.expert_sources}
    for name, source in {"base": recipe.base, **recipe.experts}.items():
        if source.digest is not None and source.digest != found[name].digest:
            raise MergetuneError(
                f"{recipe_file}: the weights of `{name}` in {found[name].path} are not those that the "
                f"recipe was made with (SHA-256 {found[name].digest}, not {source.digest}). Give the "
                "same weights, or take the digest out of the recipe to merge these."
            )
    write_merged(folder, Merger(inputs.base, inputs.experts), recipe, inputs)
