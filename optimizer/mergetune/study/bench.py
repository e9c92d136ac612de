"""Measuring models: a recipe is merged into a living engine and scored on a suite."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mergetune.engines.choice import installed_version
from mergetune.engines.engine import Engine, EngineConfig, EngineKind
from mergetune.engines.start import start_chosen, start_engine
from mergetune.errors import EngineError, MergetuneError, TrialError
from mergetune.evaluation.evaluate import ITEM_KEYS, Evaluator, Measurement
from mergetune.evaluation.suite import Split
from mergetune.machine import clock
from mergetune.machine.memory import free_memory, in_smaller_batches
from mergetune.measuring.progress import Progress, candidate_line
from mergetune.measuring.reply_store import ReplyStore, StoredLM
from mergetune.merging.inputs import Inputs
from mergetune.results import roles, selection
from mergetune.results.run_dir import MOST_ATTEMPTS, Candidate, CandidateKind, Cost, RunDir, SpaceKind
from mergetune.slopes.gradients import has_slopes
from mergetune.slopes.references import References, find_references
from mergetune.slopes.sensitivity import RECOMMENDED, anchor_points, measure_sensitivity
from mergetune.space.recipe import MergeRecipe, count_layers
from mergetune.study.search import Outcome, failure, success

if TYPE_CHECKING:
    from mergetune.engines.transformers_engine import TransformersEngine

_FAULTS_IN_A_ROW = 6
_NOISE, _SENSITIVITY = "noise", "sensitivity"  # name attempts, and seconds
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


@dataclass(frozen=True)
class _Scored:
    """A model that was measured: what it cost, its scores, and how the engine broke before."""

    cost: Cost
    measurement: Measurement
    faults: tuple[str, ...]


class Bench:
    """Where candidates are measured: a living engine and the suite, and what they found.

    An engine that breaks is replaced, and the candidate tried once more. Every attempt is counted on disk
    before it begins: what ends the process itself is given up after two.

    Args:
        engine: how to start the engine.
        inputs: what is merged.
        evaluator: the suite.
        run: where all is kept.
        progress: is told what is done.
        interrupted: says whether the user has pressed Ctrl-C, which may come out as any exception.

    Raises:
        MergetuneError: the engine cannot be started.
    """

    def __init__(
        self,
        engine: EngineConfig,
        inputs: Inputs,
        evaluator: Evaluator,
        run: RunDir,
        progress: Progress,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.inputs, self.evaluator, self.run, self.progress = inputs, evaluator, run, progress
        self.scores = run.all_scores("search")
        self._candidates = {candidate.name: candidate for candidate in run.candidates()}
        self._interrupted = interrupted
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

    @property
    def candidates(self) -> list[Candidate]:
        """The candidates in the order measured."""
        return list(self._candidates.values())

    def measure(
        self,
        kind: CandidateKind,
        name: str,
        recipe: MergeRecipe,
        params: Mapping[str, float] | None,
        space: SpaceKind = "search_space",
    ) -> Candidate:
        """Merge, load and score one candidate on the search split, unless that was done before.

        What goes wrong with a trial is its own failure, whatever it is; a baseline must be measured.

        Raises:
            MergetuneError: a baseline cannot be measured, or something is wrong that is no fault of the
                candidate and that the user has to mend.
        """
        known = self._candidates.get(name)  # perhaps from the holdout split alone
        if known is not None and (name in self.scores or (known.state == "failed" and kind == "trial")):
            return known
        fields: dict[str, Any] = {
            "name": name,
            "number": len(self._candidates) if known is None else known.number,
            "kind": kind,
            "recipe": recipe,
            "params": params,
            "space": space,
            "holdout_cost": Cost() if known is None else known.holdout_cost,
        }
        what, began = f"search.{name}", clock.seconds()

        def say(reason: str) -> None:
            self.progress.say(candidate_line(name, None, 0.0, reason))

        found = self._try(what, recipe, "search", say)
        if isinstance(found, str) and kind == "baseline":
            self.run.forget_attempts(what)  # for it is tried anew at the next start
            raise MergetuneError(
                f"The baseline `{name}` cannot be measured: {found}\nMend what is wrong and run the same "
                f"command again; what was measured is kept. {self.run.path / 'run.log'} has more."
            )
        if isinstance(found, str):
            cost = Cost(lost_s=clock.seconds() - began)
            candidate = self._keep({**fields, "state": "failed", "reason": found, "cost": cost}, None)
            self.run.forget_attempts(what)
            say(found)
            return candidate
        candidate = self._keep({**fields, "cost": found.cost, "faults": found.faults}, found.measurement)
        self.run.forget_attempts(what)
        self.progress.say(candidate_line(name, self.scores[name], candidate.cost.total_s, ""))
        return candidate

    def measure_broken(self) -> None:
        """Measure again whose scores could not be read."""
        for each in self.candidates:
            if each.state == "complete" and each.name not in self.scores:
                self.measure(each.kind, each.name, each.recipe, each.params, each.space)

    def measure_noise(self) -> None:
        """Score the base once more on the search split: what differs is noise of the measurement alone.

        Where that cannot be done, the study goes on without.
        """
        base = self._candidates.get(roles.BASE)
        if base is None or self.run.noise() is not None:
            return
        self.progress.at_work("the base once more")
        found = self._try(_NOISE, base.recipe, "search", self.progress.say, repeat=1)
        if isinstance(found, str):
            self.progress.say(f"warning: no noise floor, the base cannot be measured once more: {found}")
            return
        self.run.add_seconds(_NOISE, found.cost.total_s)
        self.run.write_noise(found.measurement)
        self.run.forget_attempts(_NOISE)
        first = self.run.measurement(roles.BASE, "search")
        assert first is not None  # measured before
        again = found.measurement.items
        both = first.merge(again, on=ITEM_KEYS, suffixes=("", "_again"), validate="one_to_one")
        n_differ = int((both["score"].fillna(0) != both["score_again"].fillna(0)).sum())
        self.progress.say(
            f"noise floor: the base once more, {found.cost.total_s:.1f} s; "
            f"{n_differ} of {len(both)} items differ"
        )

    def confirm(self, candidate: Candidate) -> str | None:
        """Score a candidate on the holdout split, unless that was done before; says and returns why not."""
        name = candidate.name
        if name in self._candidates and self.run.holds_measurement(name, "holdout"):
            return None
        self.progress.at_work(f"holdout: {name}")

        def say(reason: str) -> None:
            self.progress.say(f"holdout: {candidate_line(name, None, 0.0, reason)}")

        found = self._try(f"holdout.{name}", candidate.recipe, "holdout", say)
        if isinstance(found, str):
            say(found)
            return found
        self.run.write_measurement(name, "holdout", found.measurement)
        self._keep(candidate.model_copy(update={"holdout_cost": found.cost}), None)
        self.run.forget_attempts(f"holdout.{name}")
        line = candidate_line(name, found.measurement.scores(), found.cost.total_s, "")
        self.progress.say(f"holdout: {line}")
        return None

    @contextmanager
    def transformers(self) -> Iterator[TransformersEngine]:
        """Lend a transformers engine that merges the same models; vLLM makes room until it is needed."""
        from mergetune.engines.transformers_engine import TransformersEngine

        if isinstance(self.engine, TransformersEngine):
            yield self.engine
            return
        self.close()
        shared = self._config.model_dump(include={"dtype", "max_length", "device"})
        config = EngineConfig(kind="transformers", **shared)
        base, merger, chat = self.inputs.base.folder, self.inputs.merger, self.inputs.chat
        with closing(TransformersEngine(config, base, merger, chat)) as lent:
            yield lent

    def references(self, engine: TransformersEngine) -> References:
        """Find what to say to the items of the search split; what the base and the experts said may serve.

        What a merge said may not: its own words would be what its loss and slopes are taken on.
        """
        names = [name for name in self.scores if not roles.is_merge(name)]
        measured = [self.run.measurement(name, "search") for name in names]
        replies = [frame for frame in measured if frame is not None]
        found = find_references(self.evaluator, engine.lm, replies=replies)
        for reason in found.missing.values():
            self.progress.say(f"warning: slopes are taken without a task: {reason}")
        return found

    def measure_sensitivity(self, recommended: MergeRecipe) -> None:
        """Take the slopes at the base, the uniform average and this merge, unless that was done before.

        Raises:
            MergetuneError: it was begun twice, and the process ended in the middle of it.
        """
        points = anchor_points(self.inputs.base_source, self.inputs.expert_sources)
        points[RECOMMENDED] = recommended
        wanted = {recipe.digest for recipe in points.values() if has_slopes(recipe.method)}
        known = self.run.sensitivity()
        if known is not None and (known.empty or wanted <= set(known["digest"])):
            return
        self.progress.at_work("taking the slopes of every coefficient …")
        with self.attempt(_SENSITIVITY):
            began = clock.seconds()
            try:
                with self.transformers() as engine:
                    references, merger = self.references(engine), self.inputs.merger
                    found = in_smaller_batches(
                        lambda n_tokens: measure_sensitivity(
                            engine, merger, points, references, max_tokens=n_tokens
                        ),
                        self.progress.say,
                    )
            finally:
                self.run.add_seconds(_SENSITIVITY, clock.seconds() - began)
        self.run.write_sensitivity(found)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Count an attempt on disk while the block runs: it stays counted if the process does not outlive it.

        Raises:
            MergetuneError: two were counted before.
        """
        before = self.run.attempts(what)
        if before.begun >= MOST_ATTEMPTS:
            raise MergetuneError(
                f"{before.reason}. (`attempts/{what}.json` in the run directory counts that.)"
            )
        self.run.begin_attempt(what)
        try:
            yield
        finally:
            self.run.take_back_attempt(what)

    def ends_study(self, error: BaseException) -> bool:
        """Say whether an exception is more than the failure of what was being done: Ctrl-C, or an exit."""
        return not isinstance(error, Exception) or self._interrupted()

    def close(self) -> None:
        """End the engine."""
        if self.engine is not None:
            self.engine.close()
        self.engine = None

    def _living(self) -> Engine:
        """Return the engine, started again if it made room."""
        if self.engine is None:
            self.progress.at_work("starting the engine again …")
            free_memory()  # of the engine lent meanwhile: only now is an exception gone that may hold it
            self.engine = start_engine(self._config, self.inputs.base.folder, self.inputs, self.run.path)
        return self.engine

    def _keep(self, candidate: Candidate | Mapping[str, Any], measurement: Measurement | None) -> Candidate:
        """Write a candidate down."""
        kept = Candidate.model_validate(candidate)
        self.run.write_candidate(kept, measurement)
        self._candidates[kept.name] = kept
        if measurement is not None:
            self.scores[kept.name] = measurement.scores()
        return kept

    def _try(
        self,
        what: str,
        recipe: MergeRecipe,
        split: Split,
        on_fault: Callable[[str], object],
        repeat: int = 0,
    ) -> _Scored | str:
        """Score, unless that was begun twice before and came to no end; returns why it cannot be done.

        Args:
            what: names the attempts.
            recipe: what to merge.
            split: what to score it on.
            on_fault: told how an engine broke before another attempt is made.
            repeat: replies of one repeat are those of no other.

        Raises:
            MergetuneError: the user has something to mend, or this process cannot go on.
            OSError: the disk cannot be written.
        """
        if (before := self.run.attempts(what, recipe.digest)).begun >= MOST_ATTEMPTS:
            return before.reason
        try:
            return self._score(what, recipe, split, on_fault, repeat)
        except BaseException as error:
            if isinstance(error, (MergetuneError, OSError)) and not isinstance(error, TrialError):
                self.run.forget_attempts(what)
                raise
            if self.ends_study(error):
                self.run.take_back_attempt(what, recipe.digest)
                raise
            log.exception("%s failed", what)
            reason = str(error) if isinstance(error, TrialError) else f"{type(error).__name__}: {error}"
            if not isinstance(error, EngineError):  # whose fault is kept
                self.run.add_fault(what, recipe.digest, reason)
            if _has_lost_gpu():
                raise MergetuneError(
                    f"The GPU cannot be used any more in this process, since `{what}` failed ({reason}). "
                    "Run the same command again to go on: what was measured is kept, and what fails twice "
                    "is left out."
                ) from error
            return reason

    def _score(
        self,
        what: str,
        recipe: MergeRecipe,
        split: Split,
        on_fault: Callable[[str], object],
        repeat: int,
    ) -> _Scored:
        """Merge, load and score, once more where the engine breaks; replies are kept as they come."""
        name = f"{recipe.digest}-{repeat}" if repeat else recipe.digest
        faults: tuple[str, ...] = ()
        began, lost_s = clock.seconds(), 0.0
        while True:
            self.run.begin_attempt(what, recipe.digest)
            try:
                engine = self._living()
                loaded = engine.load(recipe)
                lm = StoredLM(partial(getattr, engine, "lm"), engine.lm, self._replies, name)
                measurement = self.evaluator.measure(lm, split)
            except EngineError as fault:
                log.exception("the engine broke")
                faults = (*faults, str(fault))
                self.run.add_fault(what, recipe.digest, str(fault))
                is_last = self.run.attempts(what, recipe.digest).begun >= MOST_ATTEMPTS
                if not is_last:
                    on_fault(str(fault))
                self._restart(str(fault))
                if is_last:
                    raise
                lost_s = clock.seconds() - began
                continue
            self._broken_in_a_row = 0
            cost = Cost(
                merge_s=loaded.merge_s,
                load_s=loaded.load_s,
                evaluate_s=measurement.seconds,
                lost_s=lost_s,
                n_items=len(measurement.items),
            )
            return _Scored(cost, measurement, faults)

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

    def outcome(self, candidate: Candidate | None) -> Outcome:
        """Return what Optuna is told of a candidate; None stands for a point that has no recipe.

        Optuna adds the guards' excesses up, so that each is in the unit of `selection.guard_units`.
        """
        suite = self.evaluator.suite.config
        if candidate is not None and candidate.state == "complete":
            scores = self.scores[candidate.name]
            values = [scores[name].value for name in suite.objectives]
            return success(values, selection.relative_violations(scores, self.scores, suite))
        measured = [each for each in self._candidates.values() if each.name in self.scores]
        directions = [objective.better for objective in suite.objectives.values()]
        return failure([self.outcome(each) for each in measured], directions)


def _has_lost_gpu() -> bool:
    """Say whether this process's CUDA context is broken, as an assert on the device leaves it for good."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _versions(kind: EngineKind) -> dict[str, str]:
    """Return the versions of what numbers depend on."""
    found = {name: importlib.metadata.version(name) for name in _VERSIONS_OF}
    return found | ({"vllm": installed_version() or ""} if kind == "vllm" else {})
