"""Scores of items: every turn's and every repeat's reply by the scorer, all of a task together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mergetune.errors import MergetuneError
from mergetune.evaluation.items import Item
from mergetune.evaluation.judging.verdicts import Explained, mean_of_given
from mergetune.evaluation.scorers import JudgeScorer, Scorer
from mergetune.evaluation.suite import TaskConfig


class ItemScore(NamedTuple):
    """An item's score, NaN without any verdict of a judge, how many replies have none, and its reasons."""

    value: float
    n_unjudged: int
    reason: str = ""


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
    scored = explained(scorer, asked, texts)
    scores = [each.score for each in scored]
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
        reason = numbered([each.reason for each in scored[start:end]])
        found.append(ItemScore(mean_of_given(counted), int(np.isnan(by_turn).sum()), reason))
        start = end
    return found


def explained(scorer: Scorer, items: Sequence[Item], replies: Any) -> list[Explained]:
    """Return the score of each item with the reason for it, which a judge alone gives."""
    if isinstance(scorer, JudgeScorer):
        return scorer.explained(items, replies)
    return [Explained(score, "") for score in scorer.score(items, replies)]


def numbered(texts: Sequence[str]) -> str:
    """Return the texts about an item's replies as one, each with its number where there are several."""
    if len(texts) == 1 or not any(texts):
        return texts[0] if texts else ""
    return "\n".join(f"[{i}] {text}" for i, text in enumerate(texts, 1))
