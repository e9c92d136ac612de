"""The merged model as others take it: a model directory or an adapter, its card, and mergekit's YAML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Score
from mergetune.files.library import shared_folder
from mergetune.files.yaml_io import to_yaml
from mergetune.merging.as_adapter import AdapterMerge, merge_as_adapter
from mergetune.merging.inputs import Inputs, open_inputs, open_recipe
from mergetune.merging.merger import Merger
from mergetune.space.method_table import METHODS
from mergetune.space.recipe import MergeRecipe, RecipeGroup, assign_groups
from mergetune.space.stack import Stack
from mergetune.stats.number_text import number
from mergetune.weights.adapter import is_adapter
from mergetune.weights.adapter_writer import write_adapter
from mergetune.weights.models import (
    DEMO_MODEL,
    find_model,
    is_stack,
    is_stack_file,
    model_name,
    reference_to,
    short_name,
)
from mergetune.weights.vocabulary import MatchedExpert
from mergetune.weights.writer import write_model


def write_merged(
    folder: Path,
    recipe: MergeRecipe,
    inputs: Inputs,
    scores: Mapping[str, Score] | None = None,
) -> None:
    """Write the merge of `recipe` as a model directory, whole or not at all.

    Beside the model stand `recipe.yaml`, a model card and, where mergekit can express the recipe,
    `mergekit.yaml`. They name the models that were opened, whatever the recipe's paths start from. The
    tokenizer is the base's, with the chat template that conversations were measured with.

    Raises:
        MergetuneError: the disk is full, or the recipe does not fit the models.
    """
    recipe = inputs.named_in(recipe)
    notes = {
        "README.md": model_card(folder.name, recipe, inputs, scores or {}),
        "recipe.yaml": to_yaml(recipe),
    }
    if inputs.chat is not None:
        notes |= inputs.chat.files(inputs.base.folder)
    if (foreign := mergekit_yaml(recipe, inputs)) is not None:
        notes["mergekit.yaml"] = foreign
    merger = Merger(inputs.base, inputs.experts, is_for_one=True)
    write_model(folder, merger.merge(recipe), inputs.base, notes)


def write_merged_adapter(
    folder: Path,
    recipe: MergeRecipe,
    inputs: Inputs,
    rank: int | None = None,
    at_work: Callable[[str], object] = lambda _: None,
) -> AdapterMerge:
    """Write the merge of `recipe` as an adapter of its base, whole or not at all; returns how near it comes.

    Beside the adapter stand `recipe.yaml`, a card with the error of every layer and, where conversations were
    measured with another chat template than the base's, the tokenizer's files that say so.

    Args:
        folder: where to.
        recipe: what to merge.
        inputs: its models.
        rank: the largest rank of a layer; None: whatever it takes to be exact.
        at_work: is told what is done.

    Raises:
        MergetuneError: the merge is no adapter, without a rank not exactly one, or cannot be written.
    """
    for source in (inputs.base.folder, *(expert.folder for expert in inputs.experts)):
        if source.resolve().is_relative_to(folder.resolve()):
            raise MergetuneError(f"{folder}: is a model of the merge, or holds one. Give another directory.")
    recipe = inputs.named_in(recipe)
    if isinstance(recipe.base.path, Stack) or is_stack(inputs.base.folder):
        raise MergetuneError(
            f"An adapter must have a base in a directory, but it is the stack {recipe.base.path}. Write that "
            "with `mergetune merge STACK.yaml DIR`, and name DIR as the base."
        )
    found = merge_as_adapter(inputs, recipe, rank, at_work)
    notes = {
        "README.md": model_card(folder.name, recipe, inputs, {}, found),
        "recipe.yaml": to_yaml(recipe),
    }
    if inputs.chat is not None:
        notes |= inputs.chat.files(inputs.base.folder)
    write_adapter(folder, found.updates, recipe.base.path, notes)
    return found


def model_card(
    title: str,
    recipe: MergeRecipe,
    inputs: Inputs,
    scores: Mapping[str, Score],
    adapter: AdapterMerge | None = None,
) -> str:
    """Return the card of a model or an adapter: sources, scores with their standard errors, the recipe."""
    environment = Environment(undefined=StrictUndefined)
    environment.filters |= {"line": _line, "number": number}
    text = (shared_folder("reports") / "model_card.md.j2").read_text(encoding="utf-8")
    card: str = environment.from_string(text).render(
        title=title,
        base_model=_base_model(inputs),
        sources={"base": recipe.base, **recipe.experts},
        scores=scores,
        adapter=adapter,
        recipe=recipe,
        recipe_yaml=indent(to_yaml(recipe).strip(), "    "),
    )
    return card


def _base_model(inputs: Inputs) -> str | list[str]:
    """Return what the Hub is told of the base: its name, or those of a stack's models."""
    folder = inputs.given or inputs.base.folder
    reference = reference_to(folder)
    if isinstance(reference, Stack):
        return [short_name(model) for model in reference.models]
    return model_name(folder, inputs.base.config)


def _line(text: str) -> str:
    """Write what others wrote, such as a model's name of itself, so that it ends no line, cell or code."""
    return " ".join(text.split()).replace("`", "'").replace("|", "\\|").replace("<", "&lt;")


