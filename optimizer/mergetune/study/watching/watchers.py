"""The one door to whoever watches a study: they are told of every candidate, once, and of the end.

The run directory is the truth, and a watcher is brought up to date with it. What goes wrong there is a
warning: it is tried again at the next candidate and at the next start, and each watcher is told in a thread
of its own, so that none holds the study up.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

from mergetune.errors import MergetuneError
from mergetune.files.secret_url import without_secrets
from mergetune.results.config import MlflowConfig
from mergetune.results.run_dir import Candidate, RunDir
from mergetune.study.plan import Plan
from mergetune.study.watching.database import Database
from mergetune.study.watching.mlflow_runs import MlflowRuns
from mergetune.study.watching.on_finish import OnFinish
from mergetune.study.watching.seen import Ended, Seen, key_of
from mergetune.study.watching.wandb_run import WandbRun

_END_S = 600.0  # how long the last candidates and the end may take to be told
_BROKEN_OFF_S = 10.0  # the same where a study ends before its end


class Watcher(Protocol):
    """Who watches a study: a service outside, or a command.

    Attributes:
        name: as the study file has it.
        secret: a URL whose password no message may hold.
    """

    name: str
    secret: str

    def connect(self, keys: Collection[str]) -> Collection[str]:
        """Open the study there, new or going on; returns the keys of the candidates that it knows.

        Others than those in the run directory, whose `keys` are given, are no longer true, and are removed.
        """

    def show(self, seen: Seen) -> None:
        """Add a candidate that is not known there."""

    def finish(self, ended: Ended) -> None:
        """Add what is known at the end alone."""

    def close(self) -> None:
        """Let go of what is open; called once, whether the study came to its end or not."""


def make_watchers(plan: Plan, run: RunDir) -> list[Watcher]:
    """Return who watches a study, nobody connected yet.

    Raises:
        MergetuneError: what they need is not installed, or what they are given cannot be right.
    """
    found: list[Watcher] = [] if plan.storage is None else [Database(plan.storage, run)]
    for each in plan.loggers:
        found.append(MlflowRuns(each, run) if isinstance(each, MlflowConfig) else WandbRun(each, run))
    command = plan.config.on_finish
    return found if command is None else [*found, OnFinish(command, run)]


class Watchers:
    """All who watch one study.

    Args:
        watchers: who they are.
        say: is told what goes wrong.
    """

    def __init__(
        self, watchers: Sequence[Watcher] = (), say: Callable[[str], object] = lambda _: None
    ) -> None:
        self._tellers = [_Teller(each, say) for each in watchers]
        self._has_ended = False

    def connect(self, candidates: Iterable[Candidate]) -> None:
        """Begin to tell them, of a run directory that holds these candidates.

        Raises:
            MergetuneError: somebody cannot be reached and nothing was measured yet.
        """
        keys = {key_of(each) for each in candidates}
        for teller in self._tellers:
            teller.begin(keys)

    def measured(self, seen: Seen) -> None:
        """Tell them what became of a candidate; who knows it already is not told again."""
        for teller in self._tellers:
            teller.tell(seen)

    def finished(self, ended: Ended) -> None:
        """Tell them that the study has come to its end."""
        self._has_ended = True
        for teller in self._tellers:
            teller.tell(ended)

    def close(self) -> None:
        """Wait until everybody was told, but not for ever."""
        for teller in self._tellers:
            teller.close(_END_S if self._has_ended else _BROKEN_OFF_S)


class _Teller:
    """Tells one watcher what it does not know yet, in a thread."""

    def __init__(self, watcher: Watcher, say: Callable[[str], object]) -> None:
        self._watcher, self._say = watcher, say
        self._events: queue.SimpleQueue[Seen | Ended | None] = queue.SimpleQueue()
        self._keys: set[str] = set()  # of the candidates in the run directory
        self._due: dict[str, Seen] = {}
        self._known: set[str] | None = None  # there; None: it has to be connected
        self._is_at_fault = False
        self._thread = threading.Thread(target=self._work, name=watcher.name, daemon=True)

    def begin(self, keys: Collection[str]) -> None:
        self._keys = set(keys)
        if not keys:
            try:
                self._known = set(self._watcher.connect(keys))
            except MergetuneError:
                raise
            except Exception as error:  # each service has errors of its own
                raise MergetuneError(
                    f"`{self._watcher.name}` cannot be reached: {self._reason(error)}. Mend that, or leave "
                    "it out of the study file: it may be added when the study goes on."
                ) from error
        self._thread.start()

    def tell(self, event: Seen | Ended) -> None:
        self._events.put(event)

    def close(self, most_s: float) -> None:
        if not self._thread.is_alive():
            return
        self._events.put(None)
        self._thread.join(most_s)
        if self._thread.is_alive():
            self._say(f"warning: `{self._watcher.name}` did not take everything within {most_s:.0f} s.")

    def _work(self) -> None:
        ended: Ended | None = None
        is_open = True
        while is_open:
            events = [self._events.get()]
            while not self._events.empty():  # after a fault, all that has come meanwhile is one more try
                events.append(self._events.get())
            for event in events:
                if isinstance(event, Seen):
                    self._keys.add(event.key)
                    self._due[event.key] = event
            ended = next((event for event in events if isinstance(event, Ended)), ended)
            is_open = None not in events
            try:
                self._catch_up(ended)
                ended = None
            except Exception as error:  # it takes nothing from the study
                self._warn(error)
        try:
            self._watcher.close()
        except Exception as error:
            self._warn(error)

    def _catch_up(self, ended: Ended | None) -> None:
        if not self._due and ended is None:
            return
        if self._known is None:
            self._known = set(self._watcher.connect(self._keys))
        for key in list(self._due):
            self._due[key] = self._due.pop(key)  # the last, so that one that is not taken holds no other up
            if key not in self._known:
                self._watcher.show(self._due[key])
                self._known.add(key)
            del self._due[key]
        if self._is_at_fault:
            self._is_at_fault = False
            self._say(f"`{self._watcher.name}` is up to date again.")
        if ended is not None:
            self._watcher.finish(ended)

    def _warn(self, error: Exception) -> None:
        later = "; what was measured is kept, and told at the next candidate or start" if self._due else ""
        if not (self._is_at_fault and self._due):
            self._say(f"warning: `{self._watcher.name}`: {self._reason(error)}{later}")
        self._is_at_fault = bool(self._due)
        self._known = None  # whether the last one arrived is not known

    def _reason(self, error: BaseException) -> str:
        while error.__cause__ is not None:
            error = error.__cause__
        text = " ".join(str(error).split()) or type(error).__name__
        return without_secrets(text, self._watcher.secret)
