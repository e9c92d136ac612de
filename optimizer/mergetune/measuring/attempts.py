"""Attempts: counted before they begin, so that what ends the process itself is not tried for ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from mergetune.errors import MergetuneError
from mergetune.results.run_dir import Attempts

MOST_ATTEMPTS = 2  # at one thing, over all sittings


class Ledger(Protocol):
    """Where attempts are counted: a run directory, or the memory of this process.

    `what` names what is attempted; `of` is the digest of its recipe: attempts at another do not count. `host`
    is the machine of the worker that it begins on, where there are workers.
    """

    def attempts(self, what: str, of: str = "") -> Attempts:
        """Return the attempts at something that were begun and came to no end."""
        ...

    def begin_attempt(self, what: str, of: str = "", host: str = "") -> None:
        """Count an attempt; that is done before this returns."""
        ...

    def add_fault(self, what: str, of: str, fault: str) -> None:
        """Keep how the attempt begun last ended; it still counts."""
        ...

    def take_back_attempt(self, what: str, of: str = "") -> None:
        """Count the attempt begun last no more."""
        ...

    def forget_attempts(self, what: str) -> None:
        """Count no attempt any more: it came to its end, or is to be tried anew."""
        ...


class Memory:
    """A ledger that goes with this process."""

    def __init__(self) -> None:
        self._known: dict[str, Attempts] = {}

    def attempts(self, what: str, of: str = "") -> Attempts:
        """See `Ledger`."""
        found = self._known.get(what, Attempts(of=of))
        return found if found.of == of else Attempts(of=of)

    def begin_attempt(self, what: str, of: str = "", host: str = "") -> None:
        """See `Ledger`."""
        self._known[what] = self.attempts(what, of).with_another(host)

    def add_fault(self, what: str, of: str, fault: str) -> None:
        """See `Ledger`."""
        self._known[what] = self.attempts(what, of).with_fault(fault)

    def take_back_attempt(self, what: str, of: str = "") -> None:
        """See `Ledger`."""
        self._known[what] = self.attempts(what, of).with_one_less()

    def forget_attempts(self, what: str) -> None:
        """See `Ledger`."""
        self._known.pop(what, None)


@contextmanager
def attempt(ledger: Ledger, what: str) -> Iterator[None]:
    """Count an attempt while the block runs: it stays counted if the process does not outlive it.

    Raises:
        MergetuneError: two were counted before.
    """
    before = ledger.attempts(what)
    if before.begun >= MOST_ATTEMPTS:
        raise MergetuneError(f"{before.reason}. (`attempts/{what}.json` in the run directory counts that.)")
    ledger.begin_attempt(what)
    try:
        yield
    finally:
        ledger.take_back_attempt(what)
