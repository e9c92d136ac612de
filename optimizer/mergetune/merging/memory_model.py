"""Models and adapters whose tensors are in memory already, as a base or as experts of a merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mergetune.weights.low_rank import LowRank


@dataclass(frozen=True)
class MemoryModel:
    """A base or a full fine-tune given as tensors, e.g. a `state_dict`; merged on their device."""

    name: str
    tensors: Mapping[str, Tensor]
    folder: Path = Path()
    digest: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors in order."""
        return tuple(self.tensors)

    @property
    def targets(self) -> tuple[str, ...]:
        """The base's tensors that it changes: all of them."""
        return self.names

    def view(self, name: str) -> Tensor:
        """Return a tensor: read only."""
        return self.tensors[name]

    def weights(self, name: str) -> Tensor:
        """Return a tensor: read only."""
        return self.tensors[name]

    def factors(self, name: str) -> None:
        """Return nothing: it holds weights."""

    def task_vector(self, name: str, base: Tensor) -> Tensor:
        """Return this model's tensor minus `base`, in float32."""
        return self.tensors[name].float() - base.float()


@dataclass(frozen=True)
class MemoryAdapter:
    """An adapter given as factors, by the base's tensors that it changes."""

    name: str
    updates: Mapping[str, LowRank]
    folder: Path = Path()
    digest: str = ""

    @property
    def targets(self) -> tuple[str, ...]:
        """The base's tensors that it changes."""
        return tuple(self.updates)

    def weights(self, name: str) -> None:
        """Return nothing: it adds to the base's."""

    def factors(self, name: str) -> LowRank | None:
        """Return the factors of what it adds to a tensor, None where it leaves that as it is."""
        return self.updates.get(name)

    def task_vector(self, name: str, base: Tensor) -> Tensor | None:
        """Return what it adds to a tensor, in float32."""
        found = self.updates.get(name)
        return None if found is None else found.product().to(base.device)
