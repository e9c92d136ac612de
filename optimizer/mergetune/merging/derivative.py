"""The derivative of a merge: how a loss moves with each coefficient, from the gradient of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mergetune.merging.elementwise import Step, merged_entries, signed
from mergetune.merging.methods import RULES, Coefficients
from mergetune.merging.operands import Operands
from mergetune.space.method_table import METHODS, SMOOTH
from mergetune.space.recipe import MergeRecipe, RecipeGroup

ALL = ""  # stands for the expert where one coefficient is for all of them

_CPU_CHUNK, _CUDA_CHUNK = 1 << 18, 1 << 24  # entries; a chunk's graph holds several times as many numbers


def coefficient_slopes(
    operands: Operands, recipe: MergeRecipe, group: RecipeGroup, gradient: Tensor
) -> dict[tuple[str, str], float]:
    """Return ⟨∂L/∂W, ∂W/∂c⟩ of one tensor for each of its coefficients c, by parameter and expert.

    ∂W/∂c is taken by autograd through the merge itself, so that every method has it: with masks,
    thresholds and elected signs held as they are, the weights are smooth in `lambda`, `t` and `scale`.
    Products are taken and added up in float32 (float64 where the base is), those of parts in float64.

    Args:
        operands: the tensor in the base and in the experts, on the gradient's device.
        recipe: the merge.
        group: the tensor's layer group.
        gradient: ∂L/∂W, of the tensor's shape.

    Raises:
        ValueError: the method cannot merge the tensor with these coefficients.
    """
    leaves = _leaves(recipe, group)
    if not leaves:
        return {}
    with torch.enable_grad():  # a hook runs without
        given = Coefficients(_traced(group, leaves), recipe.choices)
        step = RULES[recipe.method](operands, given)
        totals = dict.fromkeys(leaves, 0.0)
        for merged, part in _chunks(step, operands, gradient):
            found = torch.autograd.grad(
                merged, list(leaves.values()), part.to(merged.dtype), retain_graph=True, allow_unused=True
            )
            for key, slope in zip(leaves, found, strict=True):
                totals[key] += 0.0 if slope is None else float(slope)
    return totals


def _leaves(recipe: MergeRecipe, group: RecipeGroup) -> dict[tuple[str, str], Tensor]:
    """Return the smooth coefficients as scalars that autograd begins at, in float64 on the CPU."""
    names = [each.name for each in METHODS[recipe.method].parameters if each.name in SMOOTH]
    values: dict[tuple[str, str], float] = {}
    for name in names:
        given = group.coefficients[name]
        own = given if isinstance(given, dict) else {ALL: given}
        values |= {(name, expert): value for expert, value in own.items()}
    return {
        key: torch.tensor(value, dtype=torch.float64, requires_grad=True) for key, value in values.items()
    }


def _traced(
    group: RecipeGroup, leaves: Mapping[tuple[str, str], Tensor]
) -> dict[str, dict[str, Tensor] | Tensor | dict[str, float] | float]:
    """Return the group's coefficients with the leaves in the place of their numbers."""
    traced: dict[str, dict[str, Tensor] | Tensor] = {}
    for (name, expert), leaf in leaves.items():
        if expert == ALL:
            traced[name] = leaf
        else:
            own = traced.setdefault(name, {})
            assert isinstance(own, dict)
            own[expert] = leaf
    return {**group.coefficients, **traced}


def _chunks(step: Step, operands: Operands, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield merged entries with the gradient's, a part of the tensor at a time unless its rows differ."""
    numbers = step.numbers
    sources = list(operands.sources.values())
    are_vectors = [expert in operands.vectors_of for expert in operands.changed]
    if step.vectors is not None:
        sources, are_vectors = list(step.vectors), [True] * len(step.vectors)
    rule = (are_vectors, step.keep, step.combine)
    if isinstance(numbers.base_weight, Tensor) and numbers.base_weight.ndim > 0:  # a weight for each row
        yield merged_entries(operands.base, sources, *rule, numbers), gradient
        return
    base, whole, *vectors = (each.reshape(-1) for each in (operands.base, gradient, *sources))
    size = _CUDA_CHUNK if gradient.is_cuda else _CPU_CHUNK
    for begin in range(0, len(base), size):
        span = slice(begin, begin + size)
        here = numbers._replace(start=signed(begin % 2**32))
        yield merged_entries(base[span], [each[span] for each in vectors], *rule, here), whole[span]
