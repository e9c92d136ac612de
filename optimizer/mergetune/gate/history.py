"""How a deployment suite moved over releases: the checks in a folder, in the order of their names.

Each release is a folder that `check --out` wrote. Scores are the candidate's, with their 95 % intervals over
items; a change is from the release before, paired by item. Releases that were scored by other rules than the
last one are named, and left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Measurement, paired, rules_of
from mergetune.files.atomic_files import write_text
from mergetune.files.templates import render_page
from mergetune.gate.words import clean, span
from mergetune.stats.number_text import number, signed
from mergetune.stats.paired import paired_difference
from mergetune.stats.resampling import Interval, bootstrap_scores, join_items, score_interval

_WIDTH, _HEIGHT, _PAD = 640.0, 130.0, 14.0  # of a score's drawing, in pixels
_LEVEL = 0.95


@dataclass(frozen=True)
class Point:
    """One score of one release; `change` is from the release before, None where they share no item."""

    release: str
    candidate: str
    verdict: str
    value: float
    interval: Interval
    change: float | None
    change_interval: Interval | None


@dataclass(frozen=True)
class History:
    """Every score over the releases, and the releases that were left out."""

    scores: dict[str, tuple[Point, ...]]
    left_out: tuple[str, ...]


def read_history(folder: Path) -> History:
    """Read the checks in a folder.

    Raises:
        MergetuneError: there is none.
    """
    found = sorted(folder.glob("*/check.json"), key=lambda file: _in_order(file.parent.name))
    if not found:
        raise MergetuneError(
            f"{folder}: must hold folders that `mergetune check --out` wrote, one a release, but holds none."
        )
    frames = [pd.read_parquet(file.parent / "candidate.parquet") for file in found]
    same = [rules_of(frame) == rules_of(frames[-1]) for frame in frames]
    kept = [(file, frame) for file, frame, is_same in zip(found, frames, same, strict=True) if is_same]
    scores: dict[str, list[Point]] = {}
    previous: pd.DataFrame | None = None
    for file, frame in kept:
        check = json.loads(file.read_text(encoding="utf-8"))
        for name, point in _points(file.parent.name, check, frame, previous):
            scores.setdefault(name, []).append(point)
        previous = frame
    return History(
        {name: tuple(points) for name, points in scores.items()},
        tuple(file.parent.name for file, is_same in zip(found, same, strict=True) if not is_same),
    )


def write_history(folder: Path) -> Path:
    """Write `history.html` into the folder; returns its path."""
    history = read_history(folder)
    page = folder / "history.html"
    drawings = {name: _drawing(points) for name, points in history.scores.items()}
    filters: dict[str, Callable[..., str]] = {
        "clean": clean,
        "number": number,
        "signed": signed,
        "span": span,
    }
    write_text(page, render_page("history.html.j2", filters, history=history, drawings=drawings))
    return page


def _points(
    release: str, check: dict[str, Any], frame: pd.DataFrame, previous: pd.DataFrame | None
) -> list[tuple[str, Point]]:
    items = join_items({release: frame})
    verdicts = {row["name"]: row["verdict"] for row in check["rows"]}
    pairs = None if previous is None else paired(frame, previous)
    found = []
    for name, score in Measurement(frame, 0.0).scores().items():
        own = items[name]
        resampled = bootstrap_scores(own.scores, own.tasks)[:, 0]
        change, interval = None, None
        both = None if pairs is None else pairs[pairs["score_name"] == name]
        if both is not None and len(both):
            now, before = (both[each].to_numpy(np.float64) for each in ("own", "score_other"))
            moved = paired_difference(now, before, both["task"].to_numpy())
            change, interval = moved.estimate, moved.interval(_LEVEL)
        is_share = bool(frame["score"][frame["score_name"] == name].dropna().between(0, 1).all())
        interval_now = score_interval(score, resampled, _LEVEL, is_share=is_share)
        point = Point(
            release,
            str(check["candidate"]),
            verdicts.get(name, ""),
            score.value,
            interval_now,
            change,
            interval,
        )
        found.append((name, point))
    return found


def _in_order(name: str) -> list[tuple[bool, int, str]]:
    """Return what sorts `v1.9` before `v1.10`."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def _drawing(points: Sequence[Point]) -> list[dict[str, float]]:
    """Lay out a score's points and intervals, in pixels from the upper left."""
    low = min(point.interval.lower for point in points)
    high = max(point.interval.upper for point in points)
    room = (high - low) or 1.0
    step = (_WIDTH - 2 * _PAD) / max(len(points) - 1, 1)

    def up(value: float) -> float:
        return round(_PAD + (high - value) / room * (_HEIGHT - 2 * _PAD), 1)

    return [
        {
            "x": round(_PAD + i * step, 1),
            "y": up(point.value),
            "lower": up(point.interval.lower),
            "upper": up(point.interval.upper),
        }
        for i, point in enumerate(points)
    ]
