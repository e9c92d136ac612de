"""What a study taught: which coefficients mattered, and what is taken where."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from mergetune.evaluation.evaluate import Score
from mergetune.report.metric import Metric
from mergetune.results.run_dir import Candidate, searched
from mergetune.space.coordinates import Coordinate
from mergetune.space.method_table import METHODS
from mergetune.space.recipe import MergeRecipe, RecipeGroup, assign_groups, tensor_place

MIN_TRIALS = 20
_N_TOP = 5  # PED-ANOVA wants at least so many trials in the best part (optuna's documentation)
_MANY_GROUPS = 8

Changed = Mapping[str, frozenset[str]]  # by expert, the tensors that it changes
Coefficients = dict[str, dict[str, float]]  # by parameter and expert


@dataclass(frozen=True)
class Influence:
    """How much of reaching the best scores one parameter explains, and which way it works."""

    parameter: str
    share: float
    correlation: float  # Spearman's, with the score signed so that greater is better


@dataclass(frozen=True)
class DepthValue:
    """One coefficient of the recommended merge; `layer` is None outside the layers."""

    parameter: str
    expert: str
    part: str
    layer: int | None
    value: float


def influences(
    candidates: Sequence[Candidate], scores: Mapping[str, Mapping[str, Score]], metric: Metric
) -> tuple[Influence, ...]:
    """Rank the parameters by PED-ANOVA (Watanabe et al. 2023); empty below `MIN_TRIALS` candidates.

    PED-ANOVA asks how the best part differs from the rest, and takes low for good: it is given the
    score with its sign turned.
    """
    inside = [c for c in searched(candidates) if c.name in scores]
    points = pd.DataFrame([c.params for c in inside]).dropna(axis="columns")
    points = points.loc[:, points.nunique() > 1]
    if len(points) < MIN_TRIALS or points.empty:
        return ()
    values = pd.Series([metric.sign * scores[c.name][metric.name].value for c in inside])
    if values.nunique() < 2:
        return ()
    shares = _ped_anova(points, -values)
    ranks = points.corrwith(values, method="spearman")
    return tuple(Influence(name, share, float(ranks[name])) for name, share in shares.items())


def coefficients_over_depth(
    recipe: MergeRecipe, tensors: Sequence[str], changed: Changed | None
) -> list[DepthValue]:
    """Return each coefficient of a recipe in every layer, for every part of a layer that differs.

    Parts with the same coefficients in all layers are put together; tensors outside the layers come
    with their own names. Coefficients without effect are left out; see `coefficients`.
    """
    inside: dict[str, dict[int, Coefficients]] = {}
    values = []
    for name, group in assign_groups(recipe.groups, tensors).items():
        layer, own = tensor_place(name).layer, coefficients(recipe, group, [name], changed)
        if layer is None:
            values += _depth_values(own, name.removesuffix(".weight"), None)
        else:
            suffix = re.split(rf"(?:^|\.){layer}\.", name, maxsplit=1)[1]
            if tensor_place(name).role == "vision":
                suffix = f"vision.{suffix}"  # a tower's layers are its own
            inside.setdefault(suffix, {})[layer] = own
    for part, layers in _merge_parts(inside).items():
        for layer, own in sorted(layers.items()):
            values += _depth_values(own, part, layer)
    return values


def recipe_lines(
    candidates: Sequence[Candidate],
    tensors: Sequence[str],
    changed: Changed | None,
    coordinates: Mapping[str, Coordinate],
) -> dict[str, tuple[str, ...]]:
    """Write each recipe's coefficients, a line per layer group: `early: tools 0.70, persona 0.30`.

    Where the groups are many (a group for each layer or tensor) the point of the search space says the same
    in fewer words, or else the range of each coefficient. Coefficients without effect are left out; see
    `coefficients`.
    """
    found: dict[str, tuple[str, ...]] = {}
    layouts: dict[tuple[str, ...], list[list[str]]] = {}  # the tensors of each group, by the selectors
    for candidate in candidates:
        recipe = candidate.recipe
        if len(recipe.groups) > _MANY_GROUPS and candidate.params:
            found[candidate.name] = tuple(
                f"{coordinate_name(key, coordinates)} {value:.2f}" for key, value in candidate.params.items()
            )
            continue
        selectors = tuple(repr((g.layers, g.roles, g.match)) for g in recipe.groups)
        if selectors not in layouts:
            layouts[selectors] = _group_tensors(recipe.groups, tensors)
        write = _range_lines if len(recipe.groups) > _MANY_GROUPS else _group_lines
        found[candidate.name] = write(recipe, layouts[selectors], changed)
    return found


def _group_tensors(groups: Sequence[RecipeGroup], tensors: Sequence[str]) -> list[list[str]]:
    """Return the tensors of each layer group."""
    group_of = assign_groups(groups, tensors)
    return [[name for name, taker in group_of.items() if taker is group] for group in groups]


def _range_lines(
    recipe: MergeRecipe, own_tensors: Sequence[Sequence[str]], changed: Changed | None
) -> tuple[str, ...]:
    """Write `tools 0.31 to 2.00, mean 1.42, in 210 groups`."""
    every: dict[str, list[float]] = {}
    for group, own in zip(recipe.groups, own_tensors, strict=True):
        for parameter, values in coefficients(recipe, group, own, changed).items():
            for expert, value in values.items():
                every.setdefault(_coefficient_name(parameter, expert), []).append(value)
    return tuple(
        f"{name} {min(values):.2f} to {max(values):.2f}, mean {fmean(values):.2f}, in {len(values)} groups"
        for name, values in every.items()
    )


def _group_lines(
    recipe: MergeRecipe, own_tensors: Sequence[Sequence[str]], changed: Changed | None
) -> tuple[str, ...]:
    lines: dict[str, list[str]] = {}
    for group, own in zip(recipe.groups, own_tensors, strict=True):
        named = [
            f"{_coefficient_name(parameter, expert)} {value:.2f}"
            for parameter, values in coefficients(recipe, group, own, changed).items()
            for expert, value in values.items()
        ]
        if named:
            lines.setdefault(", ".join(named), []).append(group.name)
    if len(lines) == 1:
        return tuple(lines)
    return tuple(f"{', '.join(names)}: {line}" for line, names in lines.items())


def _coefficient_name(parameter: str, expert: str) -> str:
    """Write `tools` for an expert's lambda, and `density tools` for another coefficient."""
    return expert if parameter == "lambda" else f"{parameter} {expert}"


