"""All that the report shows, gathered from a run directory: plain data, nothing drawn."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd

from mergetune.evaluation.evaluate import Measurement, Score
from mergetune.evaluation.judging.agreement import Agreements, low_agreements
from mergetune.evaluation.missing_verdicts import missing_verdicts
from mergetune.evaluation.scorers import JudgeScorer
from mergetune.evaluation.suite import Split, SuiteConfig
from mergetune.report.confirmation import Confirmation, Noise, Read, confirmation, measured_noise
from mergetune.report.exploring import Exploration, explore
from mergetune.report.insights import (
    Changed,
    DepthValue,
    Influence,
    coefficients_over_depth,
    influences,
    recipe_lines,
    unchanged_roles,
)
from mergetune.report.item_details import ItemDetails, item_details
from mergetune.report.losses import Loss, form_losses, merging_losses
from mergetune.report.metric import Metric, metrics_of
from mergetune.report.sensitivity import Sensitivity, sensitivity
from mergetune.report.verdict import Summary, difference, summarize
from mergetune.results import roles, selection
from mergetune.results.run_dir import Candidate, Cost, Form, FormRecord, RunDir, StudyRecord, WarmStart
from mergetune.results.selection import PLAUSIBLE, Recommendation, Scores
from mergetune.results.slices import Slice, slices_of
from mergetune.slopes.sensitivity import RECOMMENDED
from mergetune.space.coordinates import Coordinate
from mergetune.space.method_table import METHODS
from mergetune.space.recipe import single_layers
from mergetune.stats import pareto
from mergetune.stats.resampling import Hypervolume

Role = Literal["base", "expert", "average", "merge"]
_SPLITS: tuple[Split, Split] = ("search", "holdout")


@dataclass(frozen=True)
class Entry:
    """A measured candidate: its scores by split, and by how much it breaks each guard (≤ 0: kept).

    `smoothed_excess` is that of the smoothed scores, by which a merge is chosen.
    `guard_changes` are the paired differences from what the guards refer to, by split, where they are
    shown; `coefficients` says the recipe, a line per layer group.
    """

    candidate: Candidate
    search: Scores
    holdout: Scores
    excess: Mapping[str, float]
    holdout_excess: Mapping[str, float]
    smoothed_excess: Mapping[str, float]
    guard_changes: Mapping[Split, Scores]
    on_front: bool
    recommended: bool
    smoothed: Scores
    probability: float  # of being on the front
    finalist: bool
    coefficients: tuple[str, ...]

    @property
    def interest(self) -> int:
        """Return how early a reader asks for it: 0 first, 5 for a merge that is hardly ever on the front."""
        if self.recommended:
            return 0
        if self.role in ("base", "expert"):
            return 1
        if self.finalist:
            return 2
        return 3 if self.on_front else 4 if self.probability >= PLAUSIBLE else 5

    @property
    def name(self) -> str:
        """Return the candidate's name."""
        return self.candidate.name

    @property
    def role(self) -> Role:
        """Return what the candidate is to the reader."""
        own = self.candidate.role
        if own == "base" or own == "expert":
            return own
        return "average" if self.candidate.is_baseline else "merge"

    @property
    def feasible(self) -> bool:
        """Say whether every guard is kept on the search split."""
        return all(excess <= 0 for excess in self.excess.values())


@dataclass(frozen=True)
class SliceScores:
    """The scores of some candidates on one slice of the items, by candidate and score.

    `changes` are those of the recommended merge from what the verdict compares it with, paired by item.
    """

    name: str
    scores: Mapping[str, Scores]
    changes: Scores

    def n_items(self, score: str) -> int:
        """Return how many items of a score it has, of the candidate that has a value of most."""
        return max((own[score].n_items for own in self.scores.values() if score in own), default=0)


@dataclass(frozen=True)
class FormLosses:
    """The recommended merge in another form: what that loses, and what merging lost, by score."""

    record: FormRecord
    losses: tuple[Loss, ...]
    merging: Mapping[str, Loss]


