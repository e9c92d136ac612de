"""What dropping candidates on part of their items would save, replayed on runs that measured all in full.

    python benchmarks/elimination.py RUN [RUN ...] [--alpha 0.05]

The trials of a run with `elimination: 0` are gone through in their order, as if they had been measured part
by part (`mergetune.study.elimination`), those dropped being no rivals of later ones. The table says how many
would be dropped, which share of the trials' items that saves, and how many of those dropped stand on the
front of all scores in truth.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from mergetune.evaluation.evaluate import Evaluator
from mergetune.results import selection
from mergetune.results.run_dir import RunDir
from mergetune.results.selection import Scores
from mergetune.study.elimination import Elimination
from mergetune.study.plan import Plan


@dataclass(frozen=True)
class Replay:
    """What became of a run's trials."""

    n_trials: int
    n_dropped: int
    saved: float
    n_wrong: int


def replay(run: RunDir, alpha: float) -> Replay:
    """Go through the trials of a run."""
    evaluator = Evaluator(Plan.read(run.path / "study.yaml").suite)
    elimination = Elimination(evaluator, run, alpha)
    scores, dropped, shares = run.all_scores("search"), set(), []
    full: dict[str, Scores] = {}
    for candidate in run.candidates():
        if candidate.name not in scores:
            continue
        share = 1.0
        if candidate.role == "trial":
            share = share_needed(elimination, evaluator, run, candidate.name, elimination.rivals(full))
            shares.append(share)
        if share < 1.0:
            dropped.add(candidate.name)
        else:
            full[candidate.name] = scores[candidate.name]
    front = selection.front(scores, evaluator.suite.config)
    saved = 1 - float(np.mean(shares)) if shares else 0.0
    return Replay(len(shares), len(dropped), saved, len(dropped.intersection(front)))


def share_needed(
    elimination: Elimination, evaluator: Evaluator, run: RunDir, name: str, rivals: tuple[str, ...]
) -> float:
    """Return on which share of its items a candidate is dropped, else 1."""
    frame = run.measurement(name, "search", responses=False)
    assert frame is not None  # it has scores
    frame = frame.set_index(["task", "item"])
    *parts, _ = elimination.parts
    for part in parts:
        keys = [(task, evaluator.tasks[task].item_ids[i]) for task, own in part.items() for i in own]
        measured = frame.loc[pd.MultiIndex.from_tuples(keys)]
        if elimination.why_dropped(measured.reset_index(names=["task", "item"]), rivals):
            return len(measured) / len(frame)
    return 1.0


def main() -> None:
    """Replay runs and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--alpha", type=float, default=0.05)
    arguments = parser.parse_args()
    shown = Table("run", "trials", "dropped", "items saved", "dropped, though on the front")
    for folder in arguments.runs:
        found = replay(RunDir(folder), arguments.alpha)
        counts = (str(found.n_trials), str(found.n_dropped), f"{found.saved:.0%}", str(found.n_wrong))
        shown.add_row(f"{folder.parent.parent.name}/{folder.name}", *counts)
    Console(width=max(110, Console().width)).print(shown)


if __name__ == "__main__":
    main()
