"""vLLM behind an OpenAI-compatible server on loopback that this process starts, watches and stops."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import requests as http

from optimizer.engines.completions import Choosing, Generation, Scored, Scoring
from optimizer.engines.endpoint import Endpoint
from optimizer.engines.engine import EngineConfig, ServerConfig
from optimizer.engines.guarded_process import GuardedProcess, last_words
from optimizer.engines.vllm_arguments import ENVIRONMENT, SECONDS_TO_START, engine_arguments
from optimizer.errors import EngineError, MergetuneError

_HOST = "127.0.0.1"
_SECONDS_BETWEEN_LOOKS = 0.2
# Calls of workers by name: vLLM offers them to whoever reaches the server, hence loopback only.
_ENVIRONMENT = {**ENVIRONMENT, "VLLM_SERVER_DEV_MODE": "1"}

T = TypeVar("T")


class VllmServer:
    """A `Vllm` behind its own HTTP server; a silent or dead one is an `EngineError`."""

    max_length: int

    def __init__(self, config: EngineConfig, model: Path, max_length: int, log: Path) -> None:
        assert config.server is not None  # what this is for
        self._log, self._version = log, ""
        port = _free_port(config.server)
        arguments = engine_arguments(config, model, max_length) | {"host": _HOST, "port": port}
        self._process = GuardedProcess("optimizer.engines.vllm_host:serve_http", arguments, log, _ENVIRONMENT)
        try:
            url = f"http://{_HOST}:{port}"
            self._wait_for(f"{url}/health")
            self._endpoint = Endpoint(url, concurrency=config.server.concurrency, timeout_s=config.timeout_s)
            assert self._endpoint.max_length is not None  # vLLM says it
            self.max_length = self._endpoint.max_length
        except BaseException:
            self.close()
            raise

    def generate(self, requests: Sequence[Generation]) -> list[str]:
        """See `Completer.generate`."""
        return self._checked(lambda: self._endpoint.generate(requests))

    def score(self, requests: Sequence[Scoring]) -> list[Scored]:
        """See `Completer.score`."""
        return self._checked(lambda: self._endpoint.score(requests))

    def choose(self, requests: Sequence[Choosing]) -> list[Scored]:
        """See `Completer.choose`."""
        return self._checked(lambda: self._endpoint.choose(requests))

    def call_workers(self, method: str, keywords: Mapping[str, str]) -> list[Any]:
        """See `Vllm.call_workers`."""
        body = {"method": method, "kwargs": dict(keywords)}
        results: list[Any] = self._watched(lambda: self._endpoint.post("/collective_rpc", body))["results"]
        return results

    def renew(self, version: str) -> None:
        """See `Vllm.renew`."""
        if not self._watched(lambda: self._endpoint.post("/reset_prefix_cache", None))["success"]:
            raise EngineError("vLLM would not reset its prefix cache: requests still hold blocks of it.")
        self._watched(lambda: self._endpoint.post("/update_weight_version", {"new_version": version}))
        self._version = version

    def close(self) -> None:
        """Stop the server."""
        self._process.kill()

    def _checked(self, ask: Callable[[], T]) -> T:
        """Return an answer that came from the weights loaded last: no others were there meanwhile."""
        answer = self._watched(ask)
        found = self._watched(lambda: self._endpoint.get("/weight_info"))["weight_version"]
        if self._version and found != self._version:
            raise EngineError(
                f"The server has the weights `{found}`, but `{self._version}` were loaded last."
            )
        return answer

    def _watched(self, ask: Callable[[], T]) -> T:
        """Say how the server ended, where that is why it does not answer."""
        try:
            return ask()
        except EngineError as fault:
            ending = self._process.ending()
            self.close()
            if ending is None:
                raise
            raise EngineError(f"vLLM's server ended ({ending}). {last_words(self._log)}") from fault

    def _wait_for(self, address: str) -> None:
        session = http.Session()
        session.trust_env = False  # proxies are for other machines
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline:
            if (ending := self._process.ending()) is not None:
                raise EngineError(f"vLLM's server did not start ({ending}). {last_words(self._log)}")
            with contextlib.suppress(http.RequestException):
                if session.get(address, timeout=_SECONDS_BETWEEN_LOOKS * 10).ok:
                    return
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        raise EngineError(f"vLLM's server did not start in {SECONDS_TO_START:g} s. {last_words(self._log)}")


def _free_port(config: ServerConfig) -> int:
    """Return the port that was asked for, if nothing listens there, or else any that is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, config.port or 0))
        except OSError as error:
            raise MergetuneError(
                f"`engine.server.port` must be free, but {config.port} is in use ({error}). Give another "
                "one, or leave it out to take any that is free."
            ) from error
        port: int = probe.getsockname()[1]
        return port
