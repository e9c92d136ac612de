"""What a study taught: which coefficients mattered, what is taken where, which items changed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from optimizer.evaluate import Score
from optimizer.recipe import MergeRecipe, RecipeGroup, assign_groups, tensor_place
from optimizer.report.metric import Metric
from optimizer.report.verdict import paired
from optimizer.run_dir import Candidate

MIN_TRIALS = 20
_N_TOP = 5  # PED-ANOVA wants at least so many trials in the best part (optuna's documentation)
N_EXAMPLES = 8


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


@dataclass(frozen=True)
class Example:
    """One item on which the recommended merge and an expert score differently."""

    prompt: str
    target: str
    own_response: str
    own_score: float
    expert_response: str
    expert_score: float


@dataclass(frozen=True)
class Changes:
    """The items of one score that the recommended merge gains and loses against an expert."""

    expert: str
    metric: Metric
    n_items: int
    n_gained: int
    n_lost: int
    gained: tuple[Example, ...]
    lost: tuple[Example, ...]


def influences(
    candidates: Sequence[Candidate], scores: Mapping[str, Mapping[str, Score]], metric: Metric
) -> tuple[Influence, ...]:
    """Rank the parameters by PED-ANOVA (Watanabe et al. 2023); empty below `MIN_TRIALS` candidates.

    PED-ANOVA asks how the best part differs from the rest, and takes low for good: it is given the
    score with its sign turned.
    """
    inside = [c for c in candidates if c.params is not None and c.name in scores]
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


def coefficients_over_depth(recipe: MergeRecipe, tensors: Sequence[str]) -> list[DepthValue]:
    """Return each coefficient of a recipe in every layer, for every part of a layer that differs.

    Parts with the same coefficients in all layers are put together; tensors outside the layers come
    with their own names.
    """
    inside: dict[str, dict[int, RecipeGroup]] = {}
    values = []
    for name, group in assign_groups(recipe.groups, tensors).items():
        layer = tensor_place(name).layer
        if layer is None:
            values += _depth_values(recipe, group, name.removesuffix(".weight"), None)
        else:
            suffix = re.split(rf"(?:^|\.){layer}\.", name, maxsplit=1)[1]
            inside.setdefault(suffix, {})[layer] = group
    for part, groups in _merge_parts(inside).items():
        for layer, group in sorted(groups.items()):
            values += _depth_values(recipe, group, part, layer)
    return values


def changes(
    own: pd.DataFrame,
    experts: Mapping[str, pd.DataFrame],
    metrics: Sequence[Metric],
    items: pd.DataFrame,
) -> list[Changes]:
    """Compare the recommended merge to every expert, item by item."""
    texts = items.set_index(["task", "item"])[["prompt", "target"]]
    found = []
    for expert, frame in experts.items():
        both = paired(own, frame).join(texts, on=["task", "item"])
        for metric in metrics:
            rows = both[both["score_name"] == metric.name]
            rows = rows.assign(gain=metric.sign * rows["score"]).sort_values("gain", kind="stable")
            gained, lost = rows[rows["gain"] > 0].iloc[::-1], rows[rows["gain"] < 0]
            sizes = len(rows), len(gained), len(lost)
            found.append(Changes(expert, metric, *sizes, _examples(gained), _examples(lost)))
    return found


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


def _depth_values(recipe: MergeRecipe, group: RecipeGroup, part: str, layer: int | None) -> list[DepthValue]:
    return [
        DepthValue(parameter, expert, part, layer, value)
        for parameter, values in coefficients(recipe, group).items()
        for expert, value in values.items()
    ]


def coefficients(recipe: MergeRecipe, group: RecipeGroup) -> dict[str, dict[str, float]]:
    """Return a group's coefficients by parameter and expert.

    A position `t` counts as the last expert's; what else is one for all goes under `all`.
    """
    last = list(recipe.experts)[-1]
    return {
        name: given if isinstance(given, dict) else {last if name == "t" else "all": given}
        for name, given in group.coefficients.items()
    }


def _merge_parts(
    inside: Mapping[str, dict[int, RecipeGroup]],
) -> dict[str, dict[int, RecipeGroup]]:
    """Put together the parts of a layer that have the same coefficients everywhere; norms come last."""
    alike: dict[str, list[str]] = {}
    for suffix, groups in sorted(inside.items(), key=lambda i: tensor_place(i[0]).role == "norms"):
        values = {layer: g.coefficients for layer, g in sorted(groups.items())}
        alike.setdefault(repr(values), []).append(suffix)
    return {_part_name(suffixes, inside): inside[suffixes[0]] for suffixes in alike.values()}


def _part_name(suffixes: Sequence[str], every: Mapping[str, object]) -> str:
    """Name a set of tensors by their roles, or one by one where a role is split."""
    if len(suffixes) == len(every):
        return "whole layer"
    roles = dict.fromkeys(tensor_place(suffix).role for suffix in suffixes)
    covered = [suffix for suffix in every if tensor_place(suffix).role in roles]
    if None in roles or len(covered) > len(suffixes):
        return ", ".join(suffix.removesuffix(".weight") for suffix in suffixes)
    return " + ".join(str(role) for role in roles)


def _examples(rows: pd.DataFrame) -> tuple[Example, ...]:
    fields = ["prompt", "target", "response", "own", "response_other", "score_other"]
    return tuple(Example(*row) for row in rows[fields].head(N_EXAMPLES).itertuples(index=False, name=None))
