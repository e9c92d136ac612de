"""What a check hands out, of models that say whatever may break a terminal, XML, Markdown or HTML."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from checks import LONG, frame, hostile_check
from mergetune.evaluation.judging.agreement import Agreement
from mergetune.evaluation.suite import ObjectiveConfig, SuiteConfig, TaskConfig
from mergetune.gate.judge import Check, judge
from mergetune.gate.outputs import as_attribution_table, as_data, as_html, as_junit, as_markdown, as_table
from mergetune.gate.page import drawings, shown_flips
from mergetune.gate.words import about, brief_names, clean, excerpt, span
from mergetune.stats.number_text import number, signed
from mergetune.stats.sequential import look, split_alpha


@pytest.fixture(scope="module")
def check() -> Check:
    return hostile_check(warnings=("The engines differ: <vllm> | transformers.",))


def small_check(candidate: list[float], baseline: list[float], **options: Any) -> Check:
    suite = SuiteConfig(
        description="any",
        chat_template=True,
        objectives={"s": ObjectiveConfig(tasks=(TaskConfig(lm_eval="t"),))},
    )
    first, second = (frame({("s", "t"): scores}, ("yes", "no")) for scores in (candidate, baseline))
    items = second.assign(prompt="p", target="t")
    return judge(first, second, items, suite, suite_name="e", labels=("a", "b"), **options)


class Page(HTMLParser):
    """The tags of a page, and what its attributes point to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs


def test_the_hostile_check_has_every_verdict(check: Check) -> None:
    assert check.verdict == "fail"
    assert {row.verdict for row in check.rows} == {"pass", "fail", "inconclusive"}
    assert any(row.improved for row in check.rows)


# --- words


def test_control_characters_are_shown_and_never_obeyed() -> None:
    shown = clean("a\x1b[31m\x00\x7f\tb\r\nc\r\x9b\ud800\ufffe")
    assert shown == "a\\x1b[31m\\x00\\x7f\tb\nc\\x0d\\x9b\\ud800\\ufffe"
    assert clean("Grüße, 世界 😀 مرحبا") == "Grüße, 世界 😀 مرحبا"


def test_a_long_text_is_cut_and_says_by_how_much() -> None:
    assert excerpt(LONG, 100) == "x" * 100 + "… [99,900 more characters]"
    assert excerpt("short", 100) == "short"


def test_numbers_are_short_and_plans_are_round() -> None:
    assert [number(value) for value in (0.0, 0.71349, -0.05, 0.00041, float("inf"))] == [
        *("0.000", "0.713", "−0.050", "0.00041", "∞")
    ]
    assert [about(n) for n in (31, 237, 1201, 240_000)] == ["31", "240", "1,300", "240,000"]


# --- table


def test_the_table_fits_100_columns_and_holds_no_escape_of_a_name(check: Check) -> None:
    console = Console(width=100, record=True, file=None, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(as_table(check))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert "\x1b" not in text
    for row in check.rows:
        assert number(row.candidate) in text
    assert "inconclusive" in text


def test_what_quantizing_changed_fits_100_columns_and_stands_in_every_output() -> None:
    unquantized = frame({("s", "t"): [1.0, 0.0] * 20}, ("yes", "no"))
    found = small_check([0.0] * 40, [1.0] * 40, unquantized=unquantized)
    console = Console(width=100, file=None, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(as_attribution_table(found))
    assert max(map(len, capture.get().splitlines())) <= 100
    (row,) = found.attributions
    for text in (capture.get(), as_markdown(found), as_html(found)):
        for figure in (signed(row.before), span(row.before_interval), span(row.quantizing_interval)):
            assert figure in text


# --- JSON


def test_a_column_has_the_name_of_a_file_alone_where_that_tells_rows_apart(check: Check) -> None:
    score, task = check.rows[0], next(row for row in check.rows if row.kind == "task")

    def named(*files: str) -> list[str]:
        rows = [replace(task, name=f"{task.score_name}:{file}") for file in files]
        return brief_names([score, *rows])[1:]

    assert named("data/a.jsonl (skip: 3, answers: any)", "../b.jsonl") == ["a.jsonl", "b.jsonl"]
    assert named("a.jsonl (answers: x)", "data/a.jsonl") == ["a.jsonl (answers: x)", "data/a.jsonl"]
    assert brief_names([replace(score, name="in/out (all)")]) == ["in/out (all)"]


def test_data_is_plain_json_and_holds_everything(check: Check) -> None:
    text = json.dumps(as_data(check), allow_nan=False, ensure_ascii=False)
    data = json.loads(text.encode("utf-8"))
    assert (data["verdict"], data["exit_code"]) == ("fail", 1)
    assert [row["name"] for row in data["rows"]] == [row.name for row in check.rows]
    assert data["rows"][0]["interval"]["lower"] == check.rows[0].interval.lower
    assert len(data["flips"]) == len(check.flips)
    assert any(flip["candidate_response"] == LONG for flip in data["flips"])


def test_an_infinite_interval_is_null_in_data_and_legible_everywhere() -> None:
    found = small_check([0.4], [0.5])
    assert as_data(found)["rows"][0]["interval"]["lower"] is None
    assert found.verdict == "inconclusive"
    assert "[−∞, +∞]" in as_html(found)
    assert "[−∞, +∞]" in as_markdown(found)
    ElementTree.fromstring(as_junit(found))


# --- JUnit

# junit-10.xsd of Jenkins' xUnit plugin: attributes (required ones first), and children.
SCHEMA: dict[str, tuple[set[str], set[str], set[str]]] = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {"group", "time", "skipped", "timestamp", "hostname", "id", "package", "file", "log", "url"},
        {"testsuite", "properties", "testcase", "system-out", "system-err"},
    ),
    "properties": (set(), set(), {"property"}),
    "property": ({"name", "value"}, set(), set()),
    "testcase": (
        {"name"},
        {"time", "classname", "group"},
        {"skipped", "error", "failure", "system-out", "system-err"},
    ),
    "failure": (set(), {"type", "message"}, set()),
    "skipped": (set(), {"type", "message"}, set()),
    "system-out": (set(), set(), set()),
}


