"""The gate's verdicts, on measurements made from seeds; figures against scipy and by simulation."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import ArrayLike
from scipy import optimize, stats

from mergetune.errors import MergetuneError
from mergetune.evaluation.suite import Direction, GuardConfig, ObjectiveConfig, SuiteConfig, TaskConfig
from mergetune.gate.judge import EXIT, Check, judge
from mergetune.gate.outputs import as_data, as_html, as_markdown
from mergetune.gate.row import Row
from mergetune.stats.resampling import Interval
from mergetune.stats.sequential import look, split_alpha

TASKS = (TaskConfig(lm_eval="any"),)
Scores = Mapping[tuple[str, str], ArrayLike]


def suite_of(
    objectives: Mapping[str, Direction], guards: Mapping[str, float] | None = None, margin: float = 0.05
) -> SuiteConfig:
    """A suite of objectives, by name and direction, and of guards, by name and margin."""
    return SuiteConfig(
        description="any",
        chat_template=True,
        objectives={
            name: ObjectiveConfig(tasks=TASKS, margin=margin, direction=direction)
            for name, direction in objectives.items()
        },
        guards={name: GuardConfig(tasks=TASKS, margin=own) for name, own in (guards or {}).items()},
    )


def frame(scores: Scores) -> pd.DataFrame:
    """A measurement: scores of the items of each (score, task)."""
    rows = [
        {"score_name": name, "task": task, "item": f"{task}-{i}", "score": float(v), "response": f"says {v}"}
        for (name, task), values in scores.items()
        for i, v in enumerate(np.asarray(values))
    ]
    return pd.DataFrame(rows)


def check(
    candidate: Scores | pd.DataFrame, baseline: Scores | pd.DataFrame, suite: SuiteConfig, **options: Any
) -> Check:
    first, second = (own if isinstance(own, pd.DataFrame) else frame(own) for own in (candidate, baseline))
    items = second[["score_name", "task", "item"]].assign(split="search", prompt="Why?", target="So.")
    return judge(first, second, items, suite, suite_name="evals", labels=("new", "old"), **options)


def solved(share: float, n_items: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return (np.arange(n_items) < round(share * n_items)).astype(np.float64)


def row_of(found: Check, name: str) -> Row:
    return next(row for row in found.rows if row.name == name)


# --- verdicts


def test_equal_models_pass_and_the_command_ends_with_0() -> None:
    scores = {("chat", "chat:a.jsonl"): solved(0.8, 200), ("safe", "arc"): solved(0.6, 200)}
    found = check(scores, scores, suite_of({"chat": "maximize"}, guards={"safe": 0.03}))
    assert (found.verdict, EXIT[found.verdict]) == ("pass", 0)
    assert [(row.name, row.kind, row.verdict) for row in found.rows] == [
        ("chat", "objective", "pass"),
        ("safe", "guard", "pass"),
    ]
    assert found.summary == "PASS: none of 2 scores is worse by more than its margin"
    assert found.flips == ()
    assert (found.n_items, found.saving, found.noise) == (400, None, None)


def test_a_clear_loss_fails_with_its_figures_in_words_and_ends_with_1() -> None:
    candidate = {("tool_calls", "t"): solved(0.5, 200), ("safe", "arc"): solved(0.6, 200)}
    baseline = {("tool_calls", "t"): solved(0.8, 200), ("safe", "arc"): solved(0.6, 200)}
    found = check(candidate, baseline, suite_of({"tool_calls": "maximize"}, guards={"safe": 0.05}))
    assert (found.verdict, EXIT[found.verdict]) == ("fail", 1)
    row = row_of(found, "tool_calls")
    assert (row.candidate, row.baseline, row.n_won, row.n_lost) == (0.5, 0.8, 0, 60)
    assert row.difference == pytest.approx(-0.3)
    assert found.summary.startswith("FAIL: tool_calls fell by 0.300 [−0.3")
    assert found.summary.endswith("], more than the 0.05 allowed")
    assert row_of(found, "safe").verdict == "pass"


def test_few_items_cannot_tell_how_many_could_is_said_and_the_command_ends_with_2() -> None:
    found = check(
        {("chat", "t"): solved(0.7, 30)}, {("chat", "t"): solved(0.7333, 30)}, suite_of({"chat": "maximize"})
    )
    row = row_of(found, "chat")
    assert (found.verdict, EXIT[found.verdict]) == ("inconclusive", 2)
    assert row.items_to_decide is not None
    assert row.items_to_decide > 30
    assert found.summary.startswith("INCONCLUSIVE: 30 items cannot tell whether chat is worse by more than")
    assert "would, if the true difference is the one seen" in found.summary


def test_the_number_of_items_that_would_fail_a_candidate_is_planned_at_the_level_that_fails() -> None:
    """A difference below −margin that does not yet fail at α / n needs more items, though it would at α."""
    names = [f"s{i}" for i in range(8)]
    base = {(name, "t"): solved(0.9, 200) for name in names}
    bad = base | {("s0", "t"): solved(0.815, 200)}
    found = check(bad, base, suite_of(dict.fromkeys(names, "maximize")))
    row = row_of(found, "s0")
    assert row.interval.upper < -row.margin
    assert (row.verdict, found.verdict) == ("inconclusive", "inconclusive")
    assert row.items_to_decide is not None
    assert row.items_to_decide > 200


def test_lower_is_better_turns_the_difference_and_leaves_the_scores() -> None:
    suite = suite_of({"errors": "minimize"})
    worse = check({("errors", "t"): solved(0.5, 200)}, {("errors", "t"): solved(0.1, 200)}, suite)
    row = row_of(worse, "errors")
    assert (worse.verdict, row.candidate, row.baseline) == ("fail", 0.5, 0.1)
    assert row.difference == pytest.approx(-0.4)
    assert (row.n_won, row.n_lost) == (0, 80)
    assert "got worse by 0.400 [−0.4" in worse.summary
    assert {flip.gain for flip in worse.flips} == {-1.0}
    better = check({("errors", "t"): solved(0.1, 200)}, {("errors", "t"): solved(0.5, 200)}, suite)
    assert better.verdict == "pass"
    assert row_of(better, "errors").improved


def test_a_direction_is_a_mirror() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.random(60), rng.random(60)
    up = check({("s", "t"): first}, {("s", "t"): second}, suite_of({"s": "maximize"})).rows[0]
    down = check({("s", "t"): 1 - first}, {("s", "t"): 1 - second}, suite_of({"s": "minimize"})).rows[0]
    assert down.interval.lower == pytest.approx(up.interval.lower, abs=1e-9)
    assert down.improvement_p == pytest.approx(up.improvement_p)


# --- what quantizing changed


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_a_difference_is_split_as_two_checks_would_say(direction: Direction) -> None:
    suite, tasks = suite_of({"s": direction}), ("one", "two")
    rng = np.random.default_rng(2)
    candidate, unquantized, baseline = (
        frame({("s", task): rng.random(40) for task in tasks}) for _ in range(3)
    )
    found = check(candidate, baseline, suite, unquantized=unquantized)
    (row,) = found.attributions
    before = row_of(check(unquantized, baseline, suite), "s")
    own = row_of(check(candidate, unquantized, suite), "s")
    assert (row.before, row.before_interval) == (before.difference, before.interval)
    assert (row.quantizing, row.quantizing_interval) == (own.difference, own.interval)
    assert row.before + row.quantizing == pytest.approx(row_of(found, "s").difference)
    assert (row.candidate, row.unquantized) == (own.candidate, own.baseline)
    assert row.baseline == before.baseline


# --- tasks


def test_one_task_that_collapses_fails_the_gate_though_the_mean_passes() -> None:
    names = [f"lang-{i}" for i in range(12)]
    base = {("chat", name): solved(0.7, 100) for name in names}
    gains = {("chat", name): solved(0.72, 100) for name in names}
    found = check(gains | {("chat", "lang-3"): solved(0.3, 100)}, base, suite_of({"chat": "maximize"}))
    assert row_of(found, "chat").verdict == "pass"
    assert row_of(found, "lang-3").verdict == "fail"
    assert found.verdict == "fail"
    assert "lang-3 of chat fell by 0.400" in found.summary
    assert [row.name for row in found.rows] == ["chat", *names]
    assert {row.kind for row in found.rows[1:]} == {"task"}


def test_undecided_tasks_do_not_block() -> None:
    scores = {("chat", f"t{i}"): solved(0.8, 25) for i in range(12)}
    found = check(scores, scores, suite_of({"chat": "maximize"}))
    assert {row.verdict for row in found.rows if row.kind == "task"} == {"inconclusive"}
    assert found.verdict == "pass"


def test_a_score_is_the_mean_over_its_tasks_whatever_their_sizes() -> None:
    small, large = solved(0.5, 10), solved(0.9, 1000)
    found = check(
        {("s", "a"): small, ("s", "b"): large},
        {("s", "a"): small, ("s", "b"): large},
        suite_of({"s": "maximize"}),
    )
    assert row_of(found, "s").candidate == pytest.approx(0.7)


# --- noise


def test_the_noise_of_a_repeated_run_widens_every_interval_and_takes_a_pass_back() -> None:
    rng = np.random.default_rng(2)
    scores = {("s", "a"): rng.random(300), ("s", "b"): rng.random(300)}
    shifted = {key: np.clip(values + 0.04, 0, 1) for key, values in scores.items()}
    quiet = check(scores, scores, suite_of({"s": "maximize"}))
    noisy = check(scores, scores, suite_of({"s": "maximize"}), repeat=frame(shifted))
    assert (quiet.verdict, noisy.verdict) == ("pass", "inconclusive")
    assert noisy.noise is not None
    assert noisy.noise["s"] == pytest.approx(
        np.mean([np.mean(shifted[k] - scores[k]) for k in scores]), rel=0.05
    )
    for before, after in zip(quiet.rows, noisy.rows, strict=True):
        assert after.interval.lower < before.interval.lower
        assert after.interval.upper > before.interval.upper
    assert "noise floor" in noisy.summary


def test_noise_takes_the_claim_of_an_improvement_back() -> None:
    base = {("s", "t"): solved(0.5, 200)}
    better = {("s", "t"): solved(0.6, 200)}
    assert check(better, base, suite_of({"s": "maximize"})).rows[0].improved
    again = frame({("s", "t"): solved(0.4, 200)})
    assert not check(better, base, suite_of({"s": "maximize"}), repeat=again).rows[0].improved


# --- what is measured must fit together


@pytest.mark.parametrize("side", ["candidate", "baseline"])
def test_measurements_of_different_items_are_refused_with_how_many_are_missing_where(side: str) -> None:
    whole = frame({("s", "t"): solved(0.5, 20)})
    frames = {"candidate": whole, "baseline": whole} | {side: whole.iloc[3:]}
    with pytest.raises(MergetuneError, match=rf"{side} lacks 3.*Measure both again"):
        check(frames["candidate"], frames["baseline"], suite_of({"s": "maximize"}))


def test_an_item_measured_twice_is_refused() -> None:
    whole = frame({("s", "t"): solved(0.5, 20)})
    with pytest.raises(MergetuneError, match="the candidate has `s/t/t-0` twice"):
        check(pd.concat([whole, whole.iloc[:1]]), whole, suite_of({"s": "maximize"}))


def test_scores_of_another_suite_are_refused() -> None:
    whole = frame({("s", "t"): solved(0.5, 20)})
    with pytest.raises(MergetuneError, match="must be those of the suite, other, but are s"):
        check(whole, whole, suite_of({"other": "maximize"}))


def test_a_changed_item_that_the_suite_no_longer_has_is_refused() -> None:
    first, second = frame({("s", "t"): solved(0.5, 20)}), frame({("s", "t"): solved(0.6, 20)})
    items = second.assign(prompt="p", target="t").iloc[:5]
    with pytest.raises(MergetuneError, match="2 are not"):
        judge(first, second, items, suite_of({"s": "maximize"}), suite_name="e", labels=("a", "b"))


def test_a_repeated_run_of_other_items_is_refused() -> None:
    whole = frame({("s", "t"): solved(0.5, 20)})
    with pytest.raises(MergetuneError, match="repeated baseline lacks 1"):
        check(whole, whole, suite_of({"s": "maximize"}), repeat=whole.iloc[1:])


def test_the_order_of_the_rows_changes_nothing() -> None:
    rng = np.random.default_rng(3)
    first, second = (frame({("s", "a"): rng.random(30), ("s", "b"): rng.random(20)}) for _ in range(2))
    suite = suite_of({"s": "maximize"})
    plain = check(first, second, suite)
    shuffled = check(first, second.sample(frac=1, random_state=0), suite)
    assert shuffled.rows == plain.rows
    assert shuffled.flips == plain.flips


# --- flips


def test_flips_come_losses_first_and_the_largest_first() -> None:
    first = {("s", "t"): [0.0, 1.0, 0.4, 0.5, 0.9]}
    second = {("s", "t"): [1.0, 0.2, 0.6, 0.5, 0.8]}
    flips = check(first, second, suite_of({"s": "maximize"})).flips
    assert [round(flip.gain, 9) for flip in flips] == [-1.0, -0.2, 0.8, 0.1]
    assert (flips[0].candidate_response, flips[0].baseline_response) == ("says 0.0", "says 1.0")
    assert (flips[0].prompt, flips[0].target) == ("Why?", "So.")


# --- figures against others


def test_the_interval_of_a_binary_score_is_where_the_constrained_likelihood_has_the_score_z() -> None:
    """Tango's bounds, by numerical maximization of the likelihood under the null."""
    rng = np.random.default_rng(4)
    first, second = (rng.random((2, 120)) < 0.7).astype(float)
    row = check({("s", "t"): first}, {("s", "t"): second}, suite_of({"s": "maximize"})).rows[0]
    wins, losses, n = row.n_won, row.n_lost, row.n_items

    def score(delta: float) -> float:
        def minus_log_likelihood(q: float) -> float:  # q: probability of a loss, q + delta that of a win
            rest = 1 - 2 * q - delta
            return -(wins * math.log(q + delta) + losses * math.log(q) + (n - wins - losses) * math.log(rest))

        bounds = (max(0.0, -delta) + 1e-9, (1 - delta) / 2 - 1e-9)
        q = optimize.minimize_scalar(
            minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}
        ).x
        return float((wins - losses - n * delta) / math.sqrt(n * (2 * q + delta - delta**2)))

    z = stats.norm.isf(0.05)
    assert row.method == "tango"
    assert score(row.interval.lower) == pytest.approx(z, abs=1e-3)
    assert score(row.interval.upper) == pytest.approx(-z, abs=1e-3)