@dataclass(frozen=True)
class ReportData:
    """What the report says. Entries come in the order measured, complete candidates only."""

    path: str
    study: StudyRecord
    metrics: tuple[Metric, ...]
    entries: tuple[Entry, ...]
    dropped: tuple[Candidate, ...]
    failed: tuple[Candidate, ...]
    recommendation: Recommendation | None
    verdict: Summary
    stopped: str  # why the search did; empty where it may not have
    warnings: tuple[str, ...]
    agreements: Agreements  # of judges with people
    n_items: Mapping[str, int]  # by split
    hypervolume: tuple[float, ...]  # after each entry
    influences: Mapping[str, tuple[Influence, ...]]  # by objective
    coordinates: Mapping[str, Coordinate]  # by the names in a candidate's point
    exploration: Exploration | None
    items: ItemDetails
    depths: Mapping[str, tuple[DepthValue, ...]]  # by candidate
    unchanged: tuple[str, ...]  # roles of tensors that no expert changes
    sensitivity: Sensitivity | None
    slices: tuple[SliceScores, ...]
    confirmation: Confirmation
    forms: Mapping[Form, FormLosses]  # of the recommended merge
    noise: Noise | None
    warm_start: WarmStart | None
    volume: Hypervolume | None
    unsmoothed: Mapping[str, str]  # why, by metric
    cost: Cost
    holdout_cost: Cost
    versions: Mapping[str, str]

    @property
    def n_by_slopes(self) -> int:
        """Return how many of the points that slopes led to were measured, failed ones too."""
        return sum(each.role == "slopes" for each in [*(e.candidate for e in self.entries), *self.failed])

    @property
    def objectives(self) -> tuple[Metric, ...]:
        """Return the metrics that are optimized."""
        return tuple(metric for metric in self.metrics if metric.kind == "objective")

    @property
    def front(self) -> tuple[Entry, ...]:
        """Return the front, by the first objective from worst to best."""
        first = self.metrics[0]
        found = [entry for entry in self.entries if entry.on_front]
        return tuple(sorted(found, key=lambda e: first.sign * e.search[first.name].value))

    @property
    def recommended(self) -> Entry | None:
        """Return the entry that is recommended."""
        return next((entry for entry in self.entries if entry.recommended), None)

    @property
    def depth(self) -> tuple[DepthValue, ...]:
        """Return the coefficients of the recommended merge over the layers."""
        return self.depths.get(self.recommendation.name, ()) if self.recommendation else ()


def gather(run: RunDir) -> ReportData:
    """Read a run directory, finished or not, and work out all that the report shows."""
    suite = run.study.suite_config
    candidates, choice = run.candidates(), selection.choose(run)
    search = choice.measured if choice else run.all_scores("search")
    holdout = run.all_scores("holdout")
    read: Read = functools.cache(functools.partial(run.measurement, responses=False))
    metrics = metrics_of(suite, [*search.values(), *holdout.values()])
    chosen = choice.recommendation if choice else None
    noise = measured_noise(run, metrics)
    confirmed_by = confirmation(run, choice, holdout, metrics, noise, read)
    front = selection.front(search, suite) if choice else []
    slopes, agreements = run.sensitivity(), run.agreements()
    tensors, changed = _tensors(run)
    if any(METHODS[candidate.recipe.method].changes_every_tensor for candidate in candidates):
        changed = None  # coefficients count for what no expert changes, too
    coordinates = run.coordinates()
    lines = recipe_lines([c for c in candidates if c.name in search], tensors, changed, coordinates)
    entries = tuple(
        Entry(
            candidate,
            search[candidate.name],
            holdout.get(candidate.name, {}),
            _excess(candidate.name, search, suite),
            _excess(candidate.name, holdout, suite),
            _excess(candidate.name, choice.smoothing.scores if choice else search, suite),
            _guard_changes(read, candidate, chosen, metrics, noise),
            candidate.name in front,
            chosen is not None and candidate.name == chosen.name,
            choice.smoothing.scores[candidate.name] if choice else search[candidate.name],
            choice.front.probability[candidate.name] if choice else 0.0,
            candidate.name in confirmed_by.finalists,
            lines[candidate.name],
        )
        for candidate in candidates
        if candidate.name in search
    )
    complete = [entry.candidate for entry in entries]
    objectives = [metric for metric in metrics if metric.kind == "objective"]
    compared = {roles.BASE, *map(roles.expert_name, run.study.experts)}
    confirmed = chosen is not None and compared | {chosen.name} <= holdout.keys()
    split: Split = "holdout" if confirmed else "search"
    verdict = _verdict(read, suite, chosen, entries, metrics, split, noise)
    return ReportData(
        path=str(run.path.resolve()),
        study=run.study,
        metrics=metrics,
        entries=entries,
        dropped=tuple(c for c in candidates if c.state == "dropped"),
        failed=tuple(c for c in candidates if c.state == "failed"),
        recommendation=chosen,
        verdict=verdict,
        stopped=(run.read_json("search.json") or {}).get("ended", ""),
        warnings=(
            *(run.read_json("warnings.json") or ()),
            *low_agreements(agreements),
            *missing_verdicts(_judged(run, suite, candidates), run.items),
        ),
        agreements=agreements,
        n_items=_count_items(search, holdout),
        hypervolume=_hypervolume(entries, suite) if choice else (),
        influences={m.name: influences(complete, search, m) for m in objectives},
        coordinates=coordinates,
        exploration=explore(choice, metrics, suite) if choice else None,
        items=_items(run, entries, split),
        depths=_depths(tensors, changed, complete),
        unchanged=unchanged_roles(tensors, changed),
        sensitivity=_sensitivity(slopes, chosen, candidates),
        slices=tuple(_slices(read, run, entries, verdict, noise)),
        confirmation=confirmed_by,
        forms=_forms(run, chosen, metrics, noise),
        noise=noise,
        warm_start=run.warm_start(),
        volume=choice.hypervolume(suite) if choice else None,
        unsmoothed=choice.smoothing.notes if choice else {},
        cost=_total([candidate.cost for candidate in candidates]),
        holdout_cost=_total([candidate.holdout_cost for candidate in candidates]),
        versions=run.read_json("versions.json") or {},
    )


