"""The report's files: the page, the charts for slides, the tables and the recipes."""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert
from markupsafe import Markup, escape

from mergetune.analysis.heat_maps import heat_maps
from mergetune.files.atomic_files import write_text
from mergetune.files.library import shared_folder
from mergetune.files.templates import render_page
from mergetune.report import study_charts
from mergetune.report.data import Entry, ReportData, gather
from mergetune.report.glossary import GLOSSARY
from mergetune.report.insights import MIN_TRIALS
from mergetune.report.page_data import page_data, sliders
from mergetune.report.pictures import PICTURES, as_svg, pictures, write_pictures
from mergetune.report.summary import five_sentences
from mergetune.results.run_dir import Candidate, RunDir, StudyRecord
from mergetune.space.recipe import MergeRecipe, Source
from mergetune.space.stack import ModelReference
from mergetune.stats.number_text import duration
from mergetune.theme import for_both, themed
from mergetune.weights.models import short_name

_ON_SLIDE = ("Recommended", "Gives and takes", "Next")
_SCRIPTS = ("choice.js", "explore.js")
_WIDTH, _NARROW = 480, 260  # of a chart on the page


def write_report(run: RunDir) -> Path:
    """Write the report of a run directory, finished or not; returns the page's path."""
    data = gather(run)
    folder = run.path / "report"
    folder.mkdir(exist_ok=True)
    drawn = write_pictures(data, folder)
    table = candidate_table(data)
    write_text(folder / "trials.csv", table.to_csv(index=False))
    write_text(folder / "front.csv", table[table["on_front"]].to_csv(index=False))
    _write_recipes(data, folder / "recipes", run.extended_base)
    write_text(folder / "index.html", render(data, drawn))
    return folder / "index.html"


def write_slide(run: RunDir) -> Path:
    """Write one page for a meeting, with headline, chart and three sentences; returns its path."""
    data = gather(run)
    folder = run.path / "report"
    folder.mkdir(exist_ok=True)
    drawn = pictures(data)
    chart = drawn.get("pareto") if len(data.objectives) <= 2 else drawn.get("parallel")
    sentences = [each for each in five_sentences(data) if each.title in _ON_SLIDE]
    html = render_page(
        "slide.html.j2",
        {"ticks": ticks},
        data=data,
        sentences=sentences,
        picture=_inline(as_svg(chart)) if chart is not None else "",
    )
    write_text(folder / "slide.html", html)
    return folder / "slide.html"


def render(data: ReportData, drawn: Collection[str] = ()) -> str:
    """Return the page: one HTML file that needs nothing else; `drawn` names the pictures beside it."""
    scripts = [(shared_folder("reports") / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    return render_page(
        "report.html.j2",
        {"ticks": ticks},
        data=data,
        sentences=five_sentences(data),
        block=page_data(data),
        sliders=sliders(data),
        glossary=GLOSSARY,
        anchor=lambda word: re.sub(r"\W+", "-", word).strip("-"),
        figures={
            section: [_picture(chart, _NARROW if ":" in section else _WIDTH) for chart in found]
            for section, found in _figures(data).items()
        },
        script="\n".join(scripts),
        pictures=PICTURES,
        drawn=drawn,
        min_trials=MIN_TRIALS,
        duration=duration,
        quote=shlex.quote,
        name_of=short_name,
    )


def ticks(text: str) -> Markup:
    """Escape a text and set what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def candidate_table(data: ReportData) -> pd.DataFrame:
    """Return a row per candidate, also of those dropped or failed: state, scores, cost and parameters."""
    rows = [_row(entry.candidate, entry, data) for entry in data.entries]
    rows += [_row(candidate, None, data) for candidate in (*data.dropped, *data.failed)]
    names = {name: None for row in rows for name in row}
    columns = [name for name in names if not name.startswith("param.")]
    columns += [name for name in names if name.startswith("param.")]
    return pd.DataFrame(rows, columns=columns or ["name", "on_front"])


def _row(candidate: Candidate, entry: Entry | None, data: ReportData) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": candidate.name,
        "role": candidate.role,
        "state": candidate.state,
        "reason": candidate.reason,
        "on_front": entry is not None and entry.on_front,
        "recommended": entry is not None and entry.recommended,
        "finalist": entry is not None and entry.finalist,
        "pareto_probability": entry.probability if entry is not None else None,
        "feasible": entry.feasible if entry is not None else None,
    }
    for metric in data.metrics:
        for split in ("search", "holdout"):
            scores = {} if entry is None else entry.search if split == "search" else entry.holdout
            score = scores.get(metric.name)
            row[f"{metric.name}.{split}"] = score.value if score else None
            row[f"{metric.name}.{split}.stderr"] = score.stderr if score else None
        smoothed = entry.smoothed[metric.name] if entry is not None else None
        row[f"{metric.name}.smoothed"] = smoothed.value if smoothed else None
        row[f"{metric.name}.smoothed.stderr"] = smoothed.stderr if smoothed else None
    row |= candidate.cost.model_dump()
    row["recipe_digest"] = candidate.recipe.digest
    return row | {f"param.{name}": value for name, value in (candidate.params or {}).items()}


def _figures(data: ReportData) -> dict[str, list[alt.LayerChart]]:
    """Draw the charts of every section; an empty list where there is nothing to draw."""
    explained = [name for name, found in data.influences.items() if found]
    return {
        "hypervolume": [study_charts.hypervolume(data)] if any(data.hypervolume) else [],
        "importance": [study_charts.importance(data, name) for name in explained],
        "cost": [study_charts.cost(data)] if data.entries else [],
        **{
            f"sensitivity:{each.point}": heat_maps(each.layers)
            for each in (data.sensitivity.points if data.sensitivity else ())
        },
    }


def _picture(chart: alt.LayerChart, width: int) -> str:
    return _inline(vl_convert.vegalite_to_svg(themed(chart.properties(width=width)).to_dict()))


def _inline(drawing: str) -> str:
    """Return a drawing as the address of an image that the page itself holds."""
    return f"data:image/svg+xml;base64,{base64.b64encode(for_both(drawing).encode()).decode()}"


def _write_recipes(data: ReportData, folder: Path, extended_base: Path) -> None:
    """Write the recipes of all candidates, and no longer any other.

    They name the models as the study does, but what lies in the run directory relative to their own
    folder, since it moves with them.
    """
    folder.mkdir(exist_ok=True)
    is_extended = extended_base.is_dir()
    base = str(Path("../..", extended_base.name)) if is_extended else data.study.base
    shown = {entry.name: entry for entry in data.entries}
    for stale in folder.glob("*.yaml"):
        if stale.stem not in shown:
            stale.unlink()
    for name, entry in shown.items():
        _named(entry.candidate.recipe, data.study, base).write(folder / f"{name}.yaml")


def _named(recipe: MergeRecipe, study: StudyRecord, base: ModelReference) -> MergeRecipe:
    """Return a recipe with this base, and the experts where the study has them."""

    def named(source: Source, path: ModelReference) -> Source:
        return source.model_copy(update={"path": path})

    experts = {name: named(source, study.experts[name]) for name, source in recipe.experts.items()}
    return recipe.model_copy(update={"base": named(recipe.base, base), "experts": experts})
