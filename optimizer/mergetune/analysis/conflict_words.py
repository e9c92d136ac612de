"""Conflicts in words: which skills conflict, where, how much, and what it says of merge or retrain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from mergetune.analysis.conflicts import Conflict, Kind, Place, Slope
from mergetune.slopes.sensitivity import AVERAGE, BASE, RECOMMENDED, fold_facts

HOW_TO_READ = (
    "A gain is how far a score's loss on its reference replies falls per unit of a coefficient (λ), locally, "
    "in nats; below zero, raising it harms. Where a score gets better without these replies, it is the loss "
    "of still saying them."
)
TITLES = {
    BASE: "At the base",
    AVERAGE: "At the uniform average",
    RECOMMENDED: "At the recommended merge",
}
_KINDS: tuple[Kind, ...] = ("unclear", "none", "partial", "strong")  # what tells most last
_MOST_PLACES = 2
_LIMITS = {
    BASE: "Slopes at the base say what the first bit of each task vector does, not what all of it does.",
    RECOMMENDED: (
        "At a good merge conflicting gradients are the rule: on the front nothing helps one objective "
        "without harming another. They show where the trade-off lies, not that merging failed."
    ),
}
_ADVICE: Mapping[Kind, str] = {
    "unclear": "Too few items to tell whether merging works; more of them, or a study, would.",
    "none": "By layer groups, too little conflicts clearly to speak against merging.",
    "partial": (
        "Merge, with coefficients by layer group: each score can gain where little is at stake for the "
        "other, and has to give way where they conflict."
    ),
    "strong": (
        "Most of what one of them would gain from here the other would lose, and no coefficient of these "
        "layer groups serves both. Finer groups may separate them; if a study finds no merge that keeps "
        "both, retrain one model on the data of both."
    ),
}


@dataclass(frozen=True)
class Finding:
    """A sentence, and what it rests on: more sentences, one for each place."""

    sentence: str
    details: tuple[str, ...] = ()


def findings(point: str, found: Sequence[Conflict]) -> list[Finding]:
    """Say which scores conflict at a point, where, how much, and what to do.

    Args:
        point: its name.
        found: the pairs of scores there, as `conflicts` returns them.
    """
    if not found:
        return []
    said = [_opposed(each) for each in found if each.kind in ("partial", "strong")]
    said += map(Finding, _others(found))
    if point in _LIMITS:
        said.append(Finding(_LIMITS[point]))
    if point != RECOMMENDED:
        said.append(Finding(_ADVICE[max((each.kind for each in found), key=_KINDS.index)]))
    return said


def evidence(frame: pd.DataFrame) -> str:
    """Say how many items of each score a measurement of sensitivity rests on."""
    facts = fold_facts(frame)
    counts = facts[facts["point"] == facts["point"].iloc[0]].groupby("score_name", sort=False)["n_items"]
    listed = ", ".join(f"{n} of `{name}`" for name, n in counts.sum().items())
    return f"All this rests on few items: {listed}. ± is one standard error."


def with_error(value: float, stderr: float, digits: int | None = None) -> str:
    """Write a signed figure with its error (NaN: unknown), as exactly as that allows: `+2.13 ± 0.31`.

    `digits` says how many decimals it has instead, so that the figures of a column stand in line.
    """
    known = [decimals(value, 3), *([] if math.isnan(stderr) else [decimals(stderr, 2)])]
    shown = max(min(known), 0) if digits is None else digits
    error = "?" if math.isnan(stderr) else f"{stderr:.{shown}f}"
    return f"{value:+z.{shown}f} ± {error}".replace("-", "−")


def decimals(value: float, n_significant: int) -> int:
    """Return the decimals that a number needs for so many significant digits, six at most."""
    return min(n_significant - 1 - math.floor(math.log10(abs(value))), 6) if value else 6


def _opposed(conflict: Conflict) -> Finding:
    one, two = conflict.first.score_name, conflict.second.score_name
    how = "conflict" if conflict.kind == "strong" else "conflict in part"
    shown, n_more = conflict.places[:_MOST_PLACES], len(conflict.places) - _MOST_PLACES
    more = [f"And {n_more} more, where less is at stake."] if n_more > 0 else []
    return Finding(
        f"{_pair(conflict)} {how}: {conflict.share:.0%} of the gradient conflicts ({_cosine(conflict)}).",
        (*(_place(place, one, two) for place in shown), *more),
    )


def _place(place: Place, one: str, two: str) -> str:
    helped, harmed = (one, place.first), (two, place.second)
    if place.first.value > 0:  # its loss rises
        helped, harmed = harmed, helped
    what = f"More of `{place.expert}`" if place.expert else f"A higher `{place.parameter}`"
    return (
        f"{what} in `{place.group}` helps `{helped[0]}` ({_gain(helped[1], ' nats per unit')} of its "
        f"gradient) and harms `{harmed[0]}` ({_gain(harmed[1])})."
    )


def _gain(slope: Slope, unit: str = "") -> str:
    return f"{with_error(-slope.value, slope.stderr)}{unit}, {slope.share:.0%}"


def _others(found: Sequence[Conflict]) -> Iterator[str]:
    """Name the pairs without a conflict, those that are too noisy apart."""
    calm = [f"{_pair(each)} ({each.share:.0%}, {_cosine(each)})" for each in found if each.kind == "none"]
    if calm:
        yield f"Little or nothing conflicts by layer groups between {', '.join(calm)}."
    noisy = [f"{_pair(each)} ({_cosine(each)})" for each in found if each.kind == "unclear"]
    if noisy:
        yield (
            f"Too noisy to tell by layer groups: {', '.join(noisy)}. At least one gradient lies mostly "
            "within two standard errors."
        )


def _pair(conflict: Conflict) -> str:
    return f"`{conflict.first.score_name}` and `{conflict.second.score_name}`"


def _cosine(conflict: Conflict) -> str:
    error = "?" if conflict.cosine_stderr is None else f"{conflict.cosine_stderr:.2f}"
    return f"cosine {conflict.cosine:z.2f} ± {error}".replace("-", "−")
