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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import linalg, optimize

from optimizer.evaluate import Score
from optimizer.resampling import Floats, ItemScores, score_covariance, score_means
from optimizer.run_dir import Candidate

if TYPE_CHECKING:
    from sklearn.gaussian_process.kernels import Kernel

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
        for name, value, stderr in zip(found.names, values, found.stderr, strict=True):
            scores[name][score_name] = Score(float(value), float(stderr), len(own.scores))
    return Smoothing(scores, smoothers, notes)


def search_points(candidates: Sequence[Candidate]) -> pd.DataFrame:
    """Return the points of the search space, a row per candidate, each coefficient's range being [0, 1].

    Coefficients that are the same for all say nothing and are left out.
    """
    inside = {candidate.name: candidate.params for candidate in candidates if candidate.params is not None}
    points = pd.DataFrame.from_dict(inside, orient="index").dropna(axis="columns")
    points = points.loc[:, points.nunique() > 1]
    return (points - points.min()) / (points.max() - points.min())


def fit_smoother(points: Floats, joined: ItemScores, seed: int = 0) -> Smoother | str:
    """Return the smoother of one score on points, (n_candidates, n_coefficients), or why there is none."""
    if len(points) < MIN_POINTS or points.shape[1] == 0:
        return f"fewer than {MIN_POINTS} candidates have a point in the search space"
    values = score_means(joined.scores, joined.tasks)
    scale = float(values.std())
    if scale < 1e-9:
        return "all candidates have the same score"
    noise = common_noise(score_covariance(joined.scores, joined.tasks)) / scale**2
    centred = (values - values.mean()) / scale
    smooth_kernel = fit_kernel(smooth_prior(points.shape[1]), points, centred, noise, seed)
    rough_kernel = fit_kernel(rough_prior(), points, centred, noise, seed)
    gram = np.asarray(smooth_kernel(points))
    if loo_log_density(gram, centred, noise) <= loo_log_density(rough_kernel(points), centred, noise):
        return "the coefficients do not help to predict it"
    found = posterior(gram, noise)
    limits = float(joined.scores.min()), float(joined.scores.max())
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


def log_likelihood(gram: Floats, gradient: Floats, values: Floats, noise: Floats) -> tuple[float, Floats]:
    """Return the log marginal likelihood and its gradient (Rasmussen & Williams 2006, eqs. 2.30 and 5.9).

    `gradient`, (n, n, n_hyperparameters), is that of `gram`.
    """
    factor = linalg.cho_factor(gram + noise, lower=True)
    solved = linalg.cho_solve(factor, values)
    log_determinant = 2 * np.log(np.diag(factor[0])).sum()
    value = -0.5 * (values @ solved + log_determinant + len(values) * math.log(2 * math.pi))
    inner = np.outer(solved, solved) - linalg.cho_solve(factor, np.eye(len(values)))
    return float(value), 0.5 * np.einsum("ij,ijk->k", inner, gradient)


@dataclass(frozen=True)
class _Prior:
    """A kernel with the log-normal priors of its hyperparameters: (n_hyperparameters,) each."""

    kernel: Kernel
    centre: Floats
    spread: Floats


def fit_kernel(prior: _Prior, points: Floats, values: Floats, noise: Floats, seed: int) -> Kernel:
    """Return the kernel with the hyperparameters of greatest posterior density, from several starts."""
    bounds = prior.kernel.bounds

    def loss(theta: Floats) -> tuple[float, Floats]:
        gram, gradient = prior.kernel.clone_with_theta(theta)(points, eval_gradient=True)
        value, slope = log_likelihood(gram, gradient, values, noise)
        offset = (theta - prior.centre) / prior.spread
        return 0.5 * float(offset @ offset) - value, offset / prior.spread - slope

    rng = np.random.default_rng(seed)
    drawn = rng.normal(prior.centre, 0.7 * prior.spread, size=(_N_STARTS - 1, len(prior.centre)))
    starts = np.clip([prior.centre, *drawn], *bounds.T)
    runs = [optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds) for start in starts]
    best = min(runs, key=lambda run: float(run.fun))
    return prior.kernel.clone_with_theta(best.x)


def smooth_prior(n_dims: int) -> _Prior:
    """Length scales grow with √d, so that many coefficients do not overfit (Hvarfner et al. 2024)."""
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    surface = ConstantKernel(1.0, (1e-3, 1e2)) * Matern(np.ones(n_dims), (3e-2, 1e3), nu=2.5)
    kernel = ConstantKernel(_FLAT, "fixed") + surface + WhiteKernel(0.01, (1e-5, 1e1))
    lengths = np.full(n_dims, math.sqrt(2) + 0.5 * math.log(n_dims))
    centre = np.concatenate([[0.0], lengths, [math.log(0.01)]])
    return _Prior(kernel, centre, np.concatenate([[1.5], np.full(n_dims, math.sqrt(3)), [2.0]]))


def rough_prior() -> _Prior:
    """The same without neighbours."""
    from sklearn.gaussian_process.kernels import ConstantKernel, WhiteKernel

    kernel = ConstantKernel(_FLAT, "fixed") + WhiteKernel(1.0, (1e-5, 1e1))
    return _Prior(kernel, np.zeros(1), np.full(1, 1.5))
