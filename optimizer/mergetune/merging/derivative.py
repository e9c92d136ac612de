"""The derivative of a merge: how a loss moves with each coefficient, from the gradient of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mergetune.merging.elementwise import (
    AnySource,
    Numbers,
    Step,
    kept_vectors,
    merged_entries,
    row_blocks,
    spans,
    wide,
)
from mergetune.merging.methods import RULES, Coefficients
from mergetune.merging.operands import Operands
from mergetune.space.method_table import METHODS, SMOOTH
from mergetune.space.recipe import MergeRecipe, RecipeGroup
from mergetune.weights.low_rank import LowRank

ALL = ""  # stands for the expert where one coefficient is for all of them

_CPU_CHUNK, _CUDA_CHUNK = 1 << 18, 1 << 24  # entries; a chunk's graph holds several times as many numbers


def coefficient_slopes(
    operands: Operands, recipe: MergeRecipe, group: RecipeGroup, gradient: Tensor
) -> dict[tuple[str, str], float]:
    """Return ⟨∂L/∂W, ∂W/∂c⟩ of one tensor for each of its coefficients c, by parameter and expert.

    ∂W/∂c is taken by autograd through the merge itself, so that every method has it: with masks,
    thresholds and elected signs held as they are, the weights are smooth in `lambda`, `t` and `scale`. A
    plain sum of vectors is followed from the products ⟨∂L/∂W, vector⟩ alone, which is much faster; those of
    whole factors B A are Σ (∂L/∂W Aᵀ) ∘ B. Products are taken and added up in float32 (float64 where the base
    is), those of parts in float64, on the gradient's device, where only what is read is brought.

    Args:
        operands: the tensor in the base and in the experts.
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
        given = Coefficients(_traced(group, leaves), recipe.choices, recipe.seed)
        step = RULES[recipe.method](operands, given)
        totals = dict.fromkeys(leaves, 0.0)
        traced = _products if _is_plain_sum(step) else _entries
        for outputs, slopes in traced(step, operands, gradient):
            found = torch.autograd.grad(
                outputs, list(leaves.values()), slopes, retain_graph=True, allow_unused=True
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


_Traced = Iterator[tuple[list[Tensor], list[Tensor]]]  # what autograd follows, and the slopes by that


def _products(step: Step, operands: Operands, gradient: Tensor) -> _Traced:
    """Yield the numbers of a plain sum, with the products of the gradient and what each multiplies."""
    weights = (step.numbers.base_weight, *step.numbers.lambdas)
    followed = {i: w for i, w in enumerate(weights) if isinstance(w, Tensor) and w.requires_grad}
    sources, products = _sources(step, operands), dict.fromkeys(followed, 0.0)
    rest = []  # whose products are taken entry by entry; 0 is the base
    with torch.no_grad():
        for i in followed:
            source = sources[i - 1] if i > 0 else None
            if isinstance(source, LowRank) and step.keep == "all":
                products[i] = source.to(gradient.device).inner(gradient)
            else:
                rest.append(i)
        experts = [i - 1 for i in rest if i > 0]
        own = replace(step.of_experts(experts), sources=[sources[expert] for expert in experts])
        for part in _parts(own, operands, gradient) if rest else ():
            rule = (part.are_vectors, own.keep, part.numbers, part.ranks)
            multiplied = kept_vectors(part.base, part.sources, *rule)
            if 0 in rest:
                multiplied.insert(0, part.base)
            for i, each in zip(rest, multiplied, strict=True):
                products[i] += float(torch.dot(each, part.gradient))
    if followed:
        yield list(followed.values()), [followed[i].new_tensor(products[i]) for i in followed]


def _entries(step: Step, operands: Operands, gradient: Tensor) -> _Traced:
    """Yield merged entries with the gradient's."""
    for part in _parts(step, operands, gradient):
        rule = (part.are_vectors, step.keep, step.combine, part.numbers, part.ranks)
        yield [merged_entries(part.base, part.sources, *rule)], [part.gradient]


class _Part(NamedTuple):
    """A part of a tensor: as `spans` yields it, on the gradient's device."""

    base: Tensor
    gradient: Tensor
    sources: list[Tensor]
    are_vectors: list[bool]
    ranks: list[Tensor]
    numbers: Numbers


def _parts(step: Step, operands: Operands, gradient: Tensor) -> Iterator[_Part]:
    device = gradient.device
    chunk = _CUDA_CHUNK if gradient.is_cuda else _CPU_CHUNK
    given = [source.to(device) for source in _sources(step, operands)]
    tensors = operands.base.to(device), gradient
    for own, (base, slopes), sources in row_blocks(step.to(device), tensors, given):
        are_vectors = [source.kind == "vector" for source in sources]
        data = [source.data for source in sources]
        for (entries, slope, *parts), ranks, numbers in spans(own, (base, slopes, *data), chunk):
            start = wide(entries)
            yield _Part(start, slope.to(start.dtype), parts, are_vectors, ranks, numbers)


def _sources(step: Step, operands: Operands) -> Sequence[AnySource]:
    return list(operands.sources.values()) if step.sources is None else step.sources


def _is_plain_sum(step: Step) -> bool:
    """Say whether a merge is numbers times vectors, which do not depend on the coefficients themselves."""
    return step.combine == "sum" and step.keep != "clip" and step.numbers.n_rows is None
