"""What a run says while it works: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mergetune.evaluation.evaluate import Score
from mergetune.stats.number_text import number

log = logging.getLogger("mergetune")


class Progress:
    """The progress of one study, to be used as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line that stays, and log it."""
        log.info(text)
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def at_work(self, text: str) -> None:
        """Show what is being done now (on a terminal only)."""
        if self._console.is_terminal:
            self._live.update(Text(text, style="dim", no_wrap=True, overflow="ellipsis"))


def candidate_line(name: str, scores: Mapping[str, Score] | None, seconds: float, reason: str) -> str:
    """Return the line of one candidate; `reason` says why it was dropped or, without scores, failed."""
    if scores is None:
        return f"{name:<16} failed: {reason}"
    dropped = f"dropped: {reason}  " if reason else ""
    shown = "  ".join(f"{key} {number(score.value)}±{number(score.stderr)}" for key, score in scores.items())
    return f"{name:<16} {dropped}{shown}  {seconds:.1f} s"


class StudyLine:
    """Says where a search stands.

    Args:
        first: the number of the first trial of this sitting.
        n_trials: how many are to come.
    """

    def __init__(self, first: int, n_trials: int) -> None:
        self._first, self._last, self._began = first, first + n_trials - 1, time.monotonic()

    def text(self, number: int, n_front: int) -> str:
        """Return the line to show before trial `number`, with so many merges on the front."""
        left = "…"
        if number > self._first:
            seconds_per_trial = (time.monotonic() - self._began) / (number - self._first)
            left = f"{seconds_per_trial * (self._last - number + 1) / 60:.0f} min left"
        return f"trial {number} of {self._last} · front {n_front} · {left}"
