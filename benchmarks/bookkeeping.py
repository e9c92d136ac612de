"""What a study's own bookkeeping costs: seconds and peak memory of each stage, on runs that never ran.

    python benchmarks/bookkeeping.py
    python benchmarks/bookkeeping.py --candidates 100 500 1000 --objectives 2 4 --stages choose report

A run directory is made for every combination of the sizes, through `RunDir`, with no model: an item is solved
where a luck shared by all candidates and one of each candidate's own are below a skill, which is a smooth
function of the coefficients. `--items` counts those of each score, so that a candidate has
items × (objectives + guards) of them. Each stage runs in a child process of its own; its peak of resident
memory is that of the whole process, imports included.

- `front`: the front, as in the line of progress before every trial, and its hypervolume;
- `trial`: what is done for one trial beside asking the sampler, merging and scoring: its scores worked out
  and written, and Optuna told;
- `choose`: what a study does after its last trial, and a report in its course: reading every score by item,
  smoothing, resampling, recommending; `smooth` is the smoothing in it alone;
- `gather`: all that the report shows, `choose` included; `report`: that, drawn and written.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, FloatDistribution
from rich.console import Console
from rich.table import Table

from mergetune.evaluation.evaluate import Measurement
from mergetune.evaluation.suite import Split, SuiteConfig
from mergetune.report import gather, write_report
from mergetune.results import selection
from mergetune.results.roles import BASE, expert_name, role_of
from mergetune.results.run_dir import Candidate, Cost, HoldoutUse, RunDir, StudyRecord
from mergetune.results.smoothing import smooth
from mergetune.space.recipe import OUTSIDE_LAYERS, MergeRecipe, RecipeGroup, Source
from mergetune.stats import pareto
from mergetune.stats.resampling import Floats, ItemJoin
from mergetune.study.search import CANDIDATE, open_search, success, tell

_N_LAYERS = 32
_N_FINALISTS = 3
_PARTS = ("input_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo"), "post_attention_layernorm")
_PARTS += tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))
_SPLITS: tuple[Split, Split] = ("search", "holdout")


@dataclass(frozen=True)
class Size:
    """How large a synthetic run is."""

    candidates: int
    items: int  # of each score in each split
    objectives: int
    guards: int
    dimensions: int
    experts: int

    @property
    def n_groups(self) -> int:
        """Return the number of layer groups, each with a coefficient per expert."""
        return self.dimensions // self.experts

    @property
    def objective_names(self) -> list[str]:
        """Return the objectives' names."""
        return [f"skill{i}" for i in range(self.objectives)]

    @property
    def guard_names(self) -> list[str]:
        """Return the guards' names."""
        return [f"guard{i}" for i in range(self.guards)]

    @property
    def expert_names(self) -> list[str]:
        """Return the experts' names."""
        return [f"e{i}" for i in range(self.experts)]


