"""What measuring candidates in parts would save, replayed on runs that measured all of them in full.

    python benchmarks/racing.py RUN [RUN ...]

A candidate of the search is looked at after an eighth, a quarter, a half and three quarters of its items, in
an order that their ids alone decide. It is dropped as soon as some merge that was measured in full before,
and stands on the front, is surely better in every objective: by the betting bounds of `stats.sequential`,
which hold at all looks together, at an error level of 0.05 for all of these merges. The table says how many
candidates would be dropped, which share of the search's items that saves, and how many of those dropped stand
on the front of all scores in truth.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from mergetune.evaluation.suite import SuiteConfig
from mergetune.results import selection
from mergetune.results.run_dir import RunDir
from mergetune.stats.sequential import item_order, look, split_alpha

PARTS = (0.125, 0.25, 0.5, 0.75)
FEWEST = 4  # items of each task
ALPHA = 0.05

Key = tuple[str, str, str]  # score, task and item


@dataclass(frozen=True)
class Replay:
    """What became of a run's candidates."""

    n_candidates: int
    n_dropped: int
    saved: float
    n_wrong: int


def replay(run: RunDir) -> Replay:
    """Race the candidates of a run's search against those before them."""
    suite, scores = run.study.suite_config, run.all_scores("search")
    front = selection.front(scores, suite)
    full: dict[str, pd.Series[float]] = {}
    dropped, shares = [], []
    for candidate in run.candidates():
        measurement = run.measurement(candidate.name, "search")
        if measurement is None:
            continue
        own = measurement.set_index(["score_name", "task", "item"])["score"]
        share = 1.0
        if not candidate.is_baseline:
            rivals = [full[name] for name in selection.front({name: scores[name] for name in full}, suite)]
            share = share_needed(own, rivals, suite)
            shares.append(share)
        if share == 1.0:
            full[candidate.name] = own
        else:
            dropped.append(candidate.name)
    saved = 1 - float(np.mean(shares)) if shares else 0.0
    return Replay(len(shares), len(dropped), saved, len(set(dropped) & set(front)))


def share_needed(own: pd.Series[float], rivals: Sequence[pd.Series[float]], suite: SuiteConfig) -> float:
    """Return which share of its items tells that a candidate is worse than a rival in everything, else 1."""
    orders = [
        [rows.index[i] for i in item_order(str(task), [str(item) for *_, item in rows.index])]
        for task, rows in own.groupby(level="task")
    ]
    for part in PARTS:
        taken: list[list[Key]] = [keys[: max(int(part * len(keys)), FEWEST)] for keys in orders]
        if any(is_worse(own, rival, taken, suite, ALPHA / len(rivals)) for rival in rivals):
            return sum(map(len, taken)) / len(own)
    return 1.0


def is_worse(
    own: pd.Series[float],
    rival: pd.Series[float],
    taken: Sequence[Sequence[Key]],
    suite: SuiteConfig,
    alpha: float,
) -> bool:
    """Say whether a candidate is surely worse than a rival in every objective, by these items of tasks."""
    for name, objective in suite.objectives.items():
        tasks = [keys for keys in taken if keys and keys[0][0] == name]
        n_rounds = min(map(len, tasks))
        keys = pd.MultiIndex.from_tuples([key for task in tasks for key in task[:n_rounds]])
        ours, theirs = (scores.reindex(keys).to_numpy(np.float64) for scores in (own, rival))
        differences = np.reshape(objective.sign * (theirs - ours), (len(tasks), n_rounds))
        found = look(differences, 0.0, split_alpha(alpha, early_share=1.0))
        if found.lower <= 0:
            return False
    return True


def main() -> None:
    """Replay runs and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    shown = Table("run", "candidates", "dropped", "items saved", "dropped, though on the front")
    for folder in parser.parse_args().runs:
        found = replay(RunDir(folder))
        counts = (str(found.n_candidates), str(found.n_dropped), f"{found.saved:.0%}", str(found.n_wrong))
        shown.add_row(folder.name, *counts)
    Console(width=max(110, Console().width)).print(shown)


if __name__ == "__main__":
    main()
