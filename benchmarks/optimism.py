"""What searches report against what held-out items confirm, over finished runs of one study.

For each run: the finalists' mean score over the objectives on the search split, as measured and smoothed, and
on the holdout split; the optimism measured (search − holdout) with its 95 % interval, and the optimism that
the search split alone predicted. Runs differ in their seeds only; they share all items, so that the means
over runs have the items' noise in common.

    for seed in 1 2 3 4 5; do mergetune run study-$seed.yaml --out runs/$seed; done
    python benchmarks/optimism.py runs/*
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mergetune.report import gather
from mergetune.results.run_dir import RunDir


@dataclass(frozen=True)
class Outcome:
    """One run's finalists: mean scores over the objectives, signed so that greater is better."""

    run: str
    n_candidates: int
    n_finalists: int
    search: float
    smoothed: float
    confirmed: float
    optimism: float
    lower: float
    upper: float
    smoothed_optimism: float
    predicted: float
    is_confirmed: bool  # whether the predicted optimism lies within the measured one's interval


def outcome_of(folder: Path) -> Outcome:
    """Read one run directory."""
    data = gather(RunDir(folder))
    found = data.confirmation
    if found.mean is None or found.smoothed_mean is None or found.predicted is None:
        raise SystemExit(f"{folder}: has no confirmed finalists.")
    objectives = [one for one in found.optimism if one.metric.kind == "objective"]
    return Outcome(
        run=folder.name,
        n_candidates=len(data.entries),
        n_finalists=len(found.finalists),
        search=float(np.mean([one.metric.sign * one.search.value for one in objectives])),
        smoothed=float(np.mean([one.metric.sign * one.smoothed.value for one in objectives])),
        confirmed=float(np.mean([one.metric.sign * one.holdout.value for one in objectives])),
        optimism=found.mean.estimate,
        lower=found.mean.interval.lower,
        upper=found.mean.interval.upper,
        smoothed_optimism=found.smoothed_mean.estimate,
        predicted=found.predicted.estimate,
        is_confirmed=found.mean.agrees(found.predicted.estimate),
    )


def main() -> None:
    """Print a row per run and the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    outcomes = [outcome_of(folder) for folder in args.runs]
    if args.json:
        args.json.write_text(json.dumps([asdict(each) for each in outcomes], indent=1), encoding="utf-8")
    table = Table(
        *("run", "candidates", "finalists", "search", "smoothed", "confirmed"),
        *("optimism, 95 %", "smoothed", "predicted", "within"),
    )
    for each in outcomes:
        table.add_row(
            *(each.run, str(each.n_candidates), str(each.n_finalists)),
            *(f"{value:.3f}" for value in (each.search, each.smoothed, each.confirmed)),
            f"{each.optimism:+.3f} [{each.lower:+.3f}, {each.upper:+.3f}]",
            *(f"{value:+.3f}" for value in (each.smoothed_optimism, each.predicted)),
            "yes" if each.is_confirmed else "no",
        )
    means = np.mean([(each.optimism, each.smoothed_optimism, each.predicted) for each in outcomes], axis=0)
    console = Console(width=max(140, Console().width))
    console.print(table)
    console.print("mean optimism {:+.3f}, of smoothed scores {:+.3f}, predicted {:+.3f}".format(*means))


if __name__ == "__main__":
    main()
