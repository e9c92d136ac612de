"""A gate that may stop early: paired differences are looked at again and again, the error rates hold.

The claim is about what the suite stands for, as in the gate that uses all items: the items are independent
draws of the deployment's requests, and the expected difference candidate − baseline is compared with
−margin. (Sampling without replacement would narrow the interval towards the suite's own mean; its last look
says nothing about deployment: at an expected difference of −margin it passes nearly every second suite.)

The bounds are those of a gambler who bets on the next difference being above a mean m, at odds that are
fair if m is the truth: with stakes g spread evenly over (0, 1), the wealth after differences dᵢ ∈ [−1, 1] is
W(m) = ∫₀¹ Πᵢ (1 + g·(dᵢ − m)/(1 + m)) dg. While the expected difference is m or less, W(m) ever reaches 1/α
with probability α at most (Ville 1939), however often one looks; the lower bound is the greatest m refuted
so. The upper bound is the same for −dᵢ. This is the grid-Kelly capital process of Waudby-Smith & Ramdas
("Estimating means of bounded random variables by betting", JRSS-B 2024), Cover's universal portfolio. Every
admissible test of a bounded mean by e-values is such a bet (Clerico 2024); even stakes need no tuning.

A score with several tasks is the mean over its tasks, so items are taken in rounds of one item of every
task. Within a round the tasks may have different means μₜ; the expected factor of a round of T tasks is then
Πₜ (1 + λ(μₜ − m)) ≤ (1 + λ(mean of μₜ − m))ᵀ by the inequality of the means: the bounds hold for the mean
over tasks, at the end of every round. The smallest task ends the rounds.

A whole gate: every score has its own verdict, by `look`, after any batch of rounds. A verdict stands once it
is reached: that score needs no more items. Scores that no look decided get all their items and the ordinary
test of a fixed sample, at the `final` levels of `split_alpha`, where the error of both stages is counted.
The bounds are the honest interval of a run that stopped early; the ordinary one is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mergetune.errors import MergetuneError

LookVerdict = Literal["pass", "fail", "undecided"]
Array = NDArray[np.float64]

_STAKES = (np.arange(128) + 0.5) / 128  # (n_stakes,); a fair bet each, so that their mean is one as well
_BISECTIONS = 20  # bounds to 2 · 2⁻²⁰


@dataclass(frozen=True)
class Levels:
    """One-sided error levels of one score: of all its early looks together, and of the test at the end."""

    early_pass: float
    early_fail: float
    final_pass: float
    final_fail: float


@dataclass(frozen=True)
class Look:
    """One score after some rounds: an interval that holds at all looks at once, and what follows from it."""

    verdict: LookVerdict
    estimate: float
    lower: float
    upper: float
    n_items: int


def split_alpha(alpha: float = 0.05, n_scores: int = 1, early_share: float = 0.4) -> Levels:
    """Share out the error of a gate over its two stages and its scores.

    A whole gate passes when all its scores pass: each may err at level α without correction (intersection–
    union test; Berger 1982). It fails as soon as one score fails: the n scores get α/n each (Bonferroni).
    Both stages together then pass wrongly, and fail wrongly, with probability α at most. An early share of
    0.4 is where, in simulation, further sharing costs more power than it saves items.

    Raises:
        MergetuneError: a number is out of its range.
    """
    if not (0 < alpha < 1 and 0 < early_share <= 1 and n_scores >= 1):
        raise MergetuneError(
            "`0 < alpha < 1`, `0 < early_share <= 1` and `n_scores >= 1` must hold, but got "
            f"alpha={alpha}, early_share={early_share} and n_scores={n_scores}."
        )
    early, final = alpha * early_share, alpha * (1 - early_share)
    return Levels(early, early / n_scores, final, final / n_scores)


def look(differences: Array, margin: float, levels: Levels) -> Look:
    """Judge a score by the rounds seen so far; the order within them does not matter.

    Args:
        differences: (n_tasks, n_rounds), or (n_rounds,) for one task: score of the candidate − score of
            the baseline, item by item, greater is better, in [−1, 1].
        margin: how far the candidate may fall below the baseline, in [0, 1).
        levels: from `split_alpha`; the bounds are one-sided, at `early_pass` and `early_fail`.

    Raises:
        MergetuneError: there is no difference, or one is not in [−1, 1], or the margin is out of its range.
    """
    if not 0 <= margin < 1:
        raise MergetuneError(f"`0 <= margin < 1` must hold for an early verdict, but got margin={margin}.")
    if differences.size == 0 or not (np.abs(differences) <= 1).all():
        got = f"{differences.min()} to {differences.max()}" if differences.size else "no differences"
        raise MergetuneError(
            f"Early verdicts need differences of scores in [-1, 1], but got {got}. "
            "Run this score on the whole suite, or choose a metric between 0 and 1."
        )
    values, counts = np.unique(differences, return_counts=True)
    lower = _lower_bound(values, counts, levels.early_pass)
    upper = -_lower_bound(-values, counts, levels.early_fail)
    verdict: LookVerdict = "pass" if lower > -margin else "fail" if upper < -margin else "undecided"
    return Look(verdict, float(differences.mean()), lower, upper, differences.size)


def whole_verdict(verdicts: Iterable[LookVerdict]) -> LookVerdict:
    """Return the verdict of a whole gate: it fails with its first failed score and passes with its last."""
    found = set(verdicts)
    return "fail" if "fail" in found else "pass" if found == {"pass"} else "undecided"


def item_order(task: str, ids: Sequence[str], seed: int = 0) -> list[int]:
    """Shuffle a task's items by a hash of seed, task and id: indices into `ids`.

    The order knows nothing of the results, is the same on every machine, and new items leave the others in
    the order that they had.
    """
    keys = [item_key(task, item, seed) for item in ids]
    return sorted(range(len(ids)), key=keys.__getitem__)


def item_key(task: str, item: str, seed: int = 0) -> bytes:
    """Return what an item is sorted by in an order that its id alone decides."""
    return hashlib.blake2b(f"{seed}\0{task}\0{item}".encode(), digest_size=8).digest()


def _lower_bound(values: Array, counts: NDArray[np.intp], alpha: float) -> float:
    """Return the greatest mean that the wealth refutes, rounded down: W(m) falls from ∞ at −1 to ≤ 1."""
    low, high = -1.0, float(np.average(values, weights=counts))  # W(estimate) ≤ 1, as 1 + x ≤ eˣ
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle > -1 and _log_wealth(values, counts, middle) >= -np.log(alpha):
            low = middle
        else:
            high = middle
    return low


def _log_wealth(values: Array, counts: NDArray[np.intp], mean: float) -> float:
    """Return log W(mean): evidence against an expected difference of `mean` or less."""
    gains = (values - mean) / (1 + mean)  # (n_values,), ≥ −1
    log_wealths = np.log1p(_STAKES[:, None] * gains) @ counts  # (n_stakes,)
    return float(np.logaddexp.reduce(log_wealths) - np.log(len(_STAKES)))
