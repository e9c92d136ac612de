"""The report in five sentences that can be forwarded: what, which, what for, at what cost, what next."""

from __future__ import annotations

from typing import NamedTuple

from mergetune.report.data import ReportData
from mergetune.report.verdict import N_RESAMPLES, Comparison
from mergetune.results.roles import is_merge
from mergetune.stats.number_text import duration, listed
from mergetune.weights.models import short_name


class Sentence(NamedTuple):
    """One of the five; backticks stand around names."""

    title: str
    text: str


def five_sentences(data: ReportData) -> tuple[Sentence, ...]:
    """Say what was merged, what is recommended, what it gives and takes, what it costs, what to do next.

    Empty where nothing is recommended.
    """
    if data.recommendation is None:
        return ()
    return (
        Sentence("What was merged", _merged(data)),
        Sentence("Recommended", _recommended(data)),
        Sentence("Gives and takes", _gives_and_takes(data)),
        Sentence("Costs", _costs(data)),
        Sentence("Next", _next(data)),
    )


def _merged(data: ReportData) -> str:
    experts = listed([f"`{name}`" for name in data.study.experts])
    n_merges = sum(is_merge(entry.name) for entry in data.entries)
    return (
        f"{experts}, fine-tunes of `{short_name(data.study.base)}`, were merged in {n_merges} ways, and each "
        f"merge was scored on {data.n_items['search']:,} items of {listed([m.name for m in data.metrics])}."
    )


def _recommended(data: ReportData) -> str:
    verdict = data.verdict
    if verdict.level == "none":
        return f"None of these merges; {verdict.headline[0].lower()}{verdict.headline[1:]}"
    kinds = [
        [rival for rival in verdict.rivals if is_merge(rival.name) == merged] for merged in (False, True)
    ]
    best = [min(kind, key=lambda rival: rival.worst_loss) for kind in kinds if kind]
    ahead = " and of ".join(f"`{rival.name}` in {rival.ahead:.0%}" for rival in best)
    sureness = f": it is ahead of {ahead} of {N_RESAMPLES:,} resamples of the items" if best else ""
    name = data.recommendation.name if data.recommendation else ""
    return f"`{name}`, {'clearly' if verdict.level == 'good' else 'but not clearly'}{sureness}."


def _gives_and_takes(data: ReportData) -> str:
    where = "On held-out items" if data.verdict.split == "holdout" else "On the items it was chosen by"
    told = [_told(one) for one in data.verdict.comparisons]
    return (
        f"{where} it scores {'; '.join(told)}; each ± is one standard error." if told else "Not compared yet."
    )


def _told(one: Comparison) -> str:
    metric = one.metric
    if metric.kind == "guard":
        kept = "broken" if one.is_broken else "kept"
        return f"{metric.change(one.difference)} on the guard `{metric.name}` ({kept})"
    return (
        f"{metric.text(one.own)} on `{metric.name}`, {metric.change(one.difference)} against its best expert"
    )


def _costs(data: ReportData) -> str:
    n_experts = len(data.study.experts)
    spent = duration(data.cost.total_s + data.holdout_cost.total_s)
    return (
        f"It is one model of the base's size instead of {n_experts}, and no slower; to find it "
        f"took {spent} of computing."
    )


def _next(data: ReportData) -> str:
    verdict, name = data.verdict, data.recommendation.name if data.recommendation else ""
    lost = [one for one in verdict.comparisons if one.metric.kind == "objective" and one.falls_short]
    if verdict.level == "none":
        evidence = f"the best of them, `{name}`, loses {verdict.worst_loss:.0%} of what the best expert gains"
        beaten = [
            rival for rival in verdict.rivals if verdict.worst_loss and rival.worst_loss <= verdict.worst_loss
        ]
        others = (
            f", and {listed([f'`{rival.name}`' for rival in beaten])} no more than that" if beaten else ""
        )
        return f"None of these: retrain on the data of all skills; {evidence}{others}."
    if verdict.split == "search":
        return f"Confirm `{name}` on items that the search did not see before it is deployed."
    if any(one.is_broken for one in verdict.comparisons):
        return f"Do not deploy `{name}` before the broken guard is looked into; choose another below."
    check = f"Check `{name}` on your deployment's items (`mergetune check`), then deploy it"
    if lost:
        names = listed([f"`{one.metric.name}`" for one in lost])
        return f"{check}; if {names} must not lose that much, set a limit below, or retrain on its data."
    return f"{check}{'' if verdict.level == 'good' else '; more items would tell it from its rivals'}."
