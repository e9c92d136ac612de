from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mergetune.evaluation.evaluate import Measurement, Score
from mergetune.evaluation.judging.agreement import Agreement
from mergetune.evaluation.suite import Split
from mergetune.report import ReportData, gather, write_report
from mergetune.report.charts import points
from mergetune.report.insights import MIN_TRIALS, Influence, coordinate_name
from mergetune.report.labels import Label, place_labels
from mergetune.report.metric import Metric
from mergetune.report.page import render, ticks
from mergetune.report.page_data import page_data
from mergetune.report.study_charts import hypervolume, importance
from mergetune.report.style import FRONT, PERHAPS, mark_of
from mergetune.report.verdict import Summary, summarize
from mergetune.results import selection
from mergetune.results.config import read_study
from mergetune.results.run_dir import RunDir
from mergetune.space.coordinates import Coordinate
from mergetune.space.recipe import MergeRecipe
from mergetune.stats import pareto
from mergetune.stats.number_text import duration
from mergetune.weights.models import find_model
from report_pages import unpacked
from synthetic_run import EXPERTS, N_LAYERS, Plan, write_run

SPLITS: tuple[Split, Split] = ("search", "holdout")
ATTACK = "</script><script>alert(1)</script>"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished study whose recommended merge says something nasty on every item."""
    folder = tmp_path_factory.mktemp("report")
    chosen = gather(write_run(folder / "plain")).recommendation
    assert chosen is not None
    return write_run(folder / "run", Plan(responses={chosen.name: ATTACK}))


@pytest.fixture(scope="session")
def data(finished: RunDir) -> ReportData:
    return gather(finished)


@pytest.fixture(scope="session")
def page(finished: RunDir) -> Path:
    return write_report(finished)


@pytest.fixture
def simulate(tmp_path: Path) -> Callable[[Plan], RunDir]:
    return lambda plan: write_run(tmp_path / "run", plan)


# What is gathered


def test_the_front_and_the_recommendation_are_those_of_the_selection(
    finished: RunDir, data: ReportData
) -> None:
    scores = {entry.name: entry.search for entry in data.entries}
    suite = finished.study.suite_config
    assert {entry.name for entry in data.front} == set(selection.front(scores, suite))
    choice = selection.choose(finished)
    assert choice is not None
    assert data.recommendation == choice.recommendation
    assert {entry.name for entry in data.entries if entry.finalist} == set(choice.finalists(3, suite))
    for entry in data.entries:
        assert entry.probability == choice.front.probability[entry.name]
        assert entry.smoothed == choice.smoothing.scores[entry.name]


def test_the_front_runs_from_the_worst_to_the_best_first_objective(data: ReportData) -> None:
    values = [entry.search["tool_calls"].value for entry in data.front]
    assert values == sorted(values)


def test_entries_that_break_a_guard_are_not_on_the_front(data: ReportData) -> None:
    broken = [entry for entry in data.entries if not entry.feasible]
    assert broken
    assert not any(entry.on_front for entry in broken)


def test_hypervolume_never_falls_and_ends_at_that_of_the_front(data: ReportData) -> None:
    assert list(data.hypervolume) == sorted(data.hypervolume)
    suite = data.study.suite_config
    signed = selection.objective_points({e.name: e.search for e in data.front}, suite)
    base = next(entry.search for entry in data.entries if entry.name == "base")
    reference = [base[name].value for name in suite.objectives]
    assert data.hypervolume[-1] == pytest.approx(pareto.hypervolume(signed, reference))


def test_packs_hold_what_every_candidate_replied_and_scored(finished: RunDir, data: ReportData) -> None:
    for split in SPLITS:
        items, scores = (unpacked(data.items.packs[f"{kind}.{split}"]) for kind in ("items", "scores"))
        for name in scores:
            measured = finished.measurement(name, split)
            assert measured is not None
            rows = measured.set_index("item").loc[[item for _, item, *_ in items]]
            assert scores[name] == rows["score"].tolist()
            own = unpacked(data.items.packs[f"replies.{split}.{name}"])
            assert "reasons" not in own
            first = own["first"] and unpacked(data.items.packs[f"replies.{split}.{own['first']}"])["replies"]
            replies = [first[i] if reply == 0 else reply for i, reply in enumerate(own["replies"])]
            assert replies == rows["response"].tolist()
    assert data.items.n_replies_left_out == 0


def test_optimism_is_the_score_of_the_search_above_that_of_the_holdout(data: ReportData) -> None:
    found = data.confirmation
    assert data.recommendation is not None
    assert found.finalists[0] == data.recommendation.name
    names = ["tool_calls", "persona", "general"]
    assert [(one.name, one.metric.name) for one in found.optimism] == [
        (name, score) for name in found.finalists for score in names
    ]
    for one in found.optimism:
        assert one.difference.value == pytest.approx(one.search.value - one.holdout.value)
        assert one.smoothed_difference.value == pytest.approx(one.smoothed.value - one.holdout.value)
        assert one.difference.stderr == pytest.approx(math.hypot(one.search.stderr, one.holdout.stderr))


def test_the_mean_optimism_is_that_of_finalists_and_objectives(data: ReportData, page: Path) -> None:
    found = data.confirmation
    own = [one for one in found.optimism if one.metric.kind == "objective"]
    assert found.mean is not None
    assert found.smoothed_mean is not None
    assert found.predicted is not None
    assert found.mean.estimate == pytest.approx(np.mean([one.difference.value for one in own]))
    assert found.smoothed_mean.estimate == pytest.approx(
        np.mean([one.smoothed_difference.value for one in own])
    )
    # Finalists share items: their mean errs more than independent ones would, and less than one alone.
    half_width = (found.mean.interval.upper - found.mean.interval.lower) / 2 / 1.96
    alone = math.sqrt(sum(one.difference.stderr**2 for one in own[:2])) / 2
    assert alone / math.sqrt(len(found.finalists)) < half_width < 1.1 * alone
    assert found.predicted.interval.lower < found.predicted.estimate < found.predicted.interval.upper
    agree = found.mean.agrees(found.predicted.estimate)
    assert ("the two agree" in page.read_text(encoding="utf-8")) == agree


def test_the_prediction_chooses_anew_in_each_resample_by_the_same_rule(finished: RunDir) -> None:
    choice, suite = selection.choose(finished), finished.study.suite_config
    assert choice is not None
    drawn, names = choice.optimism(suite), choice.front.names
    for b in range(5):
        by: dict[str, dict[str, Score]] = {name: {} for name in names}
        for key, resampled in choice.front.resampled.items():
            smoother = choice.smoothing.smoothers.get(key)
            row = resampled[b].copy()
            if smoother is not None:
                columns = [names.index(name) for name in smoother.names]
                row[columns] = smoother.apply(row[columns])
            for name, value in zip(names, row, strict=True):
                by[name][key] = Score(float(value), 0.0, 1)
        chosen = selection.recommend(by, suite, choice.scales)
        assert chosen is not None
        for k, key in enumerate(suite.objectives):
            resampled = choice.front.resampled[key][b, names.index(chosen.name)]
            assert drawn[k][b] == pytest.approx(resampled - choice.measured[chosen.name][key].value)


def test_a_second_use_of_the_holdout_is_said_loudly(simulate: Callable[[Plan], RunDir], page: Path) -> None:
    warning = "The holdout was used 2 times; the later choice may have been"
    html = render(gather(simulate(Plan(n_trials=4, n_items=20, n_holdout_uses=2))))
    assert warning in html
    once = page.read_text(encoding="utf-8")
    assert "The holdout was used" not in once
    assert once.count("written down before any was measured on the holdout") == 1


def test_noise_of_the_measurement_is_said_and_widens_the_errors(simulate: Callable[[Plan], RunDir]) -> None:
    data = gather(simulate(Plan(n_trials=4, n_items=40, noise=0.2)))
    assert data.noise is not None
    assert data.noise.n_changed > 0
    for one in data.confirmation.optimism:
        variance = one.search.stderr**2 + one.holdout.stderr**2 + data.noise.variances[one.metric.name]
        assert one.difference.stderr == pytest.approx(math.sqrt(variance))
    assert f"{data.noise.n_changed} changed their score" in render(data)


def test_the_hypervolume_is_shown_less_its_optimism(data: ReportData) -> None:
    assert data.volume is not None
    assert data.volume.observed == pytest.approx(data.hypervolume[-1])
    assert data.volume.interval.lower < data.volume.corrected < data.volume.interval.upper
    assert data.volume.corrected < data.volume.observed


def test_marks_tell_how_surely_a_merge_is_on_the_front(data: ReportData) -> None:
    for entry in data.entries:
        mark = mark_of(entry)
        if entry.role == "merge" and not entry.recommended:
            assert (mark is FRONT) == (entry.probability >= 0.5)
            assert (mark is PERHAPS) == (0.1 <= entry.probability < 0.5)


def test_costs_are_summed_over_all_candidates(finished: RunDir, data: ReportData) -> None:
    costs = [candidate.cost for candidate in finished.candidates()]
    assert data.cost.evaluate_s == pytest.approx(sum(cost.evaluate_s for cost in costs))
    assert data.cost.n_items == sum(cost.n_items for cost in costs)
    assert "lost to failures" not in render(data)
    lost = data.cost.model_copy(update={"lost_s": 7.0})
    assert "<td>7.0 s</td>" in render(replace(data, cost=lost))


def test_depth_gives_every_layer_its_coefficient_and_splits_parts_that_differ(data: ReportData) -> None:
    assert data.recommended is not None
    late = {g.name: g.per_expert("lambda") for g in data.recommended.candidate.recipe.groups}
    last = {(v.part, v.expert): v.value for v in data.depth if v.layer == N_LAYERS - 1}
    for expert in EXPERTS:
        assert last["attention", expert] == late["late-attention"][expert]
        assert last["mlp", expert] == late["late-mlp"][expert]
    layers = {value.layer for value in data.depth if value.part == "attention"}
    assert layers == set(range(N_LAYERS))
    outside = {value.part for value in data.depth if value.layer is None}
    assert outside == {"model.embed_tokens", "model.norm", "lm_head"}


def test_coefficients_that_touch_nothing_are_left_out(simulate: Callable[[Plan], RunDir]) -> None:
    """As of adapters: none changes what is outside the layers or a norm, and one leaves the MLPs alone."""
    run = simulate(Plan(n_trials=3, n_items=20, holdout=False))
    model = run.read_json("model.json")
    layers = [name for name in model["tensors"] if re.search(r"attn|mlp", name)]
    changed = {"tools": [name for name in layers if "attn" in name], "persona": layers}
    run.write_json("model.json", {**model, "changed": changed})
    data = gather(run)
    assert {value.part for value in data.depth} == {"attention", "mlp"}
    assert {value.expert for value in data.depth if value.part == "mlp"} == {"persona"}
    assert data.unchanged == ("embeddings", "norms", "head")
    trial = next(entry for entry in data.entries if entry.name == "trial-0001")
    assert [line.partition(":")[0] for line in trial.coefficients] == [
        *("early", "middle", "late-attention", "late-mlp")
    ]
    assert trial.coefficients[-1].startswith("late-mlp: persona ")
    assert "no expert touches them: embeddings, norms, head." in render(data)


def test_the_report_says_why_the_search_ended(simulate: Callable[[Plan], RunDir]) -> None:
    run = simulate(Plan(n_trials=4, n_items=20))
    assert "The search ended when" not in render(gather(run))
    run.write_json("search.json", {"ended": "all trials were done"})
    assert "The search ended when all trials were done" in render(gather(run))


def test_importance_finds_the_expert_that_a_score_depends_on(data: ReportData) -> None:
    def share(found: tuple[Influence, ...], expert: str) -> float:
        return sum(one.share for one in found if one.parameter.endswith(expert))

    for objective, expert in (("tool_calls", "tools"), ("persona", "persona")):
        found = data.influences[objective]
        assert sum(one.share for one in found) == pytest.approx(1)
        own = [one.correlation for one in found if one.parameter.endswith(expert)]
        assert np.mean(own) > 0
    assert share(data.influences["tool_calls"], "tools") > 0.5


# The verdict


def test_the_verdict_compares_to_the_best_expert_of_each_objective(data: ReportData) -> None:
    assert data.verdict.split == "holdout"
    against = {one.metric.name: one.against for one in data.verdict.comparisons}
    assert against == {"tool_calls": "expert-tools", "persona": "expert-persona", "general": "base"}
    for one in data.verdict.comparisons:
        assert one.difference.value == pytest.approx(one.own.value - one.other.value)
        assert one.difference.stderr < math.hypot(one.own.stderr, one.other.stderr)  # paired


def test_a_merge_that_is_clearly_ahead_is_said_to_beat_the_experts(
    simulate: Callable[[Plan], RunDir],
) -> None:
    data = gather(simulate(Plan(n_items=100, n_baselines=3, n_trials=5)))
    assert data.verdict.level == "good"
    assert "beats every expert" in data.verdict.headline


def test_a_merge_that_does_not_beat_the_experts_is_said_not_to(simulate: Callable[[Plan], RunDir]) -> None:
    verdict = gather(simulate(Plan(objectives=("persona",), n_trials=5))).verdict
    assert verdict.level == "none"
    assert verdict.headline.endswith("the best merge of the search, does not beat your experts.")
    assert verdict.sentences[1].startswith("Deploy `expert-persona`")


def _judged(data: ReportData, averages: tuple[str, ...], **scores: tuple[int, int, int]) -> Summary:
    """Judge `trial` by these right answers out of 100 to tool_calls, persona and general; `_` is `-`."""
    known = {"base": (0, 0, 80), "expert_tools": (90, 0, 80), "expert_persona": (0, 90, 80)} | scores
    frames = {
        name.replace("_", "-"): pd.DataFrame(
            {"score_name": metric.name, "task": metric.name, "item": str(i), "score": float(i < count)}
            for metric, count in zip(data.metrics, counts, strict=True)
            for i in range(100)
        )
        for name, counts in known.items()
    }
    chosen = selection.Recommendation("trial", "", keeps_guards=True)
    return summarize(chosen, frames, data.metrics, data.study.suite_config, "holdout", averages)


def test_the_headline_claims_nothing_of_what_was_not_measured_on_its_split(data: ReportData) -> None:
    measured = {"trial": (85, 85, 80), "average_0.5": (40, 40, 80), "average_1": (50, 50, 80)}
    every = _judged(data, ("average-0.5", "average-1"), **measured)
    assert every.headline == (
        "As one model for all objectives, `trial` beats every expert and every average, at the price of 5.0 "
        "points of `tool_calls` and 5.0 points of `persona` against the best expert at it."
    )
    some = _judged(data, ("average-0.5", "average-1", "average-0.8"), **measured)
    assert "every expert and the averages `average-0.5` and `average-1`, at" in some.headline
    del measured["average_1"]
    one = _judged(data, ("average-0.5", "average-1", "soup-a+b"), **measured)
    assert "beats every expert and the average `average-0.5`, at" in one.headline


def test_where_no_expert_gains_the_verdict_says_so_and_noise_decides_nothing(data: ReportData) -> None:
    known = {"base": (0, 50, 80), "expert_tools": (90, 49, 80), "expert_persona": (0, 51, 80)}
    full, poor = (_judged(data, (), **known, trial=own) for own in ((89, 49, 80), (8, 51, 80)))
    assert full.sentences[0] == (
        "On the held-out items it keeps 99% on `tool_calls` of the best expert's gain over the base; no "
        "expert gains on `persona` beyond noise, and it is −1.0 ± 1.0 points from the base: its worst loss "
        "is 41%."
    )
    assert full.worst_loss is not None
    assert poor.worst_loss is not None
    assert poor.worst_loss == pytest.approx(1 - 8 / 90)
    assert full.worst_loss < poor.worst_loss
    alike = {"base": (50, 50, 80), "expert_tools": (50, 49, 80), "expert_persona": (49, 50, 80)}
    none = _judged(data, (), **alike, trial=(51, 52, 80))
    assert "keeps" not in " ".join([none.headline, *none.sentences[:1]])
    assert "more than all" not in none.sentences[0]


def test_a_guard_that_is_met_exactly_is_kept_in_the_verdict(data: ReportData) -> None:
    for reference in range(5, 101):
        known = {"base": (0, 0, reference), "expert_tools": (90, 0, reference)}
        verdict = _judged(data, (), **known, trial=(85, 85, reference - 5))
        assert not any(one.is_broken for one in verdict.comparisons)
        assert "breaks" not in verdict.headline


def test_what_breaks_a_guard_is_left_out_of_the_comparison_and_named(data: ReportData) -> None:
    verdict = _judged(data, (), trial=(85, 85, 80), expert_persona=(0, 90, 70))
    assert "`trial` beats every expert that keeps the guards, at" in verdict.headline
    left_out = "`expert-persona` is left out of the comparison: on the held-out items it breaks a guard."
    assert verdict.sentences[-1] == left_out
    assert not any(one.is_broken for one in verdict.comparisons)
    without = _judged(data, (), trial=(85, 85, 80), expert_persona=(0, 90, 70), expert_tools=(90, 0, 70))
    assert "`trial` beats the base model, at" in without.headline


def test_a_merge_that_breaks_a_guard_on_the_holdout_is_said_to(data: ReportData) -> None:
    verdict = _judged(data, (), trial=(85, 85, 74))
    assert verdict.level == "mixed"
    assert verdict.headline.endswith("but on the held-out items it breaks `general`.")
    assert [one.metric.name for one in verdict.comparisons if one.is_broken] == ["general"]


@pytest.mark.parametrize(("measured", "smoothed", "is_said"), [(0.02, -0.01, True), (0.02, 0.01, False)])
def test_a_guard_that_is_kept_by_the_smoothed_score_alone_is_said_to_be(
    data: ReportData, measured: float, smoothed: float, is_said: bool
) -> None:
    entries = [
        replace(entry, excess={"general": measured}, smoothed_excess={"general": smoothed})
        for entry in data.entries
    ]
    assert ("smoothed, as it is chosen by: kept" in render(replace(data, entries=tuple(entries)))) == is_said


def test_every_figure_of_the_verdict_says_which_split_it_is_of(
    finished: RunDir, data: ReportData, simulate: Callable[[Plan], RunDir]
) -> None:
    chosen, suite = data.recommended, finished.study.suite_config
    assert chosen is not None
    holdout = {e.name: e.holdout for e in data.entries if e.holdout}
    scales = selection.scales_of(finished, holdout, "holdout")
    kept = selection.retained_gains(holdout, chosen.holdout, suite, scales)
    assert data.verdict.sentences[0].startswith(
        f"On the held-out items it keeps {kept['tool_calls']:.0%} on `tool_calls`, {kept['persona']:.0%} on"
    )
    assert f"It was chosen by the search split alone. {chosen_reason(data)}" in render(data)
    searched = gather(simulate(Plan(n_trials=4, n_items=20, holdout=False))).verdict
    assert searched.sentences[0].startswith("On the search split it keeps ")


def chosen_reason(data: ReportData) -> str:
    assert data.recommendation is not None
    return str(ticks(data.recommendation.reason))


def test_the_guard_stands_beside_the_objectives_with_its_paired_error(
    finished: RunDir, data: ReportData
) -> None:
    html = render(data)
    summary = html[: html.index("<h2>Scores")]
    assert "guard: at most 5.0 points worse" in summary
    (guard,) = (one for one in data.verdict.comparisons if one.metric.name == "general")
    assert guard.metric.change(guard.difference) in summary
    own, base = (finished.measurement(name, "search") for name in ("average-1", "base"))
    assert own is not None
    assert base is not None
    both = own.merge(base, on=["score_name", "task", "item"])
    gaps = (both["score_x"] - both["score_y"])[both["score_name"] == "general"]
    entry = next(entry for entry in data.entries if entry.name == "average-1")
    change = entry.guard_changes["search"]["general"]
    assert change.value == pytest.approx(gaps.mean())
    assert change.stderr == pytest.approx(gaps.std() / math.sqrt(len(gaps)))
    word = "broken" if entry.excess["general"] > 0 else "kept"
    assert f"{guard.metric.change(change)}: {word}" in html


def test_a_broken_guard_is_said_first(simulate: Callable[[Plan], RunDir]) -> None:
    run = simulate(Plan(holdout=False, n_items=30))
    for entry in gather(run).entries:
        if entry.feasible and entry.role in {"average", "merge"}:
            (run.path / "candidates" / f"{entry.name}.json").unlink()
    data = gather(run)
    assert data.verdict.headline == "No merge keeps every guard on the search split."
    assert data.recommended not in data.front
    html = render(data)
    assert ": broken</small>" in html
    assert "None of these merges; no merge keeps every guard" in html


# Studies that are not finished, and other numbers of objectives

PARTIAL = {
    "nothing measured": Plan(n_trials=0, n_baselines=0),
    "only the base": Plan(n_trials=0, n_baselines=1, holdout=False),
    "baselines without an average": Plan(n_trials=0, n_baselines=3, holdout=False),
    "few trials, no holdout": Plan(n_trials=3, holdout=False, n_items=20),
    "every trial failed": Plan(n_trials=2, failed=(1, 2)),
    "one objective, no guard": Plan(objectives=("persona",), guard_margin=None, n_trials=4),
    "a minimized objective": Plan(("tool_calls", "latency"), minimized=("latency",), n_trials=4),
    "three objectives": Plan(("tool_calls", "persona", "brevity"), n_trials=4),
}


@pytest.mark.parametrize("plan", PARTIAL.values(), ids=PARTIAL.keys())
def test_the_page_can_be_drawn_of(plan: Plan, simulate: Callable[[Plan], RunDir]) -> None:
    data = gather(simulate(replace(plan, n_items=20)))
    html = render(data)
    assert all(entry.name in html for entry in data.entries if entry.role != "merge")
    assert "nan" not in re.sub(r"(?s)<script>.*?</script>", "", html).replace("is nan:", "")
    if not any(entry.role in ("average", "merge") for entry in data.entries):
        assert data.verdict.headline == "No merge has been measured yet."


def test_nothing_is_recommended_before_the_base_is_measured(simulate: Callable[[Plan], RunDir]) -> None:
    run = simulate(Plan(n_trials=3, holdout=False, n_items=20))
    (run.path / "candidates" / "base.json").unlink()
    data = gather(run)
    assert (data.recommendation, data.front, data.hypervolume) == (None, (), ())
    assert "Nothing is recommended" in render(data)


def test_importance_is_left_out_where_trials_are_few(simulate: Callable[[Plan], RunDir]) -> None:
    data = gather(simulate(Plan(n_trials=3, holdout=False, n_items=20)))
    assert not any(data.influences.values())
    assert f"it takes {MIN_TRIALS} candidates" in render(data)


def test_failed_trials_are_named_with_their_reason(data: ReportData) -> None:
    assert [candidate.name for candidate in data.failed] == ["trial-0006"]
    assert "the model&#39;s output is broken" in render(data)


# The files


class _References(HTMLParser):
    """Collects what a browser would fetch: src, stylesheets, and url(…) in styles."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.n_scripts = 0
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.n_scripts += tag == "script"
        self._in_style = tag == "style"
        for name, value in attrs:
            if (name in {"src", "srcset", "poster", "data"} and not str(value).startswith("data:")) or (
                tag == "link" and name == "href"
            ):
                self.fetched.append(f"{tag} {name}={value}")
            elif name == "href" and not str(value).startswith("#"):
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.fetched += re.findall(r"@import.*|url\(.*?\)", data)
            self._in_style = False


