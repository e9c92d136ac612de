"""Ctrl-C, and signals that ask to end, that cannot get lost: a flag beside the exception."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

_ENDING = (signal.SIGTERM, signal.SIGHUP)  # of a batch scheduler, a machine that is taken away, a terminal


def end_as_by_ctrl_c() -> None:
    """Let signals that ask the process to end do what Ctrl-C does, unless they are ignored (nohup)."""
    for number in _ENDING:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _interrupt)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class Interrupts:
    """Remembers Ctrl-C and its like while the block runs.

    A `KeyboardInterrupt` raised inside a callback of C code (an optimizer's, a database driver's) may
    be swallowed there or come out as another exception; `requested` stays set all the same, and
    Python does not print a traceback of what it swallowed.
    """

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if Ctrl-C was pressed and its exception got lost."""
        if self.requested:
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupts:
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:  # Python delivers signals to the main thread only
            taken = [signal.SIGINT, *(each for each in _ENDING if signal.getsignal(each) != signal.SIG_IGN)]
            self._before = {number: signal.signal(number, self._handle) for number in taken}
            self._hook_before, sys.unraisablehook = sys.unraisablehook, self._on_swallowed
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_main:
            for number, before in self._before.items():
                signal.signal(number, before)
            sys.unraisablehook = self._hook_before

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        raise KeyboardInterrupt

    def _on_swallowed(self, swallowed: sys.UnraisableHookArgs) -> None:
        if not issubclass(swallowed.exc_type, KeyboardInterrupt):
            self._hook_before(swallowed)