def mergekit_yaml(recipe: MergeRecipe, inputs: Inputs) -> str | None:
    """Return mergekit's configuration of the same merge; None where mergekit cannot express it.

    It draws other random masks (DARE, DELLA) and samples thresholds (Arcee Fusion), weighs short task
    vectors alike (SCE) and gives norms of filters a floor (model stock by rows); dividing by a count
    it does only where all experts of a group share one lambda. It does not weigh what it merges by RAM. Rows
    of added tokens it treats otherwise, and it leaves nothing as it is, such as a vision tower. It merges no
    stacks.
    """
    form, shared = METHODS[recipe.method].mergekit, _shared_parameters(recipe)
    if form is None or shared is None or any(isinstance(expert, MatchedExpert) for expert in inputs.experts):
        return None
    if is_stack(inputs.base.folder):
        return None
    if not form.has_weights and any(set(g.per_expert("lambda").values()) != {1.0} for g in recipe.groups):
        return None
    groups = assign_groups(recipe.groups, inputs.base.names)
    if len(groups) < len(inputs.base.names):
        return None
    base = _mergekit_name(inputs.base.folder)
    names = [_mergekit_name(expert.folder) for expert in inputs.experts]
    models = [
        {"model": f"{base}+{name}" if is_adapter(expert.folder) else name}
        for expert, name in zip(inputs.experts, names, strict=True)
    ]
    parameters = [_expert_parameters(recipe, groups, name) for name in recipe.experts]
    pairs = zip(models, parameters, strict=True)
    config: dict[str, Any] = {"merge_method": recipe.method}
    config["models"] = [{**model, **({"parameters": own} if own else {})} for model, own in pairs]
    if form.base_model != "none" and recipe.choices.get("origin") != "zero":
        config["base_model"] = base if form.base_model == "base" else models[0]["model"]
    outer = {name: _by_tensor(groups, value) if callable(value) else value for name, value in shared.items()}
    config |= {"parameters": outer} if outer else {}
    config |= {"dtype": "float32", "out_dtype": _dtype(inputs)}
    return yaml.safe_dump(config, sort_keys=False)


def _mergekit_name(folder: Path) -> str:
    """Return what mergekit finds a model by: `owner/name@commit` or a directory."""
    reference = reference_to(folder)
    return str(folder) if reference == DEMO_MODEL else str(reference)


def _shared_parameters(recipe: MergeRecipe) -> dict[str, Any] | None:
    """Return mergekit's parameters for all models at once, functions of the layer group where they vary.

    None where mergekit cannot express these options.
    """
    options = recipe.choices
    normalize = options.get("normalize")
    if options.get("granularity") == "rows":
        return None
    if normalize == "count":
        if any(len(set(group.per_expert("lambda").values())) > 1 for group in recipe.groups):
            return None
        return {"normalize": True, "lambda": lambda group: next(iter(group.per_expert("lambda").values()))}
    if normalize is not None:
        return {"normalize": normalize == "weights"}
    return {name: lambda group, name=name: group.single(name) for name in _singles(recipe, "all models")}


def _expert_parameters(recipe: MergeRecipe, groups: Mapping[str, RecipeGroup], expert: str) -> dict[str, Any]:
    """Return mergekit's parameters of one model."""
    form = METHODS[recipe.method].mergekit
    named = {"density": "density", "gamma": "gamma"}
    if form is not None and form.has_weights:
        named["lambda"] = "weight"
    given = [name for name in named if name in recipe.groups[0].coefficients]
    found = {
        named[name]: _by_tensor(groups, lambda g, name=name: g.per_expert(name)[expert]) for name in given
    }
    for name in _singles(recipe, "model"):
        found[name] = _by_tensor(groups, lambda g, name=name: g.single(name))
    is_second = expert == list(recipe.experts)[-1]
    for name in _singles(recipe, "weights"):
        found["weight"] = _by_tensor(
            groups, lambda g, name=name: g.single(name) if is_second else 1 - g.single(name)
        )
    return found | ({"weight": 1.0} if recipe.choices.get("normalize") == "count" else {})


def _singles(recipe: MergeRecipe, place: str) -> list[str]:
    """Return the coefficients, one for all experts, that stand in this place in mergekit's configuration."""
    method = METHODS[recipe.method]
    if method.mergekit is None or method.mergekit.single != place:
        return []
    return [parameter.name for parameter in method.parameters if not parameter.is_per_expert]


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


def _dtype(inputs: Inputs) -> str:
    """Return the dtype of the base's weights, as mergekit names it."""
    dtypes = (inputs.base.dtype(name) for name in inputs.base.names)
    return str(next(dtype for dtype in dtypes if dtype.is_floating_point)).removeprefix("torch.")


def merge_recipe(file: Path, folder: Path, say: Callable[[str], object] = lambda _: None) -> None:
    """Write the model of a recipe, or of a stack's file; raises `MergetuneError` as `open_recipe` does."""
    recipe, inputs = _of_stack(file, say) if is_stack_file(str(file)) else open_recipe(file, say)
    write_merged(folder, recipe, inputs)


def _of_stack(file: Path, say: Callable[[str], object]) -> tuple[MergeRecipe, Inputs]:
    """Return the recipe that gives a stack as it is, and its models."""
    place = find_model(str(file), Path())
    inputs = open_inputs(place, {"stack": place}, say=say)
    source = inputs.base_source
    return MergeRecipe.of_one_group("passthrough", source, {"stack": source}, {"scale": 1.0}), inputs
