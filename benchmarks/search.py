"""What a search is worth: the true front that each method would report, against what it costs.

    export OMP_NUM_THREADS=1 TQDM_DISABLE=1
    python benchmarks/search.py --folder DIR [--problems uneven small-12] [--seeds 2 3 4 5 6] [--json FILE]

Problems, each with models of its own for every seed (`small_skills.py`):

- `uneven`: two experts, one trained much longer than the other, 8 lambdas in 4 slices of the depth. Every
  plain average loses the first skill: its score is a cliff over most of the box.
- `small-12`, `small-24`: three experts and objectives, 12 and 24 lambdas.

Methods are studies of their own, all with the same baselines: random points, NSGA-II, TPE, CMA-ES on the mean
of all skills (as mergekit-evolve searches), Optuna's Gaussian process (`gp`), and points that slopes lead to
and the Gaussian process after them: as a study does by default (`slopes`), and with a lambda for each tensor
and expert in the descent (`slopes-tensors`).

Costs are full evaluations after the baselines: one for each candidate, and a descent's forward passes (a
backward pass counts as two). At each cost, what is on the front by search scores was measured on the holdout
split, which no search saw; the hypervolume above the base is given as a share of the best known, the largest
of any method at any cost, of all together, and of an oracle: lambdas for each tensor, found by gradient on
all search items (`oracle.py`), whose own share is in the last column of hypervolumes, whatever it cost.
`ffe_90` and `ffe_95` are the least costs at which the share is 0.90 and 0.95, `optimism` by how much search
scores overstate the last front's hypervolume. Figures are medians over seeds, with quartiles.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from gradient import Models, Trace, common_front, confirm, hypervolume, run_on, small_models
from mergetune.evaluation.evaluate import Score
from mergetune.evaluation.suite import SuiteConfig
from mergetune.results import roles, selection
from mergetune.results.run_dir import RunDir
from mergetune.stats import pareto
from mergetune.study.rescore import rescore
from oracle import descend

COSTS = (3, 6, 12, 20, 30)  # full evaluations after the baselines
METHODS: dict[str, dict[str, Any]] = {
    "random": {"sampler": "RandomSampler"},
    "nsga2": {"sampler": {"kind": "NSGAIISampler", "population_size": 10}},
    "tpe": {"sampler": "TPESampler"},
    "cma-es": {"sampler": "CmaEsSampler"},
    "gp": {"sampler": "GPSampler"},
    "slopes": {"sampler": "GPSampler", "warm_start": "gradient"},
    "slopes-tensors": {"sampler": "GPSampler", "warm_start": {"kind": "gradient", "grain": "tensors"}},
}
ORACLE = "oracle"
OF_THE_MEAN = {"cma-es"}  # methods that search one objective


@dataclass(frozen=True)
class Problem:
    """Which experts there are, and into how many slices the depth is cut."""

    experts: str
    n_groups: int


PROBLEMS = {
    "uneven": Problem("uneven", 4),
    "small-12": Problem("even", 4),
    "small-24": Problem("even", 8),
}


def run_method(models: Models, problem: Problem, method: str, seed: int, n_trials: int) -> Trace:
    """Run a study of one method, or go on with it."""
    name, changes = f"{problem.n_groups}-{method}", {"allow_flat_objectives": True, "warm_start": "none"}
    if method in OF_THE_MEAN:
        changes["suite"] = str(write_mean(models))
    run = run_on(models, name, problem.n_groups, n_trials, seed, **{**changes, **METHODS[method]})
    if method not in OF_THE_MEAN:
        return Trace(method, seed, run)
    by_skill = run.path.with_name(f"{name}-by-skill")
    rescore(run, models.suite, by_skill)
    return Trace(method, seed, RunDir(by_skill))


def write_mean(models: Models) -> Path:
    """Write the suite whose only objective is the mean of all skills."""
    suite = yaml.safe_load(Path(models.suite).read_text(encoding="utf-8"))
    tasks = [task for objective in suite["objectives"].values() for task in objective["tasks"]]
    file, mean = models.folder / "mean.yaml", {**suite, "objectives": {"mean": {"tasks": tasks}}}
    file.write_text(yaml.safe_dump(mean, sort_keys=False), encoding="utf-8")
    return file


def prefix(trace: Trace, cost: float) -> Mapping[str, selection.Scores]:
    """Return what a study had measured on the search split when it had spent so much."""
    return {name: scores for name, scores in trace.search.items() if trace.costs[name] <= cost}


def volumes(models: Models, traces: Sequence[Trace]) -> dict[str, dict[str, float]]:
    """Return of each method the figures of one seed, all judged by the best that is known."""
    suite, costs = traces[0].suite, range(max(COSTS) + 1)
    common = common_front(traces)
    fronts = {
        trace: {cost: selection.front(prefix(trace, cost), suite) for cost in costs} for trace in traces
    }
    holdout = {}
    for trace in traces:
        also = {name for own, name in common if own is trace}
        holdout[trace] = confirm(trace.run, also.union(*fronts[trace].values(), {roles.BASE}))
    base = holdout[traces[0]][roles.BASE]

    def volume(trace: Trace, names: Sequence[str]) -> float:
        return hypervolume([holdout[trace][name] for name in names], base, suite)

    oracle = oracle_volume(models, base, suite)
    curves = {trace: [volume(trace, fronts[trace][cost]) for cost in costs] for trace in traces}
    together = hypervolume([holdout[trace][name] for trace, name in common], base, suite)
    best = max(oracle, together, *(max(curve) for curve in curves.values())) or 1.0
    found: dict[str, dict[str, float]] = {}
    for trace, curve in curves.items():
        shares = [value / best for value in curve]
        last = [trace.search[name] for name in fronts[trace][max(COSTS)]]
        reported = hypervolume(last, trace.search[roles.BASE], suite)
        found[trace.arm] = {
            **{f"ffe_{share}": _first(shares, share / 100) for share in (90, 95)},
            **{f"hv_at_{cost}": shares[cost] for cost in COSTS},
            "optimism": reported / (curve[-1] or math.nan) - 1,
        }
    figures = dict.fromkeys(found[traces[0].arm], math.nan)
    return {**found, ORACLE: figures | {f"hv_at_{max(COSTS)}": oracle / best}}


def oracle_volume(models: Models, base: selection.Scores, suite: SuiteConfig) -> float:
    """Return the hypervolume that an oracle's front has on the holdout split, above the base."""
    reached = list(descend(models.folder, list(models.experts)))
    searched = {str(i): _scores(each.search) for i, each in enumerate(reached)}
    points = selection.objective_points(searched, suite)
    return hypervolume([_scores(reached[i].holdout) for i in pareto.front(points)], base, suite)