def _parsed(page: Path) -> _References:
    parser = _References()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


def test_the_page_fetches_nothing_and_links_only_to_its_own_files(page: Path) -> None:
    parsed = _parsed(page)
    assert parsed.fetched == []
    assert parsed.links
    assert all((page.parent / link).is_file() for link in parsed.links)


def test_what_a_model_said_is_escaped(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    assert "<script>alert(1)" not in html
    assert _parsed(page).n_scripts == 2  # data and script


def test_a_nasty_text_in_the_data_cannot_end_the_script(data: ReportData) -> None:
    first, *rest = data.entries
    nasty = replace(first, coefficients=(ATTACK,))
    html = render(replace(data, entries=(nasty, *rest)))
    assert "alert(1)" in html
    assert "<script>alert(1)" not in html


def test_sensitivity_is_left_out_where_it_was_not_measured(page: Path) -> None:
    assert "Sensitivity" not in page.read_text(encoding="utf-8")


def test_pictures_for_slides_are_written(page: Path) -> None:
    image = (page.parent / "pareto.png").read_bytes()
    width, height = struct.unpack(">II", image[16:24])
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert width >= 1500
    assert height >= 800
    drawing = (page.parent / "pareto.svg").read_text(encoding="utf-8")
    assert drawing.startswith("<svg")
    assert ">expert-persona</text>" in drawing


def test_tables_hold_every_candidate_and_the_front(page: Path, finished: RunDir, data: ReportData) -> None:
    trials = pd.read_csv(page.parent / "trials.csv").set_index("name")
    assert set(trials.index) == {candidate.name for candidate in finished.candidates()}
    assert trials.loc["trial-0006", "state"] == "failed"
    assert "broken" in str(trials.loc["trial-0006", "reason"])
    for entry in data.entries:
        for split, scores in (("search", entry.search), ("holdout", entry.holdout)):
            value = trials.loc[entry.name, f"persona.{split}"]
            expected = scores["persona"].value if scores else math.nan
            assert value == pytest.approx(expected, nan_ok=True)
        assert trials.loc[entry.name, "persona.smoothed"] == pytest.approx(entry.smoothed["persona"].value)
        assert trials.loc[entry.name, "pareto_probability"] == pytest.approx(entry.probability)
        params = entry.candidate.params or {}
        assert trials.loc[entry.name, "param.lambda.early.tools"] == params["lambda.early.tools"]
    front = pd.read_csv(page.parent / "front.csv")
    assert set(front["name"]) == {entry.name for entry in data.front}
    assert front["on_front"].all()


def test_the_commands_shown_name_files_that_can_be_read(page: Path, data: ReportData) -> None:
    html = page.read_text(encoding="utf-8")
    recipes, studies = (re.findall(rf"mergetune {verb} (\S+)", html) for verb in ("merge", "run"))
    assert data.recommended is not None
    assert MergeRecipe.read(Path(recipes[0])) == data.recommended.candidate.recipe
    assert read_study(Path(studies[0])).experts == data.study.experts


def test_every_recipe_of_the_front_is_written(page: Path, data: ReportData) -> None:
    for entry in data.front:
        recipe = MergeRecipe.read(page.parent / "recipes" / f"{entry.name}.yaml")
        assert recipe == entry.candidate.recipe


def test_recipes_and_title_name_the_models_as_the_study_does(simulate: Callable[[Plan], RunDir]) -> None:
    run = simulate(Plan(n_trials=3))
    known = {"base": "acme/base@0123", "experts": {"tools": "acme/tools@4567", "persona": "/models/persona"}}
    text = json.loads((run.path / "record.json").read_text()) | known
    (run.path / "record.json").write_text(json.dumps(text))
    page = write_report(RunDir(run.path))
    assert "fine-tunes of acme/base</h1>" in page.read_text(encoding="utf-8")
    for file in (page.parent / "recipes").glob("*.yaml"):
        recipe = MergeRecipe.read(file)
        named = {"base": recipe.base.path, "experts": {k: v.path for k, v in recipe.experts.items()}}
        assert named == known


def test_recipes_find_the_extended_base_of_a_run_that_was_moved(
    simulate: Callable[[Plan], RunDir], tmp_path: Path
) -> None:
    run = simulate(Plan(n_trials=3))
    run.extended_base.mkdir()
    moved = run.path.rename(tmp_path / "moved")
    recipes = write_report(RunDir(moved)).parent / "recipes"
    bases = {find_model(MergeRecipe.read(file).base.path, recipes) for file in recipes.glob("*.yaml")}
    assert bases == {moved / "base"}


def test_no_temporary_file_is_left(page: Path) -> None:
    assert not list(page.parent.rglob("*.tmp"))


# Small parts


def test_charts_show_every_candidate_with_scores_and_coefficients(data: ReportData) -> None:
    frame = points(data).set_index("name")
    assert set(frame.index) == {entry.name for entry in data.entries}
    assert frame.loc["expert-tools", "coefficients"] == "tools 1.00, persona 0.00"
    assert re.fullmatch(r"\d+\.\d% ± \d+\.\d", str(frame.loc["base", "m0_text"]))
    assert data.recommendation is not None
    assert frame["mark"].iloc[-1] == "recommended"  # drawn on top


def _specs(chart: Any, key: str) -> list[Any]:
    """Return all values of a key in a chart's specification."""

    def walk(node: Any) -> list[Any]:
        if isinstance(node, list):
            return [found for each in node for found in walk(each)]
        if not isinstance(node, dict):
            return []
        return [value for name, value in node.items() if name == key] + walk(list(node.values()))

    return walk(chart.to_dict())


def test_the_hypervolume_stays_below_the_top_of_its_chart_and_has_no_digit_too_many(
    data: ReportData, page: Path
) -> None:
    (domain,) = {tuple(y["scale"]["domain"]) for y in _specs(hypervolume(data), "y")}
    assert domain[1] > 1.1 * max(data.hypervolume)
    assert data.volume is not None
    assert f"at the end is {data.volume.observed:.3g}." in page.read_text(encoding="utf-8")


def test_importance_charts_share_their_scale_and_name_coefficients_in_words(data: ReportData) -> None:
    drawn = [importance(data, name) for name in data.influences]
    shares = [one.share for found in data.influences.values() for one in found]
    assert {tuple(x["scale"]["domain"]) for chart in drawn for x in _specs(chart, "x")} == {(0, max(shares))}
    assert "persona in late-mlp" in str(drawn[0].to_dict())


@pytest.mark.parametrize(
    ("coordinate", "key", "words"),
    [
        (
            Coordinate(parameter="lambda", group="mlp1", expert="persona"),
            "lambda.mlp1.persona",
            "persona in mlp1",
        ),
        (Coordinate(parameter="lambda", group="mlp1"), "lambda.mlp1", "lambda in mlp1"),
        (
            Coordinate(parameter="density", group="layers.0-9", expert="tools"),
            "density.layers.0-9.tools",
            "density of tools in layers.0-9",
        ),
        (Coordinate(parameter="toward", point="gradient-3"), "toward.gradient-3", "toward gradient-3"),
        (
            Coordinate(parameter="times", group="early", expert="tools"),
            "times.early.tools",
            "factor of tools in early",
        ),
    ],
)
def test_coefficients_are_named_in_words(coordinate: Coordinate, key: str, words: str) -> None:
    assert coordinate.key == key
    assert coordinate_name(key, {key: coordinate}) == words
    assert coordinate_name(key, {}) == key  # of a run that does not say what it stands for


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "100.0% (51 of 51)"), (0.0, "0.0% (0 of 51)"), (0.5, "50.0% ± 0.0")]
)
def test_a_score_on_which_all_items_agree_is_not_given_an_error_of_zero(value: float, text: str) -> None:
    metric = Metric("persona", "objective", 1, percent=True)
    assert metric.text(Score(value, 0.0, 51)) == text
    assert metric.change(Score(0.0, 0.0, 51)) == "+0.0 points on all 51 items"


