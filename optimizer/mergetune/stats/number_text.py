"""Numbers, and lists of names, as they are shown to people."""

from __future__ import annotations

import math
from collections.abc import Sequence

_FEW, _MANY = 1e-3, 1e6  # within these sizes three digits after the point say what there is to say


def number(value: float) -> str:
    """Write a value: `0.713`; of tiny and huge ones the first digits, `2.1e−05`."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    text = f"{value:.3f}" if value == 0 or _FEW <= size < _MANY else f"{value:.{2 if size < 1 else 4}g}"
    return text.replace("-", "−")


def signed(value: float) -> str:
    """Write a difference with its sign: `+0.021`."""
    return f"+{number(value)}" if value > 0 else number(value)


def listed(texts: Sequence[str]) -> str:
    """Join texts, at least one, as one says them: `a, b and c`."""
    *others, last = texts
    return f"{', '.join(others)} and {last}" if others else last


def duration(seconds: float) -> str:
    """Write a time as one reads it: `4.2 s`, `3 min 20 s`, `7 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
