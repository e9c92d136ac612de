"""What choosing costs where a gain is noise: the rule of `stats/gains.py` against plain shares of the gain.

Studies are simulated where the truth is known: a base, experts and merges at random lambdas in [0, 1.3], on
two objectives. The first expert has a skill of 80 points; the second gains on the other objective as much as
the row says, in truth. Plain shares divide by the best expert's gain as measured, whatever made it.

    python benchmarks/choosing.py [--studies 2000] [--smoothed 200]

A minute on one core, and one or two more for `--smoothed`, choices by smoothed scores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from mergetune.evaluation.evaluate import Score
from mergetune.evaluation.suite import SuiteConfig
from mergetune.results import roles, selection, smoothing
from mergetune.results.roles import BASE, expert_name
from mergetune.results.selection import Scales
from mergetune.stats.gains import GainScale
from mergetune.stats.resampling import Floats, ItemScores, score_means

OBJECTIVES = {"skill": (0.1, 0.8), "other": (0.5, None)}  # the base's true score and the expert's gain
SUITE = SuiteConfig.model_validate(
    {
        "description": "simulated",
        "chat_template": False,
        "objectives": {name: {"tasks": [{"lm_eval": "simulated"}]} for name in OBJECTIVES},
    }
)


@dataclass(frozen=True)
class Case:
    """Studies of one kind: what the second expert gains, how much is measured, and which studies count."""

    title: str
    gain: float
    n_merges: int
    n_experts: int = 2
    n_items: int = 200
    by_one_item: bool = False  # only studies in which the best expert leads by one item
    is_smoothed: bool = False


@dataclass(frozen=True)
class Study:
    """One simulated study: true scores by objective, (n_candidates,), and what was measured."""

    lambdas: Floats  # (n_candidates, 2)
    truth: dict[str, Floats]
    items: dict[str, ItemScores]

    def kept(self, objective: str, candidate: int) -> float:
        """Return the true share that a candidate keeps of the gain of the objective's expert."""
        own, expert = self.truth[objective], 1 + list(OBJECTIVES).index(objective)
        gain = float(own[expert] - own[0])
        return float(own[candidate] - own[0]) / gain if gain else 1.0


def studies(case: Case, rng: np.random.Generator) -> Iterator[Study]:
    """Yield studies without end; items have a difficulty in common, as `tests/synthetic_run.py` has it."""
    names = [BASE, *(expert_name(str(i)) for i in range(case.n_experts))]
    names += [f"trial-{i}" for i in range(case.n_merges)]
    fixed = np.eye(1 + case.n_experts, 3)[:, 1:]  # the base, the two experts, and others with neither skill
    while True:
        lambdas = np.vstack([fixed, rng.uniform(0, 1.3, size=(case.n_merges, 2))])
        excess = np.maximum(lambdas.sum(axis=1) - 1, 0) ** 2
        truth, items = {}, {}
        for k, (objective, (base, gain)) in enumerate(OBJECTIVES.items()):
            share = np.tanh(2.2 * lambdas[:, k]) / np.tanh(2.2) - 0.2 * lambdas[:, 1 - k] - 0.1 * excess
            truth[objective] = np.clip(base + (case.gain if gain is None else gain) * share, 0.01, 0.99)
            luck = np.sqrt(0.8) * rng.normal(size=(case.n_items, 1))
            luck = luck + np.sqrt(0.2) * rng.normal(size=(case.n_items, len(names)))
            right = (luck < stats.norm.ppf(truth[objective])).astype(np.float64)
            items[objective] = ItemScores(tuple(names), right, np.zeros(case.n_items))
        study = Study(lambdas, truth, items)
        if not case.by_one_item or _lead(study, case) == 1:
            yield study


def _lead(study: Study, case: Case) -> int:
    """Return by how many items the best expert leads the base on the second objective."""
    right = study.items["other"].scores.sum(axis=0)
    return round(float(right[1 : 1 + case.n_experts].max() - right[0]))


