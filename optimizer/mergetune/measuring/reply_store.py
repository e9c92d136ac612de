"""Replies kept by content: what was asked of which model is never asked again, however it is scored."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from filelock import FileLock
from lm_eval.api.model import LM

from mergetune.evaluation.lm_requests import asked_of, request_key
from mergetune.files.atomic_files import write_parquet
from mergetune.files.library import cache_folder, writable
from mergetune.machine.hardware import hardware
from mergetune.results.run_dir import readable

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from mergetune.engines.completions import Truncate

# A text; how long it took, in seconds, or the log-likelihood of a text; that of a continuation.
Reply = str | float | tuple[float, bool]
_AT_A_TIME = 2048  # requests that are put to the model together, unless its engine says how many
_SECONDS_BETWEEN_WRITES = 10.0  # each one writes the model's file anew
_TIMED_AT_A_TIME = 64  # requests: each waits for the one before it
_COLUMNS = ["key", "text", "number", "is_greedy"]


@dataclass(frozen=True)
class ReplyStore:
    """A folder with a file per model: its replies, by the request's key.

    A model's name here is a digest of all that its replies depend on; a request's key is one of what is
    asked and how it is decoded (`request_key`). Scores are not kept: they are computed from replies. A file
    is replaced as a whole, so that a process that is killed leaves what was there before.
    """

    folder: Path

    def read(self, model: str) -> dict[str, Reply]:
        """Return what is known of a model: replies by key."""
        file = self._file(model)
        if not file.is_file():
            return {}
        with readable(file):
            frame = pd.read_parquet(file).set_axis(_COLUMNS, axis=1)  # once `number` was `loglikelihood`
            rows = frame.itertuples(index=False, name=None)
            return {key: _reply(*columns) for key, *columns in rows}

    def add(self, model: str, replies: Mapping[str, Reply]) -> None:
        """Keep further replies of a model."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f"{model}.lock"):
            both = {**replies, **self.read(model)}  # what was there stays
            rows = [(key, *_columns(reply)) for key, reply in both.items()]
            frame = pd.DataFrame(rows, columns=_COLUMNS)
            write_parquet(
                self._file(model),
                frame.astype({"text": object, "number": float, "is_greedy": "boolean"}),
            )

    def _file(self, model: str) -> Path:
        return self.folder / f"{model}.parquet"


def default_store() -> ReplyStore:
    """Return the store in this user's cache; raises `MergetuneError` where it cannot be written."""
    return ReplyStore(writable(cache_folder() / "replies", "--cache"))


@dataclass(frozen=True)
class Missing:
    """A request that has to be put to a model, and the key that its reply is kept by."""

    key: str
    request: Instance


