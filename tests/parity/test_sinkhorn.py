"""Sinkhorn against the POT library (https://pythonot.github.io), which is written independently."""

import numpy as np
import ot
import pytest
import torch

from pretrain.losses.sinkhorn import sinkhorn


def pot(cost: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """POT scales columns first, then rows: given the transpose, rows first, then columns."""
    m, n = cost.shape
    plan = ot.sinkhorn(
        np.full(n, 1 / n), np.full(m, 1 / m), cost.T.double().numpy(), epsilon, method="sinkhorn_log",
        numItermax=iterations, stopThr=0, warn=False,
    )  # fmt: skip
    return torch.from_numpy(plan.T.copy())


def random_cost(m: int, n: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m + n), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(8, 8), (5, 9), (9, 5), (1, 4), (64, 64)])
@pytest.mark.parametrize("epsilon", [0.05, 0.15, 1.0])
@pytest.mark.parametrize("iterations", [1, 5, 50])
def test_every_iterate_is_pots(shape, epsilon, iterations):
    cost = random_cost(*shape)
    expected = pot(cost, epsilon, iterations)
    assert (sinkhorn(cost, epsilon, iterations) - expected).abs().max() < 1e-12
    assert (sinkhorn(cost.float(), epsilon, iterations) - pot(cost.float(), epsilon, iterations)).abs().max() < 1e-5


def test_the_limit_is_pots_own_solution():
    cost = random_cost(12, 12)
    a = np.full(12, 1 / 12)
    solution = torch.from_numpy(ot.sinkhorn(a, a, cost.numpy(), 0.3, numItermax=100_000, stopThr=1e-13))
    torch.testing.assert_close(sinkhorn(cost, 0.3, 2000), solution, atol=1e-9, rtol=0)


def test_a_small_epsilon_approaches_the_best_assignment():
    cost = random_cost(6, 6)
    best = torch.from_numpy(ot.emd(np.full(6, 1 / 6), np.full(6, 1 / 6), cost.numpy()))
    torch.testing.assert_close(sinkhorn(cost, 0.01, 20_000), best, atol=1e-3, rtol=0)


def test_with_a_removed_diagonal_the_plan_is_pots():
    cost = random_cost(16, 16, torch.float32).clamp(-3, 3).masked_fill(torch.eye(16, dtype=torch.bool), 200.0)
    assert (sinkhorn(cost, 0.15, 5) - pot(cost, 0.15, 5)).abs().max() < 1e-5
