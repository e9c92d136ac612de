"""The report's page in a real browser: Debian's Chromium, with no network."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from in_browser import LOOKS, NEEDS_CHROMIUM, Opened, started, violations
from mergetune.evaluation.suite import GuardConfig, SuiteConfig
from mergetune.report import write_report
from mergetune.report.data import gather
from mergetune.report.page_data import page_data
from mergetune.results import selection
from mergetune.results.run_dir import RunDir
from mergetune.results.selection import Choice, Scores
from synthetic_run import Plan, write_run

pytestmark = NEEDS_CHROMIUM

ATTACK = "<img src=x onerror=alert(1)></script>"
PLANS = {
    "two objectives": Plan(n_items=40),
    "three objectives, one of them minimized": Plan(
        ("tool_calls", "persona", "latency"), minimized=("latency",), n_items=40, n_trials=15
    ),
    "one objective": Plan(("persona",), n_trials=8, n_items=40),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started() as made:
        yield made


@pytest.fixture(scope="module", params=PLANS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("browser")
    plain = gather(write_run(folder / "plain", PLANS[request.param])).recommendation
    assert plain is not None
    made = write_run(folder / "run", replace(PLANS[request.param], responses={plain.name: ATTACK}))
    write_report(made)
    return made


def chosen(page: Any) -> str:
    return str(page.inner_text("#choice strong"))


@pytest.mark.parametrize("options", LOOKS)
def test_the_page_is_accessible_and_quiet_and_fits(
    browser: Any, run: RunDir, options: dict[str, Any]
) -> None:
    opened = Opened(browser, **options)
    page = opened.open_report(run)
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.wrong == []


def test_paper_shows_every_section_and_no_control(browser: Any, run: RunDir) -> None:
    page = Opened(browser, color_scheme="dark").open_report(run)
    titles = page.locator("h2:visible").all_inner_texts()
    page.emulate_media(media="print")
    assert page.locator("h2:visible").all_inner_texts() == titles
    assert page.locator("input:visible, button:not(.link):visible, #items:visible").count() == 0
    assert page.locator("#chart svg:visible, #won-and-lost table:visible").count() == 2
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_what_a_model_said_is_text(browser: Any, run: RunDir) -> None:
    page = Opened(browser).open_report(run)
    assert ATTACK in page.inner_text("#items")
    assert page.locator("#items img").count() == 0


def settings(block: dict[str, Any], draw: random.Random) -> dict[str, list[float | None]]:
    """Draw weights and limits; now and then none."""
    found: dict[str, list[float | None]] = {"weights": [], "limits": []}
    for j, score in enumerate(block["scores"]):
        best = block["candidates"][score["reference"]]["chosen_by"][j]
        worst = min(score["sign"] * each["chosen_by"][j] for each in block["candidates"]) * score["sign"]
        limit = draw.uniform(0, 0.3) if score["kind"] == "guard" else draw.uniform(worst, best)
        is_off = score["kind"] == "objective" and draw.random() < 0.5
        found["limits"].append(None if is_off else limit)
        found["weights"].append(draw.uniform(0.1, 3) if score["kind"] == "objective" else 0)
    return found


def asked_of_python(
    choice: Choice, suite: SuiteConfig, block: dict[str, Any], own: dict[str, list[float | None]]
) -> tuple[str, set[str]]:
    """Return the recommendation and the front by `selection`, each limit on an objective being a guard."""
    objectives, guards, more = dict(suite.objectives), dict(suite.guards), {}
    for j, score in enumerate(block["scores"]):
        name, limit = score["name"], own["limits"][j]
        reference = block["candidates"][score["reference"]]
        if score["kind"] == "guard":
            guards[name] = guards[name].model_copy(update={"margin": limit})
            continue
        objectives[name] = objectives[name].model_copy(update={"weight": own["weights"][j]})
        if limit is not None:
            config = objectives[name]
            more[f"limit of {name}"] = name
            guards[f"limit of {name}"] = GuardConfig(
                tasks=config.tasks,
                direction=config.direction,
                margin=max(0.0, config.sign * (reference["chosen_by"][j] - limit)),
                reference=reference["name"].removeprefix("expert-"),
            )
    asked = suite.model_copy(update={"objectives": objectives, "guards": guards})

    def with_limits(scores: Scores) -> Scores:
        return {**scores, **{limit: scores[name] for limit, name in more.items()}}

    by = {name: with_limits(scores) for name, scores in choice.smoothing.scores.items()}
    measured = {name: with_limits(scores) for name, scores in choice.measured.items()}
    scales = replace(choice.scales, guards=selection.guard_units(measured, asked))
    found = selection.recommend(by, asked, scales)
    assert found is not None
    # A limit on an objective is a score, whatever the reference scored as measured.
    floors = {
        score["name"]: (score["sign"], limit)
        for score, limit in zip(block["scores"], own["limits"], strict=True)
        if score["kind"] == "objective" and limit is not None
    }
    reached = {
        name: scores
        for name, scores in choice.measured.items()
        if all(sign * scores[key].value >= sign * limit for key, (sign, limit) in floors.items())
        and selection.keeps_guards(
            scores,
            choice.measured,
            suite.model_copy(update={"guards": {key: guards[key] for key in suite.guards}}),
        )
    }
    plain = suite.model_copy(update={"guards": {}})
    return found.name, set(selection.front(reached, plain))


def test_the_page_chooses_as_the_study_does(browser: Any, run: RunDir) -> None:
    page, draw = Opened(browser).open_report(run), random.Random(0)
    choice, suite, block = selection.choose(run), run.study.suite_config, page_data(gather(run))
    assert choice is not None
    drawn = [settings(block, draw) for _ in range(300)]
    found = page.evaluate(
        """drawn => drawn.map(own => {
            const rows = ranked(page, own);
            return [recommended(rows).candidate.name, rows.filter(r => r.onFront).map(r => r.candidate.name)];
        })""",
        drawn,
    )
    expected = [asked_of_python(choice, suite, block, own) for own in drawn]
    assert [(name, set(front)) for name, front in found] == expected
    assert len({name for name, _ in expected}) > 1 or len(choice.measured) < 20


def test_probabilities_are_those_of_the_resamples(browser: Any, run: RunDir) -> None:
    page, draw = Opened(browser).open_report(run), random.Random(1)
    choice, suite, block = selection.choose(run), run.study.suite_config, page_data(gather(run))
    assert choice is not None
    resampled = choice.resampled(suite)
    for _ in range(10):
        own = settings(block, draw)
        met = 1.0
        for j, score in enumerate(block["scores"]):
            limit, values = own["limits"][j], resampled[score["name"]]
            if limit is None:
                continue
            if score["kind"] == "guard":
                kept = values - values[:, [score["reference"]]] >= -limit - 1e-9
            else:
                kept = values >= score["sign"] * limit - 1e-9
            met = met * kept.mean(axis=0)
        found = page.evaluate("own => page.candidates.map(c => probability(page, own, c))", own)
        assert found == pytest.approx(
            list(met) if not isinstance(met, float) else [1.0] * len(found), abs=0.09
        )


def test_sliders_change_the_choice_and_a_link_restores_it(browser: Any, run: RunDir) -> None:
    opened = Opened(browser)
    page = opened.open_report(run)
    assert chosen(page) == page.evaluate("page.recommended")
    assert "as in the study's own settings" in page.inner_text("#choice")
    page.focus("#limit-0")
    page.keyboard.press("ArrowRight" if page.evaluate("page.scores[0].sign > 0") else "ArrowLeft")
    page.keyboard.press("End" if page.evaluate("page.scores[0].sign > 0") else "Home")
    before, text = chosen(page), page.inner_text("#limit-text-0")
    assert text != "no limit"
    address = page.evaluate("location.hash")
    assert "limit." in address
    page.select_option("#candidate", "base")
    again = Opened(browser)
    other = again.open_report(run, page.evaluate("location.hash"))
    assert chosen(other) == before
    assert other.inner_text("#limit-text-0") == text
    assert other.inner_text("#candidate-title") == "All about base"
    page.click("#reset")
    assert chosen(page) == page.evaluate("page.recommended")
    assert "limit." not in page.evaluate("location.hash")
    assert opened.wrong == again.wrong == []


def test_the_keyboard_reaches_everything(browser: Any, run: RunDir) -> None:
    page = Opened(browser).open_report(run)
    wanted = page.evaluate(
        """[...document.querySelectorAll('a[href], button, select, input, dfn, summary')]
            .filter(e => e.checkVisibility()).map((e, i) => { e.dataset.number = i; return i; })"""
    )
    reached = set()
    for _ in range(len(wanted) + 60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.dataset.number"))
    assert reached >= {str(number) for number in wanted}


def test_a_term_is_explained_on_focus(browser: Any, run: RunDir) -> None:
    page = Opened(browser).open_report(run)
    page.focus("dfn >> nth=0")
    shown = page.evaluate("getComputedStyle(document.activeElement, '::after').content")
    described = page.evaluate(
        "document.getElementById(document.activeElement.getAttribute('aria-describedby')).textContent"
    )
    assert json.loads(shown) == described


def test_items_won_and_lost_add_up_to_the_difference_of_scores(browser: Any, run: RunDir) -> None:
    page, data = Opened(browser).open_report(run), gather(run)
    entries, name = {entry.name: entry for entry in data.entries}, page.input_value("#candidate")
    other = page.input_value("#against")
    for row, metric in zip(page.locator("#item-rows tr").all(), data.metrics, strict=True):
        won, lost, count = (int(cell.inner_text()) for cell in row.locator("td").all())
        difference = entries[name].holdout[metric.name].value - entries[other].holdout[metric.name].value
        assert metric.sign * (won - lost) / count == pytest.approx(difference)