class SyntheticRun:
    """Writes the run directory of a study of some size."""

    def __init__(self, path: Path, size: Size) -> None:
        self.run, self.size, self.rng = RunDir(path), size, np.random.default_rng(0)
        self.experts = {e: Source(path=f"/models/{e}", digest=e * 8) for e in size.expert_names}
        self.keys = {split: self._keys(split) for split in _SPLITS}
        n_rows = range(len(self.keys["search"]))
        self.luck = {split: self.rng.normal(size=len(n_rows)) for split in _SPLITS}
        self.words = [f"The answer to item {i} is {'so ' * 30}{i % 97}." for i in n_rows]

    def write(self) -> RunDir:
        """Write base, experts and trials, the holdout of the first few, and the base once more."""
        with self.run.claim(_record(self.size)):
            pass
        parts = [f"model.layers.{i}.{part}.weight" for i in range(_N_LAYERS) for part in _PARTS]
        tensors = ["model.embed_tokens.weight", *parts, "model.norm.weight", "lm_head.weight"]
        changed = dict.fromkeys(self.size.expert_names, tensors)
        self.run.write_json("model.json", {"n_layers": _N_LAYERS, "tensors": tensors, "changed": changed})
        items = [
            keys.assign(split=split, prompt=self.words, target="so") for split, keys in self.keys.items()
        ]
        self.run.write_items(pd.concat(items, ignore_index=True))
        points = dict(itertools.islice(self._points(), self.size.candidates))
        for number, (name, point) in enumerate(points.items()):
            candidate = self._candidate(number, name, point)
            self.run.write_candidate(candidate, self._measure(name, point, "search"))
        confirmed = list(points)[: self.size.experts + 2 + _N_FINALISTS]
        for name in confirmed:
            self.run.write_measurement(name, "holdout", self._measure(name, points[name], "holdout"))
        use = HoldoutUse(
            at=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
            finalists=tuple(confirmed[-_N_FINALISTS:]),
            n_candidates=len(points),
        )
        self.run.add_holdout_use(use)
        self.run.write_noise(self._measure(BASE, points[BASE], "search"))
        return self.run

    def _points(self) -> Iterator[tuple[str, Floats]]:
        """Yield names and coefficients, (n_groups, n_experts): base, experts, an average, then trials."""
        shape = self.size.n_groups, self.size.experts
        yield BASE, np.zeros(shape)
        for own, name in zip(np.eye(self.size.experts), self.size.expert_names, strict=True):
            yield expert_name(name), np.broadcast_to(own, shape)
        yield "average-0.5", np.full(shape, 0.5)
        for number in itertools.count(1):
            yield f"trial-{number:04d}", self.rng.uniform(0, 1.3, shape).round(2)

    def _candidate(self, number: int, name: str, point: Floats) -> Candidate:
        groups: list[RecipeGroup] = []
        params: dict[str, float] = {}
        for group, values in zip(_groups(self.size.n_groups), point.tolist(), strict=True):
            own = dict(zip(self.size.expert_names, values, strict=True))
            groups.append(RecipeGroup.model_validate({**group, "lambda": own}))
            params |= {f"lambda.{group['name']}.{expert}": value for expert, value in own.items()}
        recipe = MergeRecipe(
            method="task_arithmetic",
            base=Source(path="/models/base", digest="b" * 64),
            experts=self.experts,
            groups=tuple(groups),
        )
        return Candidate(
            name=name,
            number=number,
            role=role_of(name),
            recipe=recipe,
            params=params,
            cost=Cost(merge_s=1.0, load_s=0.5, evaluate_s=30.0, n_items=len(self.words)),
        )

    def _keys(self, split: Split) -> pd.DataFrame:
        names = [*self.size.objective_names, *self.size.guard_names]
        return pd.DataFrame(
            {
                "score_name": np.repeat(names, self.size.items),
                "task": np.repeat([f"{name}:items.jsonl" for name in names], self.size.items),
                "item": [f"{split[0]}{i:015x}" for i in range(len(names) * self.size.items)],
            }
        )

    def _measure(self, name: str, point: Floats, split: Split) -> Measurement:
        """Solve the items where luck is below the skill of this point; each objective wants another one."""
        experts, groups = np.arange(self.size.objectives), np.arange(self.size.objectives)
        wanted = point.mean(axis=0)[experts % self.size.experts]
        wanted += 0.3 * point.mean(axis=1)[groups % self.size.n_groups]
        skills = [*(np.tanh(wanted) - 0.06 * point.mean() * self.size.experts)]
        skills += [1.0 - 0.03 * (point.mean() * self.size.experts - 0.5)] * self.size.guards
        own = np.random.default_rng(zlib.crc32(f"{name} {split}".encode())).normal(size=len(self.words))
        solved = 0.8 * self.luck[split] + 0.6 * own < np.repeat(skills, self.size.items)
        frame = self.keys[split].assign(score=solved.astype(np.float64), response=self.words)
        return Measurement(frame, 30.0)


def _groups(count: int) -> list[dict[str, Any]]:
    """Return the selectors of the layer groups: outside the layers, then equal parts of the depth."""
    bounds = np.linspace(0, _N_LAYERS, count, dtype=int).tolist()
    inside = [
        {"name": f"g{i}", "layers": (first, end - 1)}
        for i, (first, end) in enumerate(itertools.pairwise(bounds), start=1)
    ]
    return [{"name": "g0", "match": OUTSIDE_LAYERS}, *inside]


def _record(size: Size) -> StudyRecord:
    task = {"items": "items.jsonl", "scorer": "exact"}
    suite = {
        "description": "A synthetic suite.",
        "chat_template": True,
        "objectives": {name: {"tasks": [task]} for name in size.objective_names},
        "guards": {name: {"tasks": [task], "margin": 0.05} for name in size.guard_names},
    }
    return StudyRecord(
        base="/models/base",
        experts={name: f"/models/{name}" for name in size.expert_names},
        search_space="/spaces/space.yaml",
        suite="/suites/suite.yaml",
        suite_name="suite",
        suite_config=SuiteConfig.model_validate(suite),
        digests={"suite": "5" * 64, "search_space": "a" * 64, "base": "b" * 64},
    )


# --- the stages: each prepares, starts the clock, and returns the seconds of what it is about


def _seconds(work: Callable[[], object], repetitions: int = 1) -> float:
    began = time.perf_counter()
    for _ in range(repetitions):
        work()
    return (time.perf_counter() - began) / repetitions


def time_front(run: RunDir) -> float:
    """Find the front, as in a line of progress, and its hypervolume."""
    suite, scores = run.study.suite_config, run.all_scores("search")
    floor = selection.objective_points({BASE: scores[BASE]}, suite)[0]

    def line() -> float:
        front = {name: scores[name] for name in selection.front(scores, suite)}
        return pareto.hypervolume(selection.objective_points(front, suite), floor)

    return _seconds(line)


