"""Descent on real small models: losses fall, lambdas stay in bounds, costs are counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from optimizer.descent import DescentConfig, at, coefficients, descend
from optimizer.engines.completions import Scoring
from optimizer.engines.engine import EngineConfig
from optimizer.engines.transformers_engine import TransformersEngine
from optimizer.errors import MergetuneError
from optimizer.losses import mean_losses
from optimizer.merging.inputs import Inputs, open_inputs
from optimizer.recipe import MergeRecipe
from optimizer.references import Reference, References
from optimizer.suite import SuiteConfig

TASKS = {"tasks": [{"items": "items.jsonl", "scorer": "exact"}]}
SUITE = SuiteConfig.model_validate(
    {
        "description": "test",
        "chat_template": False,
        "objectives": {"first": TASKS, "second": TASKS},
        "guards": {"guard": {**TASKS, "margin": 0.1}},
    }
)
CONFIG = DescentConfig(n_items=8, n_step=2, first_steps=4, next_steps=3, rate=0.3)


@pytest.fixture(scope="module")
def inputs(tiny_base: Path, tiny_experts: dict[str, Path]) -> Inputs:
    return open_inputs(tiny_base, tiny_experts)


@pytest.fixture(scope="module")
def engine(inputs: Inputs) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(EngineConfig(device="cpu"), inputs.base.folder, inputs.merger)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def start(inputs: Inputs) -> MergeRecipe:
    lambdas = {"lambda": {"a": 0.5, "b": 0.5}}
    return MergeRecipe.model_validate(
        {
            "method": "task_arithmetic",
            "base": inputs.base_source,
            "experts": inputs.expert_sources,
            "groups": [
                {"name": "layers", "match": r"layers\.", **lambdas},
                {"name": "rest", "match": r"^(?!.*layers\.)", **lambdas},
            ],
        }
    )


def references(n_items: int = 8) -> References:
    """Random texts; those of one score are much alike, so that all of them gain by the same change."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for name in (*SUITE.objectives, *SUITE.guards):
        reply = torch.randint(3, 300, (6,), generator=generator).tolist()
        for number in range(n_items):
            prompt = torch.randint(3, 300, (4,), generator=generator).tolist()
            items.append(Reference(name, "task", f"{name}{number}", (Scoring([*prompt, *reply], 4),)))
    return References(tuple(items))


def test_losses_fall_on_items_kept_apart_and_costs_are_counted(
    inputs: Inputs, engine: TransformersEngine, start: MergeRecipe
) -> None:
    items = references()
    found = descend(engine, inputs.merger, start, items, SUITE, CONFIG)
    apart, _ = items.parts(CONFIG.apart)
    engine.load(start)
    before = mean_losses(engine.model, apart)
    for point in found.points:
        assert sum(point.losses[name] * share for name, share in point.weights.items()) < sum(
            before[name] * share for name, share in point.weights.items()
        )
        assert set(coefficients(point.recipe)) == {(g, e) for g in ("layers", "rest") for e in "ab"}
        assert all(CONFIG.low <= value <= CONFIG.high for value in point.coefficients.values())
    n_steps = CONFIG.first_steps + 2 * CONFIG.next_steps
    floors = 2 * 4 + 8  # two experts on a step's items of the objectives, the base on all of the guard's
    measured = 3 * 2 * 6  # of three stretches the middle and the end, on two items of each score
    assert found.n_passes == 3 * 6 * n_steps + floors + measured
    assert found.full_evaluations(100) == found.n_passes / 100
    assert len(found.history) == n_steps


def test_the_same_descent_gives_the_same_points(
    inputs: Inputs, engine: TransformersEngine, start: MergeRecipe
) -> None:
    config = replace(CONFIG, first_steps=2, next_steps=1)
    first, second = (descend(engine, inputs.merger, start, references(), SUITE, config) for _ in range(2))
    assert first == second


def test_a_recipe_is_moved_and_nothing_else_about_it(start: MergeRecipe) -> None:
    lambdas = {key: value + 1 for key, value in coefficients(start).items()}
    moved = at(start, lambdas)
    assert coefficients(moved) == lambdas
    assert at(moved, coefficients(start)) == start


def test_a_method_without_lambdas_is_refused(
    inputs: Inputs, engine: TransformersEngine, start: MergeRecipe
) -> None:
    recipe = MergeRecipe.model_validate(
        {
            "method": "slerp",
            "base": start.base,
            "experts": start.experts,
            "groups": [{"name": "all", "t": 0.5}],
        }
    )
    with pytest.raises(MergetuneError, match="`slerp` has none"):
        descend(engine, inputs.merger, recipe, references(), SUITE)
