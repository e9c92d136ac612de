"""What a search is worth: the true front that each method would report, against what it costs.

    export OMP_NUM_THREADS=1 TQDM_DISABLE=1
    python benchmarks/search.py --folder DIR [--problems uneven small-12] [--seeds 2 3 4 5 6] [--json FILE]

Problems of small Llamas, each with models of its own for every seed (`small_skills.py`; settings of the
descent were chosen on seeds 0 and 1):

- `uneven`: two experts, one trained much longer than the other, 8 lambdas in 4 slices of the depth. Every
  plain average loses the first skill: its score is a cliff over most of the box.
- `small-6`, `small-12`, `small-24`: three experts and objectives; 2, 4 and 8 slices.
- `four`: four experts and objectives, 16 lambdas in 4 slices.

and `smollm2`, the two experts, three objectives and the guard of examples/taskmaster (12 lambdas in 6 slices;
the seed is the study's).

Methods are studies of their own, all with the same baselines: random points, NSGA-II, TPE, CMA-ES on the
mean of all skills (as mergekit-evolve searches), Optuna's Gaussian process (`gp`), and what a study does by
default (`slopes`): a descent in single tensors, and the Gaussian process around the points that it leads to.
In `slopes-groups` the descent keeps to the layer groups of the search space.

Costs are full evaluations after the baselines: one for each candidate, and a descent's forward passes (a
backward pass counts as two). At each cost, what is on the front by search scores was measured on the holdout
split, which no search saw; the hypervolume above the base is given as a share of the best known, the largest
of any method at any cost, of all together, and of an oracle: lambdas for each tensor, found by gradient on
all search items (`oracle.py`), whose own share is in the last column of hypervolumes, whatever it cost
(small Llamas only). `ffe_90` and `ffe_95` are the least costs at which the share is 0.90 and 0.95, `optimism`
by how much search scores overstate the last front's hypervolume, `worst_skill` the least share of the best
expert's gain over the base that the recommended merge keeps on the holdout split. Figures are medians over
seeds, with quartiles.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

import small_skills
from mergetune.evaluation.evaluate import Evaluator, Score
from mergetune.evaluation.suite import SuiteConfig
from mergetune.files.yaml_io import write_yaml
from mergetune.measuring.progress import Progress
from mergetune.results import roles, selection
from mergetune.results.config import StudyConfig
from mergetune.results.run_dir import RunDir
from mergetune.results.selection import Scores
from mergetune.space.search_space_config import SearchSpaceConfig
from mergetune.stats import pareto
from mergetune.study.candidates import Candidates
from mergetune.study.loop import run_study
from mergetune.study.plan import Plan
from mergetune.study.rescore import rescore
from oracle import descend

TASKMASTER = Path(__file__).parent.parent / "examples" / "taskmaster"
CONSOLE = Console(stderr=True)

COSTS = (3, 6, 12, 20, 30)  # full evaluations after the baselines
METHODS: dict[str, dict[str, Any]] = {
    "random": {"sampler": "RandomSampler"},
    "nsga2": {"sampler": {"kind": "NSGAIISampler", "population_size": 10}},
    "tpe": {"sampler": "TPESampler"},
    "cma-es": {"sampler": "CmaEsSampler"},
    "gp": {"sampler": "GPSampler"},
    "slopes": {"warm_start": "gradient"},
    "slopes-groups": {"warm_start": {"kind": "gradient", "grain": "search_space"}},
}
ORACLE = "oracle"
OF_THE_MEAN = {"cma-es"}  # methods that search one objective


@dataclass(frozen=True)
class Models:
    """What is merged, and the folder that keeps the studies."""

    folder: Path
    base: str
    experts: dict[str, str]
    suite: str
    n_layers: int
    batch_size: int


def small_models(folder: Path, seed: int, kind: str, n_search: int) -> Models:
    """Train the models of one seed, unless they are there; see `small_skills.write_models`."""
    more = "" if n_search == small_skills.N_SEARCH else f"-{n_search}"
    own = folder.resolve() / f"{kind}-{seed}{more}"
    small_skills.write_models(own, seed, kind, n_search)
    experts = {skill: str(own / skill) for skill in small_skills.EXPERTS[kind]}
    suite = str(own / "suite.yaml")
    return Models(own, str(own / "base"), experts, suite, small_skills.N_LAYERS, batch_size=200)


def smollm2_models(folder: Path) -> Models:
    """Name the models of examples/taskmaster."""
    own = folder.resolve() / "smollm2"
    own.mkdir(parents=True, exist_ok=True)
    experts = {name: str((TASKMASTER / "experts" / name).resolve()) for name in ("tools", "persona")}
    return Models(own, "smollm2-demo", experts, "taskmaster", 30, batch_size=50)


@dataclass(frozen=True)
class Problem:
    """Which models there are, and into how many slices the depth is cut."""

    models: str
    n_groups: int


SMOLLM2 = "smollm2"
PROBLEMS = {
    "uneven": Problem("uneven", 4),
    "small-6": Problem("even", 2),
    "small-12": Problem("even", 4),
    "small-24": Problem("even", 8),
    "four": Problem("four", 4),
    SMOLLM2: Problem(SMOLLM2, 6),
}


def search_space(n_layers: int, n_groups: int) -> SearchSpaceConfig:
    """Cut the depth into slices; embeddings go with the first one, final norm and head with the last."""
    bounds = [round(i * n_layers / n_groups) for i in range(n_groups + 1)]
    slices = ["|".join(map(str, range(first, end))) for first, end in pairwise(bounds)]
    patterns = [rf"\.layers\.({numbers})\." for numbers in slices]
    patterns[0] += r"|^model\.embed_tokens\."
    patterns[-1] += r"|^model\.norm\.|^lm_head\."
    return SearchSpaceConfig.model_validate(
        {
            "description": f"The depth in {n_groups} slices.",
            "method": "task_arithmetic",
            "groups": [{"name": f"depth{i}", "match": pattern} for i, pattern in enumerate(patterns, 1)],
        }
    )


@dataclass(frozen=True)
class Trace:
    """One study that ran: what it measured on the search split, and at what cost."""

    method: str
    run: RunDir

    @property
    def suite(self) -> SuiteConfig:
        """The suite's file."""
        return self.run.study.suite_config

    @cached_property
    def search(self) -> Mapping[str, Scores]:
        """The scores on the search split, by candidate."""
        return self.run.all_scores("search")

    @cached_property
    def costs(self) -> dict[str, float]:
        """What was spent after the baselines when a candidate was measured, in full evaluations."""
        record = self.run.warm_start_record() or {}
        passes = {each["name"]: each["n_passes"] for each in record.get("checkpoints", ())}
        of_one = sum(passes.values()) / record["full_evaluations"] if passes else 1.0
        costs, spent = dict.fromkeys(self.search, 0.0), 0.0
        for candidate in self.run.candidates():
            if not candidate.is_baseline:
                spent += 1 + passes.get(candidate.name, 0) / of_one
                costs[candidate.name] = spent
        return costs