def scores_of(study: Study, is_smoothed: bool) -> dict[str, dict[str, Score]]:
    """Return the scores to choose by, by candidate name."""
    found: dict[str, dict[str, Score]] = {name: {} for name in study.items["skill"].names}
    for key, items in study.items.items():
        values = score_means(items.scores)
        if is_smoothed:
            smoother = smoothing.fit_smoother(study.lambdas, items)
            values = values if isinstance(smoother, str) else smoother.apply(values)
        for name, value in zip(items.names, values.tolist(), strict=True):
            found[name][key] = Score(value, 0.0, len(items.scores))
    return found


def plain(study: Study) -> Scales:
    """Return scales by which every gain is clear."""
    names = study.items["skill"].names
    return Scales({key: GainScale(dict.fromkeys(names, 0.0), 1.0) for key in study.items}, {})


def ours(study: Study) -> Scales:
    """Return the scales that a study chooses by."""
    experts = [name for name in study.items["skill"].names if roles.is_expert(name)]
    return Scales({key: GainScale.of(items, BASE, experts) for key, items in study.items.items()}, {})


RULES: dict[str, Callable[[Study], Scales]] = {"plain shares": plain, "mergetune": ours}


def simulate(case: Case, n_studies: int) -> dict[str, Floats]:
    """Return the true shares kept by each rule's choice, (n_studies, 2)."""
    kept: dict[str, list[list[float]]] = {rule: [] for rule in RULES}
    for _, study in zip(range(n_studies), studies(case, np.random.default_rng(0)), strict=False):
        names, scores = study.items["skill"].names, scores_of(study, case.is_smoothed)
        for rule, scales in RULES.items():
            chosen = selection.recommend(scores, SUITE, scales(study))
            assert chosen is not None  # every study has merges
            kept[rule].append([study.kept(key, names.index(chosen.name)) for key in OBJECTIVES])
    return {rule: np.array(own) for rule, own in kept.items()}


def cases(n_smoothed: int) -> Iterator[Case]:
    """Yield what is simulated."""
    for n_merges in (8, 25):
        yield Case("an item of 200 ahead, no true gain", 0.0, n_merges, by_one_item=True)
        yield Case("no true gain", 0.0, n_merges)
    yield Case("no true gain, 5 experts", 0.0, 8, n_experts=5)
    yield Case("no true gain, 60 items", 0.0, 8, n_items=60)
    for points in (40, 20, 10, 5):
        yield Case(f"gain of {points} points", points / 100, 8)
    if n_smoothed:
        yield Case("no true gain, smoothed", 0.0, 25, is_smoothed=True)
        yield Case("gain of 10 points, smoothed", 0.1, 25, is_smoothed=True)


def main() -> None:
    """Print a row per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--smoothed", type=int, default=0, help="studies of each case of smoothed scores")
    arguments = parser.parse_args()
    table = Table(
        "other objective", "merges", "rule", "skill: below half", "skill kept", "other kept", "worse"
    )
    for case in cases(arguments.smoothed):
        n_studies = arguments.smoothed if case.is_smoothed else arguments.studies
        found = simulate(case, n_studies)
        worse = {rule: kept.min(axis=1) for rule, kept in found.items()}
        for rule, kept in found.items():
            change = worse[rule] - worse["plain shares"]
            table.add_row(
                *(case.title, str(case.n_merges), rule, f"{(kept[:, 0] < 0.5).mean():.1%}"),
                f"{kept[:, 0].mean():.3f}",
                f"{kept[:, 1].mean():.3f}" if case.gain else "",
                f"{worse[rule].mean():.3f}"
                + ("" if rule == "plain shares" else f" ({_signed(change)} ± {_error(change)})"),
            )
    Console(width=140).print(table)


def _signed(change: Floats) -> str:
    return f"{change.mean():+.3f}".replace("-", "−")


def _error(change: Floats) -> str:
    return f"{change.std() / np.sqrt(len(change)):.3f}"


if __name__ == "__main__":
    main()
