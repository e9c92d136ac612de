"""Candidates dropped on part of their items, because with all of them they could not be on the front.

A candidate of the sampler is looked at after a sixteenth, an eighth, a quarter, a half and three quarters of
its items, in an order that their ids alone decide. It is dropped when it is surely worse in every objective
than some merge of the front as it was when the candidate was begun, or surely breaks a guard: by evidence
that holds at all looks together (`stats.without_replacement`). The error level is shared out among those
merges and the guards: a candidate that all items would put on the front is dropped with that probability at
most.

A score with several tasks is the mean of their means, so that an item of a smaller task counts for more: the
items of a score are drawn from all its tasks together, each gain times what its item counts for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mergetune.evaluation.aggregations import not_means
from mergetune.evaluation.evaluate import Documents, Evaluator
from mergetune.evaluation.suite import ScoreConfig
from mergetune.results import roles, selection
from mergetune.results.run_dir import RunDir
from mergetune.results.selection import Scores
from mergetune.stats.sequential import item_key
from mergetune.stats.without_replacement import log_evidence

_PARTS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
_FEWEST = 100  # items in a part: fewer tell little, and an engine does not work well on them

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Draw:
    """The items of one score in the order drawn.

    Attributes:
        items: their tasks and ids.
        documents: their tasks and indices.
        weights: (n_items,), what each counts for in the score, the greatest being 1.
    """

    items: pd.MultiIndex
    documents: tuple[tuple[str, int], ...]
    weights: Values

    def first(self, part: float) -> int:
        """Return how many items a part of them is."""
        return math.ceil(part * len(self.documents))


class Elimination:
    """Tells which candidates are not worth their other items.

    Args:
        evaluator: the suite.
        run: where the measurements of the candidates on the front are.
        alpha: the error level, for each candidate; 0: none is dropped.
    """

    def __init__(self, evaluator: Evaluator, run: RunDir, alpha: float) -> None:
        self._evaluator, self._run, self._alpha = evaluator, run, alpha
        self._suite, self._all = evaluator.suite.config, evaluator.documents("search")
        self._known: dict[str, dict[str, Values]] = {}  # values of measured candidates, by score

    @cached_property
    def parts(self) -> list[Documents]:
        """The documents of each look, each part holding the one before, and at last all of them."""
        parts = [self._part(part) for part in _PARTS] if self._alpha else []
        return [*(part for part in parts if sum(map(len, part.values())) >= _FEWEST), self._all]

    @cached_property
    def _draws(self) -> dict[str, Draw]:
        return {name: _draw(self._evaluator, name) for name in self._suite.scores}

    def rivals(self, scores: Mapping[str, Scores]) -> tuple[str, ...]:
        """Return whom a candidate that begins now has to bear comparison with, of those measured."""
        return tuple(selection.front(scores, self._suite)) if self._alpha else ()

    def why_dropped(self, measured: pd.DataFrame, rivals: Sequence[str]) -> str:
        """Say why a candidate is not worth its other items; nothing where it may be.

        Args:
            measured: what was measured of it, a part of `parts`.
            rivals: from `rivals`.
        """
        if not (n_ways := len(rivals) + len(self._suite.guards)):
            return ""
        wanted = -math.log(self._alpha / n_ways)
        own = self._values(measured)
        counted = f"{len(measured)} of {sum(map(len, self._all.values()))} items"
        for name, guard in self._suite.guards.items():
            reference = self._of(roles.reference_name(guard))
            if self._evidence(name, guard, reference, own, guard.margin) >= wanted:
                return f"breaks the guard `{name}` by {counted}"
        for rival in rivals:
            theirs = self._of(rival)
            each = (self._evidence(key, it, theirs, own) for key, it in self._suite.objectives.items())
            if all(evidence >= wanted for evidence in each):
                return f"worse than {rival} in {_every(len(self._suite.objectives))} by {counted}"
        return ""

    def _evidence(
        self,
        name: str,
        score: ScoreConfig,
        better: Mapping[str, Values],
        own: Mapping[str, Values],
        margin: float = 0.0,
    ) -> float:
        """Return the evidence that a model is better in a score than a candidate by more than a margin."""
        if name not in better or name not in own:
            return 0.0
        draw = self._draws[name]
        drawn = np.flatnonzero(~np.isnan(own[name]))
        n_drawn = int(drawn[-1]) + 1 if drawn.size else 0
        gains = score.sign * (better[name][:n_drawn] - own[name][:n_drawn])
        if (np.abs(gains[~np.isnan(gains)]) > 1).any():
            return 0.0
        gains = np.nan_to_num(gains, nan=-1.0)  # no verdict: as if the candidate were the better one
        return log_evidence(draw.weights[:n_drawn] * (gains - margin) / (1 + margin), len(draw.documents))

    def _of(self, name: str) -> dict[str, Values]:
        """Return the values of a candidate that was measured in full."""
        if name not in self._known:
            frame = self._run.measurement(name, "search", responses=False)
            self._known[name] = {} if frame is None else self._values(frame)
        return self._known[name]

    def _values(self, frame: pd.DataFrame) -> dict[str, Values]:
        """Return each score's values in the order drawn, NaN where there is none; of means of items alone."""
        lacking = not_means(frame)
        return {
            str(name): rows.set_index(["task", "item"])["score"]
            .reindex(self._draws[str(name)].items)
            .to_numpy(np.float64)
            for name, rows in frame.groupby("score_name")
            if name not in lacking
        }

    def _part(self, part: float) -> Documents:
        documents: dict[str, list[int]] = {task: [] for task in self._all}
        for draw in self._draws.values():
            for task, index in draw.documents[: draw.first(part)]:
                documents[task].append(index)
        return documents


def _draw(evaluator: Evaluator, name: str) -> Draw:
    """Return the items of a score in the order drawn."""
    documents = evaluator.documents("search")
    tasks = {task: bound for task, bound in evaluator.tasks.items() if bound.score_name == name}
    fewest = min(len(documents[task]) for task in tasks)
    found = sorted(
        (item_key(task, bound.item_ids[index]), task, bound.item_ids[index], index)
        for task, bound in tasks.items()
        for index in documents[task]
    )
    return Draw(
        pd.MultiIndex.from_tuples([(task, item) for _, task, item, _ in found]),
        tuple((task, index) for _, task, _, index in found),
        np.array([fewest / len(documents[task]) for _, task, _, _ in found]),
    )


def _every(n_objectives: int) -> str:
    return "the objective" if n_objectives == 1 else "every objective"
