"""A configuration of mergekit as a recipe that gives the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from mergetune.errors import MergetuneError
from mergetune.files.yaml_io import validate
from mergetune.importing.depth import Part, Settled, count_layers_of, parts_of, settle
from mergetune.importing.merge_config import MergeConfig, read_merge_config
from mergetune.importing.methods import Resolved, Translation
from mergetune.importing.notes import Notes, Place
from mergetune.importing.parameters import Names, Scope, Value, by_names, is_graded, resolve
from mergetune.importing.references import Places, Reference, expert_names, source_paths
from mergetune.space.method_table import METHODS
from mergetune.space.recipe import MergeRecipe
from mergetune.space.stack import ModelReference, Stack

_STACK = "stack"  # the one expert of what is passed through
_LAYERS = "Say how many layers the models have: --layers N (`num_hidden_layers` in config.json)."


@dataclass(frozen=True)
class _Models:
    """Base and experts of a recipe; the experts by the configuration's references, in its order."""

    base: Reference
    base_place: Place
    names: Mapping[Reference, str]
    places: Mapping[Reference, Place]


def recipe_of(notes: Notes, places: Places, layers: int | None = None) -> MergeRecipe:
    """Return the recipe of a configuration; `notes` are told what it leaves out and why.

    Args:
        notes: of the configuration's document.
        places: of models.
        layers: the number of the models' layers, where their files are not at hand.

    Raises:
        MergetuneError: something that changes the merged weights has no counterpart in a recipe.
    """
    config = read_merge_config(notes)
    models = _models(notes, config)
    base, paths = source_paths(notes, places, models.base, models.places, models.base_place)
    notes.settle()
    depth = layers or count_layers_of(base, notes.file.parent, _needs_depth(config))
    outer: ModelReference = base
    experts: Mapping[str, ModelReference] = {models.names[expert]: path for expert, path in paths.items()}
    if _is_stack(config, models, depth):
        models, outer, experts = _stacked(notes, config, models, {**paths, models.base: base})
    lengths = _lengths(notes, config, depth)
    found = settle(parts_of(lengths), lambda part: _resolved(config, models, part))
    _check_given(notes, config, models, found)
    notes.settle()
    every = [resolved for each in found for _, resolved in each.found]
    translation = config.foreign.translate(every, lambda name, rule: notes.refuse(config.where(name), rule))
    if config.foreign.base == "optional" and config.slices[0].base is None:
        translation.options["origin"] = "zero"
    notes.settle()
    _check_coefficients(notes, config, translation)
    notes.settle()
    _remark_on_differences(notes, config, every, models)
    return _recipe(notes, translation, found, outer, experts)


def _is_stack(config: MergeConfig, models: _Models, depth: int | None) -> bool:
    """Say whether the merge is one of stacks: layers are moved, or slices of several models scaled."""
    is_scaled = config.method == "passthrough" and len(models.names) > 1 and any(config.settings)
    return config.moves_layers(depth) or is_scaled


def _stacked(
    notes: Notes, config: MergeConfig, models: _Models, paths: Mapping[Reference, str]
) -> tuple[_Models, Stack, dict[str, ModelReference]]:
    """Return models, base and experts of a merge of stacks, each with a model's layers of every slice.

    What is passed through is one stack, which is scaled; its slices have a model each.
    """
    notes.remark(("slices",), "layers are repeated, left out or moved, or scaled: the recipe is of stacks.")
    for each in (each for each in models.names if each.lora is not None):
        rule = "layers of a model with an adapter cannot be stacked. Merge it first and name the directory."
        notes.refuse(models.places[each], rule)
    by_slice = [{source.model: source.layers for source in each.inputs} for each in config.slices]
    if config.method == "passthrough":
        models = replace(models, names=dict.fromkeys(models.names, _STACK))
    elif any(expert not in found for found in by_slice for expert in models.names):
        notes.refuse(("slices",), "where layers are moved, every slice must have the same models. Add them.")
    notes.settle()

    def stack_of(expert: Reference) -> Stack:
        slots = [
            {"model": paths[model], "layers": layers}
            for found in by_slice
            for model, layers in found.items()
            if model == expert or config.method == "passthrough"
        ]
        like = {} if slots[0]["model"] == paths[models.base] else {"tokenizer": paths[models.base]}
        return validate({"stack": slots, **like}, Stack, str(notes.file))

    experts: dict[str, ModelReference] = {name: stack_of(expert) for expert, name in models.names.items()}
    has_base = all(models.base in found for found in by_slice)
    return models, stack_of(models.base if has_base else next(iter(models.names))), experts


