"""Properties of the transport plan, and the numbers that OTTER's order of scaling gives by hand."""

import pytest
import torch

from pretrain.losses.sinkhorn import sinkhorn

COST = torch.tensor([[0.0, 1, 2], [1, 0, 3], [2, 1, 0]], dtype=torch.float64)


def naive(cost: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """Scale the matrix itself; right as long as exp does not leave its range."""
    plan = (-cost / epsilon).exp()
    plan = plan / plan.sum()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True) / plan.shape[0]
        plan = plan / plan.sum(0, keepdim=True) / plan.shape[1]
    return plan


def random_cost(m: int = 8, n: int = 8) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("iterations", "expected"),
    [
        (1, [[0.288467, 0.035118, 0.005981], [0.039583, 0.263098, 0.000821], [0.005283, 0.035118, 0.326532]]),
        (5, [[0.284737, 0.032305, 0.008639], [0.045021, 0.278883, 0.001366], [0.003575, 0.022146, 0.323329]]),
    ],
)
def test_a_known_cost_gives_the_known_plan(iterations, expected):
    plan = sinkhorn(COST, 0.5, iterations)
    torch.testing.assert_close(plan, torch.tensor(expected, dtype=torch.float64), atol=6e-7, rtol=0)


@pytest.mark.parametrize("shape", [(8, 8), (3, 7), (7, 3), (1, 5), (5, 1)])
@pytest.mark.parametrize("iterations", [1, 5, 20])
def test_the_log_domain_is_the_plain_one_where_that_is_safe(shape, iterations):
    cost = random_cost(*shape)
    torch.testing.assert_close(sinkhorn(cost, 0.4, iterations), naive(cost, 0.4, iterations), atol=1e-14, rtol=1e-10)


@pytest.mark.parametrize(
    ("epsilon", "iterations", "error"), [(0.15, 5, 0.0213), (0.05, 5, 0.0482), (0.15, 200, 1.1e-4)]
)
def test_columns_are_exact_and_rows_as_near_as_in_otters_code(epsilon, iterations, error):
    torch.manual_seed(0)
    plan = sinkhorn(torch.randn(8, 8), epsilon, iterations)
    assert (plan.sum(0) - 1 / 8).abs().max() < 1e-6
    assert (plan.sum(1) - 1 / 8).abs().max().item() == pytest.approx(error, rel=0.03)
    assert plan.sum().item() == pytest.approx(1) and (plan >= 0).all()


def test_permuting_rows_and_columns_permutes_the_plan():
    cost, rows, columns = random_cost(6, 9), torch.randperm(6), torch.randperm(9)
    torch.testing.assert_close(sinkhorn(cost[rows][:, columns], 0.15, 5), sinkhorn(cost, 0.15, 5)[rows][:, columns])


@pytest.mark.parametrize("value", [0.0, -20.0, 1e4, -1e6, 1e30])
def test_a_uniform_cost_gives_the_uniform_plan(value):
    torch.testing.assert_close(sinkhorn(torch.full((4, 6), value), 0.15, 5), torch.full((4, 6), 1 / 24))


def test_a_large_epsilon_gives_the_uniform_plan():
    plan = sinkhorn(random_cost(), 1e6, 3)
    torch.testing.assert_close(plan, torch.full_like(plan, 1 / 64), atol=1e-7, rtol=0)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_costs_stay_finite(size, dtype):
    plan = sinkhorn((size * random_cost()).clamp(-6e4, 6e4).to(dtype), 0.15, 5)
    assert plan.dtype == torch.float32 and plan.isfinite().all()
    torch.testing.assert_close(plan.sum().item(), 1.0, atol=0.02, rtol=0)


def test_a_number_added_to_a_row_changes_nothing():
    added = torch.tensor([[1e3], [0.0], [-50.0]], dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(COST + added, 0.5, 3), sinkhorn(COST, 0.5, 3))


def test_autocast_does_not_lower_the_precision():
    cost = random_cost().float()
    with torch.autocast("cpu", torch.bfloat16):
        plan = sinkhorn(cost, 0.15, 5)
    assert torch.equal(plan, sinkhorn(cost, 0.15, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((COST, 0.0, 5), "epsilon 0.0 and iterations 5"),
        ((COST, float("nan"), 5), "epsilon nan"),
        ((COST, 0.15, 0), "iterations 0"),
        ((COST[0], 0.15, 5), "shape (3,): give a matrix"),
        ((COST[:0], 0.15, 5), "shape (0, 3): give a matrix"),
    ],
)
def test_what_cannot_be_solved_is_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        sinkhorn(*arguments)
    assert message in str(error.value)