def _forms(
    run: RunDir, chosen: Recommendation | None, metrics: Sequence[Metric], noise: Noise | None
) -> dict[Form, FormLosses]:
    """Gather the forms that the recommended merge was written in; those of an earlier one are left out."""
    variances, found = noise.variances if noise else {}, {}
    for form in get_args(Form):
        record = run.form(form)
        if record is None or chosen is None or record.of != chosen.name:
            continue
        merging = {loss.metric.name: loss for loss in merging_losses(run, form, metrics, variances)}
        found[form] = FormLosses(record, form_losses(run, form, metrics, variances), merging)
    return found


def _judged(
    run: RunDir, suite: SuiteConfig, candidates: Sequence[Candidate]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield every measurement of a run whose suite has a judge, and the candidate's name."""
    scorers = [task.scorer for score in suite.scores.values() for task in score.tasks]
    if not any(isinstance(scorer, JudgeScorer) for scorer in scorers):
        return
    for candidate in candidates:
        for split in _SPLITS:
            if (frame := run.measurement(candidate.name, split, responses=False)) is not None:
                yield candidate.name, frame


def _slices(
    read: Read, run: RunDir, entries: Sequence[Entry], verdict: Summary, noise: Noise | None
) -> Iterator[SliceScores]:
    """Yield the scores of the base, the experts and the merges that may be taken, by slice."""
    keys = run.study.suite_config.slices
    shown = [each.name for each in sorted(entries, key=lambda entry: entry.interest) if each.interest < 5]
    frames = (
        {name: frame for name in shown if (frame := read(name, verdict.split)) is not None} if keys else {}
    )
    for one in slices_of(run.items(), keys) if frames else ():
        scores = {name: Measurement(one.of(frame), 0.0).scores() for name, frame in frames.items()}
        if any(scores.values()):
            yield SliceScores(one.name, scores, _slice_changes(one, frames, entries, verdict, noise))


def _slice_changes(
    one: Slice,
    frames: Mapping[str, pd.DataFrame],
    entries: Sequence[Entry],
    verdict: Summary,
    noise: Noise | None,
) -> dict[str, Score]:
    own = next((entry.name for entry in entries if entry.recommended), "")
    variances, found = noise.variances if noise else {}, {}
    for compared in verdict.comparisons:
        with suppress(KeyError):  # the slice has no item of this score
            pair = one.of(frames[own]), one.of(frames[compared.against])
            found[compared.metric.name] = difference(*pair, compared.metric, variances)
    return found


def _excess(name: str, measured: Mapping[str, Scores], suite: SuiteConfig) -> dict[str, float]:
    """Return the guard violations of a candidate; empty where it or a reference was not measured."""
    try:
        return selection.guard_violations(measured[name], measured, suite)
    except KeyError:
        return {}


def _guard_changes(
    read: Read,
    candidate: Candidate,
    chosen: Recommendation | None,
    metrics: Sequence[Metric],
    noise: Noise | None,
) -> dict[Split, Scores]:
    """Compare a baseline or the recommended merge with what the guards refer to, item by item."""
    is_shown = candidate.is_baseline or (chosen is not None and candidate.name == chosen.name)
    if not is_shown:
        return {split: {} for split in _SPLITS}
    guards = [m for m in metrics if m.kind == "guard" and m.reference != candidate.name]
    variances = noise.variances if noise else {}
    found: dict[Split, Scores] = {}
    for split in _SPLITS:
        names = {candidate.name, *(guard.reference for guard in guards)}
        frames = {name: read(name, split) for name in names}
        known = {name: frame for name, frame in frames.items() if frame is not None}
        found[split] = {
            guard.name: difference(known[candidate.name], known[guard.reference], guard, variances)
            for guard in guards
            if {candidate.name, guard.reference} <= known.keys()
        }
    return found


def _verdict(
    read: Read,
    suite: SuiteConfig,
    chosen: Recommendation | None,
    entries: Sequence[Entry],
    metrics: Sequence[Metric],
    split: Split,
    noise: Noise | None,
) -> Summary:
    """Judge the recommended merge against the base, the experts, the averages, the soups and the defaults."""
    frames = {
        entry.name: frame
        for entry in entries
        if (entry.role != "merge" or entry.recommended) and (frame := read(entry.name, split)) is not None
    }
    averages = [entry.name for entry in entries if entry.role == "average"]
    variances = noise.variances if noise else {}
    return summarize(chosen, frames, metrics, suite, split, averages, variances)


def _hypervolume(entries: Sequence[Entry], suite: SuiteConfig) -> tuple[float, ...]:
    """Return the hypervolume over the base's scores after each candidate; those that break a guard add 0."""
    signed = selection.objective_points({e.name: e.search for e in entries}, suite)
    base = signed[next(i for i, entry in enumerate(entries) if entry.name == roles.BASE)]
    feasible = np.array([entry.feasible for entry in entries])
    counted = np.where(feasible[:, None], signed, base)
    return tuple(pareto.growing_hypervolumes(counted, base.tolist()).tolist())


def _tensors(run: RunDir) -> tuple[Sequence[str], Changed | None]:
    """Return the base's tensors, and those that each expert changes, where that is known."""
    model = run.read_json("model.json")
    if model is None:
        return (), None
    changed = model.get("changed")
    return model["tensors"], changed if changed is None else {e: frozenset(own) for e, own in changed.items()}


def _depths(
    tensors: Sequence[str], changed: Changed | None, candidates: Sequence[Candidate]
) -> dict[str, tuple[DepthValue, ...]]:
    if not tensors:
        return {}
    return {c.name: tuple(coefficients_over_depth(c.recipe, tensors, changed)) for c in candidates}


def _items(run: RunDir, entries: Sequence[Entry], first: Split) -> ItemDetails:
    """Pack the items, those of the verdict's split first."""
    ordered = sorted(entries, key=lambda entry: (entry.interest, -entry.probability))
    measured: dict[Split, list[str]] = {
        "search": [entry.name for entry in ordered],
        "holdout": [entry.name for entry in ordered if entry.holdout],
    }
    return item_details(run, {split: measured[split] for split in sorted(_SPLITS, key=lambda s: s != first)})


def _sensitivity(
    frame: pd.DataFrame | None, chosen: Recommendation | None, candidates: Sequence[Candidate]
) -> Sensitivity | None:
    """Gather the sensitivity, by the layer groups of the search space; before a trial, by single layers.

    What was taken at a merge that is no longer the recommended one is left out.
    """
    if frame is None:
        return None
    digests = [c.recipe.digest for c in candidates if chosen is not None and c.name == chosen.name]
    frame = frame[(frame["point"] != RECOMMENDED) | frame["digest"].isin(digests)]
    searched = [candidate.recipe.groups for candidate in candidates if not candidate.is_baseline]
    return sensitivity(frame, searched[0] if searched else single_layers(frame["tensor"]))


def _count_items(search: Mapping[str, Scores], holdout: Mapping[str, Scores]) -> dict[str, int]:
    return {
        split: max((sum(s.n_items for s in own.values()) for own in scores.values()), default=0)
        for split, scores in (("search", search), ("holdout", holdout))
    }


def _total(costs: Sequence[Cost]) -> Cost:
    total = Cost()
    for cost in costs:
        total = total.plus(cost)
    return total
