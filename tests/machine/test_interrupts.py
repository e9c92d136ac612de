"""Ctrl-C is remembered where its exception gets lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import weakref

import pytest

from mergetune.machine.interrupts import Interrupts


def test_a_swallowed_ctrl_c_is_not_lost() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        interrupts.check()
        with contextlib.suppress(KeyboardInterrupt):  # as a callback of C code does
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_ctrl_c_swallowed_in_a_weak_reference_is_kept_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    printed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)

    class Thing:
        pass

    thing = Thing()
    with Interrupts() as interrupts:
        watched = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
        del thing
        assert watched() is None
        assert interrupts.requested
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert printed == []
