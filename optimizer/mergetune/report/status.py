"""Where a study stands, read from its run directory while it goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from filelock import FileLock, Timeout

from mergetune.results import roles, selection
from mergetune.results.run_dir import RunDir
from mergetune.stats.number_text import duration, number

_NAMED = 6  # of the candidates on the front
_AT_SEARCH = "search."  # what attempts at candidates of the search are called


@dataclass(frozen=True)
class Status:
    """Where a study stands.

    Attributes:
        is_at_work: a process holds the run directory.
        ended: why the search ended; empty while it has not.
        under_way: the candidates that are being measured, or were when the process ended, and the machine of
            each one's worker, if any.
        n_measured: baselines and trials measured on all items of the search split.
        n_dropped: trials dropped on part of them.
        n_failed: candidates that could not be measured.
        n_trials: trials done, of `most_trials`.
        front: the candidates on the front, by the scores as measured.
        hypervolume: what the front dominates above the base; None before the base was measured.
        best: the merge that would be recommended by these scores; empty where there is none.
        spent_s: taken from the budget of hours, `most_s`.
        left_s: how long the search will go on, at the pace so far; None where that is not known.
    """

    is_at_work: bool
    ended: str
    under_way: Mapping[str, str]
    n_measured: int
    n_dropped: int
    n_failed: int
    n_trials: int
    most_trials: int
    front: tuple[str, ...]
    hypervolume: float | None
    best: str
    spent_s: float
    most_s: float
    left_s: float | None

    def rows(self) -> Iterator[tuple[str, str]]:
        """Return the lines of a table: what, and how it stands."""
        state = "at work" if self.is_at_work else "no process is at work"
        yield "state", f"{state}; the search ended when {self.ended}" if self.ended else state
        if self.under_way:
            hosts = (f"{name} on {host}" if host else name for name, host in self.under_way.items())
            yield "under way" if self.is_at_work else "broken off", ", ".join(hosts)
        others = [f"{n} {what}" for n, what in ((self.n_dropped, "dropped"), (self.n_failed, "failed")) if n]
        yield "trials", ", ".join([f"{self.n_trials} of {self.most_trials}", *others])
        yield "measured", f"{self.n_measured} candidates, baselines among them"
        if self.front:
            more = ", …" if len(self.front) > _NAMED else ""
            yield "front", f"{len(self.front)}: {', '.join(self.front[:_NAMED])}{more}"
        if self.hypervolume is not None:
            yield "hypervolume", f"{number(self.hypervolume)} above the base"
        if self.best:
            yield "best merge", f"{self.best}, by scores as measured"
        left = "" if self.left_s is None or self.ended else f"; about {duration(self.left_s)} left"
        yield "time", f"{duration(self.spent_s)} of {duration(self.most_s)}{left}"


def read_status(run: RunDir) -> Status:
    """Read where a study stands.

    Raises:
        MergetuneError: this is no run directory.
    """
    study, candidates, scores = run.study, run.candidates(), run.all_scores("search")
    suite, budget = study.suite_config, study.budget
    states = Counter(each.state for each in candidates)
    searched = [each for each in candidates if not each.is_baseline]
    front, best, volume = list[str](), "", None
    if roles.BASE in scores and all(roles.expert_name(name) in scores for name in study.experts):
        front = selection.front(scores, suite)
        scales = selection.scales_of(run, [name for name in scores if not roles.is_merge(name)])
        best = selection.best_merge(scores, suite, scales) or ""
        volume = selection.hypervolume([scores[name] for name in front], scores[roles.BASE], suite)
    spent_s, most_s = run.spent_s(candidates), budget.hours * 3600
    left_s = None
    if searched:
        of_one = sum(each.cost.spent_s for each in searched) / len(searched)
        left_s = max(min((budget.trials - len(searched)) * of_one, most_s - spent_s), 0.0)
    return Status(
        is_at_work=_is_held(run),
        ended=(run.read_json("search.json") or {}).get("ended", ""),
        under_way={
            what.removeprefix(_AT_SEARCH): each.host
            for what, each in run.all_attempts().items()
            if what.startswith(_AT_SEARCH)
        },
        n_measured=len(scores),
        n_dropped=states["dropped"],
        n_failed=states["failed"],
        n_trials=len(searched),
        most_trials=budget.trials,
        front=tuple(front),
        hypervolume=volume,
        best=best,
        spent_s=spent_s,
        most_s=most_s,
        left_s=left_s,
    )


def _is_held(run: RunDir) -> bool:
    """Say whether a process is at work in a run directory."""
    file = run.path / "lock"
    if not file.exists():
        return False
    try:
        with FileLock(file, timeout=0):
            return False
    except Timeout:
        return True