def _scores(shares: Mapping[str, float]) -> selection.Scores:
    return {skill: Score(share, math.nan, 0) for skill, share in shares.items()}


def _first(shares: Sequence[float], wanted: float) -> float:
    """Return the least cost at which a share is reached."""
    return next((float(cost) for cost, share in enumerate(shares) if share >= wanted), math.inf)


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the quartiles of a figure over seeds; some may be infinite."""
    return [float(each) for each in np.quantile(values, (0.25, 0.5, 0.75), method="nearest")]


def table(name: str, rows: Mapping[str, Mapping[str, Sequence[float]]]) -> Table:
    """Lay out one problem: a row for each method, a column for each figure."""
    figures = list(next(iter(rows.values())))
    shown = Table(name, *figures)
    for method, own in rows.items():
        shown.add_row(method, *("{1:.2f} ({0:.2f}–{2:.2f})".format(*own[figure]) for figure in figures))
    return shown


def main() -> None:
    """Run the benchmark and print a table for each problem; `--json` writes the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="keeps models and runs")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(2, 12)))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    medians: dict[str, dict[str, dict[str, float | None]]] = {}
    for name in arguments.problems:
        problem, every = PROBLEMS[name], []
        for seed in arguments.seeds:
            models = small_models(arguments.folder, seed, problem.experts)
            traces = [run_method(models, problem, each, seed, max(COSTS)) for each in arguments.methods]
            every.append(volumes(models, traces))
        rows = {
            method: {figure: quartiles([own[method][figure] for own in every]) for figure in every[0][method]}
            for method in every[0]
        }
        Console(width=max(200, Console().width)).print(table(name, rows))
        medians[name] = {
            method: {key: values[1] if math.isfinite(values[1]) else None for key, values in own.items()}
            for method, own in rows.items()
        }
    if arguments.json:
        arguments.json.write_text(json.dumps(medians, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
