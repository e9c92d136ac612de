"""vLLM in a process of its own, which this one calls through a pipe."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimizer.engines.completions import Choosing, Generation, Scored, Scoring
from optimizer.engines.engine import EngineConfig
from optimizer.engines.guarded_process import GuardedProcess, last_words
from optimizer.engines.vllm_arguments import ENVIRONMENT, SECONDS_TO_START, engine_arguments
from optimizer.errors import EngineError


class VllmProcess:
    """A `Vllm` in a process of its own; a silent or dead one is an `EngineError`."""

    def __init__(self, config: EngineConfig, model: Path, max_length: int, log: Path) -> None:
        self._log, self._timeout_s = log, config.timeout_s
        self._process = GuardedProcess(
            "optimizer.engines.vllm_host:serve", engine_arguments(config, model, max_length), log, ENVIRONMENT
        )
        try:
            self.max_length: int = self._answer("start", SECONDS_TO_START)["max_length"]
        except BaseException:
            self.close()
            raise

    def generate(self, requests: Sequence[Generation]) -> list[str]:
        """See `Completer.generate`."""
        replies: list[str] = self._call("generate", {"requests": requests})
        return replies

    def score(self, requests: Sequence[Scoring]) -> list[Scored]:
        """See `Completer.score`."""
        found: list[Scored] = self._call("score", {"requests": requests})
        return found

    def choose(self, requests: Sequence[Choosing]) -> list[Scored]:
        """See `Completer.choose`."""
        found: list[Scored] = self._call("choose", {"requests": requests})
        return found

    def call_workers(self, method: str, keywords: Mapping[str, str]) -> list[Any]:
        """See `Vllm.call_workers`."""
        results: list[Any] = self._call("call_workers", {"method": method, "keywords": keywords})
        return results

    def renew(self, version: str) -> None:
        """See `Vllm.renew`."""
        self._call("renew", {"version": version})

    def close(self) -> None:
        """End the process."""
        self._process.kill()

    def _call(self, method: str, keywords: Mapping[str, Any]) -> Any:
        with contextlib.suppress(OSError):  # what ended it is told below
            self._process.connection.send((method, keywords))
        return self._answer(method, self._timeout_s)

    def _answer(self, method: str, timeout_s: float) -> Any:
        """Wait for the answer of a call, as long as the engine shows that it works."""
        connection = self._process.connection
        try:
            while connection.poll(timeout_s):
                kind, value = connection.recv()
                if kind == "error":
                    raise value
                if kind == "result":
                    return value
        except (EOFError, OSError) as error:
            self._process.kill()
            raise EngineError(
                f"vLLM's process ended while at `{method}` ({self._process.ending()}). "
                f"{last_words(self._log)}"
            ) from error
        self._process.kill()
        raise EngineError(
            f"vLLM was silent for {timeout_s:g} s while at `{method}`, and was stopped. Where that is how "
            f"long it takes, raise `engine.timeout_s`. Its log: {self._log}"
        )
