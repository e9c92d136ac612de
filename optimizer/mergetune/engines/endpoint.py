"""A model behind an OpenAI-compatible HTTP endpoint, as a `Completer`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ReadTimeoutError
from urllib3.util.retry import Retry

from mergetune.engines.completions import Choosing, Generation, Scored, Scoring
from mergetune.errors import EngineError, MergetuneError, TrialError

_SECONDS_TO_CONNECT = 10.0
_MOST_SECONDS_TO_WAIT = 60  # before another try, whatever the server asks for
_PASSING = (429, 502, 503)  # failures of a moment, worth another try
_NAN = "Out of range float values are not JSON compliant"  # Python's json, and so vLLM's status 400
# What servers say of a prompt that is too long: vLLM, OpenAI, SGLang, TGI, llama.cpp and others.
_TOO_LONG = re.compile(
    r"context[ _](length|size|window)|max(imum)?[ _](model[ _]len|input|context)|longer than|too long", re.I
)
# For a vLLM whose defaults are those of the model's generation_config.json.
_NEUTRAL = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
_MOST_TIED = 4  # tokens that share the highest logit

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


class _Retry(Retry):
    """Tries again what failed, but not what timed out: a hung server would be waited for again."""

    def increment(self, *args: Any, **keywords: Any) -> Self:
        if isinstance(keywords.get("error"), ReadTimeoutError):
            raise keywords["error"]
        return super().increment(*args, **keywords)

    def get_retry_after(self, response: Any) -> float | None:
        seconds = super().get_retry_after(response)
        return None if seconds is None else min(seconds, _MOST_SECONDS_TO_WAIT)


class Endpoint:
    """An OpenAI-compatible server as a `Completer`; each prompt is a request, so that it batches freely.

    Args:
        url: the server's address, with or without `/v1` at its end.
        model: the served model's name; None takes the only one.
        concurrency: the number of requests under way at a time.
        timeout_s: how long one request may take.
        api_key: the server's, if it asks for one.
        key_option: how the user names the variable that holds it, for errors.

    Raises:
        MergetuneError: the server does not serve the model, or refuses the key.
        EngineError: the server cannot be reached.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        concurrency: int = 32,
        timeout_s: float = 600.0,
        api_key: str | None = None,
        key_option: str = "--api-key HOST=VARIABLE",
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key_option = key_option
        self._concurrency, self._timeout_s = concurrency, timeout_s
        self._session = requests.Session()
        # proxies and .netrc are for other machines
        self._session.trust_env = urlsplit(self.url).hostname not in ("localhost", "127.0.0.1", "::1")
        if api_key:
            self._session.headers["Authorization"] = f"Bearer {api_key}"
        retry = _Retry(
            4, status_forcelist=_PASSING, allowed_methods=None, raise_on_status=False, backoff_factor=0.3
        )
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=concurrency, max_retries=retry))
        card = self._card(model)
        self.model: str = card["id"]
        self.root: str | None = card.get("root")
        self.max_length: int | None = card.get("max_model_len")
        self.is_vllm: bool = card.get("owned_by") == "vllm"

    def generate(self, requests: Sequence[Generation]) -> list[str]:
        """See `Completer.generate`."""
        return self.each(self._generate, requests)

    def score(self, requests: Sequence[Scoring]) -> list[Scored]:
        """See `Completer.score`; a server that gives no log-probabilities is a `MergetuneError`."""
        return self.each(self._score, requests)

    def choose(self, requests: Sequence[Choosing]) -> list[Scored]:
        """See `Completer.choose`; raises as `score` does."""
        return self.each(self._choose, requests)

    def each(self, ask: Callable[[Asked], Answered], requests: Sequence[Asked]) -> list[Answered]:
        """Call `ask` for every request, `concurrency` at a time; after a failure no more are begun."""
        executor = ThreadPoolExecutor(self._concurrency)
        try:
            futures = [executor.submit(ask, request) for request in requests]
            for future in as_completed(futures):
                future.result()
            return [future.result() for future in futures]
        finally:
            executor.shutdown(cancel_futures=True)

    def complete(self, path: str, **body: Any) -> dict[str, Any]:
        """Post to `/v1/completions` or `/v1/chat/completions`; return the answer's one choice.

        What is None in `body` is left to the server.
        """
        given = {"model": self.model, **self._defaults, **body}
        # some refuse an empty list
        answer = self.post(path, {key: value for key, value in given.items() if value not in (None, [])})
        try:
            choice: dict[str, Any] = answer["choices"][0]
        except (KeyError, IndexError, TypeError) as error:
            raise self._fault(path, f"`choices`, but answered {str(answer)[:200]!r}") from error
        return choice

    @property
    def _defaults(self) -> Mapping[str, float]:
        """What replies depend on unless a request says it: the server's own defaults may be others."""
        return {"top_p": 1.0, **(_NEUTRAL if self.is_vllm else {})}

    def get(self, path: str) -> Any:
        """Return the JSON that a path such as `/v1/models` answers with; None if that is empty."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: Any) -> Any:
        """Post JSON to a path; return the JSON of the answer, None if that is empty."""
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: Any) -> Any:
        address, limits = self.url + path, (_SECONDS_TO_CONNECT, self._timeout_s)
        try:
            reply = self._session.request(method, address, json=body, timeout=limits)
        except requests.ReadTimeout as error:
            raise self._fault(path, f"an answer within {self._timeout_s:g} s, but gave none") from error
        except requests.RequestException as error:
            raise EngineError(
                f"{self.url} cannot be reached ({error}). Start the server, or correct the URL."
            ) from error
        if reply.status_code in (401, 403):
            raise MergetuneError(
                f"{self.url} refused the API key, or the lack of one ({reply.status_code}: {_said(reply)}). "
                f"Name the variable that holds its key: {self._key_option}."
            )
        if reply.status_code == 429:
            raise EngineError(
                f"{self.url} takes no more requests now, after several tries ({reply.status_code}: "
                f"{_said(reply)}). Ask fewer at a time, or later."
            )
        if reply.status_code >= 500 or reply.status_code in _PASSING:
            raise self._fault(path, f"an answer, but failed with {reply.status_code}: {_said(reply)}")
        if not reply.ok and _NAN in reply.text:
            raise TrialError(f"{address}: the model's log-probabilities are NaN or infinite.")
        if reply.status_code in (400, 413, 422) and _TOO_LONG.search(_said(reply)):
            raise MergetuneError(
                f"{address}: a prompt and what follows it must fit into the length that the model is served "
                f"with, but the server refuses ({reply.status_code}): {_said(reply)} Shorten the prompt, "
                "lower `max_new_tokens`, or serve the model with a greater length."
            )
        if not reply.ok:
            raise MergetuneError(f"{address} refused a request ({reply.status_code}): {_said(reply)}")
        try:
            return reply.json() if reply.content else None
        except requests.JSONDecodeError as error:
            raise self._fault(path, f"JSON, but answered {reply.text[:200]!r}") from error

    def _fault(self, path: str, what: str) -> EngineError:
        return EngineError(f"{self.url}{path} must give {what}. Look at the server's log.")

    def _card(self, model: str | None) -> dict[str, Any]:
        """Return what the server says of the model."""
        answer = self.get("/v1/models")
        try:
            cards: dict[str, dict[str, Any]] = {card["id"]: card for card in answer["data"]}
        except (KeyError, TypeError) as error:
            raise self._fault("/v1/models", f"a list, but answered {str(answer)[:200]!r}") from error
        if model is None and len(cards) == 1:
            (model,) = cards
        if model is None or model not in cards:
            which = "one of the served models must be chosen" if model is None else f"there is no `{model}`"
            raise MergetuneError(f"{self.url}: {which}. Choose one of: {', '.join(sorted(cards))}.")
        return cards[model]

    def _generate(self, request: Generation) -> str:
        choice = self.complete(
            "/v1/completions",
            prompt=list(request.tokens),
            max_tokens=request.max_new_tokens,
            stop=list(request.stop),
            stop_token_ids=list(request.stop_tokens),
            **({} if request.skip_special_tokens else {"skip_special_tokens": False}),
            **request.sampling,
        )
        return choice.get("text") or ""

    def _score(self, request: Scoring) -> Scored:
        if not self.is_vllm:
            return self._score_echo(request)
        ranked = self._ranked(request, 0)
        # bfloat16 ties often, and each of n tied tokens ranks n-th; asked for the likeliest, vLLM breaks ties
        if 1 < max((at["rank"] for at in ranked), default=1) <= _MOST_TIED:
            ranked = self._ranked(request, 1)
        return Scored([at["logprob"] for at in ranked], [at["rank"] == 1 for at in ranked])

    def _ranked(self, request: Scoring, n_likeliest: int) -> list[dict[str, Any]]:
        """Return `logprob` and `rank` of each token by vLLM's own option: half the work of `echo`."""
        found = self._next(request.tokens, prompt_logprobs=n_likeliest).get("prompt_logprobs") or []
        if len(found) != len(request.tokens):
            raise self._no_logprobs()
        pairs = list(zip(found, request.tokens, strict=True))
        return [at[str(token)] for at, token in pairs[request.start :]]

    def _score_echo(self, request: Scoring) -> Scored:
        """Score as the first completions API did: it echoes the prompt, and adds a token of its own."""
        count = len(request.tokens)
        found = self._next(request.tokens, echo=True, logprobs=1).get("logprobs") or {}
        own, best = found.get("token_logprobs") or [], found.get("top_logprobs") or []
        # a prompt's first token follows nothing: where it has a value, the server did not echo
        is_echo = count <= len(own) == len(best) <= count + 1 and own[0] is None
        if not is_echo or None in own[1:count] or not all(best[1:count]):
            raise self._no_logprobs()
        scored = range(request.start, count)
        return Scored([own[i] for i in scored], [own[i] >= max(best[i].values()) for i in scored])

    def _choose(self, request: Choosing) -> Scored:
        """Score candidates by one request; where the server cannot, by one for each of them."""
        if self.is_vllm:
            logprobs = self._next(
                request.tokens,
                logprobs=1,
                logprob_token_ids=list(request.candidates),
                return_tokens_as_token_ids=True,
            )["logprobs"]
            (likeliest,), (found,) = logprobs["tokens"], logprobs["top_logprobs"]
            names = [f"token_id:{token}" for token in request.candidates]
            if found.keys() >= set(names):  # older versions know no `logprob_token_ids`
                return Scored([found[name] for name in names], [name == likeliest for name in names])
        texts = [[*request.tokens, token] for token in request.candidates]
        each = [self._score(Scoring(text, len(text) - 1)) for text in texts]
        return Scored([one.logprobs[0] for one in each], [one.are_likeliest[0] for one in each])

    def _next(self, tokens: Sequence[int], **options: Any) -> dict[str, Any]:
        """Ask for the likeliest next token, and for what the options say."""
        return self.complete("/v1/completions", prompt=list(tokens), max_tokens=1, temperature=0.0, **options)

    def _no_logprobs(self) -> MergetuneError:
        return MergetuneError(
            f"{self.url} must give the log-probabilities of a prompt (`echo` with `logprobs`), which choices "
            "and log-likelihood tasks need, but gave none. Measure the model's directory, or serve it with "
            "vLLM."
        )


def _said(reply: requests.Response) -> str:
    """Return the server's own message; the key, which some repeat, is taken out."""
    try:
        said = str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = reply.text[:200] or str(reply.reason)
    key = str(reply.request.headers.get("Authorization", "")).removeprefix("Bearer ")
    return said.replace(key, "[the key]") if key else said
