"""The block of data that the page's script reads, as JSON."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from mergetune.report.data import Entry, ReportData
from mergetune.report.exploring import LEVELS, Exploration
from mergetune.report.insights import DepthValue
from mergetune.report.item_details import packed
from mergetune.results.roles import is_merge

_LEAST_MARGIN = 0.1  # of a guard's slider, to its end
_MOST_WEIGHT = 3.0


def page_data(data: ReportData) -> dict[str, Any]:
    """Return the block: scores, candidates, slices, and packs that are opened when they are looked at."""
    explored = data.exploration
    if explored is None or data.recommendation is None:
        return {}
    entries = {entry.name: entry for entry in data.entries}
    return {
        "recommended": data.recommendation.name,
        "levels": LEVELS,
        "scores": [
            {
                "name": score.metric.name,
                "kind": score.metric.kind,
                "sign": score.metric.sign,
                "percent": score.metric.percent,
                "weight": score.weight,
                "margin": score.metric.margin if score.metric.kind == "guard" else None,
                "reference": explored.names.index(score.reference),
                "stderr": score.reference_stderr if math.isfinite(score.reference_stderr) else 0.0,
            }
            for score in explored.scores
        ],
        "candidates": [_candidate(data, explored, i, entries[name]) for i, name in enumerate(explored.names)],
        "held_out": [entry.name for entry in data.entries if entry.holdout],
        "slices": [
            {
                "name": one.name,
                "n_items": [one.n_items(metric.name) for metric in data.metrics],
                "texts": {
                    name: [m.text(own[m.name]) if m.name in own else None for m in data.metrics]
                    for name, own in one.scores.items()
                },
            }
            for one in data.slices
        ],
        "packs": {
            **data.items.packs,
            "depth": packed({name: _panels(data, own) for name, own in data.depths.items()}),
        },
    }


def sliders(data: ReportData) -> list[dict[str, Any]]:
    """Return the range of every slider: of each score's limit, and of an objective's weight."""
    found = []
    for score in data.exploration.scores if data.exploration else ():
        reference = data.exploration.names.index(score.reference) if data.exploration else 0
        metric, best = score.metric, float(score.chosen_by[reference])
        if metric.kind == "guard":
            limits = {"low": 0.0, "high": max(4 * metric.margin, _LEAST_MARGIN), "off": None}
        else:
            worst = float(min(metric.sign * score.measured)) * metric.sign
            off = worst if metric.sign * (best - worst) > 0 else best - metric.sign
            limits = {"low": min(off, best), "high": max(off, best), "off": off}
        found.append(
            {
                "metric": metric,
                "reference": score.reference,
                "weight": score.weight,
                "most_weight": max(_MOST_WEIGHT, 2 * score.weight),
                **limits,
            }
        )
    return found


def _candidate(data: ReportData, explored: Exploration, i: int, entry: Entry) -> dict[str, Any]:
    scores = explored.scores
    return {
        "name": entry.name,
        "role": entry.role,
        "is_merge": is_merge(entry.name),
        "method": entry.candidate.recipe.method,
        "lines": entry.coefficients,
        "p": round(entry.probability, 4),
        "chosen_by": [float(score.chosen_by[i]) for score in scores],
        "measured": [float(score.measured[i]) for score in scores],
        "signed": [
            score.metric.sign * float(score.measured[i])
            for score in scores
            if score.metric.kind == "objective"
        ],
        "stderrs": [_finite(entry.search[score.metric.name].stderr) for score in scores],
        "losses": [None if score.losses is None else float(score.losses[i]) for score in scores],
        "quantiles": [[float(f"{value:.5g}") for value in score.quantiles[i]] for score in scores],
        "intervals": [
            [float(f"{bound:.4g}") for bound in (score.intervals[i].lower, score.intervals[i].upper)]
            for score in scores
        ],
        "texts": [metric.text(entry.search[metric.name]) for metric in data.metrics],
        "holdout": [metric.text(entry.holdout[metric.name]) for metric in data.metrics]
        if entry.holdout
        else None,
        "commands": commands(data, entry.name),
    }


def commands(data: ReportData, name: str) -> str:
    """Return what makes a candidate's model, and what checks it."""
    recipe = shlex.quote(f"{data.path}/report/recipes/{name}.yaml")
    return (
        f"mergetune merge {recipe} OUT\n"
        f"mergetune check {recipe} --baseline DEPLOYED --suite {shlex.quote(data.study.suite)}"
    )


def _panels(data: ReportData, depth: Iterable[DepthValue]) -> list[dict[str, Any]]:
    """Return the coefficients over the layers: a panel per parameter and part, a line per expert."""
    experts, panels = list(data.study.experts), []
    inside = [value for value in depth if value.layer is not None]
    for (parameter, part), own in groupby(inside, key=lambda value: (value.parameter, value.part)):
        lines: dict[str, dict[int, float]] = {}
        for value in own:
            lines.setdefault(value.expert, {})[value.layer or 0] = round(value.value, 3)
        n_layers = 1 + max(layer for line in lines.values() for layer in line)
        panels.append(
            {
                "title": f"{parameter}: {part}",
                "lines": [
                    {
                        "expert": expert,
                        "colour": experts.index(expert) if expert in experts else len(experts),
                        "values": [line.get(layer) for layer in range(n_layers)],
                    }
                    for expert, line in lines.items()
                ],
            }
        )
    return panels


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
