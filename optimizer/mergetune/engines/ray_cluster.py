"""Engines on a Ray cluster: each in an actor of its own, the same as in this process.

An actor opens the models once, merges recipes where it is and replies to requests; what is asked, what was
replied and what that scores stay in the process that runs the study. Models are opened by their paths, which
must lead to the same files on every machine.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from mergetune.engines.engine import EngineConfig, EngineKind, LoadTime
from mergetune.engines.start import start_chosen
from mergetune.errors import EngineError, MergetuneError
from mergetune.files.scratch import scratch_folder
from mergetune.merging.inputs import ModelPaths
from mergetune.space.recipe import MergeRecipe
from mergetune.weights.chat_template import ChatTemplate

if TYPE_CHECKING:
    from mergetune.engines.completions import Truncate

_INSTALL = "in mergetune's folder: pip install '.[ray]'"
_STORE_BYTES = 256 * 2**20  # of the shared memory of a cluster on this machine: it carries texts alone
_SECONDS_TO_PLACE = 20.0  # after which it is said that a worker waits for room
_SECONDS_TO_REACH = 10.0
_SECONDS_TO_STOP = 5.0
_STARTS = 3  # of one worker, where its machine fails meanwhile
_VERSIONS_OF = ("mergetune", "torch", "transformers")

log = logging.getLogger("mergetune")


@dataclass(frozen=True)
class HostedModel:
    """A model that actors open, as plain data; arguments as of `start_chosen`."""

    folder: Path
    paths: ModelPaths | None
    chat: ChatTemplate | None


@dataclass(frozen=True)
class Started:
    """What an actor says of its engine.

    `lines` are what was said of it, `versions` those of the libraries that numbers depend on.
    """

    config: EngineConfig
    host: str
    lines: tuple[str, ...]
    requests_at_a_time: int | None
    versions: Mapping[str, str]


class EngineHost:
    """What an actor runs: an engine, as without Ray."""

    def start(self, config: EngineConfig, model: HostedModel, begun_with: EngineKind | None) -> Started:
        """Start the engine."""
        if not os.environ.get("CUDA_VISIBLE_DEVICES"):  # workers on CPUs share the cores of their machine
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        lines: list[str] = []
        inputs = None if model.paths is None else model.paths.open(model.chat)
        self._scratch = scratch_folder()
        self._engine, settled = start_chosen(
            config, model.folder, inputs, self._scratch, begun_with, lines.append, model.chat
        )
        size = getattr(self._engine.lm, "requests_at_a_time", None)
        return Started(settled, socket.gethostname(), tuple(lines), size, _versions())

    def load(self, recipe: str) -> LoadTime:
        """Merge a recipe, which is JSON."""
        return self._engine.load(MergeRecipe.model_validate_json(recipe))

    def reply(self, kind: str, asked: Sequence[tuple[Any, ...]], truncate: Truncate) -> list[Any]:
        """Reply to requests of one kind, given by their arguments."""
        lm: Any = self._engine.lm
        lm.truncate = truncate
        found: list[Any] = getattr(lm, kind)([Instance(kind, {}, each, i) for i, each in enumerate(asked)])
        return found

    def stop(self) -> None:
        """End the engine."""
        self._engine.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


class RayCluster:
    """A Ray cluster: one that runs already or, without an address, one of this machine that ends with us.

    Args:
        config: `workers`, `ray_address` and what each engine needs.
        model: what the engines start with.
        begun_with: see `start_chosen`.

    Raises:
        MergetuneError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, config: EngineConfig, model: HostedModel, begun_with: EngineKind | None) -> None:
        self._ray = _import_ray()
        self._model, self._begun_with = model, begun_with
        self._is_ours = not self._ray.is_initialized()
        if self._is_ours:
            _connect(self._ray, config.ray_address)
        self._actors: list[Any] = []
        self._is_closed, self._has_said = False, False
        self._changing = threading.Lock()
        machines = [each["Resources"] for each in self._ray.nodes() if each["Alive"]]
        self.has_gpus = config.device != "cpu" and any(each.get("GPU", 0) for each in machines)
        if self.has_gpus:
            self._needs = {"num_gpus": config.tensor_parallel_size, "num_cpus": 1}
        else:
            cores = [int(each.get("CPU", 0)) for each in machines]
            self._needs = {"num_gpus": 0, "num_cpus": _cores_each(cores, config.workers or 1)}

    def start(self, config: EngineConfig, say: Callable[[str], object]) -> tuple[RayEngine, EngineConfig]:
        """Start an engine in an actor of its own, as soon as the cluster has room for it.

        Where its machine fails meanwhile, it is tried again, perhaps on another.

        Raises:
            MergetuneError: it cannot be started.
        """
        for _ in range(_STARTS - 1):
            try:
                return self._start(config, say)
            except EngineError:
                if not self._is_closed:
                    log.exception("a worker did not start")
        return self._start(config, say)

    def _start(self, config: EngineConfig, say: Callable[[str], object]) -> tuple[RayEngine, EngineConfig]:
        ray = self._ray
        host = ray.remote(EngineHost)
        with self._changing:
            if self._is_closed:
                raise MergetuneError("The workers were ended.")
            actor = host.options(max_restarts=0, scheduling_strategy="SPREAD", **self._needs).remote()
            self._actors.append(actor)
        local = config.model_copy(update={"workers": None, "ray_address": None})
        try:
            begun = actor.start.remote(local, self._model, self._begun_with)
            if not ray.wait([begun], timeout=_SECONDS_TO_PLACE)[0] and not self._has_said:
                self._say_waiting(say)
            started = _got(ray, begun, "a worker")
            _check_versions(started)
        except BaseException:
            self._kill(actor)
            raise
        for line in started.lines:
            say(line)
        settled = {"workers": config.workers, "ray_address": config.ray_address}
        return RayEngine(ray, actor, started, self._kill), started.config.model_copy(update=settled)

    def end_workers(self) -> None:
        """End all workers, whatever they are at, and start no other."""
        with self._changing:
            self._is_closed = True
            actors = list(self._actors)
        self._stop(actors)
        for actor in actors:
            self._kill(actor)

    def close(self) -> None:
        """Leave the cluster, once nobody waits for a worker any more."""
        self.end_workers()
        if self._is_ours:
            self._ray.shutdown()

    def _say_waiting(self, say: Callable[[str], object]) -> None:
        self._has_said = True
        free = self._ray.available_resources()
        room = ", ".join(f"{free.get(name, 0):g} {name}" for name in ("GPU", "CPU"))
        wanted = ", ".join(f"{n} {name.removeprefix('num_')}" for name, n in self._needs.items() if n)
        say(f"a worker needs {wanted}; the cluster has {room} free. Each begins as soon as there is room.")

    def _stop(self, actors: Sequence[Any]) -> None:
        """Let actors clean up behind their engines, those that are at nothing else."""
        if actors:
            stopped = [actor.stop.remote() for actor in actors]
            self._ray.wait(stopped, num_returns=len(stopped), timeout=_SECONDS_TO_STOP)

    def _kill(self, actor: Any) -> None:
        with self._changing:
            if actor not in self._actors:
                return
            self._actors.remove(actor)
        self._ray.kill(actor)