def test_improvement_is_mcnemars_one_sided_mid_p_adjusted_by_holm() -> None:
    rng = np.random.default_rng(5)
    base = {(name, "t"): (rng.random(150) < 0.5).astype(float) for name in "abc"}
    own = {
        (name, "t"): (rng.random(150) < p).astype(float)
        for name, p in zip("abc", (0.72, 0.5, 0.4), strict=True)
    }
    found = check(own, base, suite_of({"a": "maximize", "b": "maximize", "c": "maximize"}))
    raw = []
    for row in found.rows:
        n = row.n_won + row.n_lost
        raw.append(stats.binom.sf(row.n_won, n, 0.5) + stats.binom.pmf(row.n_won, n, 0.5) / 2)
    order, expected, largest = np.argsort(raw), {}, 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(raw) - rank) * raw[index]))
        expected[found.rows[index].name] = largest
    assert {row.name: row.improvement_p for row in found.rows} == pytest.approx(expected)
    assert [row.improved for row in found.rows] == [True, False, False]
    assert "PASS" not in found.summary or "a improved by" in found.summary


def test_improvement_of_graded_scores_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(6)
    first, second = rng.random(80) * 0.5 + 0.3, rng.random(80) * 0.5
    row = check({("s", "t"): first}, {("s", "t"): second}, suite_of({"s": "maximize"})).rows[0]
    assert row.improvement_p == pytest.approx(stats.ttest_rel(first, second, alternative="greater").pvalue)
    assert row.improved


