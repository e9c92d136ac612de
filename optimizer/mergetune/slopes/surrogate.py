"""Surrogate: what losses and slopes seen at a few points tell of the loss at others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy import optimize
from torch import Tensor

from mergetune.stats.resampling import Floats

_N_STEPS = 20  # at most, of a fit
_LEAST = 1e-9  # of slopes' sizes, and of variances
_SPAN = 1e-6  # directions of which the points span less, relative to the longest, count as none
_CONSTANT = 4.0  # prior variance of the mean, in that of the process

# Prior of the hyperparameters, all log-normal. With few slopes seen, their size sets the scale of all others.
_LENGTH = 0.5  # median, in √n_coefficients
_SLOPE_NOISE = 0.7  # median, in the slopes' root mean square
_SPREADS = (1.0, 0.5, 1.0, 0.7)  # of the logs


@dataclass(frozen=True)
class SeenValues:
    """Values: points (n_values, n_coefficients), values and their expected noise (n_values,), float64."""

    points: Tensor
    values: Tensor
    noise: Tensor


@dataclass(frozen=True)
class SeenSlopes:
    """Slopes: points and slopes, both (n_points, n_coefficients), float64."""

    points: Tensor
    slopes: Tensor


class Surrogate:
    """A Gaussian process that is conditioned on noisy values and noisy slopes.

    (Rasmussen and Williams 2006, section 9.4; Solak et al. 2003.) The kernel is an RBF with one length scale,
    above an unknown constant. Amplitude, length scale, a factor of the values' noise and the slopes' noise
    are fitted by their posterior density.

    n points span at most n − 1 directions. Along all others their coordinates are equal, so that the slopes
    there are independent of all else: more coefficients than points cost little.

    Args:
        values: seen at points.
        slopes: seen at points, the same or others.
        hyperparameters: where the fit begins: those of a surrogate that saw less; by default the
            prior's medians.
    """

    def __init__(self, values: SeenValues, slopes: SeenSlopes, hyperparameters: Tensor | None = None) -> None:
        self._origin, self._mean, self._noise = slopes.points[0], values.values.mean(), values.noise
        moved = torch.cat([values.points, slopes.points]) - self._origin
        _, sizes, directions = torch.linalg.svd(moved, full_matrices=False)
        self._span = directions[sizes > _SPAN * max(float(sizes[0]), _SPAN)]  # (n_span, n_coefficients)
        self._points = moved @ self._span.T
        self._apart = self._points[:, None] - self._points  # (n_points, n_points, n_span)
        self._n_values = len(values.points)
        along = slopes.slopes @ self._span.T
        self._seen = torch.cat([values.values - self._mean, along.flatten()])
        self._across = slopes.slopes - along @ self._span
        self._n_across = slopes.points.shape[1] - len(self._span)
        self._prior = _medians(slopes.slopes)
        self.hyperparameters = self._fit(self._prior if hyperparameters is None else hyperparameters)
        self._factor, self._factor_across = self._factors(self.hyperparameters)
        self._weights = _solve(self._factor, self._seen[:, None])[:, 0]
        self._weights_across = _solve(self._factor_across, self._across)

    def upper(self, point: Tensor, caution: float) -> Tensor:
        """Return the expected value at a point, and `caution` times its standard deviation above that.

        Args:
            point: (n_coefficients,), float64; a scalar comes back that autograd can follow.
            caution: how many standard deviations.
        """
        amplitude, length, *_ = self.hyperparameters.exp()
        moved = point - self._origin
        along = self._span @ moved
        across = moved - along @ self._span
        apart = along - self._points
        kernel = amplitude**2 * torch.exp(-(apart.square().sum(1) + across.square().sum()) / (2 * length**2))
        of_values, of_slopes = kernel[: self._n_values], kernel[self._n_values :] / length**2
        row = torch.cat(
            [
                of_values + _CONSTANT * amplitude**2,
                (of_slopes[:, None] * apart[self._n_values :]).flatten(),
            ]
        )
        mean = self._mean + row @ self._weights + of_slopes @ self._weights_across @ across
        known = row @ _solve(self._factor, row[:, None])[:, 0]
        known_across = across.square().sum() * (
            of_slopes @ _solve(self._factor_across, of_slopes[:, None])[:, 0]
        )
        variance = (1 + _CONSTANT) * amplitude**2 - known - known_across
        found: Tensor = mean + caution * variance.clamp(min=_LEAST).sqrt()
        return found

    def _fit(self, begin: Tensor) -> Tensor:
        reach = 3 * torch.tensor(_SPREADS)
        return minimized(self._cost, begin, self._prior - reach, self._prior + reach, _N_STEPS)[1]

    def _cost(self, theta: Tensor) -> Tensor:
        """Return −log of the posterior density of hyperparameters, but for a constant."""
        factor, across = self._factors(theta)
        paid = self._seen @ _solve(factor, self._seen[:, None])[:, 0]
        paid = paid + (self._across * _solve(across, self._across)).sum()
        # half of each log determinant: a Cholesky factor's diagonal holds roots
        size = factor.diagonal().log().sum() + self._n_across * across.diagonal().log().sum()
        prior = ((theta - self._prior) / torch.tensor(_SPREADS)).square().sum()
        cost: Tensor = paid / 2 + size + prior / 2
        return cost

    def _factors(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the covariances' Cholesky factors: of values and slopes along the span, of slopes across."""
        amplitude, length, value_noise, slope_noise = theta.exp()
        n, (n_points, n_span) = self._n_values, self._points.shape
        kernel = amplitude**2 * torch.exp(-self._apart.square().sum(-1) / (2 * length**2))
        scaled = self._apart[:, n:] / length**2  # from what was seen to where slopes were
        values = kernel[:n, :n] + _CONSTANT * amplitude**2
        mixed = (kernel[:n, n:, None] * scaled[:n]).flatten(1)
        eye, between = torch.eye(n_span, dtype=kernel.dtype) / length**2, scaled[n:]
        slopes = kernel[n:, n:, None, None] * (eye - between[..., :, None] * between[..., None, :])
        slopes = slopes.transpose(1, 2).flatten(0, 1).flatten(1)
        whole = torch.cat([torch.cat([values, mixed], 1), torch.cat([mixed.T, slopes], 1)])
        noise = torch.cat([value_noise * self._noise, slope_noise.expand(len(slopes))])
        whole = whole + torch.diag(noise.square())
        across = kernel[n:, n:] / length**2 + torch.diag(slope_noise.square().expand(n_points - n))
        return torch.linalg.cholesky(whole), torch.linalg.cholesky(across)


