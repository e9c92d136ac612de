"""Ctrl-C is remembered where its exception gets lost."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest

from optimizer.interrupts import Interrupts


def test_a_swallowed_ctrl_c_is_not_lost() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        interrupts.check()
        with contextlib.suppress(KeyboardInterrupt):  # as a callback of C code does
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert signal.getsignal(signal.SIGINT) is before