def unchanged_roles(tensors: Sequence[str], changed: Changed | None) -> tuple[str, ...]:
    """Return the roles none of whose tensors is changed by an expert, as far as that is known."""
    if changed is None:
        return ()
    touched = {tensor_place(name).role for names in changed.values() for name in names}
    roles = dict.fromkeys(tensor_place(name).role for name in tensors)
    return tuple(role for role in roles if role not in touched)


def coordinate_name(key: str, coordinates: Mapping[str, Coordinate]) -> str:
    """Write a number of a point in words, such as `persona in mlp1`; its key where it is unknown."""
    found = coordinates.get(key)
    if found is None:
        return key
    if found.point is not None:
        return f"toward {found.point}"
    what = "factor" if found.parameter == "times" else found.parameter
    if found.expert:
        what = found.expert if found.parameter == "lambda" else f"{what} of {found.expert}"
    return f"{what} in {found.group}"


def _ped_anova(points: pd.DataFrame, losses: pd.Series[float]) -> dict[str, float]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    distributions: dict[str, BaseDistribution] = {
        str(name): FloatDistribution(float(column.min()), float(column.max()))
        for name, column in points.items()
    }
    for (_, row), loss in zip(points.iterrows(), losses, strict=True):
        params = {str(name): float(value) for name, value in row.items()}
        study.add_trial(optuna.trial.create_trial(value=loss, params=params, distributions=distributions))
    quantile = max(0.1, _N_TOP / len(points))
    evaluator = PedAnovaImportanceEvaluator(target_quantile=quantile)
    return dict(get_param_importances(study, evaluator=evaluator))


def _depth_values(own: Coefficients, part: str, layer: int | None) -> list[DepthValue]:
    return [
        DepthValue(parameter, expert, part, layer, value)
        for parameter, values in own.items()
        for expert, value in values.items()
    ]


def coefficients(
    recipe: MergeRecipe, group: RecipeGroup, tensors: Sequence[str], changed: Changed | None
) -> Coefficients:
    """Return a group's coefficients by parameter and expert, those that have an effect on its tensors.

    A coefficient is without effect where no expert that it concerns changes any of them; all have one
    where it is not known what is changed (None). A position `t` counts as the last expert's; what else
    is one for all goes under `all`.
    """
    last = list(recipe.experts)[-1]
    found = {
        name: given if isinstance(given, dict) else {last if name == "t" else "all": given}
        for name, given in group.coefficients.items()
    }
    if changed is None:
        return found
    touching = {expert for expert, names in changed.items() if not names.isdisjoint(tensors)}
    if touching and METHODS[recipe.method].is_joint:
        return found
    counted = {*touching, "all"} if touching else set()
    left = {name: {e: own[e] for e in own if e in counted} for name, own in found.items()}
    return {name: own for name, own in left.items() if own}


def _merge_parts(
    inside: Mapping[str, dict[int, Coefficients]],
) -> dict[str, dict[int, Coefficients]]:
    """Put together the parts of a layer that have the same coefficients everywhere; norms come last."""
    alike: dict[str, list[str]] = {}
    for suffix, layers in sorted(inside.items(), key=lambda i: tensor_place(i[0]).role == "norms"):
        alike.setdefault(repr(sorted(layers.items())), []).append(suffix)
    return {_part_name(suffixes, inside): inside[suffixes[0]] for suffixes in alike.values()}


def _part_name(suffixes: Sequence[str], every: Mapping[str, object]) -> str:
    """Name a set of tensors by their roles, or one by one where a role is split."""
    if len(suffixes) == len(every):
        return "whole layer"
    roles = dict.fromkeys(tensor_place(suffix).role for suffix in suffixes)
    covered = [suffix for suffix in every if tensor_place(suffix).role in roles]
    if "other" in roles or len(covered) > len(suffixes):
        return ", ".join(suffix.removesuffix(".weight") for suffix in suffixes)
    return " + ".join(roles)
