"""What `mergetune inspect` prints, for a terminal of 80 columns or more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table

from mergetune.analysis.advice import Advice
from mergetune.analysis.conflict_words import TITLES, Finding, decimals, findings, with_error
from mergetune.analysis.conflicts import Conflict
from mergetune.analysis.task_vectors import (
    GAUSSIAN_OVERLAP,
    GAUSSIAN_REDUNDANCY,
    TOP_SHARE,
    PartStatistics,
    TaskVectorStatistics,
    VectorStatistics,
)
from mergetune.slopes.sensitivity import COEFFICIENT

_EXPERTS_ABREAST = 3
_SCORES_ABREAST = 3
_PAIRS_BY_GROUP = 3  # of more pairs, only the figures of the whole model are shown
_ABSENT = "–"


def inspection_tables(statistics: TaskVectorStatistics, verdict: Advice) -> Iterator[Table]:
    """Yield the tables: lengths and redundancy by layer group, then what concerns pairs."""
    parts = (*statistics.groups, statistics.whole)
    experts = list(statistics.whole.experts)
    for start in range(0, len(experts), _EXPERTS_ABREAST):
        yield _vector_table(parts, experts[start : start + _EXPERTS_ABREAST])
    if len(verdict.pairs) > _PAIRS_BY_GROUP:
        yield _overview(statistics, verdict)
        return
    for index, pair in enumerate(verdict.pairs):
        title = f"{pair.first} · {pair.second}: {pair.kind or 'nothing to compare'}"
        yield _pair_table(title, parts, index)


def verdict_sections(verdict: Advice) -> Iterator[tuple[str, list[str]]]:
    """Yield titles and their sentences; of many pairs, only those that are not complementary."""
    many = len(verdict.pairs) > _PAIRS_BY_GROUP
    shown = [pair for pair in verdict.pairs if not many or pair.kind != "complementary"]
    reasons = [f"{pair.first} · {pair.second}: {' '.join(pair.reasons)}" for pair in shown]
    yield verdict.summary, [*reasons, *verdict.notes]
    yield "What to do", list(verdict.next_steps)


def sensitivity_tables(by_group: pd.DataFrame, found: Sequence[Conflict]) -> Iterator[Table]:
    """Yield the gains of every score by layer group and expert, with their errors: a table per point.

    Args:
        by_group: of `slopes_by_group`.
        found: the conflicts in the same groups; what they lie in is marked.
    """
    for point in by_group["point"].unique():
        rows = by_group[by_group["point"] == point]
        scores = list(rows["score_name"].unique())
        marked = _marked([conflict for conflict in found if conflict.point == point])
        for start in range(0, len(scores), _SCORES_ABREAST):
            yield _gain_table(point, rows, scores[start : start + _SCORES_ABREAST], marked)


def sensitivity_sections(found: Sequence[Conflict]) -> Iterator[tuple[str, list[Finding]]]:
    """Yield a title for each point with what is to be said of it."""
    for point in dict.fromkeys(conflict.point for conflict in found):
        yield TITLES[point], findings(point, [each for each in found if each.point == point])


def _vector_table(parts: tuple[PartStatistics, ...], experts: list[str]) -> Table:
    table = _table(
        "Task vectors: length relative to the base, and squared norm in the largest "
        f"{TOP_SHARE:.0%} (Gaussian: {GAUSSIAN_REDUNDANCY:.0%})"
    )
    table.add_column("layer group", overflow="fold", min_width=11)
    table.add_column("parameters", justify="right", no_wrap=True)
    for expert in experts:
        table.add_column(escape(expert), justify="right", overflow="fold", min_width=11)
    for part in parts:
        cells = [_vector_cell(part.experts[expert]) for expert in experts]
        table.add_row(escape(part.name), f"{part.n_parameters:,}", *cells)
    return table


def _pair_table(title: str, parts: tuple[PartStatistics, ...], index: int) -> Table:
    table = _table(f"{title} (unrelated: cosine 0, overlap about {GAUSSIAN_OVERLAP:.0%}, conflicts 50%)")
    table.add_column("layer group", overflow="fold", min_width=11)
    for column in ("cosine", "overlap", "sign conflict", "weighted conflict", "length ratio"):
        table.add_column(column, justify="right", min_width=8)
    for part in parts:
        pair = part.pairs[index]
        shares = (pair.overlap, pair.sign_conflict, pair.weighted_conflict)
        table.add_row(
            escape(part.name), _number(pair.cosine, 3), *map(_percent, shares), _number(pair.norm_ratio, 2)
        )
    return table


def _overview(statistics: TaskVectorStatistics, verdict: Advice) -> Table:
    """Return a row per pair, the most opposed first."""
    table = _table("Pairs, whole model (unrelated: cosine 0, conflict 50%)")
    table.add_column("pair", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for column in ("cosine", "weighted conflict", "length ratio"):
        table.add_column(column, justify="right", min_width=8)
    rows = zip(statistics.whole.pairs, verdict.pairs, strict=True)
    for pair, judged in sorted(rows, key=lambda row: row[0].cosine or 0.0):
        table.add_row(
            escape(f"{pair.first} · {pair.second}"),
            judged.kind or _ABSENT,
            _number(pair.cosine, 3),
            _percent(pair.weighted_conflict),
            _number(pair.norm_ratio, 2),
        )
    return table


def _gain_table(
    point: str, rows: pd.DataFrame, scores: Sequence[str], marked: set[tuple[str, str, str]]
) -> Table:
    table = _table(f"{TITLES[point]}: gain in nats per unit of the coefficient (!: in conflict)")
    table.add_column("layer group", overflow="fold", min_width=11)
    table.add_column("expert", overflow="fold", min_width=7)
    for score in scores:
        table.add_column(escape(score), justify="right", no_wrap=True)
    digits = {score: _column_decimals(rows[rows["score_name"] == score]["slope"]) for score in scores}
    last = ""
    for key, own in rows.groupby(COEFFICIENT, sort=False):
        group, parameter, expert = map(str, key)
        slopes = own.set_index("score_name")[["slope", "stderr"]]
        cells = []
        for score in scores:
            slope, stderr = map(float, slopes.loc[score])
            mark = "!" if (score, group, expert) in marked else " "
            cells.append(f"{with_error(-slope, stderr, digits[score])} {mark}")
        table.add_row(escape(group) if group != last else "", escape(expert or parameter), *cells)
        last = group
    return table


def _column_decimals(slopes: pd.Series[float]) -> int:
    return max(2, decimals(float(slopes.abs().max()), 2))


def _marked(found: Sequence[Conflict]) -> set[tuple[str, str, str]]:
    """Return score, group and expert wherever a conflict lies."""
    return {
        (pull.score_name, place.group, place.expert)
        for conflict in found
        for place in conflict.places
        for pull in (conflict.first, conflict.second)
    }


def _table(title: str) -> Table:
    return Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def _vector_cell(vector: VectorStatistics) -> str:
    if vector.redundancy is None or vector.relative_norm is None:
        return _ABSENT
    return f"{vector.relative_norm:.4f} {vector.redundancy:>4.0%}"


def _number(value: float | None, digits: int) -> str:
    return _ABSENT if value is None else f"{value:z.{digits}f}"


def _percent(share: float | None) -> str:
    return _ABSENT if share is None else f"{share:.0%}"
