"""Recipe → merged tensors, streamed: inputs → plan → numbers → one pass over memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from mergetune.errors import MergetuneError, TrialError
from mergetune.merging.elementwise import AnySource, Source, merge_tensor
from mergetune.merging.methods import RULES, Coefficients, tables_of
from mergetune.merging.operands import Operands
from mergetune.merging.plan import Plan
from mergetune.space.method_table import METHODS
from mergetune.space.recipe import MergeRecipe, assign_groups
from mergetune.weights.checkpoint import Expert

_LARGEST = {
    dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}


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
    index). An adapter's products are formed in blocks of rows, never whole but for the plan's tables.

    Args:
        base: the base.
        experts: the experts, by the names that recipes use.
        is_plain: whether to merge in plain torch, slower and, on a CPU, with the same bits.

    Attributes:
        plan: what follows from base and experts alone; see `Plan`.
    """

    def __init__(self, base: Base, experts: Sequence[Expert], is_plain: bool = False) -> None:
        self.base = base
        self.experts = {expert.name: expert for expert in experts}
        self.plan = Plan(self._digest_of)
        self._is_plain = is_plain
        self._experts: tuple[str, ...] = ()
        self._operands: dict[str, Operands] = {}
        self._selectors: list[object] | None = None
        self._group_places: dict[str, int] = {}

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
        groups = self._group_of(recipe)
        self._prepare(recipe, groups)
        options, seed = recipe.choices, recipe.seed
        coefficients = [Coefficients(group.coefficients, options, seed) for group in recipe.groups]
        rule, changes_all = RULES[recipe.method], METHODS[recipe.method].changes_every_tensor
        peaks: dict[str, tuple[Tensor | float, float]] = {}
        for name in self.base.names:
            if name not in groups:
                yield name, self.base.view(name)
                continue
            operands = self.operands(recipe, name)
            base = operands.base
            is_changed = operands.sources or changes_all
            if not base.is_floating_point() or base.numel() == 0 or not is_changed:
                yield name, base
                continue
            try:
                step = rule(operands, coefficients[groups[name]])
            except ValueError as error:
                raise TrialError(f"`{recipe.method}` cannot merge `{name}`: {error}") from error
            out = _destination(into.get(name), base)
            peak = merge_tensor(step, base, list(operands.sources.values()), out, self._is_plain)
            peaks[name] = (peak, _LARGEST[out.dtype])
            yield name, out
        _check_peaks(peaks)

    def operands(self, recipe: MergeRecipe, name: str) -> Operands:
        """Gather what the base and the experts hold of one tensor, on the base's device."""
        experts = tuple(recipe.experts)
        if self._experts != experts:  # of one choice of experts, as candidates of a study have it
            self._experts, self._operands = experts, {}
        if name in self._operands:
            return self._operands[name]
        base = self.base.view(name)
        found = {expert: self._source(expert, name, base) for expert in experts}
        sources = {expert: source for expert, source in found.items() if source is not None}
        operands = Operands(name, base, experts, sources, self.plan)
        if all(self._is_stored(*each, name) for each in sources.items()):
            self._operands[name] = operands
        return operands

    def _source(self, expert: str, name: str, base: Tensor) -> AnySource | None:
        """Return what an expert makes of a tensor, on the device of `base`; None where it leaves it alone."""
        if not base.is_floating_point():
            return None
        weights = self.experts[expert].weights(name)
        if weights is None:
            if (factors := self.experts[expert].factors(name)) is not None:
                return factors.to(base.device)
            vector = self.experts[expert].task_vector(name, base)
            return None if vector is None else Source(vector, "vector")
        if weights.shape != base.shape:
            raise MergetuneError(
                f"Expert `{expert}`: `{name}` must have the base's shape {tuple(base.shape)}, but has "
                f"{tuple(weights.shape)}. Give a fine-tune of this base."
            )
        return Source(weights.to(base.device), "weights")

    def _is_stored(self, expert: str, source: AnySource, name: str) -> bool:
        """Say whether a source is the expert's own tensor, which takes no memory to keep."""
        return isinstance(source, Source) and source.data is self.experts[expert].weights(name)

    def _group_of(self, recipe: MergeRecipe) -> dict[str, int]:
        """Return the place of every tensor's group; found once for candidates that have the same groups."""
        selectors: list[object] = [(group.layers, group.roles, group.match) for group in recipe.groups]
        if selectors != self._selectors:
            places = {group.name: i for i, group in enumerate(recipe.groups)}
            found = assign_groups(recipe.groups, self.base.names)
            self._group_places = {name: places[group.name] for name, group in found.items()}
            self._selectors = selectors
        return self._group_places

    def _prepare(self, recipe: MergeRecipe, groups: Mapping[str, int]) -> None:
        """Have the tables that the recipe's method reads, of all tensors that it merges."""
        kinds = tables_of(recipe)
        if not kinds:
            return
        experts = tuple(recipe.experts)
        changed = {expert: set(self.experts[expert].targets) for expert in experts}
        merged = [name for name in groups if _is_merged(self.base.view(name))]
        for kind in kinds:
            for together in [experts] if kind.is_joint else [(expert,) for expert in experts]:
                names = [name for name in merged if any(name in changed[expert] for expert in together)]
                self.plan.prepare(kind, together, names, self._read)

    def _read(self, name: str, experts: Sequence[str]) -> tuple[Tensor, list[AnySource]]:
        """Return the base's tensor and the experts' sources, the base's weights where one changes nothing."""
        base = self.base.view(name)
        sources = [self._source(expert, name, base) for expert in experts]
        return base, [source or Source(base, "weights") for source in sources]

    def _digest_of(self, experts: Sequence[str]) -> str | None:
        """Return the SHA-256 of the base and some experts; None where one is in memory only."""
        models = (self.base, *(self.experts[expert] for expert in experts))
        digests: list[str | None] = [getattr(model, "digest", None) for model in models]
        known = [digest for digest in digests if digest]
        return hashlib.sha256("\0".join(known).encode()).hexdigest() if known == digests else None


def _is_merged(base: Tensor) -> bool:
    return base.is_floating_point() and base.numel() > 0


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