class StoredLM(LM):  # type: ignore[misc]  # lm-eval ships no types
    """A model as lm-eval sees it that says what was fetched from an engine, now or ever before.

    Args:
        renderer: anything with the model's tokenizer and chat template, which is there from the start.
        store: where replies are kept; None: in memory alone.
        name: the model's name in the store.
    """

    def __init__(self, renderer: Any, store: ReplyStore | None, name: str) -> None:
        super().__init__()
        self.renderer, self._store, self._name = renderer, store, name
        self._known = {} if store is None else store.read(name)
        self._keys: dict[int, tuple[Instance, str]] = {}  # each request's, by its identity
        self.truncate: Truncate = "refuse"

    @cached_property
    def _hardware(self) -> str:
        return hardware()

    @property
    def max_length(self) -> int | None:
        """The most tokens that prompt and reply may have together; None where nothing says it."""
        found: int | None = self.renderer.max_length
        return found

    def apply_chat_template(self, chat_history: list[dict[str, Any]], **options: Any) -> str:
        """Return a conversation as the renderer writes it, which may be more than its text."""
        rendered: str = self.renderer.apply_chat_template(chat_history, **options)
        return rendered

    def knows(self, request: Instance) -> bool:
        """Say whether a request was replied to before."""
        return self._key(request) in self._known

    def excess_tokens(self, request: Instance) -> int:
        """Return by how many tokens a request is too long; what was replied to before was not."""
        excess_tokens = getattr(self.renderer, "excess_tokens", None)
        return 0 if excess_tokens is None or self.knows(request) else int(excess_tokens(request))

    def missing(self, requests: Iterable[Instance]) -> list[Missing]:
        """Return what has to be fetched before these requests can be put to it, in their order."""
        return [
            Missing(key, request)
            for asked in asked_of(requests).values()
            for key, request in zip(self._drawn_keys(asked), asked, strict=True)
            if key not in self._known
        ]

    def has(self, missing: Missing) -> bool:
        """Say whether a reply was fetched meanwhile."""
        return missing.key in self._known

    def fetch(self, lm: LM, missing: Sequence[Missing]) -> None:
        """Put requests to a model and keep its replies as they come, also where it breaks in between."""
        unwritten: dict[str, Reply] = {}
        written = time.monotonic()
        lm.truncate = self.truncate
        by_kind: dict[str, list[Missing]] = {}
        for each in missing:
            by_kind.setdefault(each.request.request_type, []).append(each)
        try:
            for kind, rest in by_kind.items():
                while rest:
                    size = getattr(lm, "requests_at_a_time", None) or _AT_A_TIME
                    size = _TIMED_AT_A_TIME if kind == "reply_seconds" else size
                    part, rest = rest[:size], rest[size:]
                    found = getattr(lm, kind)([each.request for each in part])
                    unwritten |= {each.key: reply for each, reply in zip(part, found, strict=True)}
                    if time.monotonic() - written > _SECONDS_BETWEEN_WRITES:
                        self._keep(unwritten)
                        unwritten, written = {}, time.monotonic()
        finally:
            self._keep(unwritten)

    def generate_until(self, requests: list[Instance], **_: Any) -> list[Any]:
        """Return replies."""
        return self._replies(requests)

    def reply_seconds(self, requests: list[Instance], **_: Any) -> list[Any]:
        """Return the times of replies; see `ReplyTimes`."""
        return self._replies(requests)

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[Any]:
        """Return what continuations score."""
        return self._replies(requests)

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[Any]:
        """Return what whole texts score."""
        return self._replies(requests)

    def _replies(self, requests: Sequence[Instance]) -> list[Reply]:
        return [self._known[key] for key in self._drawn_keys(requests)]

    def _drawn_keys(self, requests: Sequence[Instance]) -> list[str]:
        """Return the keys of requests put together; one that stands several times is drawn as often."""
        draws: Counter[str] = Counter()
        keys = []
        for request in requests:
            key = self._key(request)
            keys.append(f"{key}-{draws[key]}" if draws[key] else key)
            draws[key] += 1
        return keys

    def _keep(self, replies: Mapping[str, Reply]) -> None:
        """Keep replies; what is not a number is kept in memory alone, for another time it may be one."""
        sound = {key: reply for key, reply in replies.items() if not _is_nan(reply)}
        self._known |= replies
        if sound and self._store is not None:
            self._store.add(self._name, sound)

    def _key(self, request: Instance) -> str:
        """Return the request's key; a prompt that is cut off is another one, a time is this machine's."""
        if id(request) not in self._keys:
            key = request_key(request)
            timed = request.request_type == "reply_seconds"
            self._keys[id(request)] = request, f"{key}-{self._hardware}" if timed else key
        return self._keys[id(request)][1] + ("-cut" if self.truncate == "left" else "")


def _columns(reply: Reply) -> tuple[str | None, float, bool | None]:
    if isinstance(reply, str):
        return reply, math.nan, None
    return (None, reply[0], reply[1]) if isinstance(reply, tuple) else (None, reply, None)


def _reply(text: str | None, number: float, is_greedy: Any) -> Reply:
    if isinstance(text, str):
        return text
    return number if pd.isna(is_greedy) else (number, bool(is_greedy))


def _is_nan(reply: Reply) -> bool:
    number = reply[0] if isinstance(reply, tuple) else reply
    return isinstance(number, float) and math.isnan(number)
