"""Models whose tensors are in memory already, as a base or as an expert of a merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


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