def test_junit_keeps_to_the_schema_and_has_a_case_per_row(check: Check) -> None:
    text = as_junit(check)
    root = ElementTree.fromstring(text.encode("utf-8"))
    assert root.tag == "testsuites"
    for element in root.iter():
        required, optional, children = SCHEMA[element.tag]
        assert required <= element.attrib.keys() <= required | optional
        assert {child.tag for child in element} <= children
    (suite,) = root
    cases = suite.findall("testcase")
    assert suite.get("name") == "evals & co"
    assert [case.get("classname") for case in cases] == [clean(row.score_name) for row in check.rows]
    assert len({(case.get("classname"), case.get("name")) for case in cases}) == len(cases)
    for row, case in zip(check.rows, cases, strict=True):
        assert (case.find("failure") is not None) == (row.verdict == "fail")
        assert (case.find("skipped") is not None) == (row.verdict == "inconclusive")
    counts = {key: int(suite.get(key, "")) for key in ("tests", "failures", "skipped", "errors")}
    verdicts = Counter(row.verdict for row in check.rows)
    assert counts == {
        "tests": len(cases),
        "failures": verdicts["fail"],
        "skipped": verdicts["inconclusive"],
        "errors": 0,
    }
    properties = {item.get("name"): item.get("value") for item in suite.iter("property")}
    assert properties["alpha"] == "0.05"
    assert properties["baseline"] == r"../old\x00"


def test_junit_holds_only_characters_of_xml_1_0_and_cut_replies(check: Check) -> None:
    text = as_junit(check)
    assert not re.search("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", text)
    assert len(text) < 200_000
    failures = [item.text or "" for item in ElementTree.fromstring(text).iter("failure")]
    assert all("worse than its margin allows" in failure for failure in failures)
    assert any("more characters]" in failure for failure in failures)
    assert any(r"prompt: Say \x00\x1b[31mred" in failure for failure in failures)


# --- Markdown


def test_markdown_renders_to_our_table_and_nothing_of_the_models(check: Check) -> None:
    text = as_markdown(check)
    page = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))
    allowed = {"h3", "p", "code", "blockquote", "table", "thead", "tbody", "tr", "th", "td", "strong"}
    assert set(page.tags) <= allowed | {"details", "summary", "pre"}
    assert page.tags["tr"] == len(check.rows) + 1
    assert page.tags["td"] == 7 * len(check.rows)
    assert (page.tags["table"], page.tags["h3"], page.tags["details"]) == (1, 1, 1)
    assert page.tags["pre"] == 4 * 10
    assert {name for name, _ in page.attributes} <= {"style"}


def test_markdown_says_the_verdict_first_and_fits_a_comment(check: Check) -> None:
    text = as_markdown(check)
    assert text.startswith("### FAIL: ")
    assert len(text) < 65_536
    assert f"{len(check.flips)} items changed" in text
    assert "10 of them shown" in text
    text.encode("utf-8")


def test_markdown_of_no_change_says_so() -> None:
    text = as_markdown(small_check([1.0, 0.0] * 50, [1.0, 0.0] * 50))
    assert text.startswith("### PASS: s is not worse by more than its margin")
    assert "No item changed its score." in text
    assert "<details>" not in text


