"""The other pages in a real browser, and the judge's reasons on the report's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checks import HOSTILE, hostile_check, write_check
from in_browser import LOOKS, NEEDS_CHROMIUM, Opened, started, violations
from judged import silent_on, write_judged_suite
from mergetune.evaluation.suite import Split
from mergetune.gate.history import write_history
from mergetune.gate.outputs import write_outputs
from mergetune.report import write_report
from mergetune.report.compare import write_comparison
from mergetune.report.page import write_slide
from mergetune.results.run_dir import RunDir
from plain_server import plain_server
from studies import run as run_study
from studies import write_study
from synthetic_run import Plan, write_run

pytestmark = NEEDS_CHROMIUM


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started() as made:
        yield made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / name, Plan(n_trials=n, n_items=40)) for name, n in (("may", 3), ("june", 12))]


@pytest.fixture(scope="module")
def pages(runs: list[RunDir], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for release, n_right in (("v1.9", 40), ("v1.10", 45), ("v1.11", 50)):
        write_check(folder / "releases" / release, n_right)
    write_outputs(hostile_check(warnings=("The engines differ.",)), folder / "check")
    return {
        "slide": write_slide(runs[1]),
        "comparison": write_comparison(runs, folder / "comparison.html"),
        "history": write_history(folder / "releases"),
        "check": folder / "check" / "index.html",
    }


@pytest.mark.parametrize("options", LOOKS, ids=("light", "dark", "phone"))
@pytest.mark.parametrize("name", ["slide", "comparison", "history", "check"])
def test_every_page_is_accessible_and_quiet_and_fits(
    browser: Any, pages: dict[str, Path], name: str, options: dict[str, Any]
) -> None:
    opened = Opened(browser, **options)
    page = opened.open(pages[name])
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.wrong == []


def test_a_check_shows_some_scores_alone_by_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    page = Opened(browser).open(pages["check"])
    shown = page.locator("article:visible")
    before = shown.count()
    while page.evaluate("document.activeElement.tagName") != "SELECT":
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    assert 0 < shown.count() < before


def test_a_check_shows_what_a_judge_wrote_as_text(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser)
    page = opened.open(pages["check"])
    reasons = page.locator('dt:text-is("the judge\'s reason") + dd').all_inner_texts()
    assert HOSTILE[0] in reasons
    assert opened.wrong == []


@pytest.fixture(scope="module")
def judged(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_experts: dict[str, Path]
) -> RunDir:
    """A study that a judge scored."""
    folder = tmp_path_factory.mktemp("judged")
    study = write_study(folder / "study", tiny_base, {"a": tiny_experts["a"]}, budget={"trials": 1})
    with pytest.MonkeyPatch.context() as patch, plain_server(silent_on()) as url:
        patch.setenv("MERGETUNE_CACHE", str(folder / "cache"))
        write_judged_suite(folder / "study", url, 30, holdout=0.4)
        run_study(study, folder / "run")
    return RunDir(folder / "run")


def test_the_page_shows_what_the_judge_wrote_of_both_replies(browser: Any, judged: RunDir) -> None:
    opened = Opened(browser)
    page = opened.open(judged.path / "report" / "index.html")
    page.click("#won-and-lost summary")
    page.select_option("#change", "all")
    page.wait_for_selector("#items article >> nth=4")
    names = page.input_value("#candidate"), page.input_value("#against")
    split: Split = "holdout" if "held-out" in page.inner_text("#items-say") else "search"
    frames = [judged.measurement(name, split) for name in names]
    shown = page.locator("#items article").all()
    assert len(shown) == 5
    for article in shown:
        item = article.locator("small").inner_text().split()[-1]
        texts = article.locator(".grid dd").all_inner_texts()
        wanted = []
        for frame in frames:
            assert frame is not None
            (row,) = frame[frame["item"] == item].to_dict("records")
            assert row["reason"] == f"So. (score: {round(1 + 4 * row['score'])})"
            wanted += [row["response"].strip(), row["reason"]]
        assert [text.strip() for text in texts] == wanted
    assert violations(page) == []
    assert opened.wrong == []


def test_a_run_without_reasons_opens_as_before(browser: Any, runs: list[RunDir]) -> None:
    write_report(runs[0])
    opened = Opened(browser)
    page = opened.open_report(runs[0])
    assert page.locator("#items .grid dd").count() > 0
    assert "the judge's reason" not in page.inner_text("#items")
    assert opened.wrong == []
