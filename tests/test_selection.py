"""Which merge is recommended, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from synthetic_run import Plan, write_run

from optimizer import resampling, selection
from optimizer.evaluate import Score
from optimizer.run_dir import RunDir
from optimizer.suite import SuiteConfig


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


MODELS = {"base": scores(0.1, 0.2), "expert-a": scores(0.9, 0.2), "expert-b": scores(0.1, 0.6)}


def test_the_least_worst_loss_against_the_experts_wins() -> None:
    candidates = {**MODELS, "even": scores(0.7, 0.5), "lopsided": scores(0.9, 0.4)}
    found = selection.recommend(candidates, suite())
    assert found is not None
    assert (found.name, found.keeps_guards) == ("even", True)
    assert "75% on `x`, 75% on `y`" in found.reason


def test_a_weight_moves_the_choice() -> None:
    candidates = {**MODELS, "even": scores(0.7, 0.5), "lopsided": scores(0.9, 0.4)}
    found = selection.recommend(candidates, suite(x={"weight": 3.0}, y={}))
    assert found is not None
    assert found.name == "lopsided"


def test_a_broken_guard_outweighs_every_gain() -> None:
    candidates = {**MODELS, "careless": scores(0.9, 0.6, g=0.7), "careful": scores(0.3, 0.3)}
    found = selection.recommend(candidates, suite())
    assert found is not None
    assert found.name == "careful"
    assert selection.front(candidates, suite()) == ["expert-a", "expert-b", "careful"]
    worst = selection.recommend({**MODELS, "careless": candidates["careless"]}, suite())
    assert worst is not None
    assert not worst.keeps_guards
    assert "No merge keeps every guard" in worst.reason


def test_a_guard_may_refer_to_an_expert_and_be_minimized() -> None:
    config = suite(margin=0.1, reference="a", x={}, y={})
    low = {**MODELS, "expert-a": scores(0.9, 0.2, g=0.95), "m": scores(0.5, 0.5, g=0.82)}
    assert selection.guard_violations(low["m"], low, config)["g"] > 0
    assert selection.guard_violations(low["expert-a"], low, config)["g"] <= 0


def test_minimized_objectives_count_downwards() -> None:
    config = suite(x={"direction": "minimize"}, y={})
    models = {"base": scores(0.9, 0.2), "expert-a": scores(0.1, 0.2), "expert-b": scores(0.9, 0.6)}
    candidates = {**models, "good": scores(0.2, 0.55), "bad": scores(0.8, 0.55)}
    found = selection.recommend(candidates, config)
    assert found is not None
    assert found.name == "good"
    assert "bad" not in selection.front(candidates, config)


def test_where_no_expert_is_better_than_the_base_the_plain_difference_counts() -> None:
    models = {"base": scores(0.5, 0.2), "expert-a": scores(0.4, 0.6)}
    gains = selection.retained_gains(models, scores(0.45, 0.4), suite())
    assert gains["x"] == 0.95
    assert 0.49 < gains["y"] < 0.51


def test_without_a_merge_nothing_is_recommended() -> None:
    assert selection.recommend(MODELS, suite()) is None


# The front under noise, and the finalists


def measured(**rates: tuple[float, float, float]) -> dict[str, pd.DataFrame]:
    """Per-item scores of candidates with these shares right on x, y and g, an item's luck being shared."""
    rng, frames = np.random.default_rng(3), {}
    difficulty = {name: rng.random(80) for name in "xyg"}
    for candidate, own in rates.items():
        parts = [
            pd.DataFrame(
                {
                    "score_name": name,
                    "task": np.repeat(["one", "two"], [20, 60]),
                    "item": np.arange(80),
                    "score": (0.8 * difficulty[name] + 0.2 * rng.random(80) < rate).astype(float),
                }
            )
            for name, rate in zip("xyg", own, strict=True)
        ]
        frames[candidate.replace("_", "-")] = pd.concat(parts)
    return frames


