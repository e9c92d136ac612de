"""The process that vLLM lives in: it answers the calls of `VllmProcess` until the pipe is closed."""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mergetune.engines.completions import Choosing, Generation, Scored, Scoring
from mergetune.engines.vllm_arguments import for_device
from mergetune.errors import EngineError, MergetuneError

_SECONDS_BETWEEN_BEATS = 1.0


def serve(connection: Connection, arguments: Mapping[str, Any]) -> None:
    """Start an engine with these `EngineArgs`, then answer each (method, keyword arguments).

    What goes back is ("beat", what was done last) while the engine works, then ("result", value) or ("error",
    an exception).
    """
    host: _Host | None = None
    while True:
        try:
            if host is None:
                host = _Host(connection, arguments)
                result: Any = host.facts()
            else:
                method, keywords = connection.recv()
                result = getattr(host, method)(**keywords)
            answer: tuple[str, Any] = ("result", result)
        except EOFError:
            return
        except MergetuneError as error:
            answer = ("error", error)
        except Exception as error:  # whatever vLLM raises
            answer = ("error", EngineError(f"{type(error).__name__}: {error}"))
        connection.send(answer)
        if host is None:
            return


class _Host:
    """vLLM's `LLM` with what a study does with it."""

    def __init__(self, connection: Connection, arguments: Mapping[str, Any]) -> None:
        settled = for_device(arguments)
        from vllm import LLM

        self._connection = connection
        self._llm: Any = LLM(**settled)
        self._numbers = itertools.count()
        self._version = ""
        self._next_beat = 0.0

    def facts(self) -> dict[str, Any]:
        """Return what the engine settled by itself."""
        return {"max_length": self._llm.model_config.max_model_len}

    def open_models(self, paths: str) -> None:
        """Have every worker open the models that recipes name."""
        self._llm.collective_rpc("mergetune_open", kwargs={"paths": paths})

    def load(self, recipe: str) -> list[dict[str, Any]]:
        """Have every worker merge a recipe; their progress beats meanwhile."""
        with self._watching() as progress:
            answers: list[dict[str, Any]] = self._llm.collective_rpc(
                "mergetune_load", kwargs={"recipe": recipe, "progress": str(progress)}
            )
        return answers

    def renew(self, version: str) -> None:
        """Forget what other weights computed, and stamp what these will."""
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM would not reset its prefix cache: requests still hold blocks of it.")
        self._llm.update_weight_version(version)
        self._version = version

    def generate(self, requests: Sequence[Generation]) -> list[str]:
        """See `Completer.generate`."""
        outputs = self._run(
            requests,
            [
                {
                    "max_tokens": request.max_new_tokens,
                    "stop": list(request.stop),
                    "stop_token_ids": list(request.stop_tokens),
                    "skip_special_tokens": request.skip_special_tokens,
                    **request.sampling,
                }
                for request in requests
            ],
        )
        return [output.outputs[0].text for output in outputs]

    def score(self, requests: Sequence[Scoring]) -> list[Scored]:
        """See `Completer.score`."""
        settings = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1, "detokenize": False}
        outputs = self._run(requests, [settings] * len(requests))
        return [
            _scored(
                [at[token] for at, token in zip(output.prompt_logprobs, request.tokens, strict=True) if at][
                    request.start - 1 :
                ]
            )
            for request, output in zip(requests, outputs, strict=True)
        ]

    def choose(self, requests: Sequence[Choosing]) -> list[Scored]:
        """See `Completer.choose`."""
        settings = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
        outputs = self._run(
            requests, [{**settings, "logprob_token_ids": list(request.candidates)} for request in requests]
        )
        found = []
        for request, output in zip(requests, outputs, strict=True):
            (likeliest,), (at,) = output.outputs[0].token_ids, output.outputs[0].logprobs
            logprobs = [at[token].logprob for token in request.candidates]
            found.append(Scored(logprobs, [token == likeliest for token in request.candidates]))
        return found

    def _run(
        self, requests: Sequence[Generation | Scoring | Choosing], settings: Sequence[Mapping[str, Any]]
    ) -> list[Any]:
        """Work on all requests together; returns vLLM's outputs in their order."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        try:
            parameters = [
                SamplingParams(**each, output_kind=RequestOutputKind.FINAL_ONLY) for each in settings
            ]
        except (TypeError, ValueError) as error:
            raise MergetuneError(f"vLLM does not take these generation settings: {error}") from error
        engine, outputs = self._llm.llm_engine, {}
        names = [str(next(self._numbers)) for _ in requests]
        for name, request, each in zip(names, requests, parameters, strict=True):
            engine.add_request(name, {"prompt_token_ids": list(request.tokens)}, each)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    self._check_version(output)
                    outputs[output.request_id] = output
            self._beat()
        return [outputs[name] for name in names]

    def _beat(self) -> None:
        now = time.monotonic()
        if now >= self._next_beat:
            self._connection.send(("beat", "a step of the model"))
            self._next_beat = now + _SECONDS_BETWEEN_BEATS

    @contextmanager
    def _watching(self) -> Iterator[Path]:
        """Yield a file whose text workers change as they get on; each change is a beat."""
        ended = threading.Event()
        with tempfile.TemporaryDirectory() as folder:
            progress = Path(folder) / "progress"
            progress.touch()

            def watch() -> None:
                known = ""
                while not ended.wait(_SECONDS_BETWEEN_BEATS):
                    now = progress.read_text(encoding="utf-8")
                    if now != known:
                        self._connection.send(("beat", now))
                    known = now

            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                yield progress
            finally:
                ended.set()
                watcher.join()

    def _check_version(self, output: Any) -> None:
        """Raise `EngineError` if other weights than the ones loaded last had a part in an output."""
        versions = {span.version for span in output.outputs[0].weight_versions}
        if self._version and versions != {self._version}:
            raise EngineError(
                f"A reply came from the weights {sorted(versions)}, but `{self._version}` were loaded last."
            )


def _scored(logprobs: Sequence[Any]) -> Scored:
    return Scored([at.logprob for at in logprobs], [at.rank == 1 for at in logprobs])
