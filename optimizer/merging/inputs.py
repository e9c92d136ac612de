"""The models that go into a merge, opened and checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from optimizer.config import VocabularyRule
from optimizer.merging.adapter import open_expert
from optimizer.merging.checkpoint import Checkpoint, Expert
from optimizer.merging.compatibility import (
    base_norm,
    check_compatibility,
    check_task_vectors,
    task_vector_norms,
)
from optimizer.merging.extended_base import extend_base, find_speaker, settled_tokens
from optimizer.merging.vocabulary import match_tokens
from optimizer.recipe import Source


@dataclass(frozen=True)
class Inputs:
    """A base and its experts, fit to be merged; `warnings` holds what is only suspicious.

    `given` is the base that was given where `base` is that one with the tokens that experts added.
    """

    base: Checkpoint
    experts: tuple[Expert, ...]
    norms: Mapping[str, float]
    warnings: tuple[str, ...]
    given: Path | None = None

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


def open_inputs(
    base: Path,
    experts: Mapping[str, Path],
    vocabulary: VocabularyRule = "refuse",
    extended_base: Path | None = None,
) -> Inputs:
    """Open base and experts and check that they can be merged.

    Args:
        base: the base's directory.
        experts: the experts' directories by name.
        vocabulary: what becomes of tokens that experts added; see `StudyConfig`.
        extended_base: where a base with more tokens is written, if there is none yet, and read from;
            only `mean` needs it.

    Raises:
        MergetuneError: a file is missing or broken, the models do not fit together, or weights are
            NaN or infinite; the message names every mismatch.
    """
    checkpoint = Checkpoint(base)
    may_add_tokens = vocabulary != "refuse"
    opened = tuple(open_expert(name, folder, checkpoint, may_add_tokens) for name, folder in experts.items())
    warnings = check_compatibility(checkpoint, opened, vocabulary)
    if vocabulary == "mean":
        warnings += _warn_of_template(find_speaker(checkpoint, opened))
        checkpoint = extend_base(checkpoint, opened, extended_base)
    if may_add_tokens:
        settled = settled_tokens(checkpoint.folder)
        opened = tuple(match_tokens(expert, checkpoint, settled) for expert in opened)
    norms = task_vector_norms(checkpoint, opened)
    warnings += check_task_vectors(norms, base_norm(checkpoint))
    given = None if checkpoint.folder == base else base
    return Inputs(checkpoint, opened, norms, tuple(warnings), given)


def _warn_of_template(speaker: Expert | None) -> list[str]:
    if speaker is None:
        return []
    return [
        f"The base has no chat template: the merged model takes that of `{speaker.name}`, and the token that "
        "ends its messages, so check that the other experts were trained with them, too."
    ]
