"""A clock that stands still while this process is stopped (SIGSTOP, Ctrl-Z) or the machine sleeps."""

from __future__ import annotations

import threading
import time

_TICK = 1.0  # seconds between two looks
_LATE = 5.0  # a look that is later by more was late because the process was stopped


class _Clock:
    """Counts the time that passed between looks of a thread of its own, which stops with the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._stopped = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def seconds(self) -> float:
        with self._lock:
            now = time.monotonic()
            if now - self._last > _TICK + _LATE:
                self._stopped += now - self._last - _TICK
                self._last = now
            return now - self._stopped

    def _watch(self) -> None:
        while True:
            time.sleep(_TICK)
            self.seconds()
            with self._lock:
                self._last = time.monotonic()


_clock: _Clock | None = None


def seconds() -> float:
    """Return the seconds since some moment, those left out in which this process was stopped."""
    global _clock
    if _clock is None:
        _clock = _Clock()
    return _clock.seconds()
