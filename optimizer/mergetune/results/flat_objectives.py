"""Objectives that a search cannot help: no expert is better than the base, or all models score alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from mergetune.evaluation.evaluate import ITEM_KEYS, Score
from mergetune.evaluation.suite import ScoreConfig
from mergetune.results.roles import BASE, expert_name
from mergetune.results.run_dir import RunDir

_SHOWN_ITEMS = 2
_SHOWN_LETTERS = 300
_EQUAL = 1e-9  # what rounding may add to equal scores


def flat_objectives(
    run: RunDir, scores: Mapping[str, Mapping[str, Score]], experts: Sequence[str]
) -> list[str]:
    """Describe each objective that a search would be wasted on, with two of its items; see the module.

    What is wrong is mostly the suite: a scorer that no reply can satisfy, an answer of another form, a prompt
    that was written for another model.

    Args:
        run: the run directory, for items and replies.
        scores: of the base, the experts and maybe other models on the search split, by candidate name.
        experts: the experts' names.
    """
    found = []
    for name, objective in run.study.suite_config.objectives.items():
        own = {candidate: each[name].value for candidate, each in scores.items()}
        best = max(experts, key=lambda expert: objective.sign * own[expert_name(expert)])
        if reason := _reason(objective, own, best):
            found.append("\n".join([f"`{name}`: {reason}", *_examples(run, name, best)]))
    return found


def _reason(objective: ScoreConfig, scores: Mapping[str, float], best: str) -> str:
    """Say why an objective is flat; empty where it is not."""
    own, base = scores[expert_name(best)], scores[BASE]
    if max(scores.values()) - min(scores.values()) <= _EQUAL:
        return f"all {len(scores)} models measured score {own:.3g}."
    if objective.sign * (own - base) <= _EQUAL:
        return f"no expert is better than the base, {base:.3g}; the best one, `{best}`, has {own:.3g}."
    return ""


def _examples(run: RunDir, name: str, expert: str) -> list[str]:
    """Show two items, those first that the expert failed."""
    frame = run.measurement(expert_name(expert), "search")
    if frame is None:
        return []
    sign = run.study.suite_config.objectives[name].sign
    own = frame[frame["score_name"] == name].merge(run.items(), on=ITEM_KEYS, validate="one_to_one")
    worst = own.assign(good=sign * own["score"]).sort_values("good", kind="stable").head(_SHOWN_ITEMS)
    return [line for _, row in worst.iterrows() for line in _shown(row, expert)]


def _shown(row: pd.Series, expert: str) -> list[str]:
    texts = {"asked": row["prompt"], f"`{expert}` replied": row["response"], "wanted": row["target"]}
    return [f"  {what}: {_short(str(text))}" for what, text in texts.items()]


def _short(text: str) -> str:
    """Write a text on one line, with its end, which is where a prompt asks."""
    line = " ".join(text.split()) or "(nothing)"
    return line if len(line) <= _SHOWN_LETTERS else f"…{line[-_SHOWN_LETTERS:]}"
