"""The five sentences at the top, the slide, and the charts for slides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mergetune.report import gather, write_report, write_slide
from mergetune.report.glossary import GLOSSARY
from mergetune.report.page import render
from mergetune.report.summary import five_sentences
from mergetune.results.run_dir import RunDir
from mergetune.theme import DARK, darkened
from synthetic_run import Plan, write_run


@pytest.fixture
def simulate(tmp_path: Path) -> Callable[[Plan], RunDir]:
    return lambda plan: write_run(tmp_path / "run", plan)


def test_the_summary_says_what_is_recommended_what_it_costs_and_what_is_next(
    simulate: Callable[[Plan], RunDir],
) -> None:
    data = gather(simulate(Plan(n_items=100, n_baselines=3, n_trials=5)))
    assert data.recommendation is not None
    said = dict(five_sentences(data))
    assert list(said) == ["What was merged", "Recommended", "Gives and takes", "Costs", "Next"]
    assert "in 5 ways" in said["What was merged"]
    assert said["Recommended"].startswith(f"`{data.recommendation.name}`, clearly: it is ahead of ")
    for one in data.verdict.comparisons:
        assert one.metric.change(one.difference) in said["Gives and takes"]
    lost = [one for one in data.verdict.comparisons if one.falls_short and one.metric.kind == "objective"]
    assert lost
    assert all(f"of `{one.metric.name}`" in data.verdict.headline for one in lost)
    assert said["Next"].startswith(f"Check `{data.recommendation.name}`")


def test_where_an_expert_is_better_the_summary_says_to_retrain_and_why(
    simulate: Callable[[Plan], RunDir],
) -> None:
    said = dict(five_sentences(gather(simulate(Plan(objectives=("persona",), n_trials=5)))))
    assert said["Recommended"].startswith("None of these merges; ")
    assert said["Next"].startswith("None of these: retrain on the data of all skills; the best of them, ")
    assert "`expert-persona` no more than that" in said["Next"]


def test_without_held_out_items_the_next_step_is_to_confirm(simulate: Callable[[Plan], RunDir]) -> None:
    said = dict(five_sentences(gather(simulate(Plan(n_trials=4, holdout=False)))))
    assert "on items that the search did not see" in said["Next"]


def test_every_term_of_the_page_is_explained_in_its_list_of_words(
    simulate: Callable[[Plan], RunDir],
) -> None:
    page = render(gather(simulate(Plan(n_trials=4, n_items=20))))
    for meaning in GLOSSARY.values():
        assert meaning.replace("'", "&#39;") in page


@pytest.mark.parametrize("objectives", [("tool_calls", "persona"), ("tool_calls", "persona", "brevity")])
def test_charts_are_written_light_and_dark_in_three_forms(
    objectives: tuple[str, ...], simulate: Callable[[Plan], RunDir]
) -> None:
    folder = write_report(simulate(Plan(objectives, n_trials=4, n_items=20))).parent
    names = ["pareto", "changes", "depth", *(["parallel"] if len(objectives) > 2 else [])]
    for name in names:
        for suffix in ("", "-dark"):
            assert (folder / f"{name}{suffix}.png").read_bytes().startswith(b"\x89PNG")
            assert (folder / f"{name}{suffix}.pdf").read_bytes().startswith(b"%PDF")
            drawing = (folder / f"{name}{suffix}.svg").read_text()
            assert ('"#222222"' in drawing) == (suffix == "")
    assert {file.stem.removesuffix("-dark") for file in folder.glob("*.pdf")} == set(names)


def test_a_dark_drawing_has_no_colour_of_the_light_one() -> None:
    light = "".join(f'<path fill="{colour}" stroke="{colour.lower()}"/>' for colour in DARK)
    assert not any(f'"{colour.lower()}"' in darkened(light).lower() for colour in DARK)
    assert darkened('<path fill="#123456"/>') == '<path fill="#123456"/>'


def test_the_slide_has_headline_chart_and_three_sentences(simulate: Callable[[Plan], RunDir]) -> None:
    run = simulate(Plan(n_trials=4, n_items=20))
    page = write_slide(run).read_text()
    data = gather(run)
    assert data.recommendation is not None
    assert data.verdict.headline.split("`")[2] in page
    assert page.count("<h2>") == 3
    assert page.count("<img") == 1


def test_a_run_without_any_measurement_has_a_slide_too(simulate: Callable[[Plan], RunDir]) -> None:
    plan = replace(Plan(), n_trials=0, n_baselines=0)
    assert "No merge has been measured yet." in write_slide(simulate(plan)).read_text()
