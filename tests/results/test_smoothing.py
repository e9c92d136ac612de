"""Smoothing, against scikit-learn's Gaussian process and the dense formula, and by simulation."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel, Matern, WhiteKernel

from mergetune.evaluation.evaluate import Measurement
from mergetune.results import smoothing
from mergetune.stats.resampling import Floats, ItemScores, join_items, score_covariance, score_means
from synthetic_run import Plan, write_run

KERNEL = ConstantKernel(0.8) * Matern([0.4, 1.3], nu=2.5) + WhiteKernel(0.02)


def data(seed: int, n: int = 25) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    points = rng.random((n, 2))
    return points, np.sin(3 * points[:, 0]) + 0.3 * points[:, 1] + rng.normal(0, 0.1, n)


def likelihood_of(kernel: Kernel, points: Floats, values: Floats, noise: Floats) -> tuple[float, Floats]:
    gram, gradient = kernel(points, eval_gradient=True)
    value, slope = smoothing.log_likelihood(gram, values, noise)
    return value, np.einsum("ij,ijk->k", slope, gradient)


def scikit_learns(theta: Floats) -> Kernel:
    """Build the kernel of these hyperparameters: constant, surface and what is each candidate's own."""
    constant = ConstantKernel(smoothing._FLAT, "fixed")
    if len(theta) == 1:
        return (constant + WhiteKernel()).clone_with_theta(theta)
    surface = ConstantKernel() * Matern(np.ones(len(theta) - 2), nu=2.5)
    return (constant + surface + WhiteKernel()).clone_with_theta(theta)


def fit_as_scikit_learn(
    prior: smoothing._Prior, points: Floats, values: Floats, noise: Floats, seed: int
) -> Kernel:
    """Fit as `fit_kernel` does, with their kernel and its gradient, (n, n, n_hyperparameters)."""

    def loss(theta: Floats) -> tuple[float, Floats]:
        value, slope = likelihood_of(scikit_learns(theta), points, values, noise)
        offset = (theta - prior.centre) / prior.spread
        return 0.5 * float(offset @ offset) - value, offset / prior.spread - slope

    drawn = np.random.default_rng(seed).normal(prior.centre, 0.7 * prior.spread, (3, len(prior.centre)))
    starts = np.clip([prior.centre, *drawn], *prior.bounds.T)
    runs = [
        optimize.minimize(loss, s, jac=True, method="L-BFGS-B", bounds=optimize.Bounds(*prior.bounds.T))
        for s in starts
    ]
    return scikit_learns(min(runs, key=lambda run: float(run.fun)).x)


def full_noise(n: int) -> Floats:
    root = np.random.default_rng(2).normal(size=(n, n + 3)) / 10
    return np.asarray(root @ root.T)


def items(points: Floats, truth: Floats, n_items: int, seed: int) -> ItemScores:
    rng = np.random.default_rng(seed)
    luck = np.sqrt(0.6) * rng.normal(size=(n_items, 1)) + np.sqrt(0.4) * rng.normal(
        size=(n_items, len(truth))
    )
    solved = (luck < stats.norm.ppf(truth)).astype(np.float64)
    return ItemScores(tuple(f"c{i}" for i in range(len(truth))), solved, np.zeros(n_items))


def surface(points: Floats) -> Floats:
    return np.asarray(0.5 + 0.35 * np.sin(3 * points[:, 0]) * (1 - points[:, 1] ** 2))


def test_with_diagonal_noise_it_is_scikit_learns_regression() -> None:
    points, values = data(0)
    variances = np.random.default_rng(1).uniform(0.01, 0.1, len(values))
    kernel = ConstantKernel(0.8) * Matern([0.4, 1.3], nu=2.5)
    theirs = GaussianProcessRegressor(kernel, alpha=variances, optimizer=None).fit(points, values)
    mean, covariance = theirs.predict(points, return_cov=True)
    ours = smoothing.posterior(kernel(points), np.diag(variances))
    assert ours.weights @ values == pytest.approx(mean)
    assert ours.covariance == pytest.approx(covariance, abs=1e-9)
    value, slope = likelihood_of(kernel, points, values, np.diag(variances))
    expected, gradient = theirs.log_marginal_likelihood(kernel.theta, eval_gradient=True)
    assert value == pytest.approx(expected)
    assert slope == pytest.approx(gradient)


def test_with_full_noise_it_is_the_conditional_normal() -> None:
    points, values = data(3)
    gram, noise = KERNEL(points), full_noise(len(values))
    ours = smoothing.posterior(gram, noise)
    inverse = np.linalg.inv(gram + noise)
    assert ours.weights @ values == pytest.approx(gram @ inverse @ values)
    assert ours.covariance == pytest.approx(gram - gram @ inverse @ gram, abs=1e-9)
    density = stats.multivariate_normal(np.zeros(len(values)), gram + noise).logpdf(values)
    assert likelihood_of(KERNEL, points, values, noise)[0] == pytest.approx(density)


def test_the_gradient_is_that_of_finite_differences() -> None:
    points, values = data(4)
    noise = full_noise(len(values))

    def likelihood(theta: Floats) -> float:
        kernel: Kernel = KERNEL.clone_with_theta(theta)
        return likelihood_of(kernel, points, values, noise)[0]

    slope = likelihood_of(KERNEL, points, values, noise)[1]
    assert slope == pytest.approx(optimize.approx_fprime(KERNEL.theta, likelihood, 1e-6), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("n_dims", [0, 1, 2, 24])
def test_the_kernel_and_its_slopes_are_scikit_learns(n_dims: int) -> None:
    rng = np.random.default_rng(14)
    points = np.repeat(rng.random((15, max(n_dims, 1))), 2, axis=0)  # each twice
    theta = rng.normal(size=n_dims + 2 if n_dims else 1)
    gram, by_theta = smoothing.Kernel(theta).with_slopes(points)
    theirs, gradient = scikit_learns(theta)(points, eval_gradient=True)
    assert gram == pytest.approx(theirs, rel=1e-12)
    slope = full_noise(30)
    expected = np.einsum("ij,ijk->k", slope, gradient)
    assert by_theta(slope) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("n_dims", "n"), [(2, 25), (5, 40), (24, 60)])
