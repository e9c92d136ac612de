"""How a check is put into words: numbers, names, the sentence of the verdict, and text of models."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mergetune.stats.number_text import number, signed

if TYPE_CHECKING:
    from mergetune.gate.judge import Check
    from mergetune.gate.row import Row
    from mergetune.stats.paired import Verdict
    from mergetune.stats.resampling import Interval

# C0, DEL, C1, surrogates and what else XML 1.0 forbids, but for tab and line feed.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


SLICES = "Slices are not judged: with many of them, some differ by chance."


ATTRIBUTION = (
    "What quantizing changed is candidate − unquantized; before it stands unquantized − baseline. Both are "
    "paired by item, and together the whole difference. They are not judged."
)


def clean(text: str) -> str:
    """Write control characters as their codes, so that no terminal or parser obeys them."""
    return _UNPRINTABLE.sub(_code, text.replace("\r\n", "\n"))


def excerpt(text: str, limit: int) -> str:
    """Clean a text and cut it to `limit` characters, saying so."""
    rest = len(text) - limit
    return clean(text) if rest <= 0 else f"{clean(text[:limit])}… [{rest:,} more characters]"


def span(interval: Interval) -> str:
    """Write an interval: `[−0.038, +0.021]`."""
    return f"[{signed(interval.lower)}, {signed(interval.upper)}]"


def short_name(row: Row) -> str:
    """Return a row's name; a task's without that of its score."""
    return row.name.removeprefix(f"{row.score_name}:") if row.kind == "task" else row.name


def brief_names(rows: Sequence[Row]) -> list[str]:
    """Return the names of rows for a narrow column: of a task the file's name, where its score has no two.

    So `data/pairs.jsonl (chosen: good, rejected: bad)` is `pairs.jsonl`.
    """
    brief = [short_name(row).partition(" (")[0].rpartition("/")[2] for row in rows]
    uses = Counter((row.score_name, name) for row, name in zip(rows, brief, strict=True))
    return [
        name if row.kind == "task" and uses[row.score_name, name] == 1 else short_name(row)
        for row, name in zip(rows, brief, strict=True)
    ]


def full_name(row: Row) -> str:
    """Name a row in a sentence: `tools.jsonl of tool_calls`."""
    return f"{short_name(row)} of {row.score_name}" if row.kind == "task" else row.name


def about(n_items: int) -> str:
    """Write a planned number of items, two digits of it, rounded up: `1,300`."""
    step = 10 ** max(0, len(str(n_items)) - 2)
    return f"{math.ceil(n_items / step) * step:,}"


def verdict_words(row: Row) -> str:
    """Write a row's verdict with what follows from it: `inconclusive: it takes about 240 items`."""
    if row.verdict == "pass" and row.improved:
        return "pass, improved"
    if row.kind != "task" and row.items_to_decide is not None:
        return f"inconclusive: it takes about {about(row.items_to_decide)} items"
    return row.verdict


def measured(check: Check) -> str:
    """Say how many items were measured: `450 items`, or after an early stop how many of them."""
    if check.saving is None or check.saving.n_measured == check.saving.n_items:
        return f"{check.n_items:,} items"
    return f"{check.saving.n_measured:,} of {check.saving.n_items:,} items measured on the candidate"


def reading(check: Check) -> str:
    """Say how the figures are to be read."""
    levels = sorted({round(100 * row.interval.level, 1) for row in check.rows})
    text = (
        "Differences are candidate − baseline, item by item, positive where the candidate is better; the "
        f"interval is of {' or '.join(f'{level:g}%' for level in levels)}. A score passes where its whole "
        "interval lies above −margin."
    )
    if len(check.rows) > 1:
        text += f" To fail, it must lie below at a level made stricter for {len(check.rows)} rows."
    if check.noise is not None:
        floor = ", ".join(f"{name} {number(value)}" for name, value in check.noise.items())
        text += f" Intervals count the noise of a repeated run (standard deviation: {floor})."
    return text


def summary_of(verdict: Verdict, rows: Sequence[Row], noise: Mapping[str, float]) -> str:
    """Say the verdict of a gate in one sentence; `noise` is the noise floor by score."""
    words = {"pass": _passed, "fail": _failed, "inconclusive": _undecided}
    return f"{verdict.upper()}: {words[verdict](rows, noise)}"


def _passed(rows: Sequence[Row], _: Mapping[str, float]) -> str:
    scores = [row for row in rows if row.kind != "task"]
    if len(scores) == 1:
        text = f"{scores[0].name} is not worse by more than its margin"
    else:
        text = f"none of {len(scores)} scores is worse by more than its margin"
    return "; ".join([text, *(f"{row.name} improved by {_size(row)}" for row in scores if row.improved)])


def _failed(rows: Sequence[Row], _: Mapping[str, float]) -> str:
    failed = [row for row in rows if row.verdict == "fail"]
    worst = min(failed, key=lambda row: (row.kind == "task", row.difference + row.margin))
    verb = "fell" if worst.direction == "maximize" else "got worse"
    text = f"{full_name(worst)} {verb} by {_size(worst)}, more than the {worst.margin:g} allowed"
    others = [full_name(row) for row in failed if row is not worst]
    return f"{text}; so did {', '.join(others)}" if others else text


def _undecided(rows: Sequence[Row], noise: Mapping[str, float]) -> str:
    scores = [row for row in rows if row.kind != "task" and row.verdict == "inconclusive"]
    hardest = max(scores, key=lambda row: row.items_to_decide or math.inf)
    seen = f"difference {signed(hardest.difference)} {span(hardest.interval)}"
    text = f"{hardest.n_items:,} items cannot tell whether {hardest.name} is worse by more than "
    text += f"its margin of {hardest.margin:g} ({seen}); "
    if hardest.items_to_decide is not None:
        text += f"about {about(hardest.items_to_decide)} would, if the true difference is the one seen"
    elif hardest.method == "sequential":
        text += "its early verdict is within the noise floor"
    elif noise.get(hardest.name):
        text += (
            "more items would not decide: the noise floor is too high, or the difference too near the margin"
        )
    else:
        text += "more items would not decide either: the difference is too near the margin"
    others = [row.name for row in scores if row is not hardest]
    return f"{text}; undecided as well: {', '.join(others)}" if others else text


def _size(row: Row) -> str:
    return f"{number(abs(row.difference))} {span(row.interval)}"


def _code(found: re.Match[str]) -> str:
    r"""Write a character as its code: `\x1b`."""
    code = ord(found.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
