"""Recipe → merged tensors, streamed; what does not depend on the coefficients is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from mergetune.errors import MergetuneError, TrialError
from mergetune.merging.elementwise import merge_tensor
from mergetune.merging.methods import RULES, Coefficients
from mergetune.merging.operands import Operands, Tables
from mergetune.space.method_table import METHODS
from mergetune.space.recipe import MergeRecipe, assign_groups
from mergetune.weights.checkpoint import Expert


class Base(Protocol):
    """What the merger needs of a base: a `Checkpoint`, or tensors that are in memory already."""

    @property
    def names(self) -> Sequence[str]:
        """The tensors, in the order in which they are merged."""

    def view(self, name: str) -> Tensor:
        """Return a tensor, read only; merging happens on its device."""


class Merger:
    """Merge experts into a base, again and again, with new coefficients each time.

    The same recipe gives the same bits: sums are accumulated in float32 in the order of the experts
    and cast once to the base's dtype; random masks are a pure function of (seed, expert, tensor,
    index).

    Args:
        base: the base.
        experts: the experts, by the names that recipes use.
        is_plain: whether to merge in plain torch, slower and, on a CPU, with the same bits.
    """

    def __init__(self, base: Base, experts: Sequence[Expert], is_plain: bool = False) -> None:
        self.base = base
        self.experts = {expert.name: expert for expert in experts}
        self._tables = Tables()
        self._is_plain = is_plain

    def merge(
        self, recipe: MergeRecipe, into: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the merged model, in the base's order, shape and dtype.

        Args:
            recipe: what to merge.
            into: tensors to write into, by name; one that is missing, or of another shape, dtype or
                device, is made anew. A tensor that no expert changes, or that stands in no group, may be
                the base's own: read only.

        Raises:
            MergetuneError: the recipe names an expert that was not given, or its groups do not take
                every tensor exactly once.
            TrialError: these coefficients make a weight infinite or NaN; at the end, when all tensors
                have been yielded.
        """
        if missing := set(recipe.experts) - set(self.experts):
            raise MergetuneError(
                f"The recipe names the experts {', '.join(sorted(missing))}, "
                f"but those given are {', '.join(self.experts)}."
            )
        groups = assign_groups(recipe.groups, self.base.names)
        options, rule = recipe.choices, RULES[recipe.method]
        peaks: dict[str, tuple[Tensor | float, float]] = {}
        for name in self.base.names:
            if name not in groups:
                yield name, self.base.view(name)
                continue
            operands = self.operands(recipe, name)
            is_changed = operands.changed or METHODS[recipe.method].changes_every_tensor
            if not operands.base.is_floating_point() or operands.base.numel() == 0 or not is_changed:
                yield name, operands.base
                continue
            try:
                step = rule(operands, Coefficients(groups[name].coefficients, options))
            except ValueError as error:
                raise TrialError(f"`{recipe.method}` cannot merge `{name}`: {error}") from error
            out = _destination(into.get(name), operands.base)
            vectors_of = [expert in operands.vectors_of for expert in operands.changed]
            sources = list(operands.sources.values())
            peak = merge_tensor(step, operands.base, sources, vectors_of, out, self._is_plain)
            peaks[name] = (peak, torch.finfo(out.dtype).max)
            yield name, out
        _check_peaks(peaks)

    def operands(self, recipe: MergeRecipe, name: str, device: torch.device | None = None) -> Operands:
        """Gather what the base and the experts hold of one tensor, on a device or else on the base's."""
        base = self.base.view(name).to(device)
        sources: dict[str, Tensor] = {}
        vectors_of: set[str] = set()
        for expert in recipe.experts if base.is_floating_point() else ():
            weights = self.experts[expert].weights(name)
            if weights is not None and weights.shape != base.shape:
                raise MergetuneError(
                    f"Expert `{expert}`: `{name}` must have the base's shape {tuple(base.shape)}, but has "
                    f"{tuple(weights.shape)}. Give a fine-tune of this base."
                )
            if weights is not None:
                sources[expert] = weights.to(base.device)
            elif (vector := self.experts[expert].task_vector(name, base)) is not None:
                sources[expert] = vector
                vectors_of.add(expert)
        experts = tuple(recipe.experts)
        return Operands(name, base, experts, sources, frozenset(vectors_of), recipe.seed, self._tables)


def _destination(given: Tensor | None, base: Tensor) -> Tensor:
    """Return the tensor to write into: the one given if it is like the base's, in one block, and not it."""
    like = given is not None and (given.shape, given.dtype, given.device) == (
        base.shape,
        base.dtype,
        base.device,
    )
    if given is not None and like and given.is_contiguous() and given.data_ptr() != base.data_ptr():
        return given
    return torch.empty_like(base, memory_format=torch.contiguous_format)


def _check_peaks(peaks: Mapping[str, tuple[Tensor | float, float]]) -> None:
    """Raise `TrialError` if a peak is beyond what its dtype holds; a GPU is waited for here only."""
    for name, (peak, largest) in peaks.items():
        if not float(peak) <= largest:
            raise TrialError(f"The merge makes `{name}` infinite or NaN: its coefficients are too large.")
