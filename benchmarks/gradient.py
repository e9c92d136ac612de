"""What a gradient warm start is worth: with and without it, at equal cost.

    export OMP_NUM_THREADS=1 TQDM_DISABLE=1
    python benchmarks/gradient.py --folder DIR [--pair small | smollm2] [--seeds 2 3 4 5 6] [--json FILE]

`small`: Llamas trained from scratch, a base and three experts for each seed (`small_skills.py`). The
descent's settings were chosen on seeds 0 and 1.
`smollm2`: the two experts of examples/taskmaster; the seed is the study's, and the descent does not depend on
it. Its search split helped to choose the descent's settings; its holdout split did not.

Every arm is a study of its own: `sampler` without gradients, `gradient` with points found by descent before
the sampler goes on from them; `gradient alone` is the latter before its first trial, and `baselines` are what
each study measures first. The layer groups are slices of the depth, so many that lambdas of all experts make
the dimensions asked for. DIR keeps models and runs, and a benchmark that was cut off goes on there.

Columns are costs after the baselines, in evaluations of the whole search split: one for each candidate, and
a descent's forward passes (a backward pass counts as two); `end` is all that an arm measured. Search scores
alone (and the guards by them) say what stands on the front at this cost and what is recommended. How good
that is was then measured on the holdout split, which neither search nor descent saw:

- hypervolume: the front's volume above the base, as a share of the best known, which is the largest of any
  arm at any cost and of all runs of the same models together;
- worst skill: the least share of the best expert's gain over the base that the recommended merge keeps.

Figures are means over seeds ± their standard error.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
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
from mergetune.results.selection import Scales, Scores
from mergetune.space.search_space_config import SearchSpaceConfig
from mergetune.stats import pareto
from mergetune.study.candidates import Candidates
from mergetune.study.loop import run_study
from mergetune.study.plan import Plan

TASKMASTER = Path(__file__).parent.parent / "examples" / "taskmaster"
COSTS = {"6": 6.0, "12": 12.0, "20": 20.0, "end": math.inf}  # full evaluations after the baselines
ARMS: dict[str, dict[str, str]] = {  # each one's `warm_start`
    "sampler": {"kind": "none"},
    "gradient": {"kind": "gradient"},
    "gradient-layers": {"kind": "gradient", "grain": "layers"},
    "gradient-attention_mlp": {"kind": "gradient", "grain": "attention_mlp"},
}
METRICS = {"share": "hypervolume / best known", "worst_skill": "worst skill"}

CONSOLE = Console(stderr=True)


@dataclass(frozen=True)
class Models:
    """What is merged, by which seeds it is studied, and the folder that keeps the studies."""

    folder: Path
    base: str
    experts: dict[str, str]
    suite: str
    n_layers: int
    seeds: tuple[int, ...]
    batch_size: int


def small_models(folder: Path, seed: int, kind: str = "even") -> Models:
    """Train the models of one seed, unless they are there; the studies have the same seed.

    `kind` is of `small_skills.EXPERTS`.
    """
    own = folder.resolve() / (f"small-{seed}" if kind == "even" else f"{kind}-{seed}")
    small_skills.write_models(own, seed, kind)
    experts = {skill: str(own / skill) for skill in small_skills.EXPERTS[kind]}
    suite = str(own / "suite.yaml")
    return Models(own, str(own / "base"), experts, suite, small_skills.N_LAYERS, (seed,), batch_size=200)


def smollm2_models(folder: Path, seeds: Iterable[int]) -> Models:
    """Name the models of examples/taskmaster."""
    own = folder.resolve() / "smollm2"
    own.mkdir(parents=True, exist_ok=True)
    experts = {name: str((TASKMASTER / "experts" / name).resolve()) for name in ("tools", "persona")}
    return Models(own, "smollm2-demo", experts, "taskmaster", 30, tuple(seeds), batch_size=50)


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

    arm: str
    seed: int
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
    def descent(self) -> float:
        """The descent's cost in full evaluations."""
        found = self.run.warm_start()
        return found.full_evaluations if found else 0.0

    @cached_property
    def costs(self) -> dict[str, float]:
        """What was spent after the baselines when a candidate was measured, in full evaluations."""
        trials = [candidate.name for candidate in self.run.candidates() if not candidate.is_baseline]
        return dict.fromkeys(self.search, 0.0) | {name: self.descent + i for i, name in enumerate(trials, 1)}

    def prefixes(self) -> dict[tuple[str, str], Mapping[str, Scores]]:
        """Return what was measured in each row of the table, within each column's cost."""
        baselines = {name for name, cost in self.costs.items() if cost == 0}
        by_slopes = {name for name in self.costs if roles.role_of(name) == "slopes"}
        rows = {"baselines": baselines, self.arm: set(self.costs)}
        if by_slopes:
            rows[f"{self.arm} alone"] = baselines | by_slopes
        return {
            (row, column): {n: own for n, own in self.search.items() if n in names and self.costs[n] <= cost}
            for row, names in rows.items()
            for column, cost in COSTS.items()
        }


class Choice(NamedTuple):
    """What search scores choose."""

    front: list[str]
    recommended: str


@dataclass(frozen=True)
class Cell:
    """A row and column of the table for one study: what was chosen, and how good that is on holdout."""

    row: str
    column: str
    seed: int
    descent: float
    front: list[str]
    recommended: str
    hypervolume: float
    worst_skill: float


