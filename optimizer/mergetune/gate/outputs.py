"""What a check hands out: a table, data, JUnit XML, Markdown and a page. What models said is not trusted."""

from __future__ import annotations

import html
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich import box
from rich.markup import escape
from rich.table import Table

from mergetune.files.atomic_files import write_text
from mergetune.gate.judge import EXIT, Check, Flip
from mergetune.gate.page import as_html as as_html
from mergetune.gate.row import Attribution, Row
from mergetune.gate.words import (
    ATTRIBUTION,
    SLICES,
    brief_names,
    clean,
    excerpt,
    full_name,
    measured,
    reading,
    short_name,
    span,
    verdict_words,
)
from mergetune.stats.number_text import number, signed

_STYLES = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}
_FLIPS_A_FAILURE = 5
_FLIPS_IN_MARKDOWN = 10
_ATTRIBUTION_COLUMNS = ("baseline", "unquantized", "candidate", "before quantizing", "by quantizing")
_REPLY = 1000  # characters shown of a text
_REPLY_IN_MARKDOWN = 400  # GitHub refuses comments of more than 65,536 characters


def write_outputs(check: Check, folder: Path) -> None:
    """Write check.json, junit.xml, summary.md and index.html."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "check.json", json.dumps(as_data(check), indent=1, ensure_ascii=False))
    write_text(folder / "junit.xml", as_junit(check))
    write_text(folder / "summary.md", as_markdown(check))
    write_text(folder / "index.html", as_html(check))


def as_table(check: Check) -> Table:
    """Return the rows as a table that a terminal of 100 columns holds."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=clean(reading(check)), caption_justify="left")
    table.add_column("score", overflow="fold", min_width=12)
    for column in ("candidate", "baseline", "difference, interval", "margin", "better\n/ worse"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold", min_width=13)
    for row, name in zip(check.rows, brief_names(check.rows), strict=True):
        indent = "  " if row.kind == "task" else ""
        table.add_row(
            escape(indent + clean(name)),
            number(row.candidate),
            number(row.baseline),
            f"{signed(row.difference)} {span(row.interval)}",
            f"{row.margin:g}",
            f"{row.n_won} / {row.n_lost}",
            f"[{_STYLES[row.verdict]}]{verdict_words(row)}[/]",
        )
    return table


def as_attribution_table(check: Check) -> Table | None:
    """Return what quantizing changed, as a table that a terminal of 100 columns holds; None if not asked."""
    if not check.attributions:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=ATTRIBUTION, caption_justify="left")
    table.add_column("score", overflow="fold", min_width=12)
    for column in _ATTRIBUTION_COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in check.attributions:
        table.add_row(escape(clean(row.score_name)), *_attribution_cells(row, "\n"))
    return table


