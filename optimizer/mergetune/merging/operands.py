"""One tensor of the base, with what each expert makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from mergetune.merging.elementwise import AnySource, Source, row_length

if TYPE_CHECKING:
    from mergetune.merging.plan import Plan
    from mergetune.merging.tables import Array, Kind


@dataclass(frozen=True)
class Operands:
    """One tensor of the base, and a source of each expert that changes it.

    Attributes:
        name: the tensor's name.
        base: the base's tensor, in its own dtype; read only.
        experts: all experts of the merge, in order.
        sources: of the experts that change this tensor, in the same order; read only, on the device of
            `base`.
        plan: the merger's.
    """

    name: str
    base: Tensor
    experts: tuple[str, ...]
    sources: Mapping[str, AnySource]
    plan: Plan

    @property
    def changed(self) -> tuple[str, ...]:
        """The experts that change this tensor."""
        return tuple(self.sources)

    @property
    def all_sources(self) -> list[AnySource]:
        """A source of every expert: that of one that leaves the tensor as it is are the base's weights."""
        own = Source(self.base, "weights")
        return [self.sources.get(expert, own) for expert in self.experts]

    @property
    def row_length(self) -> int:
        """The entries of a row, the last dimension; 1 for a scalar."""
        return row_length(self.base)

    def table(self, kind: Kind, expert: str | None = None) -> Array:
        """Return a table of the plan, read only: of an expert that changes the tensor, or of all together."""
        return self.plan.table(kind, self, expert)
