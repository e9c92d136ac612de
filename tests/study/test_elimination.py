"""Candidates dropped on part of their items: how often wrongly, and what a study makes of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest
import yaml

from mergetune.evaluation.evaluate import Documents, Evaluator
from mergetune.evaluation.suite import read_suite
from mergetune.report import gather
from mergetune.report.page import render
from mergetune.results import selection
from mergetune.results.run_dir import RunDir
from mergetune.study.elimination import Elimination
from mergetune.study.rescore import rescore
from studies import run, write_study

ALPHA = 0.05
SIZES = {"tools:few.jsonl": 80, "tools:many.jsonl": 320, "voice:voice.jsonl": 200, "calm:calm.jsonl": 200}
Shares = Mapping[str, float]  # of right items, by task


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> Evaluator:
    """An objective of two tasks that are not alike, one of one task, and a guard."""
    folder = tmp_path_factory.mktemp("suite")
    for name, size in SIZES.items():
        rows = [json.dumps({"prompt": f"{name} {i}", "answer": "x"}) for i in range(size)]
        (folder / name.partition(":")[2]).write_text("\n".join(rows))

    def score(*files: str, **more: float) -> dict[str, object]:
        return {"tasks": [{"items": file, "scorer": "exact"} for file in files], **more}

    suite = {
        "description": "test",
        "chat_template": False,
        "holdout": 0,
        "objectives": {"tools": score("few.jsonl", "many.jsonl"), "voice": score("voice.jsonl")},
        "guards": {"calm": score("calm.jsonl", margin=0.05)},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return Evaluator(read_suite(folder / "suite.yaml"))


@dataclass(frozen=True)
class Simulated(RunDir):
    """A run directory whose measurements are in memory."""

    path: Path = field(default=Path(), init=False)
    frames: Mapping[str, pd.DataFrame]

    def measurement(self, name: str, split: str, responses: bool = True) -> pd.DataFrame | None:
        return self.frames[name]


def measured(evaluator: Evaluator, shares: Shares, rng: np.random.Generator) -> pd.DataFrame:
    """Return a model that answers exactly such shares of the items right, whichever they are."""
    right = [rng.permutation(size) < round(shares[task] * size) for task, size in SIZES.items()]
    return evaluator.items()[["score_name", "task", "item"]].assign(score=np.concatenate(right).astype(float))


def of(tools: float, voice: float, calm: float = 0.5) -> dict[str, float]:
    return dict(zip(SIZES, (tools, tools, voice, calm), strict=True))


def drop(
    evaluator: Evaluator, frames: Mapping[str, pd.DataFrame], elimination: Elimination
) -> tuple[str, float]:
    """Measure `new` part by part; returns why it was dropped, if it was, and on which share of its items."""
    rivals = [name for name in frames if name.startswith("rival")]
    whole = frames["new"].set_index(["task", "item"])
    *parts, everything = elimination.parts
    assert count(everything) == sum(SIZES.values())
    for part in parts:
        keys = [(task, evaluator.tasks[task].item_ids[i]) for task, own in part.items() for i in own]
        own = whole.loc[pd.MultiIndex.from_tuples(keys)].reset_index(names=["task", "item"])
        if reason := elimination.why_dropped(own, rivals):
            return reason, len(own) / len(whole)
    return "", 1.0


def count(documents: Documents) -> int:
    return sum(map(len, documents.values()))


def simulate(evaluator: Evaluator, models: Mapping[str, Shares], n_times: int) -> tuple[float, float]:
    """Return how often `new` is dropped, and which share of its items it takes on average.

    The others stay as they are: the items that are drawn early are as good as any to a new one.
    """
    rng = np.random.default_rng(0)
    frames = {name: measured(evaluator, shares, rng) for name, shares in models.items()}
    elimination, found = Elimination(evaluator, Simulated(frames), ALPHA), []
    for _ in range(n_times):
        frames["new"] = measured(evaluator, models["new"], rng)
        found.append(drop(evaluator, frames, elimination))
    return float(np.mean([bool(reason) for reason, _ in found])), float(
        np.mean([share for _, share in found])
    )


@pytest.mark.parametrize(
    "models",
    [
        # as good as the best rival in one objective, much worse in the other: all items leave it on the front
        {"base": of(0.2, 0.2), "rival": of(0.6, 0.9), "new": of(0.6, 0.2)},
        # the same where each of three rivals is as good in the one objective
        {"base": of(0.2, 0.2), "rival1": of(0.5, 0.7), "rival2": of(0.5, 0.8), "rival3": of(0.5, 0.9)}
        | {"new": of(0.5, 0.2)},
        # at the guard's margin
        {"base": of(0.2, 0.2, 0.55), "rival": of(0.4, 0.9, 0.55), "new": of(0.9, 0.2, 0.5)},
    ],
    ids=["one rival", "three rivals", "a guard"],
)
def test_what_belongs_on_the_front_is_dropped_as_rarely_as_said(
    evaluator: Evaluator, models: dict[str, Shares]
) -> None:
    n_times = 200
    wrong, _ = simulate(evaluator, models, n_times)
    assert wrong <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / n_times)


def test_what_is_plainly_worse_is_dropped_early(evaluator: Evaluator) -> None:
    worse = {"base": of(0.2, 0.2), "rival": of(0.8, 0.8), "new": of(0.4, 0.4)}
    breaks = {"base": of(0.2, 0.2, 0.9), "rival": of(0.4, 0.4, 0.9), "new": of(0.8, 0.8, 0.4)}
    for models in (worse, breaks):
        dropped, share = simulate(evaluator, models, 20)
        assert (dropped, share <= 0.4) == (1.0, True)


def once(
    evaluator: Evaluator, models: Mapping[str, Shares], factors: Mapping[str, float] = MappingProxyType({})
) -> tuple[str, float]:
    """Drop `new` or not; `factors` change the scores on `voice` of the models that they name."""
    rng = np.random.default_rng(0)
    frames = {name: measured(evaluator, shares, rng) for name, shares in models.items()}
    for name, factor in factors.items():
        frames[name].loc[frames[name]["score_name"] == "voice", "score"] *= factor
    return drop(evaluator, frames, Elimination(evaluator, Simulated(frames), ALPHA))


def test_reasons_name_what_a_candidate_is_compared_with(evaluator: Evaluator) -> None:
    models = {"base": of(0.2, 0.2, 0.9), "rival": of(0.9, 0.9, 0.9), "new": of(0.1, 0.1, 0.9)}
    assert once(evaluator, models)[0] == "worse than rival in every objective by 100 of 800 items"
    models["new"] = of(0.9, 0.9, 0.1)
    assert once(evaluator, models)[0] == "breaks the guard `calm` by 100 of 800 items"


@pytest.mark.parametrize(("name", "factor"), [("new", math.nan), ("rival", 100.0)])
def test_missing_verdicts_and_scores_beyond_one_decide_nothing(
    evaluator: Evaluator, name: str, factor: float
) -> None:
    models = {"base": of(0.2, 0.2), "rival": of(0.9, 0.9), "new": of(0.1, 0.1)}
    assert once(evaluator, models)[0]
    assert once(evaluator, models, {name: factor}) == ("", 1.0)


def test_parts_hold_the_ones_before(evaluator: Evaluator) -> None:
    parts = Elimination(evaluator, Simulated({}), ALPHA).parts
    assert [count(part) for part in parts] == [100, 200, 400, 600, 800]
    for earlier, later in pairwise(parts):
        assert all(set(earlier[task]) <= set(later[task]) for task in SIZES)
    assert Elimination(evaluator, Simulated({}), 0.0).parts == [evaluator.documents("search")]


def with_many_items(study: Path, n: int) -> Path:
    """Give a study's suite one objective and a guard with more items, all for the search."""
    folder = study.parent
    words = [{"prompt": f"Say {i}.", "patterns": [str(i % 10), "e", "a", "[A-Z]"]} for i in range(n)]
    parity = [{"prompt": f"Is {i} even?", "choices": ["Yes", "No"], "answer": i % 2} for i in range(n)]
    for name, items in (("words", words), ("parity", parity)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    suite = yaml.safe_load((folder / "suite.yaml").read_text())
    objectives = {"words": suite["objectives"]["words"]}
    (folder / "suite.yaml").write_text(yaml.safe_dump({**suite, "objectives": objectives, "holdout": 0}))
    return study


def test_a_study_drops_what_is_worse_and_comes_to_the_same_front(
    tiny_base: Path, tiny_experts: dict[str, Path], tmp_path: Path
) -> None:
    runs, printed = {}, {}
    for name, level in (("whole", 0.0), ("parts", 0.05)):
        changes = {"elimination": level, "budget": {"trials": 10}, "sampler": "RandomSampler"}
        study = with_many_items(write_study(tmp_path / name, tiny_base, tiny_experts, **changes), 120)
        printed[name] = run(study, tmp_path / name / "run")
        runs[name] = RunDir(tmp_path / name / "run")
    whole, parts = (runs[name].all_scores("search") for name in ("whole", "parts"))
    dropped = {each.name: each for each in runs["parts"].candidates() if each.state == "dropped"}
    assert dropped
    assert whole.keys() - parts.keys() == dropped.keys() == runs["parts"].all_scores("part").keys()
    assert {name: whole[name] for name in parts} == parts  # replies of parts together are those of the whole
    suite = runs["parts"].study.suite_config
    assert selection.front(whole, suite) == selection.front(parts, suite)
    n_items = 240
    for name, each in dropped.items():
        part = runs["parts"].measurement(name, "part")
        assert part is not None
        assert each.cost.n_items == len(part) < n_items
        assert f"{name}       dropped: worse than" in printed["parts"]
    page = render(gather(runs["parts"]))
    assert f"Dropped on part of the items: {len(dropped)}" in page
    assert f"{len(dropped)} more" in page

    # the sampler's own storage is lost: it is told of them anew, and nothing is measured again
    (tmp_path / "parts" / "run" / "study.journal").unlink()
    before = {file: file.read_bytes() for file in (tmp_path / "parts" / "run" / "candidates").iterdir()}
    run(tmp_path / "parts" / "study.yaml", tmp_path / "parts" / "run")
    assert before == {
        file: file.read_bytes() for file in (tmp_path / "parts" / "run" / "candidates").iterdir()
    }

    # scored by another suite they are left out, for what they were dropped by counts no more
    rescore(runs["parts"], str(tmp_path / "parts" / "suite.yaml"), tmp_path / "again")
    assert RunDir(tmp_path / "again").all_scores("search") == parts
    assert {each.name for each in RunDir(tmp_path / "again").candidates()} == parts.keys()
