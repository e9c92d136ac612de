"""A worker that waits as long as an engine would work, and answers: `workers.py` starts many of them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from letters import SKILLS
from mergetune.engines.engine import EngineConfig, LoadTime
from mergetune.engines.ray_cluster import Started
from mergetune.space.recipe import MergeRecipe

EXPERTS = ("reverse", "sort")
_LOAD_SHARE = 0.1  # of a trial's time
OPTIONS = "WAITING_HOST_OPTIONS"  # the variable that names the file of a worker's options


def skills(recipe: MergeRecipe) -> list[float]:
    """Return the share of each skill's items that a merge truly solves; each counts the depth otherwise."""
    lambdas = np.array(
        [[group.per_expert("lambda").get(name, 0.0) for name in EXPERTS] for group in recipe.groups]
    )
    depth = np.linspace(0.5, 1.5, len(lambdas))
    excess = np.mean(np.maximum(lambdas.sum(axis=1) - 1, 0) ** 2)
    found = []
    for own, other, weights in ((0, 1, depth), (1, 0, depth[::-1])):
        gain = np.tanh(2.2 * np.average(lambdas[:, own], weights=weights)) / np.tanh(2.2)
        lost = 0.25 * np.average(lambdas[:, other], weights=weights) + 0.15 * excess
        found.append(float(np.clip(0.1 + 0.8 * (gain - lost), 0.0, 1.0)))
    return found


def _luck(*of: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(" ".join(of).encode()).digest()[:8]))


class WaitingHost:
    """Stands in for `EngineHost`: waits as long as an engine would work, and answers."""

    def __init__(self) -> None:
        self._options = json.loads(Path(os.environ[OPTIONS]).read_text())
        self._began = 0.0

    def start(self, config: EngineConfig, *_: object) -> Started:
        """Say that an engine runs."""
        self._note()
        settled = config.model_copy(update={"kind": "transformers"})
        return Started(settled, "here", (), None, {})

    def load(self, recipe: str) -> LoadTime:
        """Take a recipe."""
        self._began = time.time()
        self._recipe = MergeRecipe.model_validate_json(recipe)
        self._seconds = self._options["seconds"] * _luck(self._recipe.digest).gamma(4.0, 0.25)
        time.sleep(self._seconds * _LOAD_SHARE)
        return LoadTime(self._seconds * _LOAD_SHARE, 0.0)

    def reply(self, _kind: str, asked: Sequence[tuple[Any, ...]], _truncate: object) -> list[str]:
        """Answer right where luck is below the skill."""
        self._began = self._began or time.time()
        time.sleep(self._seconds * (1 - _LOAD_SHARE) * len(asked) / self._options["n_items"])
        right = dict(zip(EXPERTS, skills(self._recipe), strict=True))
        replies = []
        for prompt, *_ in asked:
            skill, letters = prompt.removesuffix(":").split(" ")
            own = 0.8 * _luck(prompt).normal() + 0.6 * _luck(prompt, self._recipe.digest).normal()
            rank = 0.5 * (1 + math.erf(own / math.sqrt(2)))  # uniform in (0, 1)
            replies.append(SKILLS[skill](letters) if rank < right[skill] else "")
        self._note()
        return replies

    def stop(self) -> None:
        """There is nothing to end."""

    def _note(self) -> None:
        """Write down when the work began that has ended now."""
        with (Path(self._options["busy"]) / str(os.getpid())).open("a") as file:
            file.write(f"{self._began or time.time()} {time.time()}\n")
        self._began = 0.0
