"""Scores of models that never ran, and a suite of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergetune.evaluation.evaluate import Score
from mergetune.evaluation.suite import SuiteConfig
from mergetune.results import selection
from mergetune.results.selection import Scales
from mergetune.stats.gains import GainScale


def suite(margin: float = 0.05, reference: str = "base", **objectives: Any) -> SuiteConfig:
    task = {"tasks": [{"lm_eval": "any"}]}
    found = {name: {**task, **fields} for name, fields in (objectives or {"x": {}, "y": {}}).items()}
    return SuiteConfig.model_validate(
        {
            "description": "test",
            "chat_template": False,
            "objectives": found,
            "guards": {"g": {**task, "margin": margin, "reference": reference}},
        }
    )


def scores(x: float, y: float, g: float = 0.8) -> dict[str, Score]:
    return {name: Score(value, 0.01, 100) for name, value in {"x": x, "y": y, "g": g}.items()}


def scales(models: Mapping[str, Mapping[str, Score]], config: SuiteConfig, stderr: float = 0.0) -> Scales:
    """Return the scales of right and wrong items, where every difference has this standard error."""
    gains = {key: GainScale(dict.fromkeys(models, stderr), 1.0) for key in config.objectives}
    return Scales(gains, selection.guard_units(models, config))


MODELS = {"base": scores(0.1, 0.2), "expert-a": scores(0.9, 0.2), "expert-b": scores(0.1, 0.6)}
