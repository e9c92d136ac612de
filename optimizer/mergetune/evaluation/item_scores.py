"""Scores of items: every turn's and every repeat's reply by the scorer, all of a task together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mergetune.errors import MergetuneError
from mergetune.evaluation.items import Item
from mergetune.evaluation.judging.verdicts import mean_of_given
from mergetune.evaluation.suite import TaskConfig


class ItemScore(NamedTuple):
    """An item's score, NaN where a judge gave no verdict at all, and how many replies have none."""

    value: float
    n_unjudged: int


def item_scores(
    config: TaskConfig, items: Sequence[Item], replies: Iterable[Sequence[Any]]
) -> list[ItemScore]:
    """Score items of a task by what was replied to each.

    A turn scores what its repeats do (see `SamplingConfig.count`), and an item the mean of its turns. Replies
    on which a judge gave no verdict count in neither.

    Args:
        config: the task in the suite.
        items: the items.
        replies: to each of them, (n_turns · n_repeats,) texts, numbers of tokens or seconds, or (n_choices,)
            log-likelihoods with whether each is the likeliest text.

    Raises:
        MergetuneError: an item cannot be scored.
    """
    scorer = config.scorer
    assert scorer is not None  # TaskConfig
    if scorer.asks == "likelihoods":
        likelihoods: Any = [[each for each, _ in own] for own in replies]
        return [ItemScore(score, 0) for score in scorer.score(items, likelihoods)]
    turns = [item.turns(config.score_turns) for item in items]
    asked = [turn for own in turns for turn in own for _ in range(config.repeats)]
    texts: Any = [text for own in replies for text in own]
    scores = scorer.score(asked, texts)
    if len(scores) != len(texts):
        raise MergetuneError(
            f"The scorer `{scorer.kind}` must return a score for each of {len(texts)} replies, but returned "
            f"{len(scores)}."
        )
    counts_worst = config.sampling is not None and config.sampling.count == "worst"
    worst = np.fmin if scorer.higher_is_better else np.fmax  # which pass over NaN
    found, start = [], 0
    for own in turns:
        end = start + len(own) * config.repeats
        by_turn = np.array(scores[start:end], dtype=np.float64).reshape(len(own), config.repeats)
        counted = worst.reduce(by_turn, axis=1) if counts_worst else [mean_of_given(each) for each in by_turn]
        found.append(ItemScore(mean_of_given(counted), int(np.isnan(by_turn).sum())))
        start = end
    return found
