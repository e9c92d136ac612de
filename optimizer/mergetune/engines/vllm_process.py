"""vLLM in a process of its own, which this one calls through a pipe."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergetune.engines.completions import Choosing, Generation, Scored, Scoring
from mergetune.engines.engine import EngineConfig
from mergetune.engines.vllm_arguments import SECONDS_TO_START, engine_arguments, environment_of
from mergetune.errors import EngineError
from mergetune.machine.guarded_process import GuardedProcess, last_words

_SECONDS_BETWEEN_LOOKS = 1.0


class VllmProcess:
    """vLLM in a process of its own, as a `Completer`; a silent or dead one is an `EngineError`."""

    def __init__(self, config: EngineConfig, model: Path, dtype: str, max_length: int, log: Path) -> None:
        self._log, self._timeout_s = log, config.timeout_s
        self._process = GuardedProcess(
            "mergetune.engines.vllm_host:serve",
            engine_arguments(config, model, dtype, max_length),
            log,
            environment_of(config.device),
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

    def open_models(self, paths: str) -> None:
        """Open the models that recipes name in every worker."""
        self._call("open_models", {"paths": paths}, SECONDS_TO_START)

    def load(self, recipe: str) -> list[dict[str, Any]]:
        """Merge a recipe in every worker; returns what each says of it, see `MergeWorker.mergetune_load`."""
        answers: list[dict[str, Any]] = self._call("load", {"recipe": recipe})
        return answers

    def renew(self, version: str) -> None:
        """Forget what other weights computed, and stamp what these will compute."""
        self._call("renew", {"version": version})

    def close(self) -> None:
        """End the process."""
        self._process.kill()

    def _call(self, method: str, keywords: Mapping[str, Any], timeout_s: float | None = None) -> Any:
        with contextlib.suppress(OSError):  # what ended it is told below
            self._process.connection.send((method, keywords))
        return self._answer(method, timeout_s or self._timeout_s)

    def _answer(self, method: str, timeout_s: float) -> Any:
        """Wait for the answer of a call, as long as the engine shows that it works."""
        connection, beat, silent_since = self._process.connection, "", time.monotonic()
        try:
            while time.monotonic() - silent_since < timeout_s:
                if not connection.poll(_SECONDS_BETWEEN_LOOKS):
                    # what it started may hold its end of the pipe, and would keep a dead one silent
                    if self._process.ending() is not None and not connection.poll():
                        raise EOFError
                    continue
                kind, value = connection.recv()
                if kind == "error":
                    raise value
                if kind == "result":
                    return value
                beat, silent_since = value, time.monotonic()
        except (EOFError, OSError) as error:
            self._process.kill()
            raise EngineError(
                f"vLLM's process ended while at `{method}` ({self._process.ending()}). "
                f"{last_words(self._log)}"
            ) from error
        self._process.kill()
        last = f" (last seen at {beat})" if beat else ""
        raise EngineError(
            f"vLLM was silent for {timeout_s:g} s while at `{method}`{last}, and was stopped. Where that is "
            f"how long it takes, raise `engine.timeout_s`. Its log: {self._log}"
        )
