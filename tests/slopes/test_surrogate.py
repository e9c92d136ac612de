"""The surrogate, held against scikit-learn's kernels; slopes stand there as differences of values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from torch import Tensor

from mergetune.slopes.surrogate import SeenSlopes, SeenValues, Surrogate, minimized

STEP = 1e-3  # of two values that stand for a slope


def smooth(points: Tensor) -> Tensor:
    return torch.sin(2 * points).sum(-1) + points[..., 0] * points[..., -1]


def with_slopes(points: Tensor) -> tuple[Tensor, Tensor]:
    points = points.clone().requires_grad_()
    values = smooth(points)
    (slopes,) = torch.autograd.grad(values.sum(), points)
    return values.detach(), slopes


def random_points(n_points: int, n_coefficients: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_points, n_coefficients, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("n_coefficients", [2, 4, 9])  # fewer than the points span, as many, and more
def test_slopes_tell_what_differences_of_values_tell(n_coefficients: int) -> None:
    points = random_points(5, n_coefficients)
    values, slopes = with_slopes(points)
    noises = torch.linspace(0.1, 0.3, 5).double()
    found = Surrogate(SeenValues(points, values, noises), SeenSlopes(points, slopes))
    amplitude, length, factor, slope_noise = found.hyperparameters.exp().tolist()
    kernel = ConstantKernel(amplitude**2) * RBF(length) + ConstantKernel(4 * amplitude**2)
    steps = STEP * torch.eye(n_coefficients).double()
    places = [points, *((points[:, None] + step).flatten(0, 1) for step in (steps, -steps))]
    at = torch.cat(places).numpy()
    n_values, n_slopes = values.numel(), slopes.numel()
    seen = np.zeros((n_values + n_slopes, len(at)))  # from values there to what was seen
    seen[:n_values, :n_values] = np.eye(n_values)
    seen[n_values:, n_values : n_values + n_slopes] = np.eye(n_slopes) / (2 * STEP)
    seen[n_values:, n_values + n_slopes :] = -np.eye(n_slopes) / (2 * STEP)
    noise = np.concatenate([(factor * noises.numpy()) ** 2, np.full(n_slopes, slope_noise**2)])
    covariance = seen @ kernel(at) @ seen.T + np.diag(noise)
    mean = float(values.mean())
    observed = np.concatenate([values.numpy() - mean, slopes.numpy().flatten()])
    for point in random_points(3, n_coefficients, seed=1):
        row = kernel(point.numpy()[None], at) @ seen.T
        expected = mean + (row @ np.linalg.solve(covariance, observed))[0]
        variance = 5 * amplitude**2 - (row @ np.linalg.solve(covariance, row.T))[0, 0]
        assert float(found.upper(point, 0.0)) == pytest.approx(expected, abs=1e-5)
        assert float(found.upper(point, 2.0)) == pytest.approx(expected + 2 * variance**0.5, abs=1e-4)


def test_slopes_foretell_values_that_were_not_seen() -> None:
    points, valued = random_points(12, 20), random_points(3, 20, seed=2)
    _, slopes = with_slopes(points)
    found = Surrogate(
        SeenValues(valued, smooth(valued), torch.full((3,), 0.1).double()), SeenSlopes(points, slopes)
    )
    others = random_points(30, 20, seed=1)
    missed = torch.stack([found.upper(point, 0.0) for point in others]) - smooth(others)
    assert missed.square().mean() < 0.1 * smooth(others).var()


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_it_finds_how_noisy_slopes_are(noise: float) -> None:
    points = random_points(15, 8)
    values, slopes = with_slopes(points)
    noisy = slopes + noise * torch.randn(slopes.shape, generator=torch.Generator().manual_seed(2)).double()
    seen = SeenValues(points, values, torch.full((15,), 0.1).double())
    *_, found = Surrogate(seen, SeenSlopes(points, noisy)).hyperparameters.exp().tolist()
    assert noise / 2 < found < noise * 2


def test_one_point_and_equal_points_are_enough() -> None:
    point = random_points(1, 3)
    values, slopes = with_slopes(point)
    for n_points in (1, 3):
        seen = SeenValues(point.repeat(n_points, 1), values.repeat(n_points), torch.ones(n_points).double())
        found = Surrogate(seen, SeenSlopes(point.repeat(n_points, 1), slopes.repeat(n_points, 1)))
        assert float(found.upper(point[0], 0.0)) == pytest.approx(float(values[0]), abs=1e-6)
        ahead = point[0] + 0.1 * slopes[0]
        assert found.upper(ahead, 0.0) > found.upper(point[0], 0.0)
        assert found.upper(ahead, 1.0) > found.upper(ahead, 0.0)


def test_the_least_between_bounds_is_found() -> None:
    centre, ends = torch.tensor([0.3, 5.0]).double(), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).double()
    value, point = minimized(lambda at: (at - centre).square().sum(), torch.zeros(2).double(), *ends)
    assert point.tolist() == pytest.approx([0.3, 1.0])
    assert value == pytest.approx(16.0)
