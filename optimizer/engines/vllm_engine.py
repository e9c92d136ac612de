"""The engine for GPUs and for speed: vLLM in a process of its own, or behind a server."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from optimizer.engines.completions import Choosing, Completer, CompletionsLM, Generation, Scored, Scoring
from optimizer.engines.engine import EngineConfig, LoadTime
from optimizer.engines.guarded_process import GuardedProcess, last_words
from optimizer.engines.vllm_arguments import ENVIRONMENT, engine_arguments
from optimizer.errors import EngineError, MergetuneError, TrialError
from optimizer.merging.inputs import ModelPaths

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from optimizer.recipe import MergeRecipe

_SECONDS_TO_START = 3600.0  # of silence: a large model is read, and compiled


class Vllm(Completer, Protocol):
    """A vLLM that answers requests, and what else of it an engine needs."""

    max_length: int

    def call_workers(self, method: str, keywords: Mapping[str, str]) -> list[Any]:
        """Call a method of `MergeWorker` in every worker."""
        ...

    def renew(self, version: str) -> None:
        """Forget what other weights computed, and stamp what these will compute."""
        ...

    def close(self) -> None:
        """End its processes."""
        ...


class VllmEngine:
    """vLLM, with every candidate merged inside its workers.

    Args:
        config: the engine's options.
        model: the directory that it starts with.
        paths: the models that recipes name; None where nothing is to be merged.
        log: the file that its output is added to.

    Raises:
        EngineError: vLLM does not start; the message says why.
    """

    def __init__(self, config: EngineConfig, model: Path, paths: ModelPaths | None, log: Path) -> None:
        from transformers import AutoTokenizer

        if config.server is None:
            self.vllm: Vllm = VllmProcess(config, model, log)
        else:
            from optimizer.engines.vllm_server import VllmServer

            self.vllm = VllmServer(config, model, log)
        self._counts = itertools.count(1)
        try:
            tokenizer = AutoTokenizer.from_pretrained(model)
            self._lm = CompletionsLM(self.vllm, tokenizer, self.vllm.max_length, config.seed)
            self.vllm.score([Scoring([self._lm.eot_token_id] * 2, 1)])  # some models start, but do not run
            if paths is not None:
                self.vllm.call_workers("mergetune_open", {"paths": paths.model_dump_json()})
        except BaseException:
            self.close()
            raise

    @property
    def lm(self) -> LM:
        """The model as lm-eval sees it."""
        return self._lm

    def load(self, recipe: MergeRecipe) -> LoadTime:
        """Have every worker merge; see `Engine.load`."""
        answers = self.vllm.call_workers("mergetune_load", {"recipe": recipe.model_dump_json(by_alias=True)})
        for answer in answers:
            if "error" in answer:
                raise (TrialError if answer["of_trial"] else MergetuneError)(answer["error"])
            if answer["digest"] != recipe.digest:
                raise EngineError(f"A worker merged the recipe {answer['digest']}, not {recipe.digest}.")
        self.vllm.renew(f"{next(self._counts)}-{recipe.digest}")
        slowest = max(answers, key=lambda answer: float(answer["merge_s"] + answer["load_s"]))
        return LoadTime(slowest["merge_s"], slowest["load_s"])

    def close(self) -> None:
        """End vLLM's processes."""
        self.vllm.close()


class VllmProcess:
    """vLLM in a process of its own that this one calls; a silent or dead one is an `EngineError`."""

    def __init__(self, config: EngineConfig, model: Path, log: Path) -> None:
        self._log, self._timeout_s = log, config.timeout_s
        self._process = GuardedProcess(
            "optimizer.engines.vllm_host:serve", engine_arguments(config, model), log, ENVIRONMENT
        )
        try:
            self.max_length: int = self._answer("start", _SECONDS_TO_START)["max_length"]
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
