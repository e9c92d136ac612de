"""The noise floor: the base measured once more, so that what differs is noise of the measurement alone."""

from __future__ import annotations

from mergetune.evaluation.evaluate import ITEM_KEYS
from mergetune.measuring.pool import Failed
from mergetune.results.roles import BASE
from mergetune.study.candidates import Candidates

_NOISE = "noise"  # names attempts, and seconds


def measure_noise(candidates: Candidates) -> None:
    """Score the base once more on the search split; where that cannot be done, the study goes on without."""
    run, progress = candidates.run, candidates.progress
    base = run.candidate(BASE)
    if base is None or run.noise() is not None:
        return
    progress.at_work("the base once more")
    found = candidates.measure_apart(_NOISE, base.recipe, "search", repeat=1)
    if isinstance(found, Failed):
        progress.say(f"warning: no noise floor, the base cannot be measured once more: {found.reason}")
        return
    run.add_seconds(_NOISE, found.cost.total_s)
    run.write_noise(found.measurement)
    run.forget_attempts(_NOISE)
    first = run.measurement(BASE, "search")
    assert first is not None  # measured before
    both = first.merge(found.measurement.items, on=ITEM_KEYS, suffixes=("", "_again"), validate="one_to_one")
    n_differ = int(((both["score"] - both["score_again"]).fillna(0) != 0).sum())
    progress.say(
        f"noise floor: the base once more, {found.cost.total_s:.1f} s; {n_differ} of {len(both)} items differ"
    )
