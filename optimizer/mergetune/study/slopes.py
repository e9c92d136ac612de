"""Slopes as a study takes them: at the end, and on what its models said."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from mergetune.machine import clock
from mergetune.machine.memory import in_smaller_batches
from mergetune.measuring.attempts import attempt
from mergetune.results.roles import is_merge
from mergetune.slopes.gradients import has_slopes
from mergetune.slopes.references import References, find_references
from mergetune.slopes.sensitivity import RECOMMENDED, anchor_points, measure_sensitivity
from mergetune.space.recipe import MergeRecipe
from mergetune.study.candidates import Candidates

if TYPE_CHECKING:
    from mergetune.engines.transformers_engine import TransformersEngine

_SENSITIVITY = "sensitivity"  # names attempts, and seconds

log = logging.getLogger("mergetune")


def study_references(candidates: Candidates, engine: TransformersEngine) -> References:
    """Find what to say to the items of the search split; what the base and the experts said may serve.

    What a merge said may not: its own words would be what its loss and slopes are taken on.
    """
    names = [name for name in candidates.scores if not is_merge(name)]
    measured = [candidates.run.measurement(name, "search") for name in names]
    replies = [frame for frame in measured if frame is not None]
    found = find_references(candidates.evaluator, engine.lm, replies=replies)
    for reason in found.missing.values():
        candidates.progress.say(f"warning: slopes are taken without a task: {reason}")
    for remark in found.remarks.values():
        candidates.progress.say(f"warning: {remark}")
    return found


def take_slopes(candidates: Candidates, recommended: MergeRecipe) -> None:
    """Take the slopes at the base, the uniform average and this merge, unless that was done before.

    Where that cannot be done, the study goes on without.
    """
    try:
        _take_slopes(candidates, recommended)
    except Exception as error:  # whatever it is, the report and the merged model are still to come
        if candidates.pool.ends_all(error):
            raise
        log.exception("no sensitivity")
        candidates.progress.say(f"no sensitivity: {error}")


def _take_slopes(candidates: Candidates, recommended: MergeRecipe) -> None:
    run, inputs = candidates.run, candidates.inputs
    points = anchor_points(inputs.base_source, inputs.expert_sources)
    points[RECOMMENDED] = recommended
    wanted = {recipe.digest for recipe in points.values() if has_slopes(recipe.method)}
    known = run.sensitivity()
    if known is not None and (known.empty or wanted <= set(known["digest"])):
        return
    candidates.progress.at_work("taking the slopes of every coefficient …")
    with attempt(run, _SENSITIVITY):
        began = clock.seconds()
        try:
            with candidates.pool.transformers() as engine:
                references = study_references(candidates, engine)
                found = in_smaller_batches(
                    lambda n_tokens: measure_sensitivity(
                        engine, inputs.merger, points, references, max_tokens=n_tokens
                    ),
                    candidates.progress.say,
                )
        finally:
            run.add_seconds(_SENSITIVITY, clock.seconds() - began)
    run.write_sensitivity(found)
