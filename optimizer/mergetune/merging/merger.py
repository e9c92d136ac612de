"""Recipe → merged tensors, streamed: inputs → plan → numbers → one pass over memory."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mergetune.errors import MergetuneError, TrialError
from mergetune.merging.deferred import DeferredTensor
from mergetune.merging.elementwise import (
    AnySource,
    Source,
    Step,
    merge_tensor,
    part_of,
    row_length,
    without_zeros,
)
from mergetune.merging.methods import RULES, Coefficients, tables_of
from mergetune.merging.operands import Operands
from mergetune.merging.plan import Plan
from mergetune.space.method_table import METHODS
from mergetune.space.recipe import MergeRecipe, assign_groups
from mergetune.weights.checkpoint import Expert
from mergetune.weights.low_rank import LowRank

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
        is_for_one: whether one recipe is merged and no other: then nothing as large as weights is kept for
            the next.

    Attributes:
        plan: what follows from base and experts alone; see `Plan`.
    """

    def __init__(
        self, base: Base, experts: Sequence[Expert], is_plain: bool = False, is_for_one: bool = False
    ) -> None:
        self.base = base
        self.experts = {expert.name: expert for expert in experts}
        self.plan = Plan(self._digest_of, keeps_large=not is_for_one)
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
        merge = self.start(recipe)
        for name in self.base.names:
            yield name, merge.tensor(name, into.get(name))
        merge.check()

    def start(self, recipe: MergeRecipe) -> Merge:
        """Return a merge of which nothing has been computed but the plan's tables.

        Raises:
            MergetuneError: see `merge`.
        """
        if missing := set(recipe.experts) - set(self.experts):
            raise MergetuneError(
                f"The recipe names the experts {', '.join(sorted(missing))}, "
                f"but those given are {', '.join(self.experts)}."
            )
        groups = self._group_of(recipe)
        self._prepare(recipe, groups)
        return Merge(self, recipe, groups, self._is_plain)

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


class _Work(NamedTuple):
    """What is to be done for one tensor."""

    step: Step
    base: Tensor
    sources: Sequence[AnySource]


class Merge:
    """One recipe on its way: its tensors, and parts of them, in any order.

    Attributes:
        read_bytes: of the base and of the experts, how much was merged so far.
        part_s: how long it took to merge parts, in seconds.
    """

    def __init__(
        self, merger: Merger, recipe: MergeRecipe, groups: Mapping[str, int], is_plain: bool
    ) -> None:
        self.read_bytes, self.part_s = 0, 0.0
        self._merger, self._recipe, self._groups, self._is_plain = merger, recipe, groups, is_plain
        options, seed = recipe.choices, recipe.seed
        self._coefficients = [Coefficients(group.coefficients, options, seed) for group in recipe.groups]
        self._peaks: list[tuple[str, Tensor | float, float]] = []
        self._error: MergetuneError | None = None

    def tensor(self, name: str, into: Tensor | None = None) -> Tensor:
        """Return a merged tensor, or the base's own where nothing changes it; see `Merger.merge`."""
        work = self._work(name)
        if work is None:
            return self._merger.base.view(name)
        out = _destination(into, work.base)
        step, base, sources = work
        self._note(name, merge_tensor(step, base, sources, out, self._is_plain), out)
        n_columns = row_length(base)
        self.read_bytes += sum(
            _n_bytes(each, base.numel() // n_columns, n_columns) for each in (base, *sources)
        )
        return out

    def deferred(self, name: str) -> Tensor:
        """Return a tensor that is merged when it is read, and only the part that is read.

        What cannot be merged is read from the base; `check` raises the error.
        """
        base = self._merger.base.view(name)
        if name not in self._groups or not _is_merged(base):
            return base
        work = functools.cache(lambda: self._work(name))

        def read(rows: slice, columns: slice) -> Tensor:
            began = time.perf_counter()
            try:
                whole = None if self._error else work()
                if whole is not None:
                    return self._part(name, whole, rows, columns)
            except MergetuneError as error:
                self._error = error
            finally:
                self.part_s += time.perf_counter() - began
            return part_of(base, rows, columns)

        return DeferredTensor.of(base, read)

    def check(self) -> None:
        """Raise the error of a part, or `TrialError` if a weight merged so far is infinite or NaN."""
        if self._error is not None:
            raise self._error
        for name, peak, largest in self._peaks:  # a GPU is waited for here only
            if not float(peak) <= largest:
                raise TrialError(f"The merge makes `{name}` infinite or NaN: its coefficients are too large.")

    def _work(self, name: str) -> _Work | None:
        """Return what is to be done for a tensor; None where the base's is the merged one."""
        recipe = self._recipe
        if name not in self._groups:
            return None
        operands = self._merger.operands(recipe, name)
        is_changed = operands.sources or METHODS[recipe.method].changes_every_tensor
        if not _is_merged(operands.base) or not is_changed:
            return None
        try:
            step = RULES[recipe.method](operands, self._coefficients[self._groups[name]])
        except ValueError as error:
            raise TrialError(f"`{recipe.method}` cannot merge `{name}`: {error}") from error
        own = list(operands.sources.values())
        step, sources = without_zeros(step, own if step.sources is None else step.sources)
        return _Work(replace(step, sources=sources), operands.base, sources)

    def _part(self, name: str, work: _Work, rows: slice, columns: slice) -> Tensor:
        """Return a part of a merged tensor; products of factors are formed in blocks of rows."""
        step, base, sources = work
        n_rows, n_columns = rows.stop - rows.start, columns.stop - columns.start
        out = torch.empty(n_rows, n_columns, dtype=base.dtype, device=base.device)
        length = next((each.block_rows for each in sources if isinstance(each, LowRank)), n_rows)
        for begin in range(0, n_rows, length):
            into = out[begin : begin + length]
            here = slice(rows.start + begin, rows.start + begin + len(into))
            part = step.of_part(base, sources, here, columns)
            peak = merge_tensor(part, part_of(base, here, columns), [], into, self._is_plain)
            self._note(name, peak, out)
        self.read_bytes += sum(_n_bytes(each, n_rows, n_columns) for each in (base, *sources))
        return out

    def _note(self, name: str, peak: Tensor | float, out: Tensor) -> None:
        self._peaks.append((name, peak, _LARGEST[out.dtype]))


def _n_bytes(read: Tensor | AnySource, n_rows: int, n_columns: int) -> int:
    """Return the bytes of a part; of factors, of these rows of B and all of A."""
    if isinstance(read, LowRank):
        return n_rows * read.b[:1].nbytes + read.a.nbytes
    data = read.data if isinstance(read, Source) else read
    return n_rows * n_columns * data.element_size()


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