def choose(search: Mapping[str, Scores], suite: SuiteConfig, scales: Scales) -> Choice:
    """Return the front and the recommended merge."""
    recommended = selection.recommend(search, suite, scales)
    assert recommended is not None  # averages are measured first
    return Choice(selection.front(search, suite), recommended.name)


def common_front(traces: Sequence[Trace]) -> list[tuple[Trace, str]]:
    """Return the front of all candidates of studies of the same models."""
    own = {
        # baselines are in all studies and keep their names, for guards refer to them
        name if trace.costs[name] == 0 else f"{trace.run.path.name} {name}": (trace, name)
        for trace in traces
        for name in trace.search
    }
    search = {key: trace.search[name] for key, (trace, name) in own.items()}
    return [own[key] for key in selection.front(search, traces[0].suite)]


def run_arm(models: Models, n_groups: int, arm: str, seed: int, n_trials: int) -> Trace:
    """Run a study, or go on with it."""
    name = f"{n_groups * len(models.experts)}-{arm}-{seed}"
    return Trace(arm, seed, run_on(models, name, n_groups, n_trials, seed, warm_start=ARMS[arm]))


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
        "budget": {"trials": n_trials, "hours": 24},
        "seed": seed,
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


def hypervolume(front: Sequence[Scores], base: Scores, suite: SuiteConfig) -> float:
    """Return the volume that a front dominates above the base."""
    points = selection.objective_points({str(i): scores for i, scores in enumerate(front)}, suite)
    return pareto.hypervolume(points, selection.objective_points({"": base}, suite)[0])


def cells(trace: Trace, also: Iterable[str]) -> list[Cell]:
    """Judge what search scores chose in one study; others are measured on the holdout split, too."""
    suite = trace.suite
    names = [candidate.name for candidate in trace.run.candidates()]
    searched = selection.scales_of(trace.run, names)
    choices = {place: choose(search, suite, searched) for place, search in trace.prefixes().items()}
    chosen = {name for choice in choices.values() for name in (*choice.front, choice.recommended)}
    scores = confirm(trace.run, chosen.union(also))
    confirmed = selection.scales_of(trace.run, names, "holdout")
    return [
        Cell(
            *place,
            trace.seed,
            trace.descent,
            *choice,
            hypervolume([scores[name] for name in choice.front], scores[roles.BASE], suite),
            min(selection.retained_gains(scores, scores[choice.recommended], suite, confirmed).values()),
        )
        for place, choice in choices.items()
    ]


def compare(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """Judge studies of the same models by the best that is known of these; returns a row for each cell."""
    common = common_front(traces)
    found = [
        cell for trace in traces for cell in cells(trace, [name for own, name in common if own is trace])
    ]
    holdout = {trace: trace.run.all_scores("holdout") for trace in traces}
    points, base = [holdout[trace][name] for trace, name in common], holdout[traces[0]][roles.BASE]
    best = max(hypervolume(points, base, traces[0].suite), *(cell.hypervolume for cell in found))
    return [{**asdict(cell), "best_known": best, "share": cell.hypervolume / (best or 1.0)} for cell in found]


def table(rows: pd.DataFrame, metric: str) -> Table:
    """Lay out one metric: a row for each dimensions and arm, a column for each cost."""
    shown = Table("dimensions", "", "descent", *COSTS, title=METRICS[metric])
    for (dimensions, row), own in rows.groupby(["dimensions", "row"], sort=False):
        values = [own[own["column"] == column][metric] for column in COSTS]
        descent = "" if row == "baselines" else f"{own['descent'].mean():.1f}"
        shown.add_row(str(dimensions), str(row), descent, *map(mean_and_error, values))
    return shown


def mean_and_error(values: pd.Series[float]) -> str:
    """Write a mean with its standard error, which a single value has none of."""
    mean, n = f"{values.mean():.3f}", len(values)
    return mean if n == 1 else f"{mean} ± {values.std() / math.sqrt(n):.3f}"


def run_all(arguments: argparse.Namespace) -> pd.DataFrame:
    """Run every arm on every model, and compare."""
    seeds, rows = arguments.seeds, []
    if arguments.pair == "small":
        every = [small_models(arguments.folder, seed) for seed in seeds]
    else:
        every = [smollm2_models(arguments.folder, seeds)]
    for dimensions in arguments.dimensions:
        for models in every:
            n_groups = dimensions // len(models.experts)
            traces = []
            for seed in models.seeds:
                for arm in arguments.arms:
                    n_trials = arguments.trials if arm == "sampler" else arguments.long
                    traces.append(run_arm(models, n_groups, arm, seed, n_trials))
            rows += [{"dimensions": dimensions, **row} for row in compare(traces)]
    return pd.DataFrame(rows).drop_duplicates(["dimensions", "row", "column", "seed"])


def main() -> None:
    """Run the benchmark and print its tables; `--json` writes a row for each cell and seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="keeps models and runs")
    parser.add_argument("--pair", choices=["small", "smollm2"], default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["sampler", "gradient"])
    parser.add_argument("--trials", type=int, default=20, help="of the sampler without gradients")
    parser.add_argument("--long", type=int, default=60, help="trials of an arm with gradients")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    rows = run_all(arguments)
    for metric in METRICS:
        Console(width=max(110, Console().width)).print(table(rows, metric))
    if arguments.json:
        figures = {"pair": arguments.pair, "cells": rows.to_dict("records")}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