def as_slice_table(check: Check) -> Table | None:
    """Return the slices as a table that a terminal of 100 columns holds; None where there are none."""
    if not check.slices:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=SLICES, caption_justify="left")
    for column in ("slice", "score"):
        table.add_column(column, overflow="fold", min_width=10)
    for column in ("items", "candidate", "baseline", "difference, interval"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in check.slices:
        table.add_row(
            escape(clean(f"{row.key}: {row.value}")),
            escape(clean(row.score_name)),
            str(row.n_items),
            number(row.candidate),
            number(row.baseline),
            f"{signed(row.difference)} {span(row.interval)}",
        )
    return table


def as_data(check: Check) -> dict[str, Any]:
    """Return all of a check, ready for JSON: no number that JSON lacks, and texts whole."""
    data: dict[str, Any] = _jsonable(asdict(check))
    return {"verdict": check.verdict, "exit_code": EXIT[check.verdict], **data}


def as_junit(check: Check) -> str:
    """Return JUnit XML, a test case per row, within the schema of Jenkins (junit-10.xsd).

    GitLab groups by `classname`, which is the score; it and GitHub's actions read the element's text, Jenkins
    the message as well, so that both hold it. An inconclusive row is a skipped case.
    """
    verdicts = Counter(row.verdict for row in check.rows)
    counts = {
        "tests": str(len(check.rows)),
        "failures": str(verdicts["fail"]),
        "errors": "0",
        "skipped": str(verdicts["inconclusive"]),
    }
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(root, "testsuite", {"name": clean(check.suite), **counts})
    properties = ElementTree.SubElement(suite, "properties")
    for name in ("candidate", "baseline", "alpha", "verdict", "summary", "n_items"):
        value = clean(str(getattr(check, name)))
        ElementTree.SubElement(properties, "property", {"name": name, "value": value})
    for row in check.rows:
        suite.append(_test_case(row, check))
    ElementTree.SubElement(suite, "system-out").text = clean("\n".join([check.summary, *check.warnings]))
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def as_markdown(check: Check) -> str:
    """Return a summary for a pull request, short enough for a comment on GitHub."""
    who = (
        f"Candidate {_code(check.candidate)} against baseline {_code(check.baseline)} on {_code(check.suite)}"
    )
    lines = [f"### {_text(check.summary)}", "", f"{who}: {_text(measured(check))}.", ""]
    lines += [f"> {_text(warning)}\n" for warning in check.warnings]
    lines += [
        "| score | candidate | baseline | difference, interval | margin | better / worse | verdict |",
        "|:--|--:|--:|--:|--:|--:|:--|",
        *map(_markdown_row, check.rows),
        "",
        reading(check),
        *_markdown_attributions(check),
        *_markdown_slices(check),
    ]
    return "\n".join([*lines, *_markdown_flips(check)]) + "\n"


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _test_case(row: Row, check: Check) -> ElementTree.Element:
    # GitLab shows only the first of two cases of one name.
    name = f"{row.name} (task)" if row.kind == "task" and row.name == row.score_name else row.name
    names = {"classname": clean(row.score_name), "name": clean(name)}
    case = ElementTree.Element("testcase", names)
    figures = _figures(row)
    if row.verdict == "fail":
        message = clean(f"{full_name(row)} is worse than its margin allows: {figures}")
        failure = ElementTree.SubElement(case, "failure", {"type": "regression", "message": message})
        failure.text = "\n\n".join([message, *map(_flip_text, islice(_losses(row, check), _FLIPS_A_FAILURE))])
    elif row.verdict == "inconclusive":
        skipped = ElementTree.SubElement(case, "skipped", {"message": f"{verdict_words(row)}: {figures}"})
        skipped.text = f"{verdict_words(row)}: {figures}"
    else:
        ElementTree.SubElement(case, "system-out").text = f"{verdict_words(row)}: {figures}"
    return case


def _figures(row: Row) -> str:
    return (
        f"candidate {number(row.candidate)}, baseline {number(row.baseline)}, difference "
        f"{signed(row.difference)} {span(row.interval)}, margin {row.margin:g}, {row.n_items} items, "
        f"{row.n_won} better, {row.n_lost} worse"
    )


def _losses(row: Row, check: Check) -> Iterator[Flip]:
    for flip in check.flips:
        is_own = flip.score_name == row.score_name and (row.kind != "task" or flip.task == row.name)
        if is_own and flip.gain < 0:
            yield flip


def _flip_text(flip: Flip) -> str:
    return "\n".join(
        [
            f"--- {clean(flip.task)}, item {clean(flip.item)}: "
            f"{number(flip.baseline_score)} → {number(flip.candidate_score)}",
            f"prompt: {excerpt(flip.prompt, _REPLY)}",
            f"target: {excerpt(flip.target, _REPLY)}",
            f"baseline: {excerpt(flip.baseline_response, _REPLY)}",
            f"candidate: {excerpt(flip.candidate_response, _REPLY)}",
        ]
    )


def _markdown_row(row: Row) -> str:
    name = f"&nbsp;&nbsp;{_code(short_name(row))}" if row.kind == "task" else _code(row.name)
    verdict = verdict_words(row)
    cells = [
        name,
        number(row.candidate),
        number(row.baseline),
        f"{signed(row.difference)} {span(row.interval)}",
        f"{row.margin:g}",
        f"{row.n_won} / {row.n_lost}",
        f"**{verdict}**" if row.verdict == "fail" else verdict,
    ]
    return f"| {' | '.join(cells)} |"


def _attribution_cells(row: Attribution, gap: str) -> list[str]:
    """Write scores and differences; `gap` stands before an interval."""
    return [
        *map(number, (row.baseline, row.unquantized, row.candidate)),
        f"{signed(row.before)}{gap}{span(row.before_interval)}",
        f"{signed(row.quantizing)}{gap}{span(row.quantizing_interval)}",
    ]


def _markdown_attributions(check: Check) -> Iterator[str]:
    if not check.attributions:
        return
    yield f"\n| score | {' | '.join(_ATTRIBUTION_COLUMNS)} |"
    yield "|:--|--:|--:|--:|--:|--:|"
    for row in check.attributions:
        yield f"| {_code(row.score_name)} | {' | '.join(_attribution_cells(row, ' '))} |"
    yield f"\n{ATTRIBUTION}"


def _markdown_slices(check: Check) -> Iterator[str]:
    if not check.slices:
        return
    yield "\n| slice | score | items | candidate | baseline | difference, interval |"
    yield "|:--|:--|--:|--:|--:|--:|"
    for row in check.slices:
        cells = [
            _code(f"{row.key}: {row.value}"),
            _code(row.score_name),
            str(row.n_items),
            number(row.candidate),
            number(row.baseline),
            f"{signed(row.difference)} {span(row.interval)}",
        ]
        yield f"| {' | '.join(cells)} |"
    yield f"\n{SLICES}"


def _markdown_flips(check: Check) -> Iterator[str]:
    if not check.flips:
        yield "\nNo item changed its score."
        return
    n_lost = sum(flip.gain < 0 for flip in check.flips)
    n_shown = min(_FLIPS_IN_MARKDOWN, len(check.flips))
    shown = f", {n_shown} of them shown" if n_shown < len(check.flips) else ""
    yield (
        f"\n<details>\n<summary>{len(check.flips)} items changed: {n_lost} worse, "
        f"{len(check.flips) - n_lost} better{shown}</summary>\n"
    )
    for flip in check.flips[:n_shown]:
        verb = "worse" if flip.gain < 0 else "better"
        scores = f"{number(flip.baseline_score)} → {number(flip.candidate_score)}"
        yield f"**{verb}**, {_code(flip.task)}, item {_code(flip.item)}: {scores}\n"
        texts = {
            "prompt": flip.prompt,
            "target": flip.target,
            "baseline": flip.baseline_response,
            "candidate": flip.candidate_response,
        }
        for title, text in texts.items():
            yield f"{title}\n<pre>{html.escape(excerpt(text, _REPLY_IN_MARKDOWN), quote=False)}</pre>\n"
    yield "</details>"


def _text(text: str) -> str:
    """Escape a text of ours with names in it, so that no character of it is Markdown or HTML."""
    escaped = html.escape(clean(text).replace("\n", " "), quote=False)
    return re.sub(
        r"(?<![a-z0-9])_|_(?![a-z0-9])|[\\`*|~#@]|\](?=[(\[:])", lambda found: f"&#{ord(found[0])};", escaped
    )


def _code(text: str) -> str:
    """Set a name as code; in HTML, for a table's `|` and a code span's backticks need no escapes there."""
    return f"<code>{_text(excerpt(text, 120))}</code>"