# --- HTML


def test_the_page_holds_no_tag_of_the_models_and_asks_the_network_for_nothing(check: Check) -> None:
    text = as_html(check)
    page = Page(text)
    assert page.tags["script"] == 1
    assert page.tags["img"] == page.tags["b"] == page.tags["i"] == page.tags["link"] == 0
    assert page.tags["article"] == len(shown_flips(check.flips))
    assert not [value for name, value in page.attributes if name in ("src", "href", "action", "onerror")]
    assert "url(" not in text
    assert "@import" not in text
    assert "&lt;script&gt;alert(" in text
    assert "{{ 7 * 7 }}" in text
    assert "\x1b" not in text
    assert "\x00" not in text
    text.encode("utf-8")


def test_the_page_leads_with_the_verdict_and_cuts_long_replies(check: Check) -> None:
    text = as_html(check)
    assert text.index("FAIL: ") < text.index("<table") < text.index("What changed") < text.index("<article")
    assert "x" * 4001 not in text
    assert "[96,000 more characters]" in text
    assert text.count("<svg") == len(check.rows)


def test_the_page_lists_losses_first_and_each_score_in_the_filter(check: Check) -> None:
    text = as_html(check)
    order = re.findall(r'<p><strong class="\w+">(worse|better)</strong>', text)
    assert order == sorted(order, reverse=True)
    assert set(order) == {"worse", "better"}
    options = re.findall(r'<option value="([^"]+)">', text)
    assert sorted(options) == sorted({"tools", "persona", "a|b&lt;i&gt;"})


def test_many_flips_are_cut_per_score_and_the_page_says_so() -> None:
    found = small_check([0.0] * 150, [1.0] * 150)
    text = as_html(found)
    assert text.count("<article") == 100
    assert "Shown are 100" in text
    assert "150 items changed: 150 worse" in " ".join(text.split())


def test_drawings_keep_the_order_of_interval_and_margin(check: Check) -> None:
    for row, drawing in zip(check.rows, drawings(check.rows), strict=True):
        assert drawing.lower <= drawing.estimate <= drawing.upper
        assert drawing.margin < 0
        assert (drawing.lower > drawing.margin) == (row.interval.lower > -row.margin)
        assert max(abs(drawing.lower), abs(drawing.upper)) <= 90


def test_an_early_stop_says_how_many_items_it_took() -> None:
    levels = split_alpha(0.05, 1)
    seen = look(np.zeros(200), 0.05, levels)
    suite = SuiteConfig(
        description="any",
        chat_template=True,
        objectives={"s": ObjectiveConfig(tasks=(TaskConfig(lm_eval="t"),))},
    )
    base = frame({("s", "t"): np.ones(300)}, ("yes",))
    found = judge(
        base.iloc[:200],
        base,
        base.assign(prompt="p", target="t"),
        suite,
        suite_name="e",
        labels=("a", "b"),
        early={"s": seen},
        levels=levels,
    )
    for text in (as_markdown(found), as_html(found)):
        assert "200 of 300 items measured on the candidate" in text
    data = as_data(found)
    assert data["saving"] == {"n_measured": 200, "n_items": 300}
    assert data["rows"][0]["minimum_detectable_effect"] is None
    ElementTree.fromstring(as_junit(found))


@pytest.mark.parametrize("kappa", [0.72, 0.41, None])
def test_how_far_a_judge_agrees_with_people_stands_beside_its_score(kappa: float | None) -> None:
    judges = {"s": {"t": Agreement("big <judge>", 40, 0.8, kappa)}}
    found = small_check([1.0, 0.0] * 20, [1.0, 0.0] * 20, agreements=judges)
    is_low = kappa is None or kappa < 0.6
    page = as_html(found)
    assert "judge `big &lt;judge&gt;`: 80% of 40 labelled replies graded as by people" in page
    assert ('<small class="low">' in page) == is_low
    for text in (page, as_markdown(found), as_junit(found)):
        assert ("agrees too little with people" in text) == is_low
    own = as_data(found)["agreements"]["s"]["t"]
    assert own == {"judge": "big <judge>", "n_labels": 40, "agreement": 0.8, "kappa": kappa}


def test_the_noise_floor_is_told() -> None:
    rng = np.random.default_rng(1)
    scores = (rng.random(100) < 0.8).astype(float)
    again = frame({("s", "t"): (rng.random(100) < 0.8).astype(float)}, ("yes",))
    found = small_check(list(scores), list(scores), repeat=again)
    for text in (as_markdown(found), as_html(found)):
        assert "noise of a repeated run" in text
