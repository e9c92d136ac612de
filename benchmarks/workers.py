"""What many workers cost: driver time per trial, idle workers, and what a search loses by them.

    python benchmarks/workers.py [--workers 1 8 64] [--trials 256] [--seconds 60] [--seeds 0 1 2]

A study runs as ever (store of replies, pool, sampler, elimination, run directory, a local Ray cluster), but a
worker's engine only waits and then answers: an item is solved where a luck of the item and one of the
candidate are below a skill, which is a smooth function of the lambdas. A trial on all items takes `--seconds`
times a draw of its own (gamma, standard deviation half the mean) that follows from its recipe alone, so that
any number of workers is told the same. One worker does not wait: its time is not of interest.

Columns, medians over the seeds:

- `driver`: CPU-seconds of the driver per trial of the search; `ask` of them in the sampler;
- `idle`: share of the workers' time in the search, from when all had started until the last trial began, in
  which they had nothing to do;
- `found`: the hypervolume, above the base, of the true skills of what is on the measured front, over that
  found with the first number of workers given.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import ray
import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from letters import distinct
from mergetune.engines import ray_cluster
from mergetune.engines.engine import EngineChanges
from mergetune.results import roles, selection
from mergetune.results.run_dir import RunDir
from mergetune.stats import pareto
from mergetune.study import loop
from small_skills import save, small_config, write_suite
from waiting_host import EXPERTS, OPTIONS, WaitingHost, skills


@dataclass
class Found:
    """What one study took and found; see the columns above."""

    n_trials: int
    driver_s: float
    ask_s: float
    idle: float
    hypervolume: float


def write_study(folder: Path, n_items: int, n_trials: int, seed: int, sampler: str) -> Path:
    """Write a base and two experts with random weights, their suite, and the study."""
    items = {skill: distinct(skill, n_items, str(seed)) for skill in EXPERTS}
    write_suite(folder, items, n_search=n_items)
    for number, name in enumerate(("base", *EXPERTS)):
        torch.manual_seed(number)
        auto: Any = AutoModelForCausalLM  # `from_config` has no types
        save(auto.from_config(small_config()), folder / name)
    study = {
        "base": "base",
        "experts": {name: name for name in EXPERTS},
        "search_space": "task_arithmetic_layer_groups",
        "suite": "suite.yaml",
        "engine": {"kind": "transformers"},
        "budget": {"trials": n_trials, "patience": n_trials, "hours": 1000},
        "warm_start": "none",
        "finalists": 1,
        "seed": seed,
        "sampler": sampler,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder / "study.yaml"


def run_one(n_workers: int, seed: int, arguments: argparse.Namespace) -> Found:
    """Run a study with so many workers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = write_study(
            folder, arguments.items // len(EXPERTS), arguments.trials, seed, arguments.sampler
        )
        busy = folder / "busy"
        busy.mkdir()
        suite = yaml.safe_load((folder / "suite.yaml").read_text())
        n_items = round(arguments.items * (1 - suite["holdout"]))
        seconds = arguments.seconds if n_workers > 1 else 0.0
        options = {"seconds": seconds, "n_items": n_items, "busy": str(busy)}
        (folder / "options.json").write_text(json.dumps(options))
        os.environ[OPTIONS] = str(folder / "options.json")
        os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
        ray.init(num_cpus=n_workers, include_dashboard=False, object_store_memory=2**28, log_to_driver=False)
        ray_cluster.EngineHost = WaitingHost  # type: ignore[misc,assignment]
        ray_cluster._versions = dict  # a worker that waits depends on none
        spent = {"ask": 0.0, "search": 0.0}
        optuna.Study.ask = _timed(optuna.Study.ask, spent, "ask", time.thread_time)  # type: ignore[method-assign]
        loop._search = _timed(loop._search, spent, "search", time.process_time)
        begun: list[float] = []
        loop._next_trial = _noting(loop._next_trial, begun)
        console = Console(file=(folder / "printed").open("w"))
        loop.run_study(study, folder / "run", console, EngineChanges(workers=n_workers), folder / "cache")
        ray.shutdown()
        run = RunDir(folder / "run")
        trials = [each for each in run.candidates() if not each.is_baseline]
        scores, suite_config = run.all_scores("search"), run.study.suite_config
        recipes = {each.name: each.recipe for each in run.candidates()}
        truth = {each: skills(recipes[each]) for each in selection.front(scores, suite_config)}
        return Found(
            n_trials=len(trials),
            driver_s=spent["search"] / len(trials),
            ask_s=spent["ask"] / len(trials),
            idle=_idle(busy, begun, n_workers) if seconds else math.nan,
            hypervolume=pareto.hypervolume(np.array([*truth.values()]), skills(recipes[roles.BASE])),
        )


def _timed(
    work: Callable[..., Any], spent: dict[str, float], name: str, clock: Callable[[], float]
) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        began = clock()
        try:
            return work(*arguments, **options)
        finally:
            spent[name] += clock() - began

    return timed


def _noting(work: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    """Note by the wall clock when a function is called."""

    def noting(*arguments: Any) -> Any:
        times.append(time.time())
        return work(*arguments)

    return noting


def _idle(folder: Path, begun: Sequence[float], n_workers: int) -> float:
    """Return the idle share of the workers' time from the first trial to the last, all having started."""
    work = [np.loadtxt(file, ndmin=2) for file in folder.iterdir()]
    begin, end = max(begun[0], *(own[0, 0] for own in work)), begun[-1]
    busy = sum(np.clip(own.clip(begin, end) @ [-1, 1], 0, None).sum() for own in work)
    return float(1 - busy / (n_workers * (end - begin)))


def main() -> None:
    """Run every study in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=256)
    parser.add_argument("--items", type=int, default=1000, help="of both skills together")
    parser.add_argument("--seconds", type=float, default=60.0, help="that a trial takes a worker")
    parser.add_argument("--sampler", default="auto")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(asdict(run_one(arguments.workers[0], arguments.seeds[0], arguments))))
        return
    table = Table("workers", "trials", "driver, s", "ask, s", "idle", "found")
    first: list[Found] = []
    for n_workers in arguments.workers:
        found = [_in_a_process(n_workers, seed, arguments) for seed in arguments.seeds]
        first = first or found

        def median(of: Callable[[Found], float], found: Sequence[Found] = found) -> float:
            return statistics.median(map(of, found))

        shares = [own.hypervolume / other.hypervolume for own, other in zip(found, first, strict=True)]
        table.add_row(
            str(n_workers),
            f"{median(lambda each: each.n_trials):g}",
            f"{median(lambda each: each.driver_s):.2f}",
            f"{median(lambda each: each.ask_s):.2f}",
            f"{median(lambda each: each.idle):.1%}",
            f"{statistics.median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})",
        )
    Console(width=120).print(table)


def _in_a_process(n_workers: int, seed: int, arguments: argparse.Namespace) -> Found:
    same = [f"--{name}={getattr(arguments, name)}" for name in ("trials", "items", "seconds", "sampler")]
    command = [sys.executable, __file__, "--one", f"--workers={n_workers}", f"--seeds={seed}", *same]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found = Found(**json.loads(done.stdout.splitlines()[-1]))
    print(n_workers, "workers, seed", seed, found, file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
