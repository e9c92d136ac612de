"""Scores smoothed over the search space: what a candidate's neighbours say of it, item noise being known.

A score y of n candidates is a truth f and noise, y = f + ε with ε ~ N(0, Σ). The truth is a Gaussian process
over the coefficients, f ~ N(0, K) with K = constant + σ² · Matérn 5/2 (a length scale per coefficient) +
τ² · 1: what no neighbour can know of a candidate (τ) is part of its truth, so that a rough surface is not
smoothed away. The smoothed score is E[f | y] = K (K + Σ)⁻¹ y (Rasmussen & Williams 2006, eqs. 2.23-2.24, with
Σ for σₙ²I).

Σ is known from the items, which are the same for all candidates: a variance in common, which cancels where
candidates are compared, and one of each candidate's own, both averages over the candidates. The covariance
of each single pair would be worse: in simulations, smoothed scores then erred more than the measured ones.
Hardly more items than candidates estimate it, and the variance of a binary score errs together with the
score, which pulls generalized least squares aside (Peelle's pertinent puzzle).

Scores are smoothed on their own scale: on that of the arcsine (for shares) a real run's scores predict each
other a little better, but the choices were as good and the intervals no truer, in the same simulations.
Whether choosing by smoothed scores beats choosing by measured ones: benchmarks/smoothing.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import linalg, optimize

from mergetune.evaluation.evaluate import Score
from mergetune.results.run_dir import Candidate, searched
from mergetune.stats.gains import ROUNDING
from mergetune.stats.resampling import Floats, ItemScores, score_covariance, score_means

MIN_POINTS = 8
_N_STARTS = 4
_FLAT = 100.0  # variance of the constant, in units of the scores' own: hardly a prior


@dataclass(frozen=True)
class Smoother:
    """The smoothing of one score: a linear map of the candidates' deviations from their mean."""

    names: tuple[str, ...]
    weights: Floats  # (n_candidates, n_candidates)
    stderr: Floats  # (n_candidates,) posterior standard deviations
    limits: tuple[float, float]  # smallest and largest score of an item

    def apply(self, scores: Floats) -> Floats:
        """Smooth scores, (..., n_candidates), with the hyperparameters of the fit."""
        mean = scores.mean(axis=-1, keepdims=True)
        return np.asarray(np.clip(mean + (scores - mean) @ self.weights.T, *self.limits))


@dataclass(frozen=True)
class Smoothing:
    """The scores to choose by, per candidate; a score without a smoother is as measured, `notes` say why."""

    scores: Mapping[str, Mapping[str, Score]]
    smoothers: Mapping[str, Smoother]
    notes: Mapping[str, str]


@dataclass(frozen=True)
class Posterior:
    """What the items and the neighbours say of the true scores."""

    weights: Floats  # (n, n): the mean is weights @ values
    covariance: Floats  # (n, n)


def smooth(
    candidates: Sequence[Candidate],
    measured: Mapping[str, Mapping[str, Score]],
    items: Mapping[str, ItemScores],
    seed: int = 0,
) -> Smoothing:
    """Smooth each score over the candidates that have a point in the search space; others stay as measured.

    A score is left as measured where it is no mean of items, where fewer than `MIN_POINTS` candidates have a
    point, or where the points do not help to predict: each candidate's score from those of all others, in log
    density, better than the same model without neighbours does (leave-one-out; Rasmussen & Williams 2006,
    section 5.4.2).

    Args:
        candidates: those of the run; the ones that were not measured are left out.
        measured: the scores on one split, by candidate name.
        items: the same by item, from `resampling.join_items`.
        seed: of the fit's starts.
    """
    scores = {name: dict(own) for name, own in measured.items()}
    points = search_points([candidate for candidate in candidates if candidate.name in measured])
    smoothers, notes = {}, {}
    for score_name, every in items.items():
        if not every.is_mean:  # its noise grows with its value, and may be of another magnitude
            notes[score_name] = "it is no mean of items"
            continue
        own = every.of([str(name) for name in points.index])
        found = fit_smoother(points.to_numpy(np.float64), own, seed)
        if isinstance(found, str):
            notes[score_name] = found
            continue
        smoothers[score_name] = found
        values = found.apply(score_means(own.scores, own.tasks))
        sizes = np.isfinite(own.scores).sum(axis=0)
        for name, value, stderr, size in zip(found.names, values, found.stderr, sizes, strict=True):
            scores[name][score_name] = Score(float(value), float(stderr), int(size))
    return Smoothing(scores, smoothers, notes)


