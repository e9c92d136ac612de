"""Candidates: measured by the pool, kept in the run directory, never measured twice."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mergetune.engines.choice import installed_version
from mergetune.engines.engine import EngineConfig, EngineKind
from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Documents, Evaluator, Measurement
from mergetune.evaluation.suite import Split
from mergetune.machine import clock
from mergetune.measuring.model_under_test import LocalModel, open_model
from mergetune.measuring.pool import Failed, Job, Measured, Pool, PoolOptions, reply_name
from mergetune.measuring.progress import Progress, candidate_line
from mergetune.measuring.reply_store import ReplyStore, default_store
from mergetune.merging.inputs import Inputs
from mergetune.results import selection
from mergetune.results.roles import SEARCHED, Role, is_merge, reference_name
from mergetune.results.run_dir import Candidate, Cost, RunDir, SpaceKind
from mergetune.results.selection import Scales, Scores
from mergetune.space.recipe import MergeRecipe, count_layers
from mergetune.study.elimination import Elimination
from mergetune.study.watching.seen import Seen
from mergetune.study.watching.watchers import Watchers

_VERSIONS_OF = ("mergetune", "torch", "transformers", "lm-eval", "optuna", "safetensors")


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
class Proposal:
    """A candidate that is to be measured on the search split."""

    role: Role
    name: str
    recipe: MergeRecipe
    params: Mapping[str, float] | None = None
    space: SpaceKind = "search_space"

    @property
    def is_baseline(self) -> bool:
        """See `Candidate.is_baseline`."""
        return self.role not in SEARCHED


@dataclass
class _Begun:
    """A candidate under way.

    Attributes:
        proposal: what it is.
        at: when it was begun.
        parts: the documents of each look that is to come, the last being all.
        rivals: whom it has to bear comparison with.
    """

    proposal: Proposal
    at: float
    parts: deque[Documents]
    rivals: tuple[str, ...]
    cost: Cost = field(default_factory=Cost)
    faults: tuple[str, ...] = ()

    def add(self, found: Measured) -> None:
        """Add what a part cost; it holds the items of those before."""
        self.cost = self.cost.plus(found.cost).model_copy(update={"n_items": found.cost.n_items})
        self.faults = (*self.faults, *found.faults)


class Candidates:
    """The models of a study: each is measured once, and what it scored is kept.

    Args:
        engine: how to start the engine.
        inputs: what is merged.
        evaluator: the suite.
        run: where all is kept.
        progress: is told what is done.
        interrupted: says whether the user has pressed Ctrl-C, which may come out as any exception.
        elimination: the error level at which trials are dropped on part of their items; 0: none is.
        watchers: are told of every candidate.

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
        elimination: float = 0.0,
        watchers: Watchers | None = None,
    ) -> None:
        self.inputs, self.evaluator, self.run, self.progress = inputs, evaluator, run, progress
        self.scores = run.all_scores("search")
        self._elimination = Elimination(evaluator, run, elimination)
        self._known = {candidate.name: candidate for candidate in run.candidates()}
        parts = {each.name: run.scores(each.name, "part") for each in self.all if each.state == "dropped"}
        self._dropped = {name: scores for name, scores in parts.items() if scores is not None}
        self._watchers, self._unseen = watchers or Watchers(), deque(self.all)
        self._by_recipe: dict[str, str] = {}  # names by the recipe's digest
        for candidate in self.all:
            if candidate.name in self.scores or candidate.state != "complete":
                self._by_recipe.setdefault(candidate.recipe.digest, candidate.name)
        self._proposed: dict[str, _Begun] = {}  # by the job's purpose
        self._settled_at = -math.inf  # when the last candidate was
        self._n_sent = 0
        self._agreements = run.agreements()
        options = PoolOptions(
            folder=run.path,
            begun_with=run.versions().get("engine"),
            name=_reply_name,
            ledger=run,
            say=progress.say,
            on_fault=self._say_fault,
            at_work=progress.at_work,
            interrupted=interrupted,
        )
        base = LocalModel.base_of(inputs)
        self._replies = ReplyStore(run.path / "replies")
        self.pool = Pool(base, engine, evaluator, self._replies, options)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        self._show_watchers()

    @property
    def all(self) -> list[Candidate]:
        """The candidates in the order measured."""
        return list(self._known.values())

    @property
    def best(self) -> str:
        """The merge that would be recommended by the scores as measured; empty where none was measured."""
        return selection.best_merge(self.scores, self.evaluator.suite.config, self.scales) or ""

    @cached_property
    def scales(self) -> Scales:
        """What makes scores comparable: the base's and the experts', which are measured first."""
        return selection.scales_of(self.run, [name for name in self.scores if not is_merge(name)])

    @property
    def spent_s(self) -> float:
        """See `RunDir.spent_s`."""
        return self.run.spent_s(self._known.values())

    @property
    def n_since_best(self) -> int:
        """How many candidates of the search were measured after that one, or failed."""
        names = [each.name for each in self.all if not each.is_baseline]
        best = self.best
        return len(names) - (names.index(best) + 1 if best in names else 0)

    def measure(self, proposal: Proposal) -> Candidate:
        """Merge, load and score one candidate on the search split, unless that was done before.

        What goes wrong with a trial is its own failure, whatever it is; a baseline must be measured.

        Raises:
            MergetuneError: a baseline cannot be measured, or something is wrong that is no fault of the
                candidate and that the user has to mend.
        """
        if (known := self.known(proposal)) is not None:
            return known
        self.propose(proposal)
        return self.next()

    def measure_all(self, proposals: Iterable[Proposal]) -> None:
        """Measure candidates, as many side by side as the pool has room for; see `measure`.

        Each proposal is asked for when there is room for it.
        """
        for proposal in proposals:
            if self.known(proposal) is None:
                self.propose(proposal)
            while not self.pool.has_room:
                self.next()
        while self._proposed:
            self.next()

    @property
    def n_under_way(self) -> int:
        """How many candidates were proposed and are not measured yet."""
        return len(self._proposed)

    def known(self, proposal: Proposal) -> Candidate | None:
        """Return a candidate that was measured before, or failed; None where it is to be measured."""
        known = self._known.get(proposal.name)  # perhaps from the holdout split alone
        is_over = known is not None and known.state != "complete" and not proposal.is_baseline
        return known if proposal.name in self.scores or is_over else None

    def told(self, name: str) -> Scores | None:
        """Return what a sampler is told that a candidate scored, if need be on part of its items."""
        return self.scores.get(name, self._dropped.get(name))

    def twin(self, proposal: Proposal) -> str | None:
        """Return the name of another candidate of the same recipe, measured, dropped, failed or proposed."""
        name = self._by_recipe.get(proposal.recipe.digest)
        return None if name == proposal.name else name

    def propose(self, proposal: Proposal) -> None:
        """Give a candidate to the pool; `next` returns it, measured."""
        parts, rivals = [self.evaluator.documents("search")], tuple[str, ...]()
        if proposal.role == "trial":
            parts, rivals = self._elimination.parts, self._elimination.rivals(self.scores)
        begun = _Begun(proposal, clock.seconds(), deque(parts), rivals)
        self._by_recipe.setdefault(proposal.recipe.digest, proposal.name)
        self._measure_further(begun)

    def _measure_further(self, begun: _Begun) -> None:
        """Give the next part of a candidate's items to the pool."""
        job = Job(f"search.{begun.proposal.name}", begun.parts.popleft(), begun.proposal.recipe)
        self._proposed[job.purpose] = begun
        self.pool.submit(job)

    def next(self) -> Candidate:
        """Return a proposed candidate, measured, dropped or failed; see `measure`."""
        while True:
            found = self.pool.next()
            what = found.job.purpose
            begun = self._proposed.pop(what)
            if isinstance(found, Failed):
                return self._settle(begun, found, "")
            begun.add(found)
            items = found.measurement.items
            why_dropped = self._elimination.why_dropped(items, begun.rivals) if begun.parts else ""
            if why_dropped or not begun.parts:
                return self._settle(begun, found, why_dropped)
            self.run.forget_attempts(what)
            self._measure_further(begun)

    def _settle(self, begun: _Begun, found: Measured | Failed, why_dropped: str) -> Candidate:
        """Write down what became of a candidate."""
        proposal, what = begun.proposal, found.job.purpose
        known, elapsed_s = self._known.get(proposal.name), None
        if self.pool.config.workers is not None:  # the time that passed is shared among all under way
            now = clock.seconds()
            elapsed_s, self._settled_at = now - max(begun.at, self._settled_at), now
        fields: dict[str, Any] = {
            "name": proposal.name,
            "number": len(self._known) if known is None else known.number,
            "role": proposal.role,
            "recipe": proposal.recipe,
            "params": proposal.params,
            "space": proposal.space,
            "holdout_cost": Cost() if known is None else known.holdout_cost,
        }
        if isinstance(found, Failed) and proposal.is_baseline:
            self.run.forget_attempts(what)  # for it is tried anew at the next start
            raise MergetuneError(
                f"The baseline `{proposal.name}` cannot be measured: {found.reason}\nMend what is wrong and "
                "run the same command again; what was measured is kept. "
                f"{self.run.path / 'run.log'} has more."
            )
        if isinstance(found, Failed):
            cost = Cost(lost_s=clock.seconds() - begun.at, elapsed_s=elapsed_s)
            kept = self._keep({**fields, "state": "failed", "reason": found.reason, "cost": cost}, None)
            line = candidate_line(proposal.name, None, 0.0, found.reason)
        else:
            cost = begun.cost.model_copy(update={"elapsed_s": elapsed_s})
            fields |= {"cost": cost, "faults": begun.faults}
            if why_dropped:
                self.run.write_measurement(proposal.name, "part", found.measurement)
                self._dropped[proposal.name] = found.measurement.scores()
                kept = self._keep({**fields, "state": "dropped", "reason": why_dropped}, None)
            else:
                kept = self._keep(fields, found.measurement)
            line = candidate_line(
                proposal.name, self.told(proposal.name), kept.cost.total_s, kept.reason or ""
            )
            self._keep_asked()
        self.run.forget_attempts(what)
        self.progress.say(line)
        self._unseen.append(kept)
        self._show_watchers()
        return kept

    def _start(self) -> None:
        """Start the engine, and say where it is not what the run was begun with."""
        kind = self.pool.start().kind
        assert kind != "auto"  # it is settled
        known, versions = self.run.versions(), _versions(kind)
        changed = [name for name, now in versions.items() if known.get(name, now) != now]
        if changed:
            others = ", ".join(f"{name} {known[name]} (now {versions[name]})" for name in changed)
            self.progress.say(f"warning: what was measured here before was measured with {others}.")
        self.run.write_versions(kind, versions)

    def _show_watchers(self) -> None:
        """Show watchers what they have not seen, as soon as there is all that guards are compared to."""
        suite = self.evaluator.suite.config
        if not self.scores.keys() >= {reference_name(guard) for guard in suite.guards.values()}:
            return
        while self._unseen:
            candidate = self._unseen.popleft()
            own = self.told(candidate.name)
            if own is None:
                if candidate.state == "failed":
                    self._watchers.measured(Seen(candidate))
                continue
            excess = selection.relative_violations(own, self.scores, suite)
            self._watchers.measured(Seen(candidate, own, excess))

    def measure_broken(self) -> None:
        """Measure again whose scores could not be read."""
        self.measure_all(
            Proposal(each.role, each.name, each.recipe, each.params, each.space)
            for each in self.all
            if each.state == "complete" and each.name not in self.scores
        )

    def confirm(self, candidate: Candidate) -> str | None:
        """Score a candidate on the holdout split, unless that was done before; says and returns why not."""
        return self.confirm_all([candidate]).get(candidate.name)

    def confirm_all(self, candidates: Iterable[Candidate]) -> dict[str, str]:
        """Score candidates on the holdout split, as many side by side as the pool has room for.

        What was scored there before is left alone. Says and returns why some cannot be, by name.
        """
        reasons: dict[str, str] = {}
        begun: dict[str, Candidate] = {}  # by the job's purpose

        def take_next() -> None:
            found = self.pool.next()
            candidate = begun.pop(found.job.purpose)
            if isinstance(found, Failed):
                reasons[candidate.name] = found.reason
                self.progress.say(f"holdout: {candidate_line(candidate.name, None, 0.0, found.reason)}")
            else:
                self._keep_confirmed(candidate, found)

        for candidate in candidates:
            name = candidate.name
            if name in self._known and self.run.holds_measurement(name, "holdout"):
                continue
            while not self.pool.has_room:
                take_next()
            self.progress.at_work(f"holdout: {name}")
            job = Job(f"holdout.{name}", self.evaluator.documents("holdout"), candidate.recipe)
            begun[job.purpose] = candidate
            self.pool.submit(job)
        while begun:
            take_next()
        return reasons

    def _keep_confirmed(self, candidate: Candidate, found: Measured) -> None:
        self.run.write_measurement(candidate.name, "holdout", found.measurement)
        self._keep_asked()
        self._keep(candidate.model_copy(update={"holdout_cost": found.cost}), None)
        self.run.forget_attempts(found.job.purpose)
        line = candidate_line(candidate.name, found.measurement.scores(), found.cost.total_s, "")
        self.progress.say(f"holdout: {line}")

    def measure_apart(
        self, what: str, recipe: MergeRecipe, split: Split, repeat: int = 0
    ) -> Measured | Failed:
        """Measure a recipe without keeping it as a candidate; see `Pool.measure`.

        `what` names the attempts, which count until `RunDir.forget_attempts`.
        """
        return self.pool.measure(Job(what, self.evaluator.documents(split), recipe, repeat))

    def share_replies(self, recipe: MergeRecipe, folder: Path) -> None:
        """Put what a candidate replied where `check` looks for what the model written to `folder` replies.

        Where that place cannot be written, the model is asked once more.
        """
        chat = self.evaluator.suite.config.chat_template
        with contextlib.suppress(MergetuneError):
            written = open_model(str(folder), chat=chat)
            assert isinstance(written, LocalModel)
            known = self._replies.read(recipe.digest)
            default_store().add(reply_name(written, self.pool.config), known)

    def close(self) -> None:
        """End the engine."""
        self.pool.close()

    def _keep_asked(self) -> None:
        """Keep what a split's first candidate was sent, and how far judges agree with people."""
        n_sent = self.evaluator.count_sent(self.pool.renderer)
        if n_sent > self._n_sent:
            self.run.add_sent(self.evaluator.sent(self.pool.renderer))
            self._n_sent = n_sent
        if (agreements := self.evaluator.agreements) != self._agreements:
            self.run.write_agreements(agreements)
            self._agreements = agreements

    def _say_fault(self, job: Job, reason: str) -> None:
        split, _, name = job.purpose.partition(".")
        line = candidate_line(name or split, None, 0.0, reason)
        self.progress.say(f"holdout: {line}" if split == "holdout" else line)

    def _keep(self, candidate: Candidate | Mapping[str, Any], measurement: Measurement | None) -> Candidate:
        """Write a candidate down."""
        kept = Candidate.model_validate(candidate)
        self.run.write_candidate(kept, measurement)
        self._known[kept.name] = kept
        if measurement is not None:
            self.scores[kept.name] = measurement.scores()
        return kept


def _reply_name(job: Job) -> str:
    """Return a recipe's name in a run's store of replies."""
    assert job.recipe is not None  # all that a study measures is merged
    return f"{job.recipe.digest}-{job.repeat}" if job.repeat else job.recipe.digest


def _versions(kind: EngineKind) -> dict[str, str]:
    """Return the versions of what numbers depend on."""
    found = {name: importlib.metadata.version(name) for name in _VERSIONS_OF}
    return found | ({"vllm": installed_version() or ""} if kind == "vllm" else {})
