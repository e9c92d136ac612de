"""A run directory as others read it: candidates, front, recommendation, scores with intervals, items."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Measurement
from mergetune.evaluation.suite import Split
from mergetune.results import selection
from mergetune.results.run_dir import Candidate, RunDir
from mergetune.results.selection import Choice
from mergetune.space.recipe import MergeRecipe
from mergetune.stats.resampling import Interval, bootstrap_scores, join_items, score_interval


@dataclass(frozen=True)
class Estimate:
    """A score as measured, with its standard error and its interval over items; see `score_interval`."""

    value: float
    stderr: float
    n_items: int
    interval: Interval


class Run:
    """What a study learned, read from its run directory; nothing is written and no model is opened.

    Args:
        path: the run directory.

    Raises:
        MergetuneError: it is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = RunDir(path)
        self.suite = self._folder.study.suite_config

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """The models measured, baselines among them, in the order measured."""
        return tuple(self._folder.candidates())

    @cached_property
    def choice(self) -> Choice | None:
        """How the merge was chosen; None before the base, the experts and a merge were measured."""
        return selection.choose(self._folder)

    @property
    def recommended(self) -> str | None:
        """The name of the recommended merge, None where there is none yet."""
        found = self.choice.recommendation if self.choice else None
        return found.name if found else None

    @property
    def front(self) -> dict[str, float]:
        """The probability of being on the Pareto front, by the name of each candidate that is on it.

        A candidate is on it by the scores that one chooses by; the probability is that over resamples of the
        items.
        """
        if self.choice is None:
            return {}
        on_it = selection.front(self.choice.smoothing.scores, self.suite)
        return {name: self.choice.front.probability[name] for name in on_it}

    def recipe(self, name: str) -> MergeRecipe:
        """Return a candidate's recipe; raises `MergetuneError` where there is no such candidate."""
        return self._candidate(name).recipe

    def items(self, name: str, split: Split = "search") -> pd.DataFrame:
        """Return a row per item: score_name, task, item, split, prompt, target, response, score and reason.

        Of a conversation, `prompt` is the user's last message, `earlier` has those before it, as JSON, and
        `system` the system message. In runs of earlier versions these two are missing. `reason` is what a
        judge wrote, and empty where none did.

        Raises:
            MergetuneError: the candidate was not measured on that split.
        """
        own = self._measurement(name, split)
        keys = ["score_name", "task", "item"]
        own = own.reindex(
            columns=[*keys, "response", "score", "reason"], fill_value=""
        )  # of earlier versions
        return self._folder.items().merge(own, on=keys, validate="one_to_one")

    def scores(self, name: str, split: Split = "search", level: float = 0.95) -> dict[str, Estimate]:
        """Return a candidate's objectives and guards, with intervals of this level.

        Raises:
            MergetuneError: the candidate was not measured on that split.
        """
        frame = self._measurement(name, split)
        items, found = join_items({name: frame}), {}
        for key, own in Measurement(frame, 0.0).scores().items():
            resampled = bootstrap_scores(items[key].scores, items[key].tasks)[:, 0]
            is_share = self.suite.scores[key].are_shares(frame["score"][frame["score_name"] == key].dropna())
            interval = score_interval(own, resampled, level, is_share=is_share)
            found[key] = Estimate(own.value, own.stderr, own.n_items, interval)
        return found

    def _candidate(self, name: str) -> Candidate:
        found = self._folder.candidate(name)
        if found is None:
            known = ", ".join(candidate.name for candidate in self.candidates)
            raise MergetuneError(f"{self.path}: has no candidate `{name}`, but {known}.")
        return found

    def _measurement(self, name: str, split: Split) -> pd.DataFrame:
        self._candidate(name)
        frame = self._folder.measurement(name, split)
        if frame is None:
            raise MergetuneError(f"{self.path}: `{name}` was not measured on the {split} split.")
        return frame
