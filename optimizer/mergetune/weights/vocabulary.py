"""Experts that added tokens: their rows of embeddings and head, matched to the base's by token."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mergetune.errors import MergetuneError
from mergetune.weights.adapter import LoraExpert
from mergetune.weights.checkpoint import Checkpoint, Expert, has_token_rows
from mergetune.weights.low_rank import LowRank
from mergetune.weights.tokenizer_files import read_vocabulary


@dataclass(frozen=True, eq=False)
class MatchedExpert:
    """An expert whose embeddings and head stand in the base's rows, matched by token.

    A row whose token the expert lacks is the base's own, so that the task vector is 0 there. `rows`
    holds the rows in common, (2, n_common): the base's and the expert's.
    """

    expert: Expert
    base: Checkpoint
    rows: Tensor
    _gathered: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def name(self) -> str:
        """The user's name for it."""
        return self.expert.name

    @property
    def folder(self) -> Path:
        """Where it was read from."""
        return self.expert.folder

    @property
    def targets(self) -> tuple[str, ...]:
        """The base's tensors that it changes."""
        return self.expert.targets

    @property
    def digest(self) -> str:
        """SHA-256 of the expert's digest and of the rows in common."""
        return hashlib.sha256(self.expert.digest.encode() + self.rows.numpy().tobytes()).hexdigest()

    def weights(self, name: str) -> Tensor | None:
        """Return the expert's own tensor, read only, in the base's rows."""
        return self._in_rows(name) if has_token_rows(name) else self.expert.weights(name)

    def factors(self, name: str) -> LowRank | None:
        """Return the factors of what it adds; rows that are matched by token have none."""
        return None if has_token_rows(name) else self.expert.factors(name)

    def task_vector(self, name: str, base: Tensor) -> Tensor | None:
        """Return expert − base in float32, on the device of `base`."""
        if not has_token_rows(name):
            return self.expert.task_vector(name, base)
        weights = self._in_rows(name)
        return None if weights is None else weights.to(base.device, torch.float32) - base

    def _in_rows(self, name: str) -> Tensor | None:
        """Gather the expert's rows, once, in a dtype that holds the base's as well."""
        if name not in self.targets:
            return None
        if name not in self._gathered:
            base, own = self.base.view(name), own_tensor(self.expert, name, self.base)
            gathered = base.to(torch.promote_types(base.dtype, own.dtype), copy=True)
            gathered[self.rows[0]] = own[self.rows[1]].to(gathered.dtype)
            self._gathered[name] = gathered
        return self._gathered[name]


def match_tokens(expert: Expert, base: Checkpoint, settled: Collection[str] = ()) -> Expert:
    """Return the expert with embeddings and head in the base's rows; itself if they are already.

    The rows of `settled` tokens stay the base's.

    Raises:
        MergetuneError: a tokenizer is missing where one is needed.
    """
    names = [name for name in base.names if has_token_rows(name)]
    own_rows = {name: n_rows(expert, name, base) for name in names}
    has_other_rows = any(own_rows[name] != base.shape(name)[0] for name in names)
    ours, theirs = tokens_of_base(base), tokens_of(expert, base)
    if ours is None or theirs is None:
        if has_other_rows:
            raise MergetuneError(
                f"{expert.folder}: has {max(own_rows.values())} rows for tokens, not the base's "
                f"{base.shape(names[0])[0]}, and rows are matched by token, but there is no tokenizer.json "
                f"in {expert.folder if theirs is None else base.folder}. Save the tokenizer there."
            )
        return expert
    if ours == theirs and not settled and not has_other_rows:
        return expert
    common = [(row, theirs[token]) for token, row in ours.items() if token in theirs and token not in settled]
    return MatchedExpert(expert, base, torch.tensor(sorted(common)).T.contiguous())


def tokens_of_base(base: Checkpoint) -> dict[str, int] | None:
    """Return token → row of the base's tokens that have one; None where its tokenizer does not tell."""
    return _with_rows(base.folder, [base.shape(name)[0] for name in base.names if has_token_rows(name)])


def tokens_of(expert: Expert, base: Checkpoint) -> dict[str, int] | None:
    """Return token → row of an expert's tokens that have one; None where its tokenizer does not tell.

    A tokenizer may hold more, such as a padding token that no text ever has.
    """
    names = [name for name in base.names if has_token_rows(name)]
    return _with_rows(expert.folder, [n_rows(expert, name, base) for name in names])


def n_rows(expert: Expert, name: str, base: Checkpoint) -> int:
    """Return how many tokens an expert's embeddings or head have rows for."""
    if isinstance(expert, LoraExpert):
        return expert.rows_of(name) or base.shape(name)[0]
    own = expert.weights(name)
    return base.shape(name)[0] if own is None else len(own)


def _with_rows(folder: Path, counts: Sequence[int]) -> dict[str, int] | None:
    known = read_vocabulary(folder)
    if known is None or not counts:
        return known
    return {token: row for token, row in known.items() if row < min(counts)}


def own_tensor(expert: Expert, name: str, base: Checkpoint) -> Tensor:
    """Return an expert's whole tensor in its own rows; the base's where it leaves it as it is."""
    view = base.view(name)
    own = expert.resized(name, view) if isinstance(expert, LoraExpert) else expert.weights(name)
    return view if own is None else own
