"""Which merge is recommended, and why."""

from __future__ import annotations

from typing import Any

from optimizer import selection
from optimizer.evaluate import Score
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
    assert "75% on x, 75% on y" in found.reason


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