def common_front(traces: Sequence[Trace]) -> list[tuple[Trace, str]]:
    """Return the front of all candidates of studies of the same models."""
    own = {
        # baselines are in all studies and keep their names, for guards refer to them
        name if trace.costs[name] == 0 else f"{trace.method} {name}": (trace, name)
        for trace in traces
        for name in trace.search
    }
    search = {key: trace.search[name] for key, (trace, name) in own.items()}
    return [own[key] for key in selection.front(search, traces[0].suite)]


def run_on(models: Models, name: str, n_groups: int, n_trials: int, seed: int, **changes: Any) -> RunDir:
    """Run a study of these models, or go on with it; `changes` are keys of its file."""
    space = models.folder / f"space-{n_groups}.yaml"
    write_yaml(space, search_space(models.n_layers, n_groups))
    study = {
        "base": models.base,
        "experts": models.experts,
        "search_space": str(space),
        "suite": models.suite,
        "engine": {"kind": "transformers", "batch_size": models.batch_size},
        "budget": {"trials": n_trials, "hours": 24, "patience": max(n_trials, 1)},
        "seed": seed,
        "elimination": 0.0,  # a candidate costs one full evaluation
        **changes,
    }
    file, out = models.folder / f"study-{name}.yaml", models.folder / "runs" / name
    write_yaml(file, StudyConfig.model_validate(study))
    CONSOLE.print(file, style="bold")
    run_study(file, out, CONSOLE)
    return RunDir(out)


def confirm(run: RunDir, names: Iterable[str]) -> dict[str, dict[str, Score]]:
    """Measure candidates on the holdout split, where that was not done; returns all scores there."""
    missing = set(names) - run.all_scores("holdout").keys()
    if missing:
        plan = Plan.read(run.path / "study.yaml")
        inputs, evaluator = plan.open_inputs(run.path), Evaluator(plan.suite)
        with (
            Progress(CONSOLE) as progress,
            closing(Candidates(plan.config.engine, inputs, evaluator, run, progress)) as candidates,
        ):
            for candidate in run.candidates():
                if candidate.name in missing:
                    candidates.confirm(candidate)
    return run.all_scores("holdout")


