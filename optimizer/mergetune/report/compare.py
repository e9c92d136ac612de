"""Several runs on one page: what each recommends, how it scores, and what changed between them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import ITEM_KEYS, Measurement, Score, rules_of
from mergetune.files.atomic_files import write_text
from mergetune.files.templates import render_page
from mergetune.report.metric import Metric, metrics_of
from mergetune.report.verdict import difference
from mergetune.results import selection
from mergetune.results.run_dir import RunDir
from mergetune.weights.models import short_name


@dataclass(frozen=True)
class ComparedRun:
    """What one run recommends; `changes` are paired differences from what the first run recommends.

    All scores are of `split`: the held-out items where every run's recommended merge was measured on them.
    """

    name: str
    recommended: str
    keeps_guards: bool
    scores: selection.Scores
    changes: selection.Scores
    n_candidates: int
    settings: dict[str, str]  # those that differ between the runs


@dataclass(frozen=True)
class Comparison:
    """Several runs by the same rules."""

    runs: tuple[ComparedRun, ...]
    metrics: tuple[Metric, ...]
    split: str
    n_items: int


def compare(runs: Sequence[RunDir]) -> Comparison:
    """Compare what several runs recommend, on the items that all of them share.

    Raises:
        MergetuneError: their scores were made by different rules, they share no item, or one of them
            recommends nothing yet.
    """
    first = runs[0]
    suite = first.study.suite_config
    chosen = {}
    for run in runs:
        choice = selection.choose(run)
        if choice is None or choice.recommendation is None:
            raise MergetuneError(f"{run.path}: recommends nothing yet; only finished searches are compared.")
        chosen[run.path] = choice.recommendation
    names = {path: found.name for path, found in chosen.items()}
    is_held_out = all(run.holds_measurement(names[run.path], "holdout") for run in runs)
    split = "holdout" if is_held_out else "search"
    frames = [_measured(run, names[run.path], is_held_out) for run in runs]
    for run, frame in zip(runs, frames, strict=True):
        if _rules(frame, run) != _rules(frames[0], first):
            raise MergetuneError(
                f"{run.path} and {first.path}: must be scored by the same rules to be compared, but were "
                "not. Score one by the other's suite first: mergetune rescore RUN --suite FILE --out DIR."
            )
    shared = _shared(frames)
    metrics = metrics_of(suite, [_scores(frame) for frame in shared])
    settings = [_settings(run) for run in runs]
    differing = [key for key in settings[0] if len({own.get(key, "–") for own in settings}) > 1]
    return Comparison(
        tuple(
            ComparedRun(
                run.path.name,
                names[run.path],
                chosen[run.path].keeps_guards,
                _scores(frame),
                {m.name: difference(frame, shared[0], m, {}) for m in metrics},
                len(run.candidates()),
                {key: own.get(key, "–") for key in differing},
            )
            for run, frame, own in zip(runs, shared, settings, strict=True)
        ),
        metrics,
        split,
        len(shared[0]),
    )


def write_comparison(runs: Sequence[RunDir], page: Path) -> Path:
    """Write the page of several runs; returns its path."""
    found = compare(runs)
    write_text(page, render_page("comparison.html.j2", {}, comparison=found))
    return page


def _measured(run: RunDir, name: str, is_held_out: bool) -> pd.DataFrame:
    frame = run.measurement(name, "holdout" if is_held_out else "search", responses=False)
    if frame is None:
        raise MergetuneError(f"{run.path}: `{name}` has no measurement.")
    return frame


def _rules(frame: pd.DataFrame, run: RunDir) -> Any:
    """Return the digests of the rules by task; of runs of earlier versions, that of the suite."""
    return rules_of(frame) or run.study.digests.get("suite")


def _shared(frames: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    """Return the rows of the items that all have."""
    indices = [pd.MultiIndex.from_frame(frame[ITEM_KEYS]) for frame in frames]
    common = indices[0]
    for index in indices[1:]:
        common = common[common.isin(index)]
    if common.empty:
        raise MergetuneError("The runs share no item, so that nothing can be compared.")
    return [
        frame[index.isin(common)].reset_index(drop=True) for frame, index in zip(frames, indices, strict=True)
    ]


def _scores(frame: pd.DataFrame) -> dict[str, Score]:
    return Measurement(frame, 0.0).scores()


def _settings(run: RunDir) -> dict[str, str]:
    """Return what may differ between runs, in words."""
    study = run.study
    return {
        "seed": str(study.seed),
        "experts": ", ".join(f"{name} ({short_name(path)})" for name, path in study.experts.items()),
        "base": short_name(study.base),
        "search space": Path(study.search_space).stem,
        "sampler": study.sampler.kind,
        "warm start": study.warm_start.model_dump_json(),
        "budget": json.dumps(study.budget.model_dump(exclude_none=True)),
        "digest of the base": study.digests.get("base", "")[:12],
        "digests of the experts": ", ".join(study.digests.get(name, "")[:8] for name in study.experts),
    }
