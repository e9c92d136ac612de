"""The page of a check: one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from mergetune.files.templates import render_page
from mergetune.gate import words
from mergetune.gate.judge import Check, Flip
from mergetune.gate.row import Row
from mergetune.stats import number_text

_FLIPS_A_SCORE = 100
_TEXT = 4000  # characters shown of a prompt or a reply
_HALF_WIDTH = 84.0  # of a drawing, from zero to its largest value
_TONES = {"pass": "good", "fail": "none", "inconclusive": "mixed"}  # classes of report.css


@dataclass(frozen=True)
class Drawing:
    """Where a row's figures lie in its drawing, in pixels from zero."""

    lower: float
    upper: float
    estimate: float
    margin: float
    half_width: float = _HALF_WIDTH


def as_html(check: Check) -> str:
    """Return the page: the verdict, the figures with their intervals drawn, and the items that changed."""
    filters: dict[str, Callable[..., str]] = {
        "clean": words.clean,
        "number": number_text.number,
        "signed": number_text.signed,
        "span": words.span,
        "excerpt": lambda text: words.excerpt(text, _TEXT),
    }
    return render_page(
        "check.html.j2",
        filters,
        check=check,
        tone=_TONES[check.verdict],
        tones=_TONES,
        rows=list(zip(check.rows, drawings(check.rows), strict=True)),
        flips=shown_flips(check.flips),
        words=words,
    )


def drawings(rows: tuple[Row, ...]) -> list[Drawing]:
    """Lay out a drawing per row; rows within ±1 share one scale, so that they can be compared."""
    extents = [_extent(row) for row in rows]
    shared = max((extent for extent in extents if extent <= 1), default=1.0)
    return [
        _drawing(row, shared if extent <= 1 else extent) for row, extent in zip(rows, extents, strict=True)
    ]


def shown_flips(flips: tuple[Flip, ...]) -> list[Flip]:
    """Return the first flips of each score, in their order."""
    shown: Counter[str] = Counter()
    found = []
    for flip in flips:
        shown[flip.score_name] += 1
        if shown[flip.score_name] <= _FLIPS_A_SCORE:
            found.append(flip)
    return found


def _extent(row: Row) -> float:
    bounds = [row.interval.lower, row.interval.upper, row.difference, row.margin]
    return max([abs(bound) for bound in bounds if math.isfinite(bound)] + [1e-9])


def _drawing(row: Row, extent: float) -> Drawing:
    def place(value: float) -> float:
        return round(_HALF_WIDTH * min(max(value / extent, -1.05), 1.05), 1)

    return Drawing(
        place(row.interval.lower), place(row.interval.upper), place(row.difference), place(-row.margin)
    )