def run_method(models: Models, problem: Problem, method: str, seed: int, n_trials: int) -> Trace:
    """Run a study of one method, or go on with it."""
    name = f"{problem.n_groups}-{method}-{seed}"
    changes: dict[str, Any] = {"allow_flat_objectives": True, "warm_start": "none"}
    if method in OF_THE_MEAN:
        changes["suite"] = str(write_mean(models))
    run = run_on(models, name, problem.n_groups, n_trials, seed, **{**changes, **METHODS[method]})
    if method not in OF_THE_MEAN:
        return Trace(method, run)
    by_skill = run.path.with_name(f"{name}-by-skill")
    rescore(run, models.suite, by_skill)
    return Trace(method, RunDir(by_skill))


def write_mean(models: Models) -> Path:
    """Write the suite whose only objective is the mean of all skills."""
    suite = yaml.safe_load(Path(models.suite).read_text(encoding="utf-8"))
    tasks = [task for objective in suite["objectives"].values() for task in objective["tasks"]]
    file, mean = models.folder / "mean.yaml", {**suite, "objectives": {"mean": {"tasks": tasks}}}
    file.write_text(yaml.safe_dump(mean, sort_keys=False), encoding="utf-8")
    return file


def prefix(trace: Trace, cost: float) -> Mapping[str, Scores]:
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
        also = {name for own, name in common if own is trace} | {roles.BASE, recommended(trace)}
        holdout[trace] = confirm(trace.run, also.union(*fronts[trace].values()))
    base = holdout[traces[0]][roles.BASE]

    def volume(trace: Trace, names: Sequence[str]) -> float:
        return selection.hypervolume([holdout[trace][name] for name in names], base, suite)

    oracle = 0.0 if models.folder.name == SMOLLM2 else oracle_volume(models, base, suite)
    curves = {trace: [volume(trace, fronts[trace][cost]) for cost in costs] for trace in traces}
    together = selection.hypervolume([holdout[trace][name] for trace, name in common], base, suite)
    best = max(oracle, together, *(max(curve) for curve in curves.values())) or 1.0
    found: dict[str, dict[str, float]] = {}
    for trace, curve in curves.items():
        shares = [value / best for value in curve]
        last = [trace.search[name] for name in fronts[trace][max(COSTS)]]
        reported = selection.hypervolume(last, trace.search[roles.BASE], suite)
        found[trace.method] = {
            **{f"ffe_{share}": _first(shares, share / 100) for share in (90, 95)},
            **{f"hv_at_{cost}": shares[cost] for cost in COSTS},
            "optimism": reported / (curve[-1] or math.nan) - 1,
            "worst_skill": worst_skill(trace),
        }
    figures = dict.fromkeys(found[traces[0].method], math.nan)
    return {**found, ORACLE: figures | {f"hv_at_{max(COSTS)}": oracle / best}} if oracle else found


def recommended(trace: Trace) -> str:
    """Return the candidate that search scores recommend at the largest cost."""
    search = prefix(trace, max(COSTS))
    found = selection.best_merge(search, trace.suite, selection.scales_of(trace.run, search))
    assert found is not None  # averages are measured first
    return found


def worst_skill(trace: Trace) -> float:
    """Return the least share of a gain that the recommended merge keeps on the holdout split."""
    names = [candidate.name for candidate in trace.run.candidates()]
    scales, scores = selection.scales_of(trace.run, names, "holdout"), trace.run.all_scores("holdout")
    return min(selection.retained_gains(scores, scores[recommended(trace)], trace.suite, scales).values())


def oracle_volume(models: Models, base: Scores, suite: SuiteConfig) -> float:
    """Return the hypervolume that an oracle's front has on the holdout split, above the base."""
    reached = list(descend(models.folder, list(models.experts)))
    searched = {str(i): _scores(each.search) for i, each in enumerate(reached)}
    points = selection.objective_points(searched, suite)
    return selection.hypervolume([_scores(reached[i].holdout) for i in pareto.front(points)], base, suite)


def _scores(shares: Mapping[str, float]) -> Scores:
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
    parser.add_argument("--items", type=int, default=small_skills.N_SEARCH, help="of a skill, in the search")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    medians: dict[str, dict[str, dict[str, float | None]]] = {}
    for name in arguments.problems:
        problem, every = PROBLEMS[name], []
        for seed in arguments.seeds:
            is_large = problem.models == SMOLLM2
            models = (
                smollm2_models(arguments.folder)
                if is_large
                else small_models(arguments.folder, seed, problem.models, arguments.items)
            )
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
