"""Slopes: the derivative of every score's loss with respect to every coefficient of a merge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.engines.weight_gradients import each_gradient, recomputed_activations
from mergetune.errors import MergetuneError
from mergetune.merging.derivative import coefficient_slopes
from mergetune.merging.merger import Merger
from mergetune.slopes.losses import MAX_TOKENS, batches, check_finite, item_losses
from mergetune.slopes.references import Reference, References
from mergetune.space.method_table import METHODS, SMOOTH, MethodName
from mergetune.space.recipe import LayerGroup, MergeRecipe, assign_groups


@dataclass(frozen=True)
class Slopes:
    """How the losses of a merge move with its coefficients, tensor by tensor.

    Attributes:
        losses: the mean loss of each objective and guard, in nats; see `losses.item_losses`.
        table: a row per score_name, tensor, parameter and expert (empty where one coefficient is for
            all experts) with the slope: the derivative of the loss with respect to this coefficient of
            this tensor alone.
        n_passes: what each objective and guard cost, in forward passes of one text.
    """

    losses: dict[str, float]
    table: pd.DataFrame
    n_passes: dict[str, int]

    def by_group(self, groups: Iterable[LayerGroup]) -> pd.DataFrame:
        """Return the derivatives with respect to coefficients that a layer group's tensors share.

        The groups may be any that take each tensor once: the recipe's, single layers, attention and MLP.
        A row per score_name, group, parameter and expert, with the slope.
        """
        group_of = {name: group.name for name, group in assign_groups(groups, self.table["tensor"]).items()}
        keys = ["score_name", "group", "parameter", "expert"]
        rows = self.table.assign(group=self.table["tensor"].map(group_of))
        return rows.groupby(keys, sort=False)[["slope"]].sum().reset_index()


def has_slopes(method: MethodName) -> bool:
    """Say whether a method has coefficients that its weights are smooth in."""
    return any(parameter.name in SMOOTH for parameter in METHODS[method].parameters)


def count_passes(references: Sequence[Reference], max_tokens: int = MAX_TOKENS) -> int:
    """Return what the slopes of one score on these items cost, in forward passes of one text.

    A backward pass is two, and an item with choices has a text for each.
    """
    n_texts = sum(len(each.texts) for each in references)
    return n_texts * (3 + _takes_twice(references, max_tokens))


def slopes(
    engine: TransformersEngine,
    merger: Merger,
    recipe: MergeRecipe,
    references: References,
    *,
    max_tokens: int = MAX_TOKENS,
) -> Slopes:
    """Return the slopes of every objective's and guard's loss at a recipe.

    Each weight's gradient is multiplied with what the merge's derivative is there, and freed, as soon
    as it is complete: beside model and activations one gradient is alive at a time. Masks, thresholds
    and elected signs are held as they are at the recipe. Where an item alone exceeds a batch, the score's
    activations are computed a second time in the backward pass instead of kept.

    Args:
        engine: the model; the recipe's weights are loaded into it.
        merger: the models that are merged.
        recipe: where.
        references: what to say to which items.
        max_tokens: the most tokens in one batch; each batch is one backward pass.

    Raises:
        MergetuneError: the method has no coefficient that a slope could be taken of, or no expert changes
            any tensor.
        TrialError: a weight, a loss or a slope is infinite or NaN at this recipe.
    """
    if not has_slopes(recipe.method):
        raise MergetuneError(
            f"`{recipe.method}` has no slopes: they need a coefficient out of {', '.join(SMOOTH)}. "
            "Take another method, or search without gradients."
        )
    engine.load(recipe)
    losses: dict[str, float] = {}
    n_passes: dict[str, int] = {}
    rows: list[tuple[str, str, str, str, float]] = []
    for score_name, own in references.by_score.items():
        losses[score_name] = 0.0
        totals = _Totals(merger, recipe)
        if not totals.names:
            raise MergetuneError("No expert changes any tensor, so that there are no slopes. Give others.")
        n_passes[score_name] = count_passes(own, max_tokens)
        twice = _takes_twice(own, max_tokens)
        recomputed = recomputed_activations(engine.model) if twice else nullcontext()
        with each_gradient(engine.model, totals.names, totals.add), recomputed, torch.enable_grad():
            for batch, weights in batches(own, max_tokens):
                each = item_losses(engine.model, batch)
                loss = each @ each.new_tensor(weights)
                loss.backward()  # type: ignore[no-untyped-call]  # torch
                losses[score_name] += float(loss.detach())
        check_finite(f"the loss of `{score_name}`", [losses[score_name]])
        check_finite(f"the slopes of `{score_name}`", totals.values.values())
        rows += [(score_name, *key, slope) for key, slope in totals.values.items()]
    table = pd.DataFrame(rows, columns=["score_name", "tensor", "parameter", "expert", "slope"])
    return Slopes(losses, table, n_passes)


def _takes_twice(references: Sequence[Reference], max_tokens: int) -> bool:
    return any(each.n_tokens * len(each.texts) > max_tokens for each in references)


class _Totals:
    """⟨∂L/∂W, ∂W/∂c⟩ by tensor, parameter and expert, added up over backward passes."""

    def __init__(self, merger: Merger, recipe: MergeRecipe) -> None:
        changed = {name for expert in recipe.experts for name in merger.experts[expert].targets}
        every = METHODS[recipe.method].changes_every_tensor
        self._groups = assign_groups(recipe.groups, merger.base.names)
        self.names = [name for name in self._groups if every or name in changed]
        self.values: dict[tuple[str, str, str], float] = {}
        self._merger, self._recipe = merger, recipe

    def add(self, name: str, gradient: Tensor) -> None:
        operands = self._merger.operands(self._recipe, name)
        own = coefficient_slopes(operands, self._recipe, self._groups[name], gradient)
        for (parameter, expert), slope in own.items():
            key = (name, parameter, expert)
            self.values[key] = self.values.get(key, 0.0) + slope