@pytest.mark.parametrize(
    ("percent", "text", "change"),
    [(True, "71.3% ± 2.1", "−71.3 ± 2.1 points"), (False, "0.713 ± 0.021", "−0.713 ± 0.021")],
)
def test_scores_are_written_with_their_error(percent: bool, text: str, change: str) -> None:
    metric = Metric("persona", "objective", 1, percent)
    assert metric.text(Score(0.713, 0.021, 50)) == text
    assert metric.change(Score(-0.713, 0.021, 50)) == change
    assert metric.text(Score(1.0, 0.0, 1)).endswith("± ?")
    assert metric.text(Score(0.5, math.inf, 2)).endswith("± ?")


def test_labels_of_points_close_together_do_not_cover_each_other() -> None:
    labels = [Label("average-0.5", 100 + i, 100) for i in range(4)]
    spots = place_labels(labels, [(label.x, label.y) for label in labels], [], (400, 300))
    heights = {(spot.align, spot.dy) for spot in spots}
    assert len(heights) == 4


@pytest.mark.parametrize(("seconds", "text"), [(4.21, "4.2 s"), (200, "3 min 20 s"), (25500, "7 h 05 min")])
def test_durations_are_written_as_one_reads_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("kappa", [0.72, 0.41, None])
def test_how_far_a_judge_agrees_with_people_stands_beside_its_score(
    simulate: Callable[[Plan], RunDir], kappa: float | None
) -> None:
    run = simulate(Plan(n_trials=0))
    run.write_agreements({"persona": {"persona:items.jsonl": Agreement("big <judge>", 40, 0.8, kappa)}})
    page = render(gather(run))
    heading, *_ = [part for part in page.split("<th") if "big &lt;judge&gt;" in part]  # before the warnings
    assert heading.partition(">")[2].startswith("persona")
    assert "80% of 40 labelled replies graded as by people" in heading
    is_low = kappa is None or kappa < 0.6
    assert ('class="low"' in heading) == is_low
    assert ("<li>persona: The judge <code>big &lt;judge&gt;</code> agrees too little" in page) == is_low