def search_points(candidates: Sequence[Candidate]) -> pd.DataFrame:
    """Return the points of the search space, a row per candidate, each coefficient's range being [0, 1].

    Coefficients that are the same for all say nothing and are left out.
    """
    inside = {candidate.name: candidate.params for candidate in searched(candidates)}
    points = pd.DataFrame.from_dict(inside, orient="index").dropna(axis="columns")
    points = points.loc[:, points.nunique() > 1]
    return (points - points.min()) / (points.max() - points.min())


def fit_smoother(points: Floats, joined: ItemScores, seed: int = 0) -> Smoother | str:
    """Return the smoother of one score on points, (n_candidates, n_coefficients), or why there is none."""
    if len(points) < MIN_POINTS or points.shape[1] == 0:
        return f"fewer than {MIN_POINTS} candidates have a point in the search space"
    values = score_means(joined.scores, joined.tasks)
    scale = float(values.std())
    if scale <= ROUNDING * float(np.abs(values).max()):
        return "all candidates have the same score"
    noise = common_noise(score_covariance(joined.scores, joined.tasks)) / scale**2
    centred = (values - values.mean()) / scale
    smooth_kernel = fit_kernel(smooth_prior(points.shape[1]), points, centred, noise, seed)
    rough_kernel = fit_kernel(rough_prior(), points, centred, noise, seed)
    gram = smooth_kernel(points)
    if loo_log_density(gram, centred, noise) <= loo_log_density(rough_kernel(points), centred, noise):
        return "the coefficients do not help to predict it"
    found = posterior(gram, noise)
    limits = float(np.nanmin(joined.scores)), float(np.nanmax(joined.scores))
    return Smoother(joined.names, found.weights, scale * np.sqrt(np.diag(found.covariance)), limits)


def common_noise(covariance: Floats) -> Floats:
    """Return the noise with one variance and one covariance for all candidates, the means of those given."""
    n = len(covariance)
    variance = float(np.trace(covariance)) / n
    shared = float(covariance.sum() - np.trace(covariance)) / (n * (n - 1))
    shared = float(np.clip(shared, 0.0, variance))
    return np.full((n, n), shared) + (variance - shared) * np.eye(n)


def posterior(gram: Floats, noise: Floats) -> Posterior:
    """Return the posterior of f ~ N(0, gram), both (n, n), seen with noise ~ N(0, noise)."""
    factor = linalg.cho_factor(gram + noise, lower=True)
    weights = linalg.cho_solve(factor, gram).T
    return Posterior(weights, gram - weights @ gram)


def loo_log_density(gram: Floats, values: Floats, noise: Floats) -> float:
    """Return the log density of each value given all others, summed (Rasmussen & Williams 2006, eq. 5.12)."""
    inverse = np.linalg.inv(gram + noise)
    variances = 1 / np.diag(inverse)
    residuals = (inverse @ values) * variances
    return float(-0.5 * (residuals**2 / variances + np.log(2 * np.pi * variances)).sum())


def log_likelihood(gram: Floats, values: Floats, noise: Floats) -> tuple[float, Floats]:
    """Return the log marginal likelihood and its slope by `gram`, (n, n).

    Rasmussen & Williams 2006, eq. 2.30; by eq. 5.9, the slope by a hyperparameter is that by the gram times
    the gram's own, summed over all pairs.
    """
    factor, lower = linalg.cho_factor(gram + noise, lower=True)
    solved = linalg.cho_solve((factor, lower), values)
    log_determinant = 2 * np.log(np.diag(factor)).sum()
    value = -0.5 * (values @ solved + log_determinant + len(values) * math.log(2 * math.pi))
    half = np.tril(linalg.lapack.dpotri(factor, lower=lower)[0])  # of the inverse
    inverse = half + np.tril(half, -1).T
    return float(value), 0.5 * (np.outer(solved, solved) - inverse)


