"""Which merge is recommended, and why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mergetune.evaluation.evaluate import Measurement, Score
from mergetune.evaluation.suite import SuiteConfig
from mergetune.report import gather
from mergetune.report.metric import metrics_of
from mergetune.results import roles, selection
from mergetune.results.run_dir import RunDir
from mergetune.results.selection import Recommendation, Scales
from mergetune.stats import resampling
from mergetune.stats.resampling import ItemScores
from scored_models import MODELS, scales, scores, suite
from synthetic_run import Plan, write_run


def recommend(models: Mapping[str, Mapping[str, Score]], config: SuiteConfig) -> Recommendation | None:
    return selection.recommend(models, config, scales(models, config))


def test_the_least_worst_loss_against_the_experts_wins() -> None:
    candidates = {**MODELS, "even": scores(0.7, 0.5), "lopsided": scores(0.9, 0.4)}
    found = recommend(candidates, suite())
    assert found is not None
    assert (found.name, found.keeps_guards) == ("even", True)
    assert "75% on `x`, 75% on `y`" in found.reason


def test_a_weight_moves_the_choice() -> None:
    candidates = {**MODELS, "even": scores(0.7, 0.5), "lopsided": scores(0.9, 0.4)}
    found = recommend(candidates, suite(x={"weight": 3.0}, y={}))
    assert found is not None
    assert found.name == "lopsided"


def test_a_broken_guard_outweighs_every_gain() -> None:
    candidates = {**MODELS, "careless": scores(0.9, 0.6, g=0.7), "careful": scores(0.3, 0.3)}
    found = recommend(candidates, suite())
    assert found is not None
    assert found.name == "careful"
    assert selection.front(candidates, suite()) == ["expert-a", "expert-b", "careful"]
    worst = recommend({**MODELS, "careless": candidates["careless"]}, suite())
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
    found = recommend(candidates, config)
    assert found is not None
    assert found.name == "good"
    assert "bad" not in selection.front(candidates, config)


def test_where_no_expert_is_better_than_the_base_the_plain_difference_counts() -> None:
    models = {"base": scores(0.5, 0.2), "expert-a": scores(0.4, 0.6)}
    gains = selection.retained_gains(models, scores(0.45, 0.4), suite(), scales(models, suite()))
    assert gains["x"] == pytest.approx(0.95)
    assert 0.49 < gains["y"] < 0.51


def test_without_a_merge_nothing_is_recommended() -> None:
    assert recommend(MODELS, suite()) is None


# A gain that noise may have made


def counts(**right: tuple[int, int]) -> dict[str, pd.DataFrame]:
    """Return measurements of candidates with so many of 200 items right on x and y, the first ones."""
    return {
        name.replace("_", "-"): pd.concat(
            pd.DataFrame(
                {"score_name": key, "task": key, "item": range(200), "score": np.arange(200) < count}
            )
            for key, count in zip("xy", own, strict=True)
        ).assign(score=lambda frame: frame["score"].astype(float))
        for name, own in right.items()
    }


def recommended(frames: Mapping[str, pd.DataFrame], config: SuiteConfig) -> Recommendation:
    measured = {name: Measurement(frame, 0.0).scores() for name, frame in frames.items()}
    found = selection.recommend(measured, config, Scales.of_frames(frames, config))
    assert found is not None
    return found


UNGUARDED = suite(x={}, y={}).model_copy(update={"guards": {}})


@pytest.mark.parametrize("lead", [0, 1, 2])
def test_a_lead_of_an_item_does_not_outweigh_a_skill(lead: int) -> None:
    best = 100 + lead
    models = {"base": (20, 100), "expert_a": (180, 100), "expert_b": (20, best)}
    found = recommended(counts(**models, full=(178, best - 2), poor=(33, best)), UNGUARDED)
    assert found.name == "full"
    said = "it keeps 99% on `x` of the best expert's gain over the base; no expert gains on `y` beyond noise"
    assert said in found.reason
    assert "more than all" not in found.reason


def test_a_gain_that_smoothing_left_of_nothing_does_not_outweigh_a_skill() -> None:
    names = ["base", "expert-a", "expert-b", "full", "poor"]
    points = [(0.1, 0.5), (0.9, 0.5), (0.1, 0.50001), (0.89, 0.4999), (0.17, 0.50001)]
    smoothed = {name: scores(*point) for name, point in zip(names, points, strict=True)}
    found = selection.recommend(smoothed, suite(), scales(smoothed, suite(), stderr=0.03))
    assert found is not None
    assert found.name == "full"


def test_where_no_expert_gains_the_reason_says_how_far_the_merge_is_from_the_base() -> None:
    models = {"base": (150, 100), "expert_a": (149, 90), "m": (153, 96), "n": (90, 80)}
    assert recommended(counts(**models), UNGUARDED).reason == (
        "Of the 2 merges that keep every guard, its worst loss is the smallest: no expert gains on `x` "
        "beyond noise, and it is +1.5 ± 0.9 points from the base; no expert gains on `y` beyond noise, and "
        "it is −2.0 ± 1.0 points from the base."
    )


@pytest.mark.parametrize("scorer", ["latency", "reply_tokens"])
def test_what_replies_cost_is_never_told_in_percent(scorer: str) -> None:
    """Seconds may lie in [0, 1] as shares do."""
    config = suite(x={"tasks": [{"items": "x.jsonl", "scorer": scorer}], "direction": "minimize"})
    models = {"base": scores(0.25, 0), "expert-a": scores(0.25, 0), "m": scores(0.2, 0)}
    found = selection.recommend(models, config, scales(models, config, stderr=0.1))
    assert found is not None
    assert "it is −0.050 ± 0.100 from the base" in found.reason
    assert {metric.name: metric.percent for metric in metrics_of(config, models.values())} == {
        "x": False,
        "g": True,
    }


def test_a_clear_gain_is_worth_what_it_was_whatever_its_noise() -> None:
    models = {"base": scores(0.1, 0.2), "expert-a": scores(0.9, 0.2), "expert-b": scores(0.1, 0.6)}
    for stderr in (0.0, 0.01, 0.17):
        kept = selection.retained_gains(
            models, scores(0.7, 0.3), suite(), scales(models, suite(), stderr=stderr)
        )
        assert kept == pytest.approx({"x": 0.75, "y": 0.25})


# Guards that are met exactly, and the one that is broken least

EXACT = [(n, k, lost) for n in (20, 100) for k in range(n + 1) for lost in range(k + 1) if lost <= n / 10]


def test_every_guard_that_is_met_exactly_is_kept_and_one_item_more_breaks_it() -> None:
    for n, k, lost in EXACT:
        for sign in ("maximize", "minimize"):
            config = suite(margin=lost / n, x={}, y={})
            guard = config.guards["g"].model_copy(update={"direction": sign})
            config = config.model_copy(update={"guards": {"g": guard}})
            reference = k if sign == "maximize" else n - k
            step = -1 if sign == "maximize" else 1
            models = {
                "base": scores(0.1, 0.2, g=reference / n),
                "exact": scores(0.5, 0.5, g=(reference + step * lost) / n),
                "one-more": scores(0.9, 0.6, g=(reference + step * (lost + 1)) / n),
            }
            broken = {
                name: selection.guard_violations(own, models, config)["g"] for name, own in models.items()
            }
            assert broken["exact"] == 0
            assert broken["one-more"] == pytest.approx(1 / n)
            assert selection.relative_violations(models["exact"], models, config)["g"] <= 0
            assert selection.front(models, config) == ["exact"]
            found = recommend(models, config)
            assert found is not None
            assert (found.name, found.keeps_guards) == ("exact", True)


def test_a_guard_met_exactly_in_every_resample_is_kept_in_every_resample() -> None:
    rng = np.random.default_rng(0)
    luck = rng.choice([0.85, 0.9, 0.95], size=(30, 1))
    names, tasks = ("base", "exact", "broken"), np.repeat(["one", "two"], [10, 20])
    items = {key: ItemScores(names, rng.random((30, 3)) + np.array([0, 2, 4]), tasks) for key in "xy"}
    items["g"] = ItemScores(names, luck - [0, 0.05, 0.0501], tasks)
    found = selection.noisy_front(items, suite(margin=0.05))
    assert found.probability == {"base": 0.0, "exact": 1.0, "broken": 0.0}


def test_the_hypervolume_counts_what_meets_a_guard_exactly(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Plan(n_trials=0, holdout=False, n_items=20))
    right = {"base": (2, 2, 18), "average-0.5": (12, 12, 17), "average-0.8": (15, 15, 16)}
    for name, own in right.items():
        found = run.measurement(name, "search")
        assert found is not None
        column = np.concatenate([np.arange(20) < count for count in own]).astype(float)
        run.write_measurement(name, "search", Measurement(found.assign(score=column), 1.0))
    choice = selection.choose(run)
    assert choice is not None
    assert choice.recommendation is not None
    assert (choice.recommendation.name, choice.recommendation.keeps_guards) == ("average-0.5", True)
    assert choice.hypervolume(run.study.suite_config).observed >= 0.25
    assert {entry.name: entry.feasible for entry in gather(run).entries}.items() >= {
        ("average-0.5", True),
        ("average-0.8", False),
    }


def two_guards(first: float, second: float) -> SuiteConfig:
    config = suite(x={}, y={})
    guards = {
        name: config.guards["g"].model_copy(update={"margin": margin})
        for name, margin in {"g": first, "h": second}.items()
    }
    return config.model_copy(update={"guards": guards})


@pytest.mark.parametrize(
    ("margins", "stderr", "named"),
    [
        ((0.01, 0.2), 0.001, "wide"),  # two margins, and half of one
        ((0.2, 0.2), 0.001, "narrow"),
        ((0.0, 0.2), 0.001, "wide"),  # thirty standard errors
        ((0.0, 0.2), 0.5, "narrow"),  # hardly any
        ((0.0, 0.2), 0.0, "narrow"),  # nothing to go by: as it is
    ],
)
def test_excesses_are_compared_in_their_margins_or_in_noise(
    margins: tuple[float, float], stderr: float, named: str
) -> None:
    """One merge breaks the first guard by 0.03, the other the second by 0.1."""
    config = two_guards(*margins)
    reference = {"g": Score(0.8, stderr, 100), "h": Score(0.8, stderr, 100)}
    lost = {"narrow": (margins[0] + 0.03, 0.0), "wide": (0.0, margins[1] + 0.1)}
    models = {"base": scores(0.1, 0.2) | reference}
    for name, (g, h) in lost.items():
        models[name] = scores(0.5, 0.5) | {"g": Score(0.8 - g, 0.0, 100), "h": Score(0.8 - h, 0.0, 100)}
    found = recommend(models, config)
    assert found is not None
    assert (found.name, found.keeps_guards) == (named, False)


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


def regrets_of(choice: selection.Choice, config: SuiteConfig) -> dict[str, float]:
    """Return each merge's mean, over resamples one by one, of its worst loss and its excess over guards."""
    names, found = choice.front.names, dict[str, list[float]]()
    values = {}
    for key, signed in choice.front.resampled.items():
        values[key] = signed * config.scores[key].sign
        if smoother := choice.smoothing.smoothers.get(key):
            columns = [names.index(each) for each in smoother.names]
            values[key][:, columns] = smoother.apply(values[key][:, columns])
    for row in range(selection.N_RESAMPLES):
        drawn = {
            name: {key: Score(float(own[row, i]), 0.0, 1) for key, own in values.items()}
            for i, name in enumerate(names)
        }
        for name in filter(roles.is_merge, names):
            kept = selection.retained_gains(drawn, drawn[name], config, choice.scales)
            losses = [config.objectives[key].weight * (1 - share) for key, share in kept.items()]
            excess = selection.guard_violations(drawn[name], drawn, config)
            units = [by / choice.scales.guards[key] for key, by in excess.items()]
            found.setdefault(name, []).append(max(losses) + max([0.0, *units]))
    return {name: float(np.mean(own)) for name, own in found.items()}