def _models(notes: Notes, config: MergeConfig) -> _Models:
    """Return which model is the base and which are experts, as mergekit takes them."""
    base = _base(notes, config)
    inputs = [each for found in config.slices for each in found.inputs]
    takes_base = config.foreign.base == "merged"
    places = {each.model: each.place for each in reversed(inputs) if takes_base or each.model != base}
    order = [model for model in dict.fromkeys(each.model for each in inputs) if model in places]
    if config.method == "slerp" and base is not None:
        places |= {each.model: each.place for each in inputs if each.model == base}
        order = [base, *order]
    _check_slices(notes, config, order, base)
    if base is None:
        adapted = [Reference(each.model) for each in order if each.lora is not None]
        base = (adapted or order)[0]
        text = "is not given: the recipe takes config, tokenizer and dtype from `{}`."
        notes.remark(("base_model",), text.format(base))
    base_place = next((each.place for each in inputs if each.model == base), ("base_model",))
    return _Models(base, base_place, expert_names(order), {each: places[each] for each in order})


def _base(notes: Notes, config: MergeConfig) -> Reference | None:
    bases = list(dict.fromkeys(each.base for each in config.slices))
    if config.foreign.base == "required":
        for each in (each for each in config.slices if each.base is None):
            notes.refuse(each.place, f"`{config.method}` must have a `base_model`. Name one.")
    if len(bases) > 1 and config.method != "slerp":
        notes.refuse(config.slices[-1].place, "a recipe has one base. Give all slices the same `base_model`.")
    notes.settle()
    return config.base or bases[0]


def _check_slices(
    notes: Notes, config: MergeConfig, experts: Sequence[Reference], base: Reference | None
) -> None:
    """Refuse a number of models that the method does not take, and slices that lack a model it needs."""
    low, high = METHODS[config.method].min_experts, METHODS[config.method].max_experts
    wanted = str(low) if low == high else f"at least {low}" if high is None else f"{low} to {high}"
    is_beside = base is not None and config.foreign.base != "merged" and config.method != "slerp"
    for each in config.slices:
        present = [source for source in each.inputs if source.model in experts]
        n_found = len(present if config.method == "passthrough" else experts)
        if not low <= n_found <= (high or n_found):
            models = f"model{'' if wanted == '1' else 's'}{' beside the base' if is_beside else ''}"
            notes.refuse(each.place, f"`{config.method}` takes {wanted} {models}, but here are {n_found}.")
        elif len(present) < len(experts) and not config.foreign.can_lack:
            notes.refuse(
                each.place, f"`{config.method}` must have the same models in every slice. Add the others."
            )


def _graded(config: MergeConfig) -> Place | None:
    return next((place for place, setting in config.settings if is_graded(setting)), None)


def _needs_depth(config: MergeConfig) -> bool:
    return _graded(config) is not None and config.slices[0].inputs[0].layers is None


def _lengths(notes: Notes, config: MergeConfig, depth: int | None) -> list[int]:
    """Return the number of layers of each slice; where it does not matter, one."""
    ranges = [each.inputs[0].layers for each in config.slices]
    if None not in ranges:
        return [last - first for first, last in (each for each in ranges if each is not None)]
    graded = _graded(config)
    if graded is not None and depth is None:
        notes.refuse(graded, f"is a gradient over layers, but the base is not here to count them. {_LAYERS}")
        notes.settle()
    return [depth or 1] if graded is not None else [1]


