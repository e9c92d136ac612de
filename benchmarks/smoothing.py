"""Does choosing by smoothed scores beat choosing by measured ones? Simulated where the truth is known.

OMP_NUM_THREADS=1 python benchmarks/smoothing.py RUN [--repetitions 200]

RUN is a run directory with 8 candidates or more in the search space: its points, its suite and its items'
noise are what is simulated. Truths are draws from the posterior that its scores leave (`run`), or sigmoids
of mixtures of the coefficients, which no Matérn kernel drew (`sigmoid`). An item is solved where a normal
luck, shared by all candidates (0.6 of the variance) and by neighbours (0.4), is below the truth's quantile.

Harm is the true worst loss of the chosen merge plus its true excess over the guard's margin, in margins.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import special, stats

from mergetune.evaluation.evaluate import Score
from mergetune.evaluation.suite import SuiteConfig
from mergetune.results import selection, smoothing
from mergetune.results.selection import Scales
from mergetune.stats.resampling import Floats, ItemScores, join_items, score_covariance, score_means

Truth = dict[str, Floats]  # by score, (n_candidates,)


class Simulation:
    """What a run directory gives to simulate: points, suite, items; read as files, of whatever version."""

    def __init__(self, run: Path) -> None:
        record = json.loads((run / "record.json").read_text(encoding="utf-8"))
        self.suite = SuiteConfig.model_validate(record["suite_config"])
        found = [json.loads(file.read_text(encoding="utf-8")) for file in (run / "candidates").glob("*.json")]
        found = sorted(
            (c for c in found if c["params"] and c["state"] == "complete"), key=lambda c: c["number"]
        )
        self.names = [str(c["name"]) for c in found]
        points = pd.DataFrame([c["params"] for c in found])
        self.points = ((points - points.min()) / (points.max() - points.min())).to_numpy()
        files = {name: run / "candidates" / f"{name}.search.parquet" for name in self.names}
        frames = {name: pd.read_parquet(file) for name, file in files.items()}
        self.items = join_items(frames)
        squares = ((self.points[:, None] - self.points[None]) ** 2).sum(axis=2)
        self.neighbours = np.linalg.cholesky(np.exp(-squares / (2 * 0.3**2)) + 1e-3 * np.eye(len(squares)))
        self.posteriors = {key: self._posterior(items) for key, items in self.items.items()}

    def _posterior(self, items: ItemScores) -> tuple[Floats, Floats]:
        values = score_means(items.scores, items.tasks)
        scale = values.std()
        noise = smoothing.common_noise(score_covariance(items.scores, items.tasks)) / scale**2
        centred = (values - values.mean()) / scale
        prior = smoothing.smooth_prior(self.points.shape[1])
        gram = np.asarray(smoothing.fit_kernel(prior, self.points, centred, noise, 0)(self.points))
        found = smoothing.posterior(gram, noise)
        return values.mean() + scale * (found.weights @ centred), scale**2 * found.covariance

    def truth(self, kind: str, rng: np.random.Generator) -> Truth:
        """Draw true scores in [0, 1]."""
        if kind == "run":
            return {
                key: np.clip(rng.multivariate_normal(mean, covariance), 0, 1)
                for key, (mean, covariance) in self.posteriors.items()
            }
        shares = [rng.dirichlet(np.full(self.points.shape[1], 0.5)) for _ in self.items]
        truth: Truth = {}
        for own, key in zip(shares, self.items, strict=True):
            strength, rest = 2 * self.points @ own, 2 * self.points.mean(axis=1)
            if key in self.suite.guards:
                truth[key] = 0.9 - 0.06 * strength - 0.03 * np.maximum(rest - 1, 0)
            else:
                truth[key] = special.expit(6 * (strength - 0.5 - 0.3 * rest))
        return truth

    def measure(self, truth: Truth, rng: np.random.Generator) -> dict[str, ItemScores]:
        """Draw 0 or 1 for every item and candidate."""
        measured = {}
        for key, items in self.items.items():
            n_items, n = items.scores.shape
            own = (self.neighbours @ rng.normal(size=(n, n_items))).T
            luck = np.sqrt(0.6) * rng.normal(size=(n_items, 1)) + np.sqrt(0.4) * own
            solved = luck < stats.norm.ppf(np.clip(truth[key], 1e-6, 1 - 1e-6))
            measured[key] = ItemScores(items.names, solved.astype(np.float64), items.tasks)
        return measured

    def scores(self, values: Mapping[str, Floats]) -> dict[str, dict[str, Score]]:
        """Return what `selection` takes."""
        rows = zip(*values.values(), strict=True)
        return {
            name: {key: Score(float(v), 0.0, 1) for key, v in zip(values, row, strict=True)}
            for name, row in zip(self.names, rows, strict=True)
        }

    def outcome(self, truth: Truth, by: Mapping[str, Floats], scales: Scales) -> dict[str, float]:
        """Choose by these scores, and look at the truth."""
        chosen = selection.recommend(self.scores(by), self.suite, scales)
        assert chosen is not None  # a run with 8 candidates has a merge
        true = self.scores(truth)
        kept = selection.retained_gains(true, true[chosen.name], self.suite, scales)
        loss = max(self.suite.objectives[key].weight * (1 - share) for key, share in kept.items())
        excess = selection.relative_violations(true[chosen.name], true, self.suite).values()
        return {
            "worst loss": loss,
            "guard broken": float(max(excess, default=0) > 0),
            "harm": loss + max([0.0, *excess]),
        }


def run(simulation: Simulation, kind: str, repetitions: int) -> None:
    """Print the figures of one kind of truth."""
    rng, rows, quality = np.random.default_rng(1), [], []
    for repetition in range(repetitions):
        truth = simulation.truth(kind, rng)
        raw, smoothed = {}, {}
        measured = simulation.measure(truth, rng)
        for key, items in measured.items():
            raw[key] = score_means(items.scores, items.tasks)
            found = smoothing.fit_smoother(simulation.points, items)
            ours = raw[key] if isinstance(found, str) else found.apply(raw[key])
            smoothed[key] = ours
            errors = {"raw": raw[key] - truth[key], "smoothed": ours - truth[key]}
            stderr = np.sqrt(np.diag(score_covariance(items.scores, items.tasks)))
            bounds = {"raw": stderr, "smoothed": stderr if isinstance(found, str) else found.stderr}
            for by, error in errors.items():
                quality.append(
                    {
                        "score": key,
                        "by": by,
                        "square of contrasts": error.var(),
                        "covered": (np.abs(error) <= 1.96 * bounds[by] + 1e-9).mean(),
                        "smoothed": not isinstance(found, str),
                    }
                )
        scales = Scales.of(measured, simulation.scores(raw), simulation.suite)
        guards = {key: smoothed[key] for key in simulation.suite.guards}
        objectives = {key: smoothed[key] for key in simulation.suite.objectives}
        for by, values in {
            "truth": truth,
            "raw": raw,
            "smoothed": smoothed,
            "guards smoothed": {**raw, **guards},
            "objectives smoothed": {**raw, **objectives},
        }.items():
            rows.append({"repetition": repetition, "by": by, **simulation.outcome(truth, values, scales)})
    table = pd.DataFrame(rows)
    harm = table.pivot(index="repetition", columns="by", values="harm")
    gain = harm["smoothed"] - harm["raw"]
    print(f"\n{kind}: {repetitions} repetitions, {len(simulation.names)} candidates")
    print(table.drop(columns="repetition").groupby("by", sort=False).mean().round(4))
    print(f"harm, smoothed − raw: {gain.mean():+.4f} ± {gain.std() / np.sqrt(len(gain)):.4f}")
    print(
        pd.DataFrame(quality)
        .groupby(["score", "by"], sort=False)
        .mean()
        .assign(rmse=lambda t: np.sqrt(t.pop("square of contrasts")))
        .round(4)
    )


def main() -> None:
    """Read the command line and simulate both kinds of truth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--truth", choices=["run", "sigmoid", "both"], default="both")
    arguments = parser.parse_args()
    simulation = Simulation(arguments.run)
    for kind in ("run", "sigmoid"):
        if arguments.truth in (kind, "both"):
            run(simulation, kind, arguments.repetitions)


if __name__ == "__main__":
    main()
