"""Measuring a candidate until the verdict is clear, with error rates that hold however often one looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mergetune.evaluation.aggregations import not_means
from mergetune.evaluation.evaluate import Documents, Evaluator
from mergetune.measuring.pool import Job, Pool
from mergetune.stats.sequential import Levels, Look, item_order, look, split_alpha, whole_verdict

_FIRST_ROUNDS = 24  # a round is an item of every task
_GROWTH = 1.5  # each look has so many times the rounds of the one before


@dataclass(frozen=True)
class Early:
    """What was measured of a candidate; `looks` has the last look at each score not measured to its end."""

    items: pd.DataFrame
    looks: Mapping[str, Look]
    levels: Levels


def measure_until_clear(
    pool: Pool,
    baseline: pd.DataFrame,
    documents: Documents,
    alpha: float,
    say: Callable[[str], object],
) -> Early:
    """Measure in a fixed shuffled order, batch by batch; see `sequential` for the rule and its proof.

    A score that a look has decided gets no more items, and the first that fails ends the measuring.

    Args:
        pool: the candidate's.
        baseline: score_name, task, item and score of every document.
        documents: what may be measured.
        alpha: the error of PASS, and that of FAIL.
        say: is told how each look came out.
    """
    evaluator = pool.evaluator
    scores = evaluator.suite.config.scores
    levels = split_alpha(alpha, len(scores))
    order = _shuffled(evaluator, documents)
    tasks = {
        str(name): list(own["task"].unique()) for name, own in baseline.groupby("score_name", sort=False)
    }
    looks: dict[str, Look] = {}
    frames: list[pd.DataFrame] = []
    open_scores, start, end = list(tasks), 0, _FIRST_ROUNDS
    while open_scores and whole_verdict(each.verdict for each in looks.values()) != "fail":
        batch = {task: order[task][start:end] for name in open_scores for task in tasks[name]}
        frames.append(pool.measured(Job("candidate", batch)).measurement.items)
        measured = pd.concat(frames, ignore_index=True)
        to_the_end = not_means(baseline) | not_means(measured)  # for the bounds of a look are of means
        for name in list(open_scores):
            sizes = [len(order[task]) for task in tasks[name]]
            if end >= max(sizes):  # all its items: the fixed test at the end decides
                open_scores.remove(name)
                looks.pop(name, None)
                continue
            differences = [
                _gains(measured, baseline, task, [evaluator.tasks[task].item_ids[i] for i in order[task]])
                for task in tasks[name]
            ]
            n_rounds = min(map(len, differences))
            if name in to_the_end or n_rounds == 0:
                continue
            sign = scores[name].sign
            rounds = np.array([own[:n_rounds] for own in differences])
            looks[name] = look(sign * rounds, scores[name].margin, levels)
            if looks[name].verdict != "undecided":
                open_scores.remove(name)
        n_items = sum(len(each) for each in order.values())
        standing = ", ".join(f"{name} {each.verdict}" for name, each in looks.items())
        say(f"{len(measured)} of {n_items} items: {standing or 'all measured'}")
        start, end = end, round(end * _GROWTH)
    return Early(pd.concat(frames, ignore_index=True), looks, levels)


def _shuffled(evaluator: Evaluator, documents: Documents) -> dict[str, list[int]]:
    """Return each task's documents in the order in which they are measured."""
    return {
        task: [found[i] for i in item_order(task, [evaluator.tasks[task].item_ids[each] for each in found])]
        for task, found in documents.items()
    }


def _gains(
    measured: pd.DataFrame, baseline: pd.DataFrame, task: str, items: Sequence[str]
) -> Sequence[float]:
    """Return candidate − baseline of a task's items, as far as they are measured, in the order of `items`.

    Items on which a judge gave no verdict for one of them are left out.
    """
    own, other = (frame[frame["task"] == task].set_index("item")["score"] for frame in (measured, baseline))
    asked = [item for item in items if item in own.index]
    gains = own.loc[asked].to_numpy() - other.loc[asked].to_numpy()
    return list(gains[~np.isnan(gains)])