def test_the_finalists_are_the_recommended_merge_and_other_trade_offs_of_the_front(run: RunDir) -> None:
    choice = selection.choose(run)
    assert choice is not None
    config = run.study.suite_config
    found = choice.finalists(4, config)
    assert choice.recommendation is not None
    assert found[0] == choice.recommendation.name
    assert 2 <= len(found) <= 4
    assert not any(name == "base" or roles.is_expert(name) for name in found)
    front = choice.front
    assert min(front.probability[name] for name in found[1:]) >= selection.PLAUSIBLE
    regrets = regrets_of(choice, config)
    assert list(found[1:]) == sorted(found[1:], key=regrets.__getitem__)
    left_out = [name for name in front.names if roles.is_merge(name) and name not in found]
    for name in left_out:
        is_alike = any(front.alike(name, other) for other in found)
        is_rare = front.probability[name] < selection.PLAUSIBLE
        assert is_alike or is_rare or (len(found) == 4 and regrets[name] > regrets[found[-1]])
    assert not any(front.alike(a, b) for i, a in enumerate(found) for b in found[:i])
    assert choice.finalists(2, config) == found[:2]


def test_the_choice_is_by_smoothed_scores_and_says_so(run: RunDir) -> None:
    choice, config = selection.choose(run), run.study.suite_config
    assert choice is not None
    assert choice.smoothing.smoothers
    by_smoothed = selection.recommend(choice.smoothing.scores, config, choice.scales)
    assert choice.recommendation is not None
    assert by_smoothed is not None
    assert choice.recommendation.name == by_smoothed.name
    assert choice.recommendation.reason.startswith("By smoothed scores, of the ")
    assert " As measured, it keeps " in choice.recommendation.reason
    again = selection.choose(run)
    assert again is not None
    assert again.finalists(9, config) == choice.finalists(9, config)


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_is_the_worst_loss_among_those_that_keep_the_guards(seed: int) -> None:
    rng, config = np.random.default_rng(seed), suite(x={"weight": 2.0}, y={"direction": "minimize"})
    drawn = {name: scores(*rng.random(3)) for name in ["base", "expert-a", "expert-b", "m", "n", "o"]}
    own_scales = scales(drawn, config, stderr=float(rng.choice([0.0, 0.05, 0.5])))

    def key(name: str) -> tuple[float, float, float]:
        kept = selection.retained_gains(drawn, drawn[name], config, own_scales)
        losses = [config.objectives[k].weight * (1 - share) for k, share in kept.items()]
        excess = selection.guard_violations(drawn[name], drawn, config)["g"]
        return max(0.0, excess), max(losses), sum(losses)

    found = selection.recommend(drawn, config, own_scales)
    assert found is not None
    assert found.name == min("mno", key=key)
    assert found.keeps_guards == (key(found.name)[0] == 0)


def test_before_a_merge_is_measured_there_is_no_finalist(tmp_path: Path) -> None:
    plan = Plan(n_trials=0, n_baselines=3, holdout=False, n_items=20)
    own = write_run(tmp_path / "run", plan)
    choice = selection.choose(own)
    assert choice is not None
    assert choice.finalists(3, own.study.suite_config) == ()