@dataclass(frozen=True)
class Kernel:
    """The covariance of the truth, K = constant + σ² · Matérn 5/2 + τ² · 1, by the logarithms of its terms.

    `theta` holds log σ², the log length scales and log τ²: (n_coefficients + 2,). With log τ² alone, (1,), no
    candidate says anything of another.
    """

    theta: Floats

    def __call__(self, points: Floats) -> Floats:
        """Return the covariances of points, (n, n_coefficients): (n, n)."""
        return self.with_slopes(points)[0]

    def with_slopes(self, points: Floats) -> tuple[Floats, Callable[[Floats], Floats]]:
        """Return the covariances of points, and what turns a slope by them into one by `theta`."""
        own = math.exp(self.theta[-1])
        gram = np.full((len(points), len(points)), _FLAT)
        gram[np.diag_indices_from(gram)] += own
        if len(self.theta) == 1:
            return gram, lambda slope: np.array([own * np.trace(slope)])
        variance, scaled = math.exp(self.theta[0]), points / np.exp(self.theta[1:-1])
        correlation, steepness = _matern(scaled)
        surface = variance * correlation
        gram += surface

        def by_theta(slope: Floats) -> Floats:
            # Σᵢⱼ Mᵢⱼ (zᵢₖ − zⱼₖ)² for every coefficient k by one product: no (n, n, n_coefficients) is made.
            steep = 2 * variance * slope * steepness  # (n, n), symmetric as the slope is
            lengths = (steep.sum(axis=1)[:, None] * scaled**2 - scaled * (steep @ scaled)).sum(axis=0)
            return np.array([(slope * surface).sum(), *lengths, own * np.trace(slope)])

        return gram, by_theta


def _matern(scaled: Floats) -> tuple[Floats, Floats]:
    """Return the Matérn 5/2 correlation of points in units of the length scales, and its steepness: (n, n).

    With s = √5 r it is (1 + s + s²/3) e⁻ˢ (Rasmussen & Williams 2006, eq. 4.17); its slope by a log length
    scale is the squared distance along that coefficient, times 5/3 (1 + s) e⁻ˢ.
    """
    squares = (scaled**2).sum(axis=1)
    distances = squares[:, None] + squares - 2 * scaled @ scaled.T
    np.fill_diagonal(distances, 0.0)
    s = np.sqrt(5 * np.maximum(distances, 0.0))
    decay = np.exp(-s)
    return (1 + s + s**2 / 3) * decay, 5 / 3 * (1 + s) * decay


@dataclass(frozen=True)
class _Prior:
    """Log-normal priors of a kernel's hyperparameters, (n_hyperparameters,) each, and their log bounds."""

    centre: Floats
    spread: Floats
    bounds: Floats  # (n_hyperparameters, 2)


def fit_kernel(prior: _Prior, points: Floats, values: Floats, noise: Floats, seed: int) -> Kernel:
    """Return the kernel with the hyperparameters of greatest posterior density, from several starts."""

    def loss(theta: Floats) -> tuple[float, Floats]:
        gram, by_theta = Kernel(theta).with_slopes(points)
        value, slope = log_likelihood(gram, values, noise)
        offset = (theta - prior.centre) / prior.spread
        return 0.5 * float(offset @ offset) - value, offset / prior.spread - by_theta(slope)

    rng = np.random.default_rng(seed)
    drawn = rng.normal(prior.centre, 0.7 * prior.spread, size=(_N_STARTS - 1, len(prior.centre)))
    starts = np.clip([prior.centre, *drawn], *prior.bounds.T)
    runs = [
        optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=optimize.Bounds(*prior.bounds.T))
        for start in starts
    ]
    best = min(runs, key=lambda run: float(run.fun))
    return Kernel(np.asarray(best.x))


def smooth_prior(n_dims: int) -> _Prior:
    """Length scales grow with √d, so that many coefficients do not overfit (Hvarfner et al. 2024)."""
    length = math.sqrt(2) + 0.5 * math.log(n_dims)
    return _Prior(
        np.array([0.0, *[length] * n_dims, math.log(0.01)]),
        np.array([1.5, *[math.sqrt(3)] * n_dims, 2.0]),
        np.log([(1e-3, 1e2), *[(3e-2, 1e3)] * n_dims, (1e-5, 1e1)]),
    )


def rough_prior() -> _Prior:
    """The same without neighbours."""
    return _Prior(np.zeros(1), np.full(1, 1.5), np.log([(1e-5, 1e1)]))