def minimized(
    function: Callable[[Tensor], Tensor], begin: Tensor, low: Tensor, high: Tensor, n_steps: int = 100
) -> tuple[float, Tensor]:
    """Return a smooth function's least value between bounds and where that is, as L-BFGS-B finds it.

    Args:
        function: from (n,) to a scalar; torch takes its derivative.
        begin: where the search begins, (n,), float64; so are the bounds.
        low: the lower bounds.
        high: the upper bounds.
        n_steps: the most steps.
    """

    def at(values: Floats) -> tuple[float, Floats]:
        point = torch.tensor(values, requires_grad=True)
        value = function(point)
        (slope,) = torch.autograd.grad(value, point)
        return float(value.detach()), slope.numpy()

    bounds = optimize.Bounds(low.numpy(), high.numpy())
    options: Any = {"maxiter": n_steps}
    found = optimize.minimize(at, begin.numpy(), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return float(found.fun), torch.from_numpy(found.x)


def _medians(slopes: Tensor) -> Tensor:
    """Return the prior's medians: the logs of amplitude, length scale, value noise's factor, slope noise."""
    size = max(float(slopes.square().mean().sqrt()), _LEAST)
    length = _LENGTH * math.sqrt(slopes.shape[1])
    amplitude = size * length  # what makes slopes of that size likely
    return torch.tensor([amplitude, length, 1.0, _SLOPE_NOISE * size]).double().log()


def _solve(factor: Tensor, columns: Tensor) -> Tensor:
    return torch.cholesky_solve(columns, factor)
