"""Sensitivity: how every score's loss moves with every coefficient, at the base and at merges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd

from mergetune.space.recipe import LayerGroup, MergeRecipe, Source, assign_groups

if TYPE_CHECKING:  # reports read sensitivities, and need no torch for it
    from mergetune.engines.transformers_engine import TransformersEngine
    from mergetune.merging.merger import Merger
    from mergetune.slopes.references import References

N_ITEMS = 12  # of each score
BASE, AVERAGE, RECOMMENDED = "base", "average", "recommended"  # the points' names
COLUMNS = [
    "point",
    "digest",
    "score_name",
    "fold",
    "n_items",
    "n_passes",
    "loss",
    "tensor",
    "parameter",
    "expert",
    "slope",
]
_FOLD = ["point", "score_name", "fold"]  # the columns that name one score's fold at a point
COEFFICIENT = ["group", "parameter", "expert"]  # the columns that name a coefficient of layer groups


def measure_sensitivity(
    engine: TransformersEngine,
    merger: Merger,
    points: Mapping[str, MergeRecipe],
    references: References,
    *,
    n_items: int = N_ITEMS,
    folds: int = 4,
    max_tokens: int | None = None,
) -> pd.DataFrame:
    """Return the slope of every objective's and guard's loss with respect to every tensor's coefficients.

    The items are cut into folds that have none in common, and the slopes taken in each, so that their
    standard error is known; that costs as many passes as taking them on all items at once. Points
    whose method has no slopes are left out.

    Args:
        engine: the model; its weights are replaced.
        merger: the models that are merged.
        points: recipes by name: `anchor_points`, and `RECOMMENDED`.
        references: what to say to which items.
        n_items: the items of each score.
        folds: how many folds they are cut into; a score with fewer items has a fold for each.
        max_tokens: the most tokens in one batch; by default as `slopes`.

    Returns:
        A row per point, score_name, fold, tensor, parameter and expert (empty where one coefficient is
        for all), with the slope in nats per unit of the coefficient, with n_items, n_passes (their cost in
        forward passes of one text) and loss (their mean, in nats) of the score in this fold, and with the
        digest of the point's recipe.

    Raises:
        TrialError: a weight, a loss or a slope is infinite or NaN at a point.
    """
    from mergetune.slopes.gradients import has_slopes, slopes

    limits = {} if max_tokens is None else {"max_tokens": max_tokens}
    cut = _folds(references.sample(n_items), folds)
    tables = [pd.DataFrame(columns=COLUMNS)]
    for point, recipe in points.items():
        for number, fold in enumerate(cut if has_slopes(recipe.method) else []):
            found = slopes(engine, merger, recipe, fold, **limits)
            sizes = {name: len(own) for name, own in fold.by_score.items()}
            names = found.table["score_name"]
            own = found.table.assign(
                point=point,
                digest=recipe.digest,
                fold=number,
                n_items=names.map(sizes),
                n_passes=names.map(found.n_passes),
                loss=names.map(found.losses),
            )
            tables.append(own[COLUMNS])
    return pd.concat(tables[1:] or tables, ignore_index=True)


def anchor_points(base: Source, experts: Mapping[str, Source]) -> dict[str, MergeRecipe]:
    """Return the recipes of the base and of the experts' uniform average, as sums of task vectors."""
    return {
        point: MergeRecipe.of_one_group(
            "task_arithmetic", base, experts, {"lambda": dict.fromkeys(experts, value)}
        )
        for point, value in ((BASE, 0.0), (AVERAGE, 1 / len(experts)))
    }


def fold_facts(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a row per point, score_name and fold, with n_items and loss."""
    return frame.drop_duplicates(_FOLD)[[*_FOLD, "n_items", "loss"]].reset_index(drop=True)


def n_passes(frame: pd.DataFrame) -> int:
    """Return what a measurement cost, in forward passes of one text."""
    return int(frame.drop_duplicates(_FOLD)["n_passes"].sum())


def slopes_by_group(frame: pd.DataFrame, groups: Iterable[LayerGroup]) -> pd.DataFrame:
    """Return the slopes of coefficients that a layer group's tensors share, with their standard errors.

    The groups may be any that take each tensor once: a recipe's, single layers, attention and MLP.
    A row per point, score_name, group, parameter and expert, the groups in their own order, with
    slope, the mean over the folds, and stderr, its standard error (NaN where there is one fold).
    """
    by_coefficient = fold_slopes(frame, groups).groupby(["point", "score_name", *COEFFICIENT], sort=False)
    return by_coefficient["slope"].agg(slope="mean", stderr="sem").reset_index()


def fold_slopes(frame: pd.DataFrame, groups: Iterable[LayerGroup]) -> pd.DataFrame:
    """Return the same in each fold: a row more per fold, and no standard error."""
    groups = list(groups)
    order = {group.name: number for number, group in enumerate(groups)}
    group_of = {name: group.name for name, group in assign_groups(groups, frame["tensor"].unique()).items()}
    rows = frame.assign(group=frame["tensor"].map(group_of))
    rows = rows.sort_values("group", key=lambda names: names.map(order), kind="stable")
    keys = ["point", "score_name", "fold", *COEFFICIENT]
    return rows.groupby(keys, sort=False)["slope"].sum().reset_index()


def _folds(references: References, count: int) -> list[References]:
    """Cut references into folds with about as many of each score; what stands together stays together.

    A sample has one item of each task after the other, so that each fold spreads over a score's tasks.
    """
    own = references.by_score.values()
    cut = [
        [each for some in own for each in some[len(some) * i // count : len(some) * (i + 1) // count]]
        for i in range(count)
    ]
    return [replace(references, items=tuple(items)) for items in cut if items]