def test_the_noisy_front_counts_the_resamples_in_which_a_feasible_candidate_is_not_dominated() -> None:
    frames = measured(base=(0.1, 0.2, 0.8), expert_a=(0.9, 0.2, 0.8), m=(0.6, 0.5, 0.78), n=(0.6, 0.52, 0.75))
    config = suite(reference="a")
    found = selection.noisy_front(resampling.join_items(frames), config, seed=5)
    rng, scores = np.random.default_rng(5), {}
    for name in "xyg":
        columns = [frame[frame["score_name"] == name]["score"].to_numpy() for frame in frames.values()]
        tasks = next(iter(frames.values()))["task"].to_numpy()[:80]
        scores[name] = resampling.bootstrap_scores(np.stack(columns, 1), tasks, n_resamples=2000, seed=rng)
    counts = np.zeros(4)
    for x, y, g in zip(*scores.values(), strict=True):
        kept = [i for i in range(4) if g[1] - g[i] <= 0.05]
        for i in kept:
            counts[i] += not any(x[j] >= x[i] and y[j] >= y[i] and (x[j] > x[i] or y[j] > y[i]) for j in kept)
    assert list(found.probability.values()) == pytest.approx(counts / 2000)
    assert 0 < found.probability["m"] < 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return write_run(tmp_path_factory.mktemp("finalists") / "run", Plan(n_trials=15))


def test_the_finalists_are_the_recommended_merge_and_other_trade_offs_of_the_front(run: RunDir) -> None:
    choice = selection.choose(run)
    assert choice is not None
    found = choice.finalists(4)
    assert choice.recommendation is not None
    assert found[0] == choice.recommendation.name
    assert 2 <= len(found) <= 4
    assert not any(name == "base" or selection.is_expert(name) for name in found)
    front = choice.front
    rest = [front.probability[name] for name in found[1:]]
    assert rest == sorted(rest, reverse=True)
    assert min(rest) >= selection.PLAUSIBLE
    assert not any(front.alike(a, b) for i, a in enumerate(found) for b in found[:i])
    assert choice.finalists(2) == found[:2]


def test_the_choice_is_by_smoothed_scores_and_says_so(run: RunDir) -> None:
    choice, config = selection.choose(run), run.study.suite_config
    assert choice is not None
    assert choice.smoothing.smoothers
    by_smoothed = selection.recommend(choice.smoothing.scores, config)
    assert choice.recommendation is not None
    assert by_smoothed is not None
    assert choice.recommendation.name == by_smoothed.name
    assert choice.recommendation.reason.startswith("By smoothed scores, of the ")
    assert " As measured, it keeps " in choice.recommendation.reason
    again = selection.choose(run)
    assert again is not None
    assert again.finalists(9) == choice.finalists(9)


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_is_the_worst_loss_among_those_that_keep_the_guards(seed: int) -> None:
    rng, config = np.random.default_rng(seed), suite(x={"weight": 2.0}, y={"direction": "minimize"})
    drawn = {name: scores(*rng.random(3)) for name in ["base", "expert-a", "expert-b", "m", "n", "o"]}

    def key(name: str) -> tuple[float, float, float]:
        kept = selection.retained_gains(drawn, drawn[name], config)
        losses = [config.objectives[k].weight * (1 - share) for k, share in kept.items()]
        excess = selection.guard_violations(drawn[name], drawn, config)["g"]
        return max(0.0, excess), max(losses), sum(losses)

    found = selection.recommend(drawn, config)
    assert found is not None
    assert found.name == min("mno", key=key)
    assert found.keeps_guards == (key(found.name)[0] == 0)


def test_before_a_merge_is_measured_there_is_no_finalist(tmp_path: Path) -> None:
    plan = Plan(n_trials=0, n_baselines=3, holdout=False, n_items=20)
    choice = selection.choose(write_run(tmp_path / "run", plan))
    assert choice is not None
    assert choice.finalists(3) == ()
