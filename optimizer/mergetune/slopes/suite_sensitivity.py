"""Sensitivity without a study, from a base, its experts and a suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import cast

import pandas as pd
from lm_eval.api.model import TemplateLM

from mergetune.engines.engine import EngineConfig
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Documents, Evaluator
from mergetune.evaluation.suite import Suite
from mergetune.merging.inputs import Inputs
from mergetune.slopes.references import References, find_references
from mergetune.slopes.sensitivity import BASE, N_ITEMS, anchor_points, measure_sensitivity
from mergetune.space.recipe import MergeRecipe

_CANDIDATES = 48  # documents of each task among which items with an answer are looked for


def suite_sensitivity(
    inputs: Inputs, suite: Suite, config: EngineConfig, say: Callable[[str], object]
) -> pd.DataFrame:
    """Measure the sensitivity at the base and at the uniform average, on items of the search split.

    Args:
        inputs: the models.
        suite: the objectives and guards.
        config: the engine's options.
        say: is told what is under way, and which tasks have to be left out.

    Returns:
        As `measure_sensitivity`.

    Raises:
        MergetuneError: no item has a reference, or the engine cannot hold these models.
    """
    evaluator = Evaluator(suite)
    with closing(TransformersEngine(config, inputs.base.folder, inputs.merger, inputs.chat)) as engine:
        references = _references(engine, evaluator, inputs, say)
        for reason in (*references.missing.values(), *references.remarks.values()):
            say(f"warning: {reason}")
        if not references.items:
            raise MergetuneError(
                f"{suite.path}: slopes need items of which it is known what a model should reply, but none "
                "has an answer, and no expert replies well. Give items with answers, or experts that can."
            )
        say(f"slopes on up to {N_ITEMS} items of {', '.join(references.by_score)} …")
        points = anchor_points(inputs.base_source, inputs.expert_sources)
        return measure_sensitivity(engine, inputs.merger, points, references)


def _references(
    engine: TransformersEngine, evaluator: Evaluator, inputs: Inputs, say: Callable[[str], object]
) -> References:
    """Find references; for tasks whose items have no answers, in what the experts reply.

    What a score that is to fall counts may be found with the base alone, so that it is asked, too.
    """
    lm = cast(TemplateLM, engine.lm)
    documents = evaluator.documents("search")
    found = find_references(evaluator, lm, _spread(documents, _CANDIDATES))
    unanswered = {name: documents[name] for name in found.missing}
    if not unanswered:
        return found
    asked = _spread(unanswered, N_ITEMS)
    scores = evaluator.suite.config.scores
    falls = any(scores[evaluator.tasks[name].score_name].sign < 0 for name in asked)
    replies = []
    for model in [*inputs.expert_sources, *([BASE] if falls else [])]:
        say(f"replies of {model} to {sum(map(len, asked.values()))} items without an answer …")
        engine.load(_alone(inputs, model))
        replies.append(evaluator.measure_documents(engine.lm, asked).items)
    shown = find_references(evaluator, lm, asked, replies)
    names = list(scores)
    items = sorted((*found.items, *shown.items), key=lambda each: names.index(each.score_name))
    return References(tuple(items), shown.missing, {**found.remarks, **shown.remarks})


def _alone(inputs: Inputs, model: str) -> MergeRecipe:
    """Return the recipe that gives one expert back, or the base."""
    experts = inputs.expert_sources
    lambdas = {name: float(name == model) for name in experts}
    return MergeRecipe.of_one_group("task_arithmetic", inputs.base_source, experts, {"lambda": lambdas})


def _spread(documents: Documents, most: int) -> dict[str, Sequence[int]]:
    """Return some of each task's documents, evenly spread over all of them."""
    return {
        name: [indices[i * len(indices) // most] for i in range(most)] if len(indices) > most else indices
        for name, indices in documents.items()
    }