def _resolved(config: MergeConfig, models: _Models, part: Part) -> list[tuple[Names, Resolved]]:
    """Return the parameters of a part of the depth, for each set of names that they differ for."""
    own, foreign = config.slices[part.slice], config.foreign
    present = {each.model for each in own.inputs}

    def values(defaults: Mapping[str, Value | None], scopes: Sequence[Scope], names: Names) -> dict[str, Any]:
        return {name: resolve(name, scopes, names, part.t, default) for name, default in defaults.items()}

    def at(names: Names) -> Resolved:
        shared = values(foreign.shared, own.parameters, names)
        each = {}
        for model, name in models.names.items():
            if model in present:
                each[name] = values(foreign.each, own.scopes(model), names)
            elif config.method != "passthrough":
                each[name] = {**foreign.each, "weight": 0.0}
        if config.method == "slerp" and own.base != next(iter(models.names)) and shared["t"] is not None:
            shared["t"] = 1 - shared["t"]  # from the other end
        return Resolved(shared, each)

    return by_names(at)


def _check_given(
    notes: Notes, config: MergeConfig, models: _Models, found: Sequence[Settled[Resolved]]
) -> None:
    """Refuse parameters that must be given and are not, for some tensors."""
    places: dict[str, Place] = {models.names[model]: place for model, place in models.places.items()}
    for settled in found:
        for names, resolved in settled.found:
            group = settled.part.selectors(names)["name"]
            where = "" if group == "all" else f" for the tensors `{group}`"
            for owner, values in {"": resolved.shared, **resolved.each}.items():
                for parameter in (name for name, value in values.items() if value is None):
                    place = places.get(owner, config.where(parameter))
                    notes.refuse(place, f"`{parameter}` must be given{where}, as mergekit demands.")


def _check_coefficients(notes: Notes, config: MergeConfig, translation: Translation) -> None:
    """Refuse coefficients outside what the recipe's method takes."""
    foreign_names = {"lambda": "weight", "t": "weight" if config.method == "nuslerp" else "t"}
    for coefficients in translation.coefficients:
        for parameter in METHODS[translation.method].parameters:
            given = coefficients[parameter.name]
            for value in given.values() if isinstance(given, dict) else [given]:
                if value not in parameter.valid:
                    place = config.where(foreign_names.get(parameter.name, parameter.name))
                    rule = f"`{parameter.name}` of a recipe must be in {parameter.valid}, but is {value:g}."
                    notes.refuse(place, rule)


def _remark_on_differences(
    notes: Notes, config: MergeConfig, every: Sequence[Resolved], models: _Models
) -> None:
    """Say where the recipe's method differs from mergekit's though all settings agree."""
    warning = config.foreign.warning
    densities = [kept for each in every for own in each.each.values() for kept in [own.get("density")]]
    if warning and ("density" not in config.foreign.each or any(kept < 1 for kept in densities if kept)):
        notes.remark(("merge_method",), warning)
    if any(each.lora is not None for each in models.names):
        notes.remark(
            next(models.places[each] for each in models.names if each.lora is not None),
            "the adapter itself is the task vector, without mergekit's rounding to a merged model.",
        )


def _recipe(
    notes: Notes,
    translation: Translation,
    found: Sequence[Settled[Resolved]],
    base: ModelReference,
    experts: Mapping[str, ModelReference],
) -> MergeRecipe:
    selectors = [each.part.selectors(names) for each in found for names, _ in each.found]
    defaults = {option.name: option.choices[0] for option in METHODS[translation.method].options}
    options = {name: choice for name, choice in translation.options.items() if choice != defaults[name]}
    groups = zip(selectors, translation.coefficients, strict=True)
    try:
        return MergeRecipe.model_validate(
            {
                "method": translation.method,
                "base": {"path": base},
                "experts": {name: {"path": path} for name, path in experts.items()},
                "groups": [{**where, **values} for where, values in groups],
                "options": options or None,
            }
        )
    except ValidationError as error:
        reasons = "; ".join(str(each["msg"]).removeprefix("Value error, ") for each in error.errors())
        raise MergetuneError(f"{notes.file}: cannot be taken over: {reasons}.") from error
