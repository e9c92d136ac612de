"""The models that go into a merge, opened and checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from optimizer.merging.adapter import open_expert
from optimizer.merging.checkpoint import Checkpoint, Expert
from optimizer.merging.compatibility import (
    base_norm,
    check_compatibility,
    check_task_vectors,
    task_vector_norms,
)
from optimizer.recipe import Source


@dataclass(frozen=True)
class Inputs:
    """A base and its experts, fit to be merged; `warnings` holds what is only suspicious."""

    base: Checkpoint
    experts: tuple[Expert, ...]
    norms: Mapping[str, float]
    warnings: tuple[str, ...]

    @property
    def base_source(self) -> Source:
        """The base, as recipes name it."""
        return Source(path=str(self.base.folder), digest=self.base.digest)

    @property
    def expert_sources(self) -> dict[str, Source]:
        """The experts, as recipes name them."""
        return {expert.name: Source(path=str(expert.folder), digest=expert.digest) for expert in self.experts}

    @property
    def changed(self) -> dict[str, tuple[str, ...]]:
        """The tensors that each expert changes."""
        return {expert.name: expert.targets for expert in self.experts}


def open_inputs(base: Path, experts: Mapping[str, Path]) -> Inputs:
    """Open base and experts and check that they can be merged.

    Raises:
        MergetuneError: a file is missing or broken, the models do not fit together, or weights are
            NaN or infinite; the message names every mismatch.
    """
    checkpoint = Checkpoint(base)
    opened = tuple(open_expert(name, folder, checkpoint) for name, folder in experts.items())
    warnings = check_compatibility(checkpoint, opened)
    norms = task_vector_norms(checkpoint, opened)
    warnings += check_task_vectors(norms, base_norm(checkpoint))
    return Inputs(checkpoint, opened, norms, tuple(warnings))