# --- early stops


def test_an_early_verdict_stands_with_fewer_items_and_its_own_bounds() -> None:
    levels = split_alpha(0.05, 2)
    base = {("chat", "t"): solved(0.2, 400), ("safe", "arc"): solved(0.6, 300)}
    whole = frame({("chat", "t"): solved(0.9, 400), ("safe", "arc"): solved(0.6, 300)})
    part = whole[(whole["score_name"] != "chat") | (whole.index < 120)]
    seen = look(np.ones(120) - solved(80 / 120, 120), 0.05, levels)
    found = check(
        part, base, suite_of({"chat": "maximize"}, guards={"safe": 0.05}), early={"chat": seen}, levels=levels
    )
    chat, safe = found.rows
    assert (chat.method, chat.verdict, chat.n_items) == ("sequential", "pass", 120)
    assert chat.interval == Interval(seen.lower, seen.upper, 1 - 2 * levels.early_pass)
    assert (safe.method, safe.n_items) == ("tango", 300)
    assert safe.interval.level == pytest.approx(1 - 2 * levels.final_pass)
    assert (found.saving and found.saving.n_measured, found.saving and found.saving.n_items) == (420, 700)
    assert (chat.improvement_p, chat.improved) == (None, False)


def test_fewer_items_are_refused_without_an_early_verdict() -> None:
    levels = split_alpha(0.05, 1)
    base = frame({("s", "t"): solved(0.5, 100)})
    with pytest.raises(MergetuneError, match="candidate lacks 40"):
        check(base.iloc[:60], base, suite_of({"s": "maximize"}), levels=levels)


