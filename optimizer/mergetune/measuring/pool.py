"""The pool: where models are measured, by engines that live and are replaced where they break."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergetune.engines.choice import installed_version
from mergetune.engines.engine import Engine, EngineConfig, EngineKind
from mergetune.errors import EngineError, MergetuneError, StartError, TrialError
from mergetune.evaluation.evaluate import Documents, Evaluator, Measurement
from mergetune.evaluation.missing_verdicts import missing_verdicts
from mergetune.machine import clock
from mergetune.measuring.attempts import MOST_ATTEMPTS, Ledger, Memory
from mergetune.measuring.crew import Alone, Done, SideBySide
from mergetune.measuring.lane import Lane, Loading, Start
from mergetune.measuring.model_under_test import LocalModel, ModelUnderTest
from mergetune.measuring.reply_store import Missing, ReplyStore, StoredLM
from mergetune.results.run_dir import Cost
from mergetune.space.recipe import MergeRecipe

if TYPE_CHECKING:
    from mergetune.engines.ray_cluster import RayCluster
    from mergetune.engines.transformers_engine import TransformersEngine

_FAULTS_IN_A_ROW = 6
_SECONDS_TO_END = 30.0  # of a lane whose worker was ended
_AT_ONCE = 4  # jobs that are worth a new start of the engines
# options without effect on replies
_HARMLESS = {"batch_size", "timeout_s", "gpu_memory_utilization", "kv_cache_gib", "workers", "ray_address"}

log = logging.getLogger("mergetune")


@dataclass(frozen=True)
class Job:
    """A measurement to be made.

    Attributes:
        purpose: what it is for; names the attempts, in letters that a file's name may have.
        documents: the items, by task.
        recipe: what is merged into the engine; None: the model as it is.
        repeat: replies of one repeat are those of no other.
    """

    purpose: str
    documents: Documents
    recipe: MergeRecipe | None = None
    repeat: int = 0


@dataclass(frozen=True)
class Measured:
    """A job that was done: the scores, what they cost, and how engines broke before.

    `n_asked` counts the items for which the model had to be asked; the store held the replies to the others.
    """

    job: Job
    measurement: Measurement
    cost: Cost
    faults: tuple[str, ...]
    n_asked: int

    @property
    def counted(self) -> str:
        """Say how many items the model was asked, and how many it was not asked again."""
        n_known = len(self.measurement.items) - self.n_asked
        known = f", {n_known} known before" if n_known else ""
        return f"{self.n_asked} items measured{' once more' if self.job.repeat else ''}{known}"


@dataclass(frozen=True)
class Failed:
    """A job that cannot be done, and why."""

    job: Job
    reason: str


@dataclass(eq=False)
class _Piece:
    """Requests that one lane puts to a model, of a job or of a part of one.

    Attributes:
        purpose: names the attempts.
        missing: what is to be asked.
        began: when the first attempt did.
        asked_s: how long the last attempt took, the engine's start, merging and loading left out.
        lost_s: how long the attempts before took, with the engine's new starts.
        faults: how they ended.
    """

    underway: _Underway
    purpose: str
    missing: Sequence[Missing]
    loading: Loading = field(default_factory=Loading)
    began: float | None = None
    asked_s: float = 0.0
    lost_s: float = 0.0
    faults: tuple[str, ...] = ()


@dataclass(eq=False)
class _Underway:
    """A job that was begun: its model as lm-eval sees it, and the pieces that are still to be asked."""

    job: Job
    lm: StoredLM
    recipe: MergeRecipe | None
    n_asked: int
    pieces: list[_Piece] = field(default_factory=list)
    n_left: int = 0

    @property
    def of(self) -> str:
        """The recipe's digest, where the job is about one."""
        return self.job.recipe.digest if self.job.recipe else ""


