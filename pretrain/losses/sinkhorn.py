"""Entropic optimal transport by Sinkhorn's iterations (Cuturi, arXiv 1306.0895), as OTTER makes its targets with
(arXiv 2112.09445, section 3.2).

In the log domain: exp(-cost / epsilon) itself leaves the range of float32 at costs of 13 with OTTER's epsilon of 0.15.
This file knows costs only; what they are made of is the objective's affair.

Legend: M rows in the problem, m of them on this process (m = M for one), N columns.
"""

import math

import torch

from pretrain.losses.gather import gather_features, process_count


def sinkhorn(cost: torch.Tensor, epsilon: float, iterations: int, gather: bool = False) -> torch.Tensor:
    """The plan that moves uniform mass from rows to columns at little cost, after so many iterations.

    plan = diag(exp u) exp(-cost / epsilon) diag(exp v); an iteration scales the rows to 1 / M, then the columns to
    1 / N. So the sums of columns are exact, those of rows only nearly, until many iterations have been made.

    Args:
        cost: (m, N), finite, of any size: the plan stays the same when a number is added to a row.
        epsilon: the weight of the entropy, above 0, in the unit of the costs; the larger, the more uniform the plan.
        iterations: at least 1.
        gather: the rows are one process's part of a problem over all processes, the same number on each; what comes
            back are its rows of the whole problem's plan.

    Returns:
        (m, N) in float32, or float64 for such a cost; at least 0, the sum over all rows is 1.

    Raises:
        ValueError: for a cost that is no matrix, an epsilon that is not positive or fewer than 1 iterations.
    """
    if cost.ndim != 2 or 0 in cost.shape:
        raise ValueError(f"cost has the shape {tuple(cost.shape)}: give a matrix of at least one row and one column")
    if not epsilon > 0 or iterations < 1:
        raise ValueError(f"epsilon {epsilon} and iterations {iterations}: they must be above 0 and at least 1")
    spread = gather and process_count() > 1
    rows = len(cost) * (process_count() if spread else 1)
    with torch.autocast(cost.device.type, enabled=False):
        cost = cost if cost.dtype == torch.float64 else cost.float()
        # A logarithm, as all below. The first scaling of rows undoes the shift, which keeps large numbers precise.
        kernel = (cost.amin(1, keepdim=True) - cost) / epsilon
        # Potentials rather than a matrix that is scaled again and again, in which rounding would add up.
        v = kernel.new_zeros(cost.shape[1])
        for _ in range(iterations):
            u = -math.log(rows) - (kernel + v).logsumexp(1)
            by_column = (kernel + u.unsqueeze(1)).logsumexp(0)
            if spread:
                by_column = gather_features(by_column.unsqueeze(0)).logsumexp(0)
            v = -math.log(cost.shape[1]) - by_column
        return (kernel + u.unsqueeze(1) + v).exp()
