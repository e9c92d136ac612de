"""Measuring models: a recipe is merged into a living engine and scored on a suite."""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from optimizer import selection
from optimizer.engines import Engine, EngineConfig, start_engine
from optimizer.errors import MergetuneError, TrialError
from optimizer.evaluate import Evaluator, Measurement, Score
from optimizer.library import find
from optimizer.merging.adapter import is_adapter
from optimizer.merging.inputs import Inputs, open_inputs
from optimizer.merging.merger import Merger
from optimizer.models import find_model
from optimizer.progress import Progress, candidate_line
from optimizer.recipe import MergeRecipe, RecipeGroup, count_layers
from optimizer.run_dir import Candidate, CandidateKind, Cost, RunDir
from optimizer.suite import Split, read_suite

_VERSIONS_OF = ("mergetune", "torch", "transformers", "lm-eval", "optuna", "safetensors")

log = logging.getLogger("mergetune")


def write_facts(run: RunDir, inputs: Inputs, evaluator: Evaluator) -> None:
    """Keep what the report needs beside the measurements."""
    run.write_items(evaluator.items())
    run.write_json("versions.json", {name: importlib.metadata.version(name) for name in _VERSIONS_OF})
    run.write_json("warnings.json", list(inputs.warnings))
    run.write_json(
        "model.json",
        {
            "n_layers": count_layers(inputs.base.names),
            "tensors": list(inputs.base.names),
            "task_vector_norms": dict(inputs.norms),
        },
    )


@dataclass
class Bench:
    """Where candidates are measured: the merger, the engine and the suite, and what they found."""

    merger: Merger
    engine: Engine
    evaluator: Evaluator
    run: RunDir
    progress: Progress
    scores: dict[str, dict[str, Score]]

    def measure(
        self, kind: CandidateKind, name: str, recipe: MergeRecipe, params: Mapping[str, float] | None
    ) -> Candidate:
        """Merge, load and score one candidate on the search split, unless that was done before."""
        known = self.run.candidate(name)  # perhaps from the holdout split alone
        if known is not None and (known.state == "failed" or name in self.scores):
            return known
        number = len(self.run.candidates()) if known is None else known.number
        holdout_cost = Cost() if known is None else known.holdout_cost
        fields = {"name": name, "number": number, "kind": kind, "recipe": recipe, "params": params}
        fields["holdout_cost"] = holdout_cost
        try:
            load = self.load(recipe)
            measurement = self.evaluator.measure(self.engine.lm, "search")
        except (TrialError, torch.OutOfMemoryError) as error:
            log.exception("%s failed", name)
            if kind == "baseline":
                raise MergetuneError(f"The baseline `{name}` cannot be measured: {error}") from error
            candidate = Candidate.model_validate({**fields, "state": "failed", "reason": str(error)})
            self.run.write_candidate(candidate, None)
            self.progress.say(candidate_line(name, None, 0.0, str(error)))
            return candidate
        spent = Cost(evaluate_s=measurement.seconds, n_items=len(measurement.items))
        candidate = Candidate.model_validate({**fields, "cost": load.plus(spent)})
        self.run.write_candidate(candidate, measurement)
        self.scores[name] = measurement.scores()
        self.progress.say(candidate_line(name, self.scores[name], candidate.cost.total_s, ""))
        return candidate

    def confirm(self, candidate: Candidate) -> None:
        """Score a candidate on the holdout split, unless that was done before."""
        if self.run.measurement(candidate.name, "holdout") is not None:
            return
        self.progress.at_work(f"holdout: {candidate.name}")
        load = self.load(candidate.recipe)
        measurement = self.evaluator.measure(self.engine.lm, "holdout")
        self.run.write_measurement(candidate.name, "holdout", measurement)
        spent = load.plus(Cost(evaluate_s=measurement.seconds, n_items=len(measurement.items)))
        self.run.write_candidate(candidate.model_copy(update={"holdout_cost": spent}), None)
        line = candidate_line(candidate.name, measurement.scores(), spent.total_s, "")
        self.progress.say(f"holdout: {line}")

    def load(self, recipe: MergeRecipe) -> Cost:
        """Merge a recipe straight into the engine."""
        clock = _Stopwatch()
        start = time.perf_counter()
        self.engine.load(clock.watch(self.merger.merge(recipe, into=self.engine.weights)))
        total_s = time.perf_counter() - start
        return Cost(merge_s=clock.seconds, load_s=total_s - clock.seconds)

    def outcome(self, candidate: Candidate) -> tuple[list[float], dict[str, float]]:
        """Return a complete candidate's objective values and guard violations, as Optuna takes them."""
        suite = self.evaluator.suite.config
        scores = self.scores[candidate.name]
        values = [scores[name].value for name in suite.objectives]
        return values, selection.guard_violations(scores, self.scores, suite)


class _Stopwatch:
    """Adds up the time that an iterator takes, apart from what its consumer does with it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        while True:
            start = time.perf_counter()
            item = next(tensors, None)
            self.seconds += time.perf_counter() - start
            if item is None:
                return
            yield item


def measure_model(
    model: str,
    suite: str,
    base: str | None,
    split: Literal["search", "holdout", "all"],
    batch_size: int,
) -> Measurement:
    """Score one model, or an adapter on its `base`, on a suite; paths are relative to this folder.

    Raises:
        MergetuneError: there is no such model or suite, or an adapter came without its base.
    """
    here = Path()
    evaluator = Evaluator(read_suite(find("evals", suite, here)))
    folder = find_model(model, here)
    if is_adapter(folder) and base is None:
        raise MergetuneError(f"{folder}: is an adapter. Name the model it belongs to with --base.")
    engine = start_engine(EngineConfig(batch_size=batch_size), find_model(base, here) if base else folder)
    try:
        if base is not None:
            _load_expert(engine, find_model(base, here), folder)
        wanted: list[Split] = ["search", "holdout"] if split == "all" else [split]
        parts = [evaluator.measure(engine.lm, each) for each in wanted if evaluator.count(each)]
        items = pd.concat([part.items for part in parts], ignore_index=True)
        return Measurement(items, sum(part.seconds for part in parts))
    finally:
        engine.close()


def _load_expert(engine: Engine, base: Path, expert: Path) -> None:
    """Put one expert's weights into an engine that holds its base."""
    inputs = open_inputs(base, {"expert": expert})
    group = RecipeGroup.model_validate({"name": "all", "lambda": {"expert": 1.0}})
    recipe = MergeRecipe(
        method="task_arithmetic",
        base=inputs.base_source,
        experts=inputs.expert_sources,
        groups=(group,),
    )
    engine.load(Merger(inputs.base, inputs.experts).merge(recipe))