def test_an_early_loss_fails_and_leaves_the_other_scores_undecided() -> None:
    levels = split_alpha(0.05, 2)
    base = frame({("a", "t"): solved(0.9, 400), ("b", "t"): solved(0.5, 400)})
    part = frame({("a", "t"): np.zeros(60), ("b", "t"): solved(1, 60)})
    early = {"a": look(-np.ones(60), 0.05, levels), "b": look(np.zeros(60), 0.05, levels)}
    found = check(part, base, suite_of({"a": "maximize", "b": "maximize"}), early=early, levels=levels)
    assert [row.verdict for row in found.rows] == ["fail", "inconclusive"]
    assert found.verdict == "fail"


def test_a_gate_with_early_stops_judges_no_tasks_and_says_so() -> None:
    scores = {("s", "a"): solved(0.5, 200), ("s", "b"): solved(0.5, 200)}
    found = check(scores, scores, suite_of({"s": "maximize"}), levels=split_alpha(0.05, 1))
    assert [row.name for row in found.rows] == ["s"]
    assert any("tasks of s were judged by their mean only" in warning for warning in found.warnings)


def test_noise_can_take_an_early_verdict_back() -> None:
    levels = split_alpha(0.05, 1)
    base = frame({("s", "t"): solved(0.5, 300)})
    seen = look(np.zeros(200), 0.05, levels)
    assert seen.verdict == "pass"
    options = {"early": {"s": seen}, "levels": levels}
    noisy = frame({("s", "t"): solved(0.8, 300)})
    assert check(base.iloc[:200], base, suite_of({"s": "maximize"}), **options).verdict == "pass"
    found = check(base.iloc[:200], base, suite_of({"s": "maximize"}), repeat=noisy, **options)
    assert found.verdict == "inconclusive"
    assert "noise floor" in found.summary


