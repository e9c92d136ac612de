"""Measuring models: a recipe is merged into a living engine and scored on a suite."""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from optimizer import selection
from optimizer.engines.choice import installed_version
from optimizer.engines.engine import Engine, EngineConfig, EngineKind
from optimizer.engines.start import start_chosen, start_engine
from optimizer.errors import EngineError, MergetuneError, TrialError
from optimizer.evaluate import ITEM_KEYS, Evaluator, Measurement
from optimizer.gradients import has_slopes
from optimizer.merging.inputs import Inputs
from optimizer.progress import Progress, candidate_line
from optimizer.recipe import MergeRecipe, count_layers
from optimizer.references import References, find_references
from optimizer.reply_store import ReplyStore, StoredLM
from optimizer.run_dir import Candidate, CandidateKind, Cost, RunDir
from optimizer.sensitivity import RECOMMENDED, anchor_points, measure_sensitivity
from optimizer.suite import Split

if TYPE_CHECKING:
    from optimizer.engines.transformers_engine import TransformersEngine

_ATTEMPTS = 2  # at a candidate, where the engine breaks
_FAULTS_IN_A_ROW = 6
_VERSIONS_OF = ("mergetune", "torch", "transformers", "lm-eval", "optuna", "safetensors")

log = logging.getLogger("mergetune")


def write_facts(run: RunDir, inputs: Inputs, evaluator: Evaluator, leaks: Sequence[str] = ()) -> None:
    """Keep what the report needs beside the measurements.

    Raises:
        MergetuneError: what was measured here is of other items.
    """
    run.write_items(evaluator.items())
    run.write_json("warnings.json", [*inputs.warnings, *leaks])
    run.write_json(
        "model.json",
        {
            "n_layers": count_layers(inputs.base.names),
            "tensors": list(inputs.base.names),
            "changed": inputs.changed,
            "task_vector_norms": dict(inputs.norms),
        },
    )


