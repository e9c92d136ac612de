"""A crew of lanes: who takes which piece of work."""

from __future__ import annotations

import threading
from typing import Any

from mergetune.engines.engine import EngineConfig, LoadTime
from mergetune.measuring.crew import SideBySide
from mergetune.measuring.lane import Lane, Loading
from mergetune.space.recipe import MergeRecipe, Source


class CountingEngine:
    """An engine that counts what is merged into it."""

    lm: Any = None

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def load(self, recipe: MergeRecipe) -> LoadTime:
        self.loaded.append(recipe.digest)
        return LoadTime(0.0, 0.0)

    def close(self) -> None:
        """There is nothing to end."""


def recipe(value: float) -> MergeRecipe:
    sources = Source(path="base"), {"a": Source(path="a")}
    return MergeRecipe.of_one_group("task_arithmetic", *sources, {"lambda": {"a": value}})


def test_a_lane_goes_on_with_the_merge_that_it_holds() -> None:
    """Parts of two candidates come in turn, both lanes waiting: each merges its candidate once."""
    engines = [CountingEngine(), CountingEngine()]
    left = list(engines)
    both = threading.Barrier(2)

    def start(config: EngineConfig, _say: Any) -> tuple[CountingEngine, EngineConfig]:
        return left.pop(), config

    def work(lane: Lane, piece: MergeRecipe) -> None:
        lane.ready(piece, Loading())
        both.wait(10)  # no lane does the work of both

    lanes = [Lane(start, EngineConfig()) for _ in engines]
    crew = SideBySide(lanes, work, lambda lane, piece: lane.holds(piece))
    candidates = [recipe(0.1), recipe(0.2)]
    for turn in range(20):
        for piece in candidates if turn % 2 else reversed(candidates):
            crew.submit(piece)
        assert all(crew.next().error is None for _ in candidates)
    crew.close()
    crew.join(10)
    assert sorted(len(engine.loaded) for engine in engines) == [1, 1]
