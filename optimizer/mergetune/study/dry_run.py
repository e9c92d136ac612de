"""What a study would do, and how long that takes, before it does it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from mergetune.engines.engine import UNCHANGED, EngineChanges, EngineConfig
from mergetune.engines.weight_facts import WeightFacts
from mergetune.evaluation.evaluate import Documents, Evaluator
from mergetune.evaluation.suite import Split
from mergetune.files.library import use_cache
from mergetune.machine.memory import free_bytes
from mergetune.measuring.model_under_test import LocalModel
from mergetune.measuring.pool import Job, Pool
from mergetune.measuring.progress import Progress
from mergetune.merging.inputs import Inputs
from mergetune.results.run_dir import RunDir
from mergetune.space.search_space import SearchSpace
from mergetune.stats.number_text import duration
from mergetune.study.baselines import baselines
from mergetune.study.loop import open_spaces
from mergetune.study.plan import Plan
from mergetune.study.watching.watchers import make_watchers

_PROBED = 32  # items of a task, where the engine has no batch size


@dataclass(frozen=True)
class Costs:
    """What one candidate costs on each split, in seconds, foreseen from some items of each task."""

    search_s: float
    holdout_s: float

    def shared(self, n_workers: int) -> Costs:
        """Return what one costs where so many are measured side by side."""
        return Costs(self.search_s / n_workers, self.holdout_s / n_workers)


def describe_study(
    study_file: Path,
    console: Console,
    engine: EngineChanges = UNCHANGED,
    cache: Path | None = None,
) -> None:
    """Print what a study would do, what it would measure, and about how long; nothing is written.

    One batch of items of every task is measured on the base.

    Args:
        study_file: the study.
        console: where to print.
        engine: takes the place of options in the study file.
        cache: takes the place of its `cache`.

    Raises:
        MergetuneError: what `run_study` raises before it measures.
    """
    plan = Plan.read(study_file, engine)
    make_watchers(plan, RunDir(plan.folder))
    use_cache(cache or plan.cache, partial(console.print, highlight=False, markup=False))
    with Progress(console) as progress:
        progress.at_work(f"opening {plan.config.base} and {len(plan.config.experts)} experts")
        inputs = plan.open_inputs(None, progress.at_work)
        evaluator = Evaluator(plan.suite)
        plan = replace(plan, suite=evaluator.suite)
        space, _ = open_spaces(plan, inputs)
        progress.at_work("measuring one batch of every task on the base")
        config, costs = _probe(plan.config.engine, inputs, evaluator)
        for warning in (*inputs.warnings, *evaluator.warnings):
            progress.say(f"warning: {warning}")
        for name, text in _rows(plan, inputs, space, evaluator, config, costs):
            progress.say(f"{name:<14} {text}")


def _rows(
    plan: Plan,
    inputs: Inputs,
    space: SearchSpace,
    evaluator: Evaluator,
    config: EngineConfig,
    costs: Costs,
) -> Iterator[tuple[str, str]]:
    experts, budget = ", ".join(inputs.expert_sources), plan.config.budget
    n_groups, n_free = len(space.groups), len(space.distributions)
    yield "search space", f"{plan.config.search_space}: {n_free} coefficients in {n_groups} layer groups"
    yield "models", f"{plan.config.base}, {len(inputs.base.names)} tensors; experts {experts}"
    for split in ("search", "holdout"):
        yield f"{split} split", _items(evaluator, split)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = auto if config.device == "auto" else config.device
    weights = WeightFacts.read(inputs.base.folder, config.dtype).nbytes / 2**30
    free = free_bytes(device) / 2**30
    n_workers = plan.config.engine.workers or 1
    side_by_side = f"{n_workers} workers side by side; each " if n_workers > 1 else ""
    batch = "" if config.batch_size is None else f", batches of {config.batch_size}"
    yield (
        "engine",
        f"{side_by_side}{config.kind}{batch}; {weights:.1f} GiB of weights, "
        f"{free:.1f} GiB are free on `{device}`",
    )
    listed = baselines(space, inputs.base_source, inputs.expert_sources, inputs.norms)
    n_first = len(listed) + 1  # the base once more
    n_confirmed = plan.config.finalists + len(inputs.expert_sources) + 3  # base, average, best baseline
    yield "baselines", f"{len(listed)} models, and the base twice: {duration(n_first * costs.search_s)}"
    costs = costs.shared(n_workers)
    n_trials = budget.trials if n_free else min(budget.trials, 1)
    if budget.items is not None:
        n_paid_for = -(-budget.items // evaluator.count("search")) - len(listed)
        n_trials = min(n_trials, max(n_paid_for, 0))
    search_s = min(n_trials * costs.search_s, max(budget.hours * 3600 - n_first * costs.search_s, 0))
    slopes = (
        "" if plan.config.warm_start.kind == "none" else "; what slopes lead to costs up to twice as much"
    )
    yield "trials", f"up to {n_trials} trials, within {budget.hours:g} hours: {duration(search_s)}{slopes}"
    holdout_s = n_confirmed * costs.holdout_s if evaluator.count("holdout") else 0.0
    yield "confirmation", f"up to {n_confirmed} models on the holdout split: {duration(holdout_s)}"
    total = n_first * costs.search_s + search_s + holdout_s
    yield (
        "in all",
        f"{duration(total)}, {duration(costs.search_s)} a candidate, without the time that slopes take",
    )


def _items(evaluator: Evaluator, split: Split) -> str:
    counts: dict[str, int] = {}
    for name, documents in evaluator.documents(split).items():
        key = evaluator.tasks[name].score_name
        counts[key] = counts.get(key, 0) + len(documents)
    every = ", ".join(f"{key} {count}" for key, count in counts.items())
    return f"{sum(counts.values())} items: {every}"


def _probe(config: EngineConfig, inputs: Inputs, evaluator: Evaluator) -> tuple[EngineConfig, Costs]:
    """Measure one batch of every task on the base; returns the engine's settled configuration, too.

    Each task alone says what it costs beside the others, and all at a time what they cost together.
    """
    base = LocalModel.base_of(inputs)
    search = evaluator.documents("search")
    here = config.model_copy(update={"workers": None, "ray_address": None})
    with closing(Pool(base, here, evaluator, None)) as pool:
        settled = pool.start()
        n_probed = settled.batch_size or _PROBED
        some = {name: documents[:n_probed] for name, documents in search.items() if documents}
        alone = {name: _seconds(pool, {name: own}) for name, own in some.items()}
        together = _seconds(pool, some) / (sum(alone.values()) or 1.0)
    seconds = {name: together * alone[name] / len(own) for name, own in some.items()}
    return settled, Costs(_foreseen(seconds, search), _foreseen(seconds, evaluator.documents("holdout")))


def _seconds(pool: Pool, documents: Documents) -> float:
    return pool.measured(Job("probe", documents)).cost.evaluate_s


def _foreseen(seconds: Mapping[str, float], documents: Documents) -> float:
    return sum(seconds.get(name, 0.0) * len(own) for name, own in documents.items())