def time_choose(run: RunDir) -> float:
    """Choose, as a study does at its end."""
    return _seconds(lambda: selection.choose(run))


def time_smooth(run: RunDir) -> float:
    """Smooth the scores; what it needs is read before."""
    candidates, measured, join = run.candidates(), {}, ItemJoin()
    for candidate in candidates:
        if (frame := run.measurement(candidate.name, "search", responses=False)) is not None:
            measured[candidate.name] = Measurement(frame, 0.0).scores()
            join.add(candidate.name, frame)
    items = join.items()
    return _seconds(lambda: smooth(candidates, measured, items))


def time_gather(run: RunDir) -> float:
    """Gather what the report shows."""
    return _seconds(lambda: gather(run))


def time_report(run: RunDir) -> float:
    """Write the report."""
    return _seconds(lambda: write_report(run))


def time_trial(run: RunDir) -> float:
    """Keep ten trials more, and tell Optuna, which knows all others."""
    suite, known = run.study.suite_config, run.candidates()
    last = known[-1]
    frame, scores = run.measurement(last.name, "search"), run.scores(last.name, "search")
    assert frame is not None  # it was written
    assert scores is not None
    distributions: dict[str, BaseDistribution] = {
        name: FloatDistribution(0.0, 2.0) for name in last.params or ()
    }
    sampler = optuna.samplers.RandomSampler(seed=0)
    with tempfile.TemporaryDirectory(dir=run.path) as folder:
        search = open_search(Path(folder) / "study.journal", ["maximize"] * len(suite.objectives), sampler)
        for _ in known:
            tell(search, search.ask(distributions), success([scores[n].value for n in suite.objectives], {}))
        trials = [search.ask(distributions) for _ in range(10)]
        scratch = RunDir(Path(folder))
        (scratch.path / "candidates").mkdir()

        def trial() -> None:
            asked = trials.pop()
            candidate = last.model_copy(update={"number": len(known) + len(trials)})
            scratch.write_candidate(candidate, Measurement(frame, 1.0))
            own = Measurement(frame, 1.0).scores()
            asked.set_user_attr(CANDIDATE, candidate.name)
            tell(search, asked, success([own[n].value for n in suite.objectives], {}))

        return _seconds(trial, repetitions=10)


STAGES: dict[str, Callable[[RunDir], float]] = {
    "front": time_front,
    "trial": time_trial,
    "choose": time_choose,
    "smooth": time_smooth,
    "gather": time_gather,
    "report": time_report,
}


@dataclass(frozen=True)
class Spent:
    """What one stage took."""

    seconds: float
    peak_mb: float  # resident memory of the process


def spent_on(stage: str, folder: Path, limit_s: float) -> Spent | None:
    """Run a stage in a process of its own; None where it was ended after `limit_s`."""
    command = [sys.executable, __file__, "--stage", stage, "--run", str(folder)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return None
    return Spent(**json.loads(done.stdout))


def _print_stage(stage: str, folder: Path) -> None:
    seconds = STAGES[stage](RunDir(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "peak_mb": peak / (1 if sys.platform == "linux" else 1024) / 1024}))


def _sizes(arguments: argparse.Namespace) -> Iterator[Size]:
    names = ("candidates", "items", "objectives", "guards", "dimensions", "experts")
    for values in itertools.product(*(getattr(arguments, name) for name in names)):
        yield Size(**dict(zip(names, values, strict=True)))


def measure(sizes: Sequence[Size], stages: Sequence[str], limit_s: float) -> Table:
    """Make a run of each size, spend the stages on it, and return the table."""
    columns = [*Size.__annotations__, *(f"{stage}, s" for stage in stages), "peak, MB"]
    table = Table(*columns)
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            SyntheticRun(Path(folder), size).write()
            found = {stage: spent_on(stage, Path(folder), limit_s) for stage in stages}
        cells = [f"{own.seconds:.3g}" if own else f"> {limit_s:.0f}" for own in found.values()]
        peaks = [f"{stage} {own.peak_mb:.0f}" for stage, own in found.items() if own]
        table.add_row(*map(str, vars(size).values()), *cells, ", ".join(peaks))
    return table


def main() -> None:
    """Read the command line; measure every combination of sizes, or, as a child, a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    defaults = {
        "candidates": 500,
        "items": 5000,
        "objectives": 4,
        "guards": 2,
        "dimensions": 24,
        "experts": 3,
    }
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=[value])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES])
    parser.add_argument("--limit", type=float, default=1800, help="seconds after which a stage is ended")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        _print_stage(arguments.stage, arguments.run)
        return
    Console(width=200).print(measure([*_sizes(arguments)], arguments.stages, arguments.limit))


if __name__ == "__main__":
    main()