def test_a_fit_is_the_one_with_scikit_learns_kernel(n_dims: int, n: int) -> None:
    points = np.random.default_rng(n).random((n, n_dims))
    joined = items(points, surface(points), 80, n)
    values, noise = score_means(joined.scores), smoothing.common_noise(score_covariance(joined.scores))
    centred, scaled = (values - values.mean()) / values.std(), noise / values.var()
    for prior in (smoothing.smooth_prior(n_dims), smoothing.rough_prior()):
        ours = smoothing.fit_kernel(prior, points, centred, scaled, 0)
        theirs = fit_as_scikit_learn(prior, points, centred, scaled, 0)
        smoothed, expected = (smoothing.posterior(k(points), scaled).weights @ values for k in (ours, theirs))
        assert smoothed == pytest.approx(expected, abs=1e-6)


def test_the_slopes_of_many_coefficients_take_little_memory() -> None:
    points = np.random.default_rng(15).random((300, 200))
    theta = np.full(202, 1.0)
    tracemalloc.start()
    gram, by_theta = smoothing.Kernel(theta).with_slopes(points)
    by_theta(gram)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6  # (300, 300, 202) slopes at once would take 145 MB


def test_leaving_one_out_is_what_it_says() -> None:
    points, values = data(5, n=9)
    covariance = KERNEL(points) + full_noise(9)
    total = 0.0
    for i in range(9):
        rest = np.arange(9) != i
        weights = np.linalg.solve(covariance[np.ix_(rest, rest)], covariance[rest, i])
        variance = covariance[i, i] - weights @ covariance[rest, i]
        total += stats.norm(weights @ values[rest], np.sqrt(variance)).logpdf(values[i])
    assert smoothing.loo_log_density(KERNEL(points), values, full_noise(9)) == pytest.approx(total)


def test_the_common_noise_keeps_the_mean_variance_and_the_variance_of_the_mean() -> None:
    scores = np.random.default_rng(6).random((30, 5)) + np.random.default_rng(7).random((30, 1))
    covariance = score_covariance(scores)
    ours = smoothing.common_noise(covariance)
    assert np.trace(ours) == pytest.approx(np.trace(covariance))
    assert ours.mean() == pytest.approx(covariance.mean())


def test_smoothed_scores_are_nearer_to_the_truth_and_their_intervals_hold_it() -> None:
    squares, covered = [], []
    for seed in range(6):
        points = np.random.default_rng(100 + seed).random((35, 3))
        truth = surface(points)
        measured = items(points, truth, 60, seed)
        found = smoothing.fit_smoother(points, measured)
        assert isinstance(found, smoothing.Smoother)
        raw = score_means(measured.scores)
        ours = found.apply(raw)
        squares.append([np.var(raw - truth), np.var(ours - truth)])  # what all have in common cancels
        covered.append(np.abs(ours - truth) <= 1.96 * found.stderr)
    raw_error, our_error = np.mean(squares, axis=0)
    assert our_error < 0.6 * raw_error
    assert 0.85 < np.mean(covered) <= 1


def test_it_is_the_same_with_the_same_seed_and_for_many_resamples_at_once() -> None:
    points = np.random.default_rng(8).random((20, 2))
    measured = items(points, surface(points), 50, 9)
    first, second = (smoothing.fit_smoother(points, measured, seed=3) for _ in range(2))
    assert isinstance(first, smoothing.Smoother)
    assert isinstance(second, smoothing.Smoother)
    assert (first.weights == second.weights).all()
    many = np.random.default_rng(10).random((4, 20))
    assert first.apply(many) == pytest.approx(np.stack([first.apply(one) for one in many]))
    assert first.apply(many).max() <= 1


def test_where_points_say_nothing_scores_stay_as_measured() -> None:
    rng = np.random.default_rng(11)
    points = rng.random((30, 6))
    lottery = items(points, rng.uniform(0.2, 0.8, 30), 200, 12)
    assert smoothing.fit_smoother(points, lottery) == "the coefficients do not help to predict it"
    few = items(points[:7], surface(points[:7]), 50, 13)
    assert "fewer than 8" in str(smoothing.fit_smoother(points[:7], few))
    same = ItemScores(lottery.names, np.ones((5, 30)), np.zeros(5))
    assert smoothing.fit_smoother(points, same) == "all candidates have the same score"


def test_candidates_outside_the_space_keep_their_scores(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Plan(n_trials=20, holdout=False))
    candidates = [
        c.model_copy(update={"params": None}) if c.name in {"base", "average-0.5"} else c
        for c in run.candidates()
    ]
    frames: dict[str, pd.DataFrame] = {}
    for candidate in candidates:
        if (frame := run.measurement(candidate.name, "search")) is not None:
            frames[candidate.name] = frame
    measured = {name: Measurement(frame, 0.0).scores() for name, frame in frames.items()}
    found = smoothing.smooth(candidates, measured, join_items(frames))
    assert "tool_calls" in found.smoothers
    assert found.scores.keys() == frames.keys()
    for name, raw in measured.items():
        ours = found.scores[name]
        for key, score in ours.items():
            outside = name in {"base", "average-0.5"} or key in found.notes
            assert (score == raw[key]) == outside
    assert found.smoothers.keys() | found.notes.keys() == {"tool_calls", "persona", "general"}
