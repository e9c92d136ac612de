"""A candidate as whoever watches a study is shown it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mergetune.evaluation.suite import Split
from mergetune.results.run import Run
from mergetune.results.run_dir import Candidate, RunDir
from mergetune.results.selection import Scores


@dataclass(frozen=True)
class Seen:
    """A candidate with what it scored on the search split.

    Attributes:
        candidate: what it is, and what became of it.
        scores: objectives and guards, of a dropped one on part of the items; none where it failed.
        excess: by how much each guard is broken, in the units of `selection.guard_units`: kept at 0 or less.
    """

    candidate: Candidate
    scores: Scores = field(default_factory=dict)
    excess: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What it is told apart by: another recipe under the same name is another candidate."""
        return key_of(self.candidate)

    def facts(self) -> dict[str, str]:
        """Return what there is to say of it in words, by name."""
        own = self.candidate
        known = {
            "candidate": own.name,
            "role": own.role,
            "state": own.state,
            "method": own.recipe.method,
            "recipe": own.recipe.digest,
            "reason": own.reason or "",
            "faults": "; ".join(own.faults),
        }
        return {name: text for name, text in known.items() if text}

    def figures(self) -> dict[str, float]:
        """Return its scores, their standard errors, the guards' excesses and its cost, by name."""
        found: dict[str, float] = {}
        for name, score in self.scores.items():
            found |= {name: score.value, f"{name}.stderr": score.stderr}
        found |= {f"guard.{name}": excess for name, excess in self.excess.items()}
        cost = self.candidate.cost
        return _finite({**found, "items": float(cost.n_items), "seconds": cost.total_s})


@dataclass(frozen=True)
class Ended:
    """The end of a study: its report, and what the run directory says."""

    report: Path
    run: Run

    def figures(self, name: str) -> dict[str, float]:
        """Return a candidate's scores on each split with standard errors and 95 % intervals, by name."""
        found: dict[str, float] = {}
        splits: tuple[tuple[Split, str], ...] = (("search", ""), ("holdout", "holdout."))
        for split, front in splits:
            if not RunDir(self.run.path).holds_measurement(name, split):
                continue
            for key, own in self.run.scores(name, split).items():
                ends = {"stderr": own.stderr, "low": own.interval.lower, "high": own.interval.upper}
                found |= {f"{front}{key}": own.value}
                found |= {f"{front}{key}.{end}": value for end, value in ends.items()}
        return _finite(found)


def study_facts(run: RunDir) -> dict[str, str]:
    """Return what there is to say of a study in words, by name."""
    study = run.study
    return {
        "base": str(study.base),
        **{f"expert.{name}": str(place) for name, place in study.experts.items()},
        "search_space": Path(study.search_space).stem,
        "suite": study.suite_name,
        "sampler": study.sampler.kind,
        "seed": str(study.seed),
        "trials": str(study.budget.trials),
        "run": str(run.path.resolve()),
    }


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def key_of(candidate: Candidate) -> str:
    """Return what a candidate is told apart by."""
    return key(candidate.name, candidate.recipe.digest)


def key(candidate: str, recipe: str) -> str:
    """Return what the candidate of this name and of the recipe with this digest is told apart by."""
    return f"{candidate}@{recipe}"