@dataclass(frozen=True)
class PoolOptions:
    """How a pool works.

    Attributes:
        folder: where engines keep their logs, and that they passed their self-test; None: the cache.
        begun_with: the kind of engine that earlier measurements were made with, where `kind` is `auto`.
        name: a model's name in the store; by default of all that its replies depend on.
        ledger: where attempts are counted.
        say: is told which engine runs, and on which replies a judge gave no verdict.
        on_fault: is told how an engine broke before another attempt is made.
        at_work: is told what is being done.
        interrupted: says whether the user has pressed Ctrl-C, which may come out as any exception.
    """

    folder: Path | None = None
    begun_with: EngineKind | None = None
    name: Callable[[Job], str] | None = None
    ledger: Ledger = field(default_factory=Memory)
    say: Callable[[str], object] = lambda _: None
    on_fault: Callable[[Job, str], object] = lambda _job, _reason: None
    at_work: Callable[[str], object] = lambda _: None
    interrupted: Callable[[], bool] = lambda: False


class Pool:
    """Takes jobs and gives measurements; its engines start when they are first needed.

    Replies are asked for in the lanes, one engine each; all else is done in the thread that the pool is used
    in. An engine that breaks is replaced, and what it was asked is asked once more. Every attempt is counted
    before it begins: what ends the process itself is given up after two.

    Args:
        model: what is measured, or what recipes are merged into.
        config: how to start its engines.
        evaluator: the suite.
        store: where replies are kept; None, and a served model, which may change unseen: nowhere.
        options: the rest.
    """

    def __init__(
        self,
        model: ModelUnderTest,
        config: EngineConfig,
        evaluator: Evaluator,
        store: ReplyStore | None,
        options: PoolOptions | None = None,
    ) -> None:
        self.model, self.config, self.evaluator = model, config, evaluator
        self._options = options or PoolOptions()
        self._store = store if isinstance(model, LocalModel) else None
        self._cluster: RayCluster | None = None
        self._lanes = [self._lane(self._start_here)]  # or those of the cluster, once it is there
        self._crew: Alone[_Piece] | SideBySide[_Piece] = Alone(self._lanes[0], self._ask)
        self._underway: list[_Underway] = []
        self._answered: deque[_Underway] = deque()  # of which no piece is left to be asked
        self._broken_in_a_row = 0
        self._last_fault = ""

    @property
    def engine(self) -> Engine | None:
        """The first engine, where it runs."""
        return self._lanes[0].engine

    @property
    def size(self) -> int:
        """How many jobs can be under way."""
        return self._crew.size

    @property
    def has_room(self) -> bool:
        """Whether a further job would begin at once."""
        return len(self._underway) < self.size

    @property
    def has_news(self) -> bool:
        """Whether a lane may be waiting for what is done with its last reply."""
        return bool(self._answered) or self._crew.has_done

    @property
    def n_at_once(self) -> int:
        """How many jobs should be ready after an engine was lent: more where that cost a new start."""
        n_workers = self.config.workers or 1
        makes_room = self._cluster.has_gpus if self._cluster else self.config.kind != "transformers"
        return max(n_workers, _AT_ONCE) if makes_room else n_workers

    def start(self) -> EngineConfig:
        """Start an engine, unless one was; returns its settled configuration.

        Raises:
            StartError: it cannot be started.
        """
        if self._cluster is not None:  # lanes side by side start their own engines
            return self.config
        if self.config.workers is None:
            self._lanes[0].living()
            self.config = self._lanes[0].config
            return self.config
        self._cluster = self._open_cluster()
        first = self._lane(self._cluster.start)
        self._lanes = [first]
        first.living()  # settles which kind all others are
        self.config = first.config
        self._lanes += [Lane(self._cluster.start, self.config) for _ in range(1, self.config.workers or 1)]
        self._crew = SideBySide(self._lanes, self._ask, lambda lane, piece: lane.holds(piece.underway.recipe))
        return self.config

    def submit(self, job: Job) -> None:
        """Take a job; `next` gives what becomes of it.

        Raises:
            MergetuneError: the user has something to mend.
        """
        self._submit(job, n_pieces=1)

    def next(self) -> Measured | Failed:
        """Return what became of a job.

        A job that was begun twice before and came to no end has failed.

        Raises:
            StartError: the engine cannot be started.
            MergetuneError: the user has something to mend, or this process cannot go on.
            OSError: the disk cannot be written.
        """
        while True:
            if self._answered:
                underway = self._answered.popleft()
                self._underway.remove(underway)
                return self._scored(underway)
            if (ended := self._hear(self._crew.next())) is not None:
                return ended

    def measure(self, job: Job) -> Measured | Failed:
        """Do a job while no other is under way; see `next`."""
        self.submit(job)
        return self.next()

    def measured(self, job: Job) -> Measured:
        """Return a job's measurement.

        Raises:
            MergetuneError: it cannot be done; also as `next` does.
        """
        self._submit(job, n_pieces=self.config.workers or 1)
        found = self.next()
        self._options.ledger.forget_attempts(job.purpose)
        if isinstance(found, Failed):
            raise MergetuneError(found.reason)
        return found

    @contextmanager
    def transformers(self) -> Iterator[TransformersEngine]:
        """Lend a transformers engine that merges the same models; vLLM makes room until it is needed."""
        from mergetune.engines.transformers_engine import TransformersEngine

        if isinstance(self.engine, TransformersEngine):
            self._lanes[0].forget_loaded()  # whoever borrows it puts other weights in
            yield self.engine
            return
        assert isinstance(self.model, LocalModel)
        assert self.model.inputs is not None  # slopes are those of a merge
        if self._cluster is None or self._cluster.has_gpus:
            for lane in self._lanes:
                lane.close()
        shared = self.config.model_dump(include={"dtype", "max_length", "device"})
        config = EngineConfig(kind="transformers", **shared)
        inputs = self.model.inputs
        with closing(TransformersEngine(config, self.model.folder, inputs.merger, inputs.chat)) as lent:
            yield lent

    def ends_all(self, error: BaseException) -> bool:
        """Say whether an exception is more than the failure of what was being done: Ctrl-C, or an exit."""
        return not isinstance(error, Exception) or self._options.interrupted()

    def close(self) -> None:
        """End the engines, whatever they are at."""
        self._crew.close()
        if self._cluster is not None:
            self._cluster.end_workers()
            if isinstance(self._crew, SideBySide):
                self._crew.join(_SECONDS_TO_END)
            self._cluster.close()

    @cached_property
    def renderer(self) -> Any:
        """What renders prompts, one for all jobs, so that the evaluator renders each once."""
        if isinstance(self.model, LocalModel):
            return self.model.prompts(self.config.max_length)
        return self._lanes[0].living().lm

    def _lane(self, start: Start) -> Lane:
        return Lane(start, self.config, self._options.say, self._options.at_work)

    def _open_cluster(self) -> RayCluster:
        from mergetune.engines.ray_cluster import HostedModel, RayCluster

        if not isinstance(self.model, LocalModel):
            raise MergetuneError(
                f"{self.model.reference}: a server has workers of its own. Leave `workers` out."
            )
        paths = None if self.model.inputs is None else self.model.inputs.paths
        hosted = HostedModel(self.model.folder.resolve(), paths, self.model.chat)
        self._options.at_work("opening the cluster …")
        return RayCluster(self.config, hosted, self._options.begun_with)

    def _start_here(self, config: EngineConfig, say: Callable[[str], object]) -> tuple[Engine, EngineConfig]:
        return self.model.start(config, self._options.folder, self._options.begun_with, say)

    def _submit(self, job: Job, n_pieces: int) -> None:
        """Take a job; what its model has to be asked is shared out among so many lanes."""
        recipe = job.recipe or (self.model.recipe if isinstance(self.model, LocalModel) else None)
        lm = self._lm(job)
        requests = self.evaluator.requests(lm, job.documents)
        own = [each for asked in requests.values() for each in asked.values()]
        missing = lm.missing([request for each in own for request in each])
        n_asked = sum(not all(map(lm.knows, each)) for each in own)
        if missing and self.config.workers is not None:
            _check_timeless(missing)
            self.start()
        underway = _Underway(job, lm, recipe, n_asked)
        self._underway.append(underway)
        size = math.ceil(len(missing) / n_pieces)
        for start in range(0, len(missing), size or 1):
            purpose = job.purpose if size == len(missing) else f"{job.purpose}.{start // size}"
            underway.pieces.append(_Piece(underway, purpose, missing[start : start + size]))
        underway.n_left = len(underway.pieces)
        if not underway.pieces:
            self._answered.append(underway)
        for piece in underway.pieces:
            self._crew.submit(piece)

    def _lm(self, job: Job) -> StoredLM:
        """Return the model of a job as lm-eval sees it, with what is known of its replies."""
        if self._store is None:
            return StoredLM(self.renderer, None, "")
        if self.config.kind == "auto":
            self.start()  # replies are known by the engine that gave them
        name = (self._options.name or self._name)(job)
        return StoredLM(self.renderer, self._store, name)

    def _name(self, job: Job) -> str:
        """Return the digest of a model together with what computes its replies."""
        assert isinstance(self.model, LocalModel)
        return reply_name(self.model, self.config, job.repeat)

    def _ask(self, lane: Lane, piece: _Piece) -> None:
        """Put a piece's requests to its model, in the lane's thread; replies are kept as they come."""
        underway, ledger = piece.underway, self._options.ledger
        if (before := ledger.attempts(piece.purpose, underway.of)).begun >= MOST_ATTEMPTS:
            raise _GivenUpError(before.reason)
        now = clock.seconds()
        piece.began = now if piece.began is None else piece.began
        piece.lost_s, piece.loading = now - piece.began, Loading()
        ledger.begin_attempt(piece.purpose, underway.of, lane.host)
        lm = lane.ready(underway.recipe, piece.loading)
        underway.lm.fetch(lm, [each for each in piece.missing if not underway.lm.has(each)])
        piece.asked_s = clock.seconds() - now - piece.loading.all_s

    def _hear(self, done: Done[_Piece]) -> Failed | None:
        """Take note of what a lane has done; returns a job that has failed by it."""
        piece, error = done.piece, done.error
        if piece is None:
            assert error is not None  # why the lane is gone
            if self._crew.has_lanes:
                self._options.say(f"warning: there is a worker less: {error}")
                return None
            self._underway.clear()
            if isinstance(error, StartError) or not isinstance(error, MergetuneError):
                raise error
            raise MergetuneError(
                f"The engine broke ({self._last_fault}) and cannot be started again: {error}"
            ) from error
        underway = piece.underway
        if underway not in self._underway:  # another piece of it has failed
            return None
        if error is None:
            self._broken_in_a_row = 0
            underway.n_left -= 1
            if underway.n_left == 0:
                self._answered.append(underway)
            if piece.purpose != underway.job.purpose:
                self._options.ledger.forget_attempts(piece.purpose)
            return None
        if isinstance(error, EngineError) and not self.ends_all(error):
            return self._broken(piece, error)
        self._underway.remove(underway)
        return self._failed(underway.job, piece.purpose, error)

    def _broken(self, piece: _Piece, fault: EngineError) -> Failed | None:
        """Ask what broke an engine once more, unless that was done."""
        ledger, underway = self._options.ledger, piece.underway
        log.error("the engine broke", exc_info=fault)
        self._last_fault = str(fault)
        self._broken_in_a_row += 1
        piece.faults = (*piece.faults, str(fault))
        ledger.add_fault(piece.purpose, underway.of, str(fault))
        if self._broken_in_a_row == _FAULTS_IN_A_ROW:
            self._underway.clear()
            raise MergetuneError(
                f"The engine broke {_FAULTS_IN_A_ROW} times in a row, the last time so: {fault}\n"
                "What was measured is kept: mend what is wrong and run the same command again."
            )
        if ledger.attempts(piece.purpose, underway.of).begun >= MOST_ATTEMPTS:
            self._underway.remove(underway)
            return Failed(underway.job, str(fault))
        self._options.on_fault(underway.job, str(fault))
        self._crew.submit(piece)
        return None

    def _scored(self, underway: _Underway) -> Measured | Failed:
        """Score what was replied to a job's requests."""
        job, ledger, began = underway.job, self._options.ledger, clock.seconds()
        try:
            if not underway.pieces:
                if (before := ledger.attempts(job.purpose, underway.of)).begun >= MOST_ATTEMPTS:
                    return Failed(job, before.reason)
                ledger.begin_attempt(job.purpose, underway.of)
            measurement = self.evaluator.measure_documents(underway.lm, job.documents)
        except BaseException as error:
            return self._failed(job, job.purpose, error)
        for line in missing_verdicts([("", measurement.items)], self.evaluator.items):
            self._options.say(f"warning: {job.purpose}: {line}")
        pieces = underway.pieces
        cost = Cost(
            merge_s=sum(piece.loading.merge_s for piece in pieces),
            load_s=sum(piece.loading.load_s for piece in pieces),
            evaluate_s=sum(piece.asked_s for piece in pieces) + clock.seconds() - began,
            lost_s=sum(piece.lost_s for piece in pieces),
            n_items=len(measurement.items),
        )
        faults = tuple(fault for piece in pieces for fault in piece.faults)
        return Measured(job, measurement, cost, faults, underway.n_asked)

    def _failed(self, job: Job, purpose: str, error: BaseException) -> Failed:
        """Return a job as failed by an error, or raise that where it is more than the job's failure."""
        ledger, of = self._options.ledger, job.recipe.digest if job.recipe else ""
        if isinstance(error, _GivenUpError):
            return Failed(job, str(error))
        if isinstance(error, (MergetuneError, OSError)) and not isinstance(error, TrialError):
            ledger.forget_attempts(purpose)
            raise error
        if self.ends_all(error):
            ledger.take_back_attempt(purpose, of)
            raise error
        log.error("%s failed", purpose, exc_info=error)
        reason = str(error) if isinstance(error, TrialError) else f"{type(error).__name__}: {error}"
        ledger.add_fault(purpose, of, reason)
        if _has_lost_gpu():
            raise MergetuneError(
                f"The GPU cannot be used any more in this process, since `{purpose}` failed "
                f"({reason}). Run the same command again to go on: what was measured is kept, and what "
                "fails twice is left out."
            ) from error
        return Failed(job, reason)


class _GivenUpError(TrialError):
    """What was begun twice before and came to no end; the message says how the attempts ended."""


def reply_name(model: LocalModel, config: EngineConfig, repeat: int = 0) -> str:
    """Return a model's name in a store: a digest of all that its replies depend on."""
    library = installed_version() if config.kind == "vllm" else importlib.metadata.version("transformers")
    settings = config.model_dump(mode="json", exclude=_HARMLESS)
    text = json.dumps([model.digest, settings, library, importlib.metadata.version("torch"), repeat])
    return hashlib.sha256(text.encode()).hexdigest()


def _check_timeless(missing: Sequence[Missing]) -> None:
    """Raise `MergetuneError` where the time of a reply is asked for: beside others it takes longer."""
    if any(each.request.request_type == "reply_seconds" for each in missing):
        raise MergetuneError(
            "`scorer: latency` needs a machine on which nothing else is under way, but there are `workers`. "
            "Leave these out, or that task."
        )


def _has_lost_gpu() -> bool:
    """Say whether this process's CUDA context is broken, as an assert on the device leaves it for good."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