class Bench:
    """Where candidates are measured: a living engine and the suite, and what they found.

    An engine that breaks is replaced, and the candidate tried once more.

    Raises:
        MergetuneError: the engine cannot be started.
    """

    def __init__(
        self, engine: EngineConfig, inputs: Inputs, evaluator: Evaluator, run: RunDir, progress: Progress
    ) -> None:
        self.inputs, self.evaluator, self.run, self.progress = inputs, evaluator, run, progress
        self.scores = run.all_scores("search")
        self._replies = ReplyStore(run.path / "replies")
        self._broken_in_a_row = 0
        progress.at_work("starting the engine …")
        self.engine: Engine | None
        known = run.versions()
        self.engine, self._config = start_chosen(
            engine, inputs.base.folder, inputs, run.path, known.get("engine"), progress.say
        )
        versions = _versions(self._config.kind)
        changed = [name for name, now in versions.items() if known.get(name, now) != now]
        if changed:
            others = ", ".join(f"{name} {known[name]} (now {versions[name]})" for name in changed)
            progress.say(f"warning: what was measured here before was measured with {others}.")
        run.write_versions(self._config.kind, versions)

    def measure(
        self, kind: CandidateKind, name: str, recipe: MergeRecipe, params: Mapping[str, float] | None
    ) -> Candidate:
        """Merge, load and score one candidate on the search split, unless that was done before."""
        known = self.run.candidate(name)  # perhaps from the holdout split alone
        if known is not None and (name in self.scores or (known.state == "failed" and kind == "trial")):
            return known
        fields: dict[str, Any] = {
            "name": name,
            "number": len(self.run.candidates()) if known is None else known.number,
            "kind": kind,
            "recipe": recipe,
            "params": params,
            "holdout_cost": Cost() if known is None else known.holdout_cost,
        }

        began = time.perf_counter()

        def fail(reason: str) -> Candidate:
            cost = Cost(lost_s=time.perf_counter() - began)
            failed = Candidate.model_validate({**fields, "state": "failed", "reason": reason, "cost": cost})
            self.run.write_candidate(failed, None)
            self.progress.say(candidate_line(name, None, 0.0, reason))
            return failed

        if self.run.begin_attempt(name) > _ATTEMPTS and kind == "trial":
            return fail(f"{_ATTEMPTS} attempts were cut off: the process was killed, or ran out of memory")
        try:
            cost, measurement, faults = self._score(
                recipe, "search", lambda fault: self.progress.say(candidate_line(name, None, 0.0, fault))
            )
        except BaseException as error:
            reason = _reason(error)
            if reason is None:
                self.run.end_attempts(name)
                raise
            log.exception("%s failed", name)
            if kind == "baseline":
                raise MergetuneError(f"The baseline `{name}` cannot be measured: {reason}") from error
            return fail(reason)
        candidate = Candidate.model_validate({**fields, "cost": cost, "faults": faults})
        self.run.write_candidate(candidate, measurement)
        self.scores[name] = measurement.scores()
        self.progress.say(candidate_line(name, self.scores[name], candidate.cost.total_s, ""))
        return candidate

    def measure_noise(self) -> None:
        """Score the base once more on the search split: what differs is noise of the measurement alone."""
        base = self.run.candidate(selection.BASE)
        if base is None or self.run.noise() is not None:
            return
        self.progress.at_work("the base once more")
        cost, again, _ = self._score(base.recipe, "search", self.progress.say, repeat=1)
        self.run.write_noise(again)
        first = self.run.measurement(selection.BASE, "search")
        assert first is not None  # measured before
        both = first.merge(again.items, on=ITEM_KEYS, suffixes=("", "_again"), validate="one_to_one")
        n_differ = int((both["score"].fillna(0) != both["score_again"].fillna(0)).sum())
        self.progress.say(
            f"noise floor: the base once more, {cost.total_s:.1f} s; {n_differ} of {len(first)} items differ"
        )

    def confirm(self, candidate: Candidate) -> None:
        """Score a candidate on the holdout split, unless that was done before; says why if it cannot be."""
        if self.run.measurement(candidate.name, "holdout") is not None:
            return
        self.progress.at_work(f"holdout: {candidate.name}")

        def say(reason: str) -> None:
            self.progress.say(f"holdout: {candidate_line(candidate.name, None, 0.0, reason)}")

        try:
            cost, measurement, _ = self._score(candidate.recipe, "holdout", say)
        except (TrialError, torch.OutOfMemoryError) as error:
            log.exception("%s failed on the holdout split", candidate.name)
            say(str(error))
            return
        self.run.write_measurement(candidate.name, "holdout", measurement)
        self.run.write_candidate(candidate.model_copy(update={"holdout_cost": cost}), None)
        line = candidate_line(candidate.name, measurement.scores(), cost.total_s, "")
        self.progress.say(f"holdout: {line}")

    @contextmanager
    def transformers(self) -> Iterator[TransformersEngine]:
        """Lend a transformers engine that merges the same models; vLLM makes room until it is needed."""
        from optimizer.engines.transformers_engine import TransformersEngine, free_memory

        if isinstance(self.engine, TransformersEngine):
            yield self.engine
            return
        self.close()
        shared = self._config.model_dump(include={"dtype", "max_length", "device"})
        try:
            config = EngineConfig(kind="transformers", **shared)
            base, merger, chat = self.inputs.base.folder, self.inputs.merger, self.inputs.chat
            with closing(TransformersEngine(config, base, merger, chat)) as lent:
                yield lent
        finally:
            free_memory()  # even if it could not be started

    def references(self, engine: TransformersEngine) -> References:
        """Find what to say to the items of the search split; what the base and the experts said may serve.

        What a merge said may not: its own words would be what its loss and slopes are taken on.
        """
        names = [name for name in self.scores if not selection.is_merge(name)]
        measured = [self.run.measurement(name, "search") for name in names]
        replies = [frame for frame in measured if frame is not None]
        found = find_references(self.evaluator, engine.lm, replies=replies)
        for reason in found.missing.values():
            self.progress.say(f"warning: slopes are taken without a task: {reason}")
        return found

    def measure_sensitivity(self, recommended: MergeRecipe) -> None:
        """Take the slopes at the base, the uniform average and this merge, unless that was done before."""
        points = anchor_points(self.inputs.base_source, self.inputs.expert_sources)
        points[RECOMMENDED] = recommended
        wanted = {recipe.digest for recipe in points.values() if has_slopes(recipe.method)}
        known = self.run.sensitivity()
        if known is not None and (known.empty or wanted <= set(known["digest"])):
            return
        self.progress.at_work("taking the slopes of every coefficient …")
        with self.transformers() as engine:
            found = measure_sensitivity(
                engine,
                self.inputs.merger,
                points,
                self.references(engine),
            )
        self.run.write_sensitivity(found)

    def close(self) -> None:
        """End the engine."""
        if self.engine is not None:
            self.engine.close()
        self.engine = None

    def _living(self) -> Engine:
        """Return the engine, started again if it made room."""
        if self.engine is None:
            self.progress.at_work("starting the engine again …")
            self.engine = start_engine(self._config, self.inputs.base.folder, self.inputs, self.run.path)
        return self.engine

    def _score(
        self, recipe: MergeRecipe, split: Split, on_fault: Callable[[str], object], repeat: int = 0
    ) -> tuple[Cost, Measurement, tuple[str, ...]]:
        """Merge, load and score, once more where the engine breaks; returns its faults, too.

        Replies are kept as they come; those of a `repeat` stand apart.
        """
        name = f"{recipe.digest}-{repeat}" if repeat else recipe.digest
        faults: tuple[str, ...] = ()
        began, lost_s = time.perf_counter(), 0.0
        while True:
            try:
                engine = self._living()
                loaded = engine.load(recipe)
                lm = StoredLM(partial(getattr, engine, "lm"), engine.lm, self._replies, name)
                measurement = self.evaluator.measure(lm, split)
            except EngineError as fault:
                log.exception("the engine broke")
                faults = (*faults, str(fault))
                if len(faults) < _ATTEMPTS:
                    on_fault(str(fault))
                self._restart(str(fault))
                if len(faults) == _ATTEMPTS:
                    raise
                lost_s = time.perf_counter() - began
                continue
            self._broken_in_a_row = 0
            cost = Cost(
                merge_s=loaded.merge_s,
                load_s=loaded.load_s,
                evaluate_s=measurement.seconds,
                lost_s=lost_s,
                n_items=len(measurement.items),
            )
            return cost, measurement, faults

    def _restart(self, reason: str) -> None:
        """Put a new engine in place of one that broke."""
        self._broken_in_a_row += 1
        self.close()
        if self._broken_in_a_row == _FAULTS_IN_A_ROW:
            raise MergetuneError(
                f"The engine broke {_FAULTS_IN_A_ROW} times in a row, the last time so: {reason}\n"
                "What was measured is kept: mend what is wrong and run the same command again."
            )
        try:
            self._living()
        except EngineError as error:
            raise MergetuneError(
                f"The engine broke ({reason}) and cannot be started again: {error}"
            ) from error

    def outcome(self, candidate: Candidate) -> tuple[list[float], dict[str, float]]:
        """Return a complete candidate's objective values and guard violations, as Optuna takes them.

        Optuna adds the violations up, so that each is in the unit of `selection.guard_units`.
        """
        suite = self.evaluator.suite.config
        scores = self.scores[candidate.name]
        values = [scores[name].value for name in suite.objectives]
        return values, selection.relative_violations(scores, self.scores, suite)


def _reason(error: BaseException) -> str | None:
    """Return why a candidate failed; None where an error says nothing of it.

    Such are a stop, a full disk, and what the user has to mend.
    """
    if isinstance(error, (TrialError, torch.OutOfMemoryError)):
        return str(error)
    if isinstance(error, (MergetuneError, OSError)) or not isinstance(error, Exception):
        return None
    return f"{type(error).__name__}: {error}"  # a task's own code may raise anything


def _versions(kind: EngineKind) -> dict[str, str]:
    """Return the versions of what numbers depend on."""
    found = {name: importlib.metadata.version(name) for name in _VERSIONS_OF}
    return found | ({"vllm": installed_version() or ""} if kind == "vllm" else {})