def test_early_verdicts_need_their_levels() -> None:
    base = frame({("s", "t"): solved(0.5, 30)})
    seen = look(np.zeros(30), 0.05, split_alpha())
    with pytest.raises(ValueError, match="levels"):
        check(base, base, suite_of({"s": "maximize"}), early={"s": seen})


# --- error rates


def test_a_gate_errs_no_more_often_than_alpha() -> None:
    """Three binary scores of 150 items: one truly at its margin must not pass, equal models must not fail."""
    margin, n_suites, n_items = 0.05, 300, 150
    suite = suite_of({"a": "maximize", "b": "maximize"}, guards={"c": margin}, margin=margin)
    rng = np.random.default_rng(7)
    base = frame({(name, name): np.zeros(n_items) for name in "abc"})
    items = base.assign(prompt="", target="")

    def verdicts(shift: float, n_suites: int) -> list[str]:
        found: list[str] = []
        for _ in range(n_suites):
            # The models can differ on few items, so that 150 have power.
            is_open, luck = rng.random((3, n_items)) < 0.12, rng.random((2, 3, n_items))
            chances = np.full((2, 3, 1), 0.5)
            chances[0, 0] -= shift / 0.12
            scores = np.where(is_open, luck < chances, True).astype(float)  # (2 models, 3 scores, n_items)
            own, other = (base.assign(score=model.ravel()) for model in scores)
            found.append(judge(own, other, items, suite, suite_name="e", labels=("a", "b")).verdict)
        return found

    gc.freeze()  # statsmodels collects garbage in every call of Holm's method
    try:
        at_margin, equal = verdicts(margin, n_suites), verdicts(0.0, 100)
    finally:
        gc.unfreeze()
    slack = stats.binom.ppf(0.999, n_suites, 0.05) / n_suites
    assert at_margin.count("pass") / n_suites <= slack
    assert at_margin.count("fail") / n_suites <= slack
    assert equal.count("fail") / len(equal) <= 0.05
    assert equal.count("pass") / len(equal) > 0.3  # not by never deciding


