"""A judge: a model that gives verdicts, served or on this machine, asked only what was not judged before."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetune.engines.engine import EngineConfig
from mergetune.errors import MergetuneError, TrialError
from mergetune.evaluation.judging.local_judge import Asked, local_judge
from mergetune.evaluation.judging.questions import Question
from mergetune.evaluation.judging.verdict_store import VerdictStore
from mergetune.evaluation.judging.verdicts import Explained, Verdict

if TYPE_CHECKING:
    from mergetune.engines.endpoint import Endpoint

_MOST_TRIES = 3  # at one verdict, where what comes is none
_MOST_UNJUDGED = 50  # one reply in so many may lack a verdict, and one in any case
_AT_A_TIME = 64  # questions to an engine, whose verdicts are kept together
_KEPT = "The verdicts that were given are kept: run the same command again to go on."

Keys = list[list[list[str]]]  # of verdicts, (n_replies, repeats, n_questions)


@dataclass(frozen=True)
class JudgeSettings:
    """Which model judges, and how it is asked; see the scorer `judge`.

    `folder` is that of a model on this machine, whose `model` is then a digest, and `engine` runs it.
    """

    model: str
    url: str
    key_variable: str | None
    temperature: float | None
    max_new_tokens: int | None
    concurrency: int
    timeout_s: float
    max_requests: int | None
    folder: Path | None = None
    engine: EngineConfig = field(default=EngineConfig(), hash=False)

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self.model if self.folder is None else str(self.folder)

    @property
    def decoding(self) -> dict[str, Any]:
        """The options of a request that a verdict depends on; those that are None are left to the server."""
        by_server = {"top_p": None} if self.temperature is None else {}
        return {"temperature": self.temperature, "max_tokens": self.max_new_tokens, **by_server}


class Judge:
    """A judge with what it said before; every verdict is kept as it comes.

    A server is first reached, or an engine started, when a verdict is missing. The model's name says which
    judge it is, not the server's address, which may change; on this machine its digest does.

    What it gave no verdict on after several tries is not asked again in this process. It is kept nowhere
    else, so that the next process asks again.

    Args:
        settings: the model and how it is asked.
        store: where verdicts are kept.
    """

    def __init__(self, settings: JudgeSettings, store: VerdictStore) -> None:
        self._settings, self._store = settings, store
        self._endpoint: Endpoint | None = None
        self._takes_schema = True
        self._n_asked = 0
        self._silent: dict[str, str] = {}  # by key, why there is no verdict
        self._lock = threading.Lock()

    def judged(self, asked: Sequence[Sequence[Question]], repeats: int) -> list[list[Explained]]:
        """Return the scores that a judge's verdicts give each reply, with its reasons, one for each repeat.

        A score is the mean over the questions about a reply, NaN where one of them has no verdict.

        Args:
            asked: the questions about each reply of a task, (n_replies, n_questions).
            repeats: how often each is asked.

        Raises:
            MergetuneError: the judge cannot be used, may be asked no more, or gives no verdict on more than
                one reply and more than 2 % of them: then it is unfit, and the others are no fair sample.
        """
        keys = [[[self._key(each, repeat) for each in own] for repeat in range(repeats)] for own in asked]
        known = self._store.read(self._settings.model)
        for key in self._silent.keys() & known.keys():  # another process has asked again
            del self._silent[key]
        missing = {
            key: question
            for questions, own in zip(asked, keys, strict=True)
            for of_repeat in own
            for key, question in zip(of_repeat, questions, strict=True)
            if key not in known and key not in self._silent
        }
        known |= self._ask(missing, keys)

        return [
            [_explained(questions, [known.get(key) for key in of_repeat]) for of_repeat in own]
            for questions, own in zip(asked, keys, strict=True)
        ]

    def _key(self, question: Question, repeat: int) -> str:
        """Return a digest of all that a verdict depends on; the store has a file for each model."""
        asked = [question.messages, question.form.response_format, self._settings.decoding, repeat]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _ask(self, missing: Mapping[str, Question], keys: Keys) -> dict[str, Verdict]:
        """Ask questions; what is wrong then is the judge's, whatever it would be of the model under test.

        As soon as too many replies lack a verdict no more is asked.
        """
        folder = self._settings.folder
        try:
            self._refuse_many_unjudged(keys)
            if not missing:
                return {}
            if folder is None:
                return self._ask_server(missing, keys)
            return self._ask_engine(folder, missing, keys)
        except MergetuneError as error:
            self._silent.clear()  # whoever mends what is wrong and calls again asks again
            raise MergetuneError(f"The judge `{self._settings.name}`: {error} {_KEPT}") from error

    def _refuse_many_unjudged(self, keys: Keys) -> None:
        """Raise `MergetuneError` where more replies lack a verdict than may; see `judged`."""
        lacking = [
            silent
            for own in keys
            if all(silent := [self._silent.keys() & set(of_repeat) for of_repeat in own])
        ]
        n_allowed = max(1, len(keys) // _MOST_UNJUDGED)
        if len(lacking) > n_allowed:
            raise MergetuneError(
                f"a verdict must be one JSON object, but {_MOST_TRIES} times there was none for "
                f"{len(lacking)} of {len(keys)} replies, of which {n_allowed} may lack one, such as for "
                f"{self._silent[min(lacking[0][0])]} Take a judge that follows instructions, or raise "
                "`max_new_tokens` if it was cut off."
            )

    def _ask_server(self, missing: Mapping[str, Question], keys: Keys) -> dict[str, Verdict]:
        """Ask several questions at a time, and keep each verdict before the next is asked for."""
        endpoint = self._connected()
        found: dict[str, Verdict] = {}

        def ask(asked: tuple[str, Question]) -> None:
            key, question = asked
            verdict = self._verdict(endpoint, question)
            with self._lock:
                if isinstance(verdict, str):
                    self._silent[key] = verdict
                    self._refuse_many_unjudged(keys)
                else:
                    self._store.add(self._settings.model, key, verdict)
                    found[key] = verdict

        endpoint.each(ask, list(missing.items()))
        return found

    def _ask_engine(self, folder: Path, missing: Mapping[str, Question], keys: Keys) -> dict[str, Verdict]:
        """Ask a model of this machine, whose memory is free again at the end."""
        given, rest = self._settings, list(missing)
        assert given.temperature is not None  # JudgeScorer.with_files
        assert given.max_new_tokens is not None
        found: dict[str, Verdict] = {}
        with local_judge(folder, given.engine, given.temperature, given.max_new_tokens) as replies:
            for start in range(0, len(rest), _AT_A_TIME):
                found |= self._verdicts(replies, {key: missing[key] for key in rest[start:][:_AT_A_TIME]})
                self._refuse_many_unjudged(keys)
        return found

    def _verdicts(
        self, replies: Callable[[Sequence[Asked]], list[str]], asked: Mapping[str, Question]
    ) -> dict[str, Verdict]:
        """Return an engine's verdicts and keep them; what it says that is none is asked for again."""
        found: dict[str, Verdict] = {}
        messages = {key: question.messages for key, question in asked.items()}
        silent: dict[str, str] = {}
        for _ in range(_MOST_TRIES):
            said = replies([(own, int(key[:8], 16) >> 1) for key, own in messages.items()])
            for key, reply in zip(list(messages), said, strict=True):
                try:
                    found[key] = asked[key].form.read(reply)
                except ValueError as error:
                    messages[key] = _asked_again(asked[key], reply, error)
                    silent[key] = _no_verdict(asked[key], reply, error)
                    continue
                self._store.add(self._settings.model, key, found[key])
                del messages[key]
            if not messages:
                break
        self._silent |= {key: silent[key] for key in messages}
        return found

    def _connected(self) -> Endpoint:
        from mergetune.engines.endpoint import Endpoint

        if self._endpoint is None:
            given = self._settings
            key = None if given.key_variable is None else os.environ.get(given.key_variable)
            if given.key_variable is not None and not key:
                raise MergetuneError(
                    f"{given.url}: the variable {given.key_variable} holds no API key. Set it."
                )
            self._endpoint = Endpoint(
                given.url,
                given.model,
                given.concurrency,
                given.timeout_s,
                api_key=key,
                key_option="`key_variable: VARIABLE`",
            )
        return self._endpoint

    def _verdict(self, endpoint: Endpoint, question: Question) -> Verdict | str:
        """Return a judge's verdict, or else why there is none.

        Where what it says is none, it is told so and asked once more.
        """
        messages, problem = question.messages, ""
        for _ in range(_MOST_TRIES):
            reply = self._reply(endpoint, messages, question.form.response_format)
            try:
                return question.form.read(reply)
            except ValueError as error:
                messages = _asked_again(question, reply, error)
                problem = _no_verdict(question, reply, error)
        return problem

    def _reply(
        self, endpoint: Endpoint, messages: Sequence[Mapping[str, str]], response_format: dict[str, Any]
    ) -> str:
        """Return what the judge says, held to the form where the server can do that."""
        if not self._takes_schema:
            return self._post(endpoint, messages)
        try:
            return self._post(endpoint, messages, response_format=response_format)
        except TrialError:  # no answer at all
            raise
        except MergetuneError:
            reply = self._post(endpoint, messages)  # raises where the form was not the reason
            self._takes_schema = False
            return reply

    def _post(self, endpoint: Endpoint, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        with self._lock:
            if self._n_asked == self._settings.max_requests:
                raise MergetuneError(
                    f"no more than {self._n_asked} requests may be made in a run (`max_requests`), but there "
                    "are verdicts to come. Raise `max_requests`, or leave it as it is."
                )
            self._n_asked += 1
        choice = endpoint.complete(
            "/v1/chat/completions", messages=list(messages), **self._settings.decoding, **options
        )
        return (choice.get("message") or {}).get("content") or ""


def _explained(questions: Sequence[Question], verdicts: Sequence[Verdict | None]) -> Explained:
    """Return what the verdicts on a reply come to; None: there is none."""
    forms = [question.form for question in questions]
    pairs = list(zip(forms, verdicts, strict=True))
    scores = [math.nan if verdict is None else form.score(verdict) for form, verdict in pairs]
    reasons = [form.text(verdict) for form, verdict in pairs if verdict is not None]
    return Explained(sum(scores) / len(scores), "\n".join(reasons))


def _asked_again(question: Question, reply: str, reason: ValueError) -> tuple[Mapping[str, str], ...]:
    """Return a question with a reply that is no verdict, and what is wrong with it."""
    again = f"That is no verdict: {reason}. {question.form.instruction}"
    added = {"role": "assistant", "content": reply}, {"role": "user", "content": again}
    return (*question.messages, *added)


def _no_verdict(question: Question, reply: str, reason: ValueError) -> str:
    return f"the item {question.about[:80]!r}: {reason}. The last reply was {reply[:300]!r}."


@functools.cache
def judge_of(settings: JudgeSettings, folder: Path) -> Judge:
    """Return this process's one judge with these settings, so that its requests are counted together."""
    return Judge(settings, VerdictStore(folder))
