"""The oracle of these tests: Gaussian data, whose noise and probability flow are closed forms."""

import math

import numpy as np
import pytest
import torch


class GaussianOracle:
    """``x_0 ~ N(mean, diag(variance))`` under a variance-preserving schedule."""

    def __init__(self, schedule):
        self.schedule = schedule
        self.mean = np.array([0.7, -1.2, 0.3])
        self.variance = np.array([0.09, 0.5, 4.0])

    def marginal(self, t):
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return alpha * self.mean, alpha**2 * self.variance + sigma**2

    def denoise(self, x, t):
        """The exact noise: minus sigma times the score of the marginal."""
        mean, variance = self.marginal(t)
        if isinstance(x, torch.Tensor):
            mean, variance = torch.as_tensor(mean), torch.as_tensor(variance)
        return self.schedule.sigma(t) * (x - mean) / variance

    def flow(self, x, start, end):
        """The exact solution of the probability-flow ODE from ``start`` to ``end``."""
        (mean_start, variance_start), (mean_end, variance_end) = map(self.marginal, (start, end))
        return mean_end + np.sqrt(variance_end / variance_start) * (x - mean_start)


@pytest.fixture
def gaussian():
    return GaussianOracle


@pytest.fixture
def start_state():
    return np.array([[0.4, -1.1, 2.0], [1.3, 0.2, -0.6]])


@pytest.fixture
def fitted_order():
    """Slope of log error against log step size: the order of convergence."""

    def fit(errors_by_steps):
        steps, errors = zip(*errors_by_steps.items(), strict=True)
        slope, _ = np.polyfit(np.log(steps), np.log(errors), 1)
        assert all(math.isfinite(error) and error > 1e-13 for error in errors), errors_by_steps
        return -slope

    return fit