def test_a_check_can_be_copied_and_compared() -> None:
    scores = {("s", "t"): solved(0.5, 30)}
    found = check(scores, scores, suite_of({"s": "maximize"}), warnings=["careful"])
    assert replace(found) == found
    assert found.warnings == ("careful",)


def test_slices_are_compared_and_not_judged() -> None:
    """Held against means by hand; a slice that is lost does not decide, and one item is no slice."""
    rng = np.random.default_rng(0)
    languages = ["de"] * 30 + ["en"] * 69 + ["fr"]
    baseline = rng.integers(0, 2, 100).astype(float)
    candidate = baseline.copy()
    candidate[:30] = 0.0
    suite = suite_of({"skill": "maximize"}, margin=0.9).model_copy(update={"slices": ("language", "size")})
    first, second = (frame({("skill", "skill"): own}) for own in (candidate, baseline))
    items = second[["score_name", "task", "item"]].assign(split="search", prompt="Why?", target="So.")
    items["slices"] = [json.dumps({"language": each}) for each in languages]
    shuffled = items.sample(frac=1, random_state=1)  # by key, never by position
    found = judge(first, second, shuffled, suite, suite_name="evals", labels=("new", "old"))
    assert found.verdict == "pass"
    assert [(row.key, row.value, row.n_items) for row in found.slices] == [
        ("language", "en", 69),
        ("language", "de", 30),
    ]
    english, german = found.slices
    assert german.candidate == 0.0
    assert german.baseline == pytest.approx(baseline[:30].mean())
    assert german.difference == pytest.approx(-baseline[:30].mean())
    assert german.interval.upper < 0 == english.difference
    page = as_html(found)
    assert "By slice" in page
    assert "language: de" in page
    assert "language: de" in as_markdown(found)
    assert json.loads(json.dumps(as_data(found)))["slices"][1]["value"] == "de"