class RayEngine:
    """An engine in an actor; see `Engine`. An actor that is gone is an `EngineError`.

    `host` is its machine.
    """

    def __init__(self, ray: Any, actor: Any, started: Started, kill: Callable[[Any], object]) -> None:
        self._ray, self._actor, self._kill = ray, actor, kill
        self.host, self._where = started.host, f"the worker on {started.host}"
        self._lm = _RemoteLM(self._call, started.requests_at_a_time)

    @property
    def lm(self) -> LM:
        """The model as lm-eval sees it."""
        return self._lm

    def load(self, recipe: MergeRecipe) -> LoadTime:
        """Have the actor merge; see `Engine.load`."""
        took: LoadTime = self._call("load", recipe.model_dump_json(by_alias=True))
        return took

    def close(self) -> None:
        """End the actor, and the engine with it."""
        self._kill(self._actor)

    def _call(self, method: str, *arguments: Any) -> Any:
        return _got(self._ray, getattr(self._actor, method).remote(*arguments), self._where)


class _RemoteLM(LM):  # type: ignore[misc]  # lm-eval ships no types
    """A model in an actor as lm-eval sees it."""

    def __init__(self, call: Callable[..., Any], requests_at_a_time: int | None) -> None:
        super().__init__()
        self._call_actor, self.requests_at_a_time = call, requests_at_a_time
        self.truncate: Truncate = "refuse"

    def generate_until(self, requests: list[Instance], **_: Any) -> list[Any]:
        return self._replies("generate_until", requests)

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[Any]:
        return self._replies("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[Any]:
        return self._replies("loglikelihood_rolling", requests)

    def _replies(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        asked = [request.args for request in requests]
        found: list[Any] = self._call_actor("reply", kind, asked, self.truncate)
        return found


def _cores_each(cores: Sequence[int], n_workers: int) -> int:
    """Return the most cores that each of so many workers can have on these machines; 1 at least."""
    most = max(cores, default=1)
    return next((n for n in range(most, 1, -1) if sum(each // n for each in cores) >= n_workers), 1)


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # else a late call would start a cluster
    try:
        import ray
    except ImportError as error:
        raise MergetuneError(f"Workers need Ray, which is not installed: {_INSTALL}.") from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    """Connect to a cluster, or start one; signals keep what they did before."""
    own = {"address": "local", "include_dashboard": False, "object_store_memory": _STORE_BYTES}
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _reach(address)
        ray.init(
            **({"address": address} if address else own),
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            ignore_reinit_error=True,
        )
    except Exception as error:  # Ray has many ways to say it
        where = f"at `{address}`" if address else "on this machine"
        raise MergetuneError(
            f"There must be a Ray cluster {where}, but it cannot be reached: {_line(error)}. "
            "`ray status` says what runs here; a cluster that `ray start` made wants RAY_AUTH_MODE=token in "
            "the environment. Leave `ray_address` out for a cluster of this machine alone."
        ) from error
    finally:
        if is_main:
            for number, handler in before.items():
                signal.signal(number, handler)


def _reach(address: str | None) -> None:
    """Raise `OSError` where nothing listens at HOST:PORT, which Ray itself would try for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), _SECONDS_TO_REACH).close()


def _got(ray: Any, reference: Any, where: str) -> Any:
    """Wait for what an actor returns; what is wrong with its machine is the fault of its engine."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, OSError):
            raise EngineError(f"{where}: {type(cause).__name__}: {cause}") from error
        raise (cause if isinstance(cause, Exception) else error) from None
    except ray.exceptions.RayError as error:
        raise EngineError(f"{where} is gone: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split())[:500]


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _VERSIONS_OF}


def _check_versions(started: Started) -> None:
    """Raise `MergetuneError` where a worker's libraries are others than ours: it would score otherwise."""
    own = _versions()
    others = {name: theirs for name, theirs in started.versions.items() if theirs != own[name]}
    if others:
        said = ", ".join(f"{name} {theirs} instead of {own[name]}" for name, theirs in others.items())
        raise MergetuneError(
            f"Every machine must have the same libraries, but {started.host} has {said}. "
            "Install the same environment there."
        )