def slice_by_language(run: RunDir, languages: pd.Series[str]) -> None:
    record = json.loads((run.path / "record.json").read_text())
    record["suite_config"]["slices"] = ["language"]
    (run.path / "record.json").write_text(json.dumps(record))
    values = [json.dumps({"language": each}) for each in languages]
    run.items().assign(slices=values).to_parquet(run.path / "items.parquet")


def test_scores_by_slice_are_those_of_the_slices_items(simulate: Callable[[Plan], RunDir]) -> None:
    run = simulate(Plan(n_trials=3, n_items=40))
    german = run.items()["item"].str.endswith(("0", "1", "2"))
    slice_by_language(run, german.map({True: "de", False: "en"}))
    data = gather(RunDir(run.path))
    assert [one.name for one in data.slices] == ["language: en", "language: de"]
    split = data.verdict.split
    measured = run.measurement("base", split)
    assert measured is not None
    rows = measured[measured["item"].str.endswith(("0", "1", "2")) & (measured["score_name"] == "persona")]
    shown = data.slices[1].scores["base"]["persona"]
    assert shown.value == pytest.approx(rows["score"].mean())
    assert shown.n_items == len(rows)
    page = render(data)
    assert "language: de" in page


def test_a_slice_without_any_verdict_for_a_candidate_has_no_score_of_it(
    simulate: Callable[[Plan], RunDir],
) -> None:
    run = simulate(Plan(n_trials=3, n_items=40))
    items = run.items()
    rare = items[(items["split"] == "holdout") & (items["score_name"] == "persona")]["item"].iloc[0]
    slice_by_language(run, (items["item"] == rare).map({True: "is", False: "en"}))
    base = run.measurement("base", "holdout")
    assert base is not None
    without = base.assign(score=base["score"].where(base["item"] != rare))
    run.write_measurement("base", "holdout", Measurement(without, 0.0))
    data = gather(RunDir(run.path))
    found = data.slices[1]
    assert found.name == "language: is"
    assert "persona" not in found.scores["base"]
    assert found.scores["expert-tools"]["persona"].n_items == found.n_items("persona") == 1
    (row,) = (one for one in page_data(data)["slices"] if one["name"] == "language: is")
    assert (row["n_items"][1], row["texts"]["base"][1]) == (1, None)


def test_the_page_stays_small_whatever_was_replied(simulate: Callable[[Plan], RunDir]) -> None:
    run, random = simulate(Plan(n_trials=20, n_items=300)), np.random.default_rng(0)
    for name in [candidate.name for candidate in run.candidates()]:
        for split in SPLITS:
            if (own := run.measurement(name, split)) is not None:
                texts = [random.bytes(600).hex() for _ in range(len(own))]
                run.write_measurement(
                    name, split, Measurement(own.assign(response=texts, reason=texts[::-1]), 0.0)
                )
    data = gather(run)
    assert data.recommendation is not None
    replies = {key: len(pack) for key, pack in data.items.packs.items() if key.startswith("replies")}
    assert f"replies.holdout.{data.recommendation.name}" in replies
    assert sum(replies.values()) < 1_500_000
    assert data.items.n_replies_left_out > 0
    assert len(render(data)) < 3_000_000
