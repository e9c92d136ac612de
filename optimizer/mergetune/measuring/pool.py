"""The pool: where models are measured, by an engine that lives and is replaced where it breaks."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator
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
from mergetune.machine.memory import free_memory
from mergetune.measuring.attempts import MOST_ATTEMPTS, Ledger, Memory
from mergetune.measuring.model_under_test import LocalModel, ModelUnderTest
from mergetune.measuring.reply_store import ReplyStore, StoredLM
from mergetune.results.run_dir import Cost
from mergetune.space.recipe import MergeRecipe

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from mergetune.engines.transformers_engine import TransformersEngine

_FAULTS_IN_A_ROW = 6
_HARMLESS = {"batch_size", "timeout_s", "gpu_memory_utilization", "kv_cache_gib"}  # to replies

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


@dataclass
class _Loading:
    """What it took to get an engine ready for a job, in seconds; `all_s` counts its start, too."""

    merge_s: float = 0.0
    load_s: float = 0.0
    all_s: float = 0.0


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
    """Takes jobs and gives measurements; it has one engine, which starts when it is first needed.

    An engine that breaks is replaced, and the job tried once more. Every attempt is counted before it begins:
    what ends the process itself is given up after two.

    Args:
        model: what is measured, or what recipes are merged into.
        config: how to start its engine.
        evaluator: the suite.
        store: where replies are kept; None, and a served model, which may change unseen: nowhere.
        options: the rest.
    """

    size = 1

    def __init__(
        self,
        model: ModelUnderTest,
        config: EngineConfig,
        evaluator: Evaluator,
        store: ReplyStore | None,
        options: PoolOptions | None = None,
    ) -> None:
        self.model, self.config, self.evaluator = model, config, evaluator
        self.engine: Engine | None = None
        self._options = options or PoolOptions()
        self._store = store if isinstance(model, LocalModel) else None
        self._waiting: deque[Job] = deque()
        self._loaded: str | None = None  # the digest of the recipe in the engine
        self._was_started = False
        self._broken_in_a_row = 0

    @property
    def has_room(self) -> bool:
        """Whether a further job would begin at once."""
        return len(self._waiting) < self.size

    def submit(self, job: Job) -> None:
        """Take a job."""
        self._waiting.append(job)

    def next(self) -> Measured | Failed:
        """Return what became of a job; see `measure`."""
        return self.measure(self._waiting.popleft())

    def start(self) -> EngineConfig:
        """Start the engine, unless it was; returns its settled configuration.

        Raises:
            StartError: it cannot be started.
        """
        self._living()
        return self.config

    def measured(self, job: Job) -> Measured:
        """Return a job's measurement.

        Raises:
            MergetuneError: it cannot be done; also as `measure` does.
        """
        found = self.measure(job)
        self._options.ledger.forget_attempts(job.purpose)
        if isinstance(found, Failed):
            raise MergetuneError(found.reason)
        return found

    def measure(self, job: Job) -> Measured | Failed:
        """Do a job, unless that was begun twice before and came to no end.

        Raises:
            StartError: the engine cannot be started.
            MergetuneError: the user has something to mend, or this process cannot go on.
            OSError: the disk cannot be written.
        """
        ledger, of = self._options.ledger, job.recipe.digest if job.recipe else ""
        if (before := ledger.attempts(job.purpose, of)).begun >= MOST_ATTEMPTS:
            return Failed(job, before.reason)
        try:
            return self._measure(job, of)
        except BaseException as error:
            if isinstance(error, (MergetuneError, OSError)) and not isinstance(error, TrialError):
                ledger.forget_attempts(job.purpose)
                raise
            if self.ends_all(error):
                ledger.take_back_attempt(job.purpose, of)
                raise
            log.exception("%s failed", job.purpose)
            reason = str(error) if isinstance(error, TrialError) else f"{type(error).__name__}: {error}"
            if not isinstance(error, EngineError):  # whose fault is kept
                ledger.add_fault(job.purpose, of, reason)
            if _has_lost_gpu():
                raise MergetuneError(
                    f"The GPU cannot be used any more in this process, since `{job.purpose}` failed "
                    f"({reason}). Run the same command again to go on: what was measured is kept, and what "
                    "fails twice is left out."
                ) from error
            return Failed(job, reason)

    @contextmanager
    def transformers(self) -> Iterator[TransformersEngine]:
        """Lend a transformers engine that merges the same models; vLLM makes room until it is needed."""
        from mergetune.engines.transformers_engine import TransformersEngine

        if isinstance(self.engine, TransformersEngine):
            self._loaded = None  # whoever borrows it puts other weights in
            yield self.engine
            return
        assert isinstance(self.model, LocalModel)
        assert self.model.inputs is not None  # slopes are those of a merge
        self.close()
        shared = self.config.model_dump(include={"dtype", "max_length", "device"})
        config = EngineConfig(kind="transformers", **shared)
        inputs = self.model.inputs
        with closing(TransformersEngine(config, self.model.folder, inputs.merger, inputs.chat)) as lent:
            yield lent

    def ends_all(self, error: BaseException) -> bool:
        """Say whether an exception is more than the failure of what was being done: Ctrl-C, or an exit."""
        return not isinstance(error, Exception) or self._options.interrupted()

    def close(self) -> None:
        """End the engine; it starts again when it is needed."""
        if self.engine is not None:
            self.engine.close()
        self.engine, self._loaded = None, None

    @cached_property
    def renderer(self) -> Any:
        """What renders prompts, one for all jobs, so that the evaluator renders each once."""
        assert isinstance(self.model, LocalModel)
        return self.model.prompts()

    def _living(self) -> Engine:
        """Return the engine, started again if it made room."""
        if self.engine is None:
            self._options.at_work(f"starting the engine{' again' if self._was_started else ''} …")
            free_memory()  # of an engine lent meanwhile: only now is an exception gone that may hold it
            options = self._options
            say: Callable[[str], object] = (lambda _: None) if self._was_started else options.say
            try:
                self.engine, self.config = self.model.start(
                    self.config, options.folder, options.begun_with, say
                )
            except MergetuneError as error:
                if self._was_started:
                    raise
                raise StartError(str(error)) from error
            self._was_started = True
        return self.engine

    def _ready(self, recipe: MergeRecipe | None, loading: _Loading) -> LM:
        """Return the model as lm-eval sees it, a recipe merged into it; the time that took is added."""
        began, engine = clock.seconds(), self._living()
        if recipe is not None and self._loaded != recipe.digest:
            self._loaded = None
            took = engine.load(recipe)
            self._loaded = recipe.digest
            loading.merge_s += took.merge_s
            loading.load_s += took.load_s
        loading.all_s += clock.seconds() - began
        return engine.lm

    def _measure(self, job: Job, of: str) -> Measured:
        """Merge, load and score, once more where the engine breaks; replies are kept as they come."""
        ledger = self._options.ledger
        recipe = job.recipe or (self.model.recipe if isinstance(self.model, LocalModel) else None)
        faults: tuple[str, ...] = ()
        began, lost_s = clock.seconds(), 0.0
        while True:
            ledger.begin_attempt(job.purpose, of)
            loading, tried = _Loading(), clock.seconds()
            try:
                lm = self._lm(job, recipe, loading)
                n_asked = self._count_new(lm, job.documents)
                measurement = self.evaluator.measure_documents(lm, job.documents)
            except EngineError as fault:
                log.exception("the engine broke")
                faults = (*faults, str(fault))
                ledger.add_fault(job.purpose, of, str(fault))
                is_last = ledger.attempts(job.purpose, of).begun >= MOST_ATTEMPTS
                if not is_last:
                    self._options.on_fault(job, str(fault))
                self._restart(str(fault))
                if is_last:
                    raise
                lost_s = clock.seconds() - began
                continue
            self._broken_in_a_row = 0
            for line in missing_verdicts([("", measurement.items)], self.evaluator.items):
                self._options.say(f"warning: {job.purpose}: {line}")
            cost = Cost(
                merge_s=loading.merge_s,
                load_s=loading.load_s,
                evaluate_s=clock.seconds() - tried - loading.all_s,
                lost_s=lost_s,
                n_items=len(measurement.items),
            )
            return Measured(job, measurement, cost, faults, n_asked)

    def _lm(self, job: Job, recipe: MergeRecipe | None, loading: _Loading) -> LM:
        """Return the model as lm-eval sees it, between it and the engine the store if there is one."""
        if self._store is None:
            return self._ready(recipe, loading)
        if self.config.kind == "auto":
            self._living()  # replies are known by the engine that gave them
        name = (self._options.name or self._name)(job)
        return StoredLM(lambda: self._ready(recipe, loading), self.renderer, self._store, name)

    def _name(self, job: Job) -> str:
        """Return the digest of a model together with what computes its replies."""
        assert isinstance(self.model, LocalModel)
        return reply_name(self.model, self.config, job.repeat)

    def _count_new(self, lm: LM, documents: Documents) -> int:
        """Count the items for which something has to be asked that the store does not hold."""
        if not isinstance(lm, StoredLM):
            return sum(map(len, documents.values()))
        requests = self.evaluator.requests(lm, documents)
        items = [own for asked in requests.values() for own in asked.values()]
        return sum(not all(map(lm.knows, own)) for own in items)

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


def reply_name(model: LocalModel, config: EngineConfig, repeat: int = 0) -> str:
    """Return a model's name in a store: a digest of all that its replies depend on."""
    library = installed_version() if config.kind == "vllm" else importlib.metadata.version("transformers")
    settings = config.model_dump(mode="json", exclude=_HARMLESS)
    text = json.dumps([model.digest, settings, library, importlib.metadata.version("torch"), repeat])
    return hashlib.sha256(text.encode()).hexdigest()


def _has_lost_gpu() -> bool:
    """Say whether this process's CUDA context is broken, as an assert on the device leaves it for good."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
