"""Redundancy reduction, siamese agreement and swapped assignments: published identities, and loops written out."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.losses.assignment import assignments, prototype_loss, swapped_pairs_loss
from pretrain.losses.redundancy import cross_correlation, redundancy_loss
from pretrain.losses.siamese import siamese_loss
from pretrain.losses.sinkhorn import sinkhorn


def draw(rows: int, dimensions: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(seed: int) -> torch.Tensor:
    return F.normalize(draw(5, 4, seed), dim=1)


def test_redundancy_is_zero_for_identity_correlation():
    """Columns of a Hadamard matrix have mean 0 and variance 1 (all but the first) and are uncorrelated."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    projections = torch.kron(two, torch.kron(two, two))[:, 1:]
    torch.testing.assert_close(cross_correlation(projections, projections), torch.eye(7))
    assert redundancy_loss(projections, projections) == 0
    # The opposite sign: every diagonal entry is -1.
    assert redundancy_loss(projections, -projections) == 7 * 4
    # One dimension twice: two ones off the diagonal.
    twice = projections[:, [0, 0, 1]]
    assert redundancy_loss(twice, twice).item() == pytest.approx(5e-3 * 2)


def test_redundancy_is_numpys_correlation_matrix():
    images, texts = (F.batch_norm(draw(40, 6, seed), None, None, training=True, eps=0) for seed in (0, 1))
    c = np.corrcoef(images.T.numpy(), texts.T.numpy())[:6, 6:]
    expected = sum((c[i, j] - 1) ** 2 if i == j else 5e-3 * c[i, j] ** 2 for i in range(6) for j in range(6))
    assert redundancy_loss(images, texts).item() == pytest.approx(expected)


def test_siamese_loss_is_between_agreement_and_opposition():
    values = draw(5, 4, 0)
    assert siamese_loss(values, 3 * values, 2 * values, values).item() == pytest.approx(0, abs=1e-12)
    assert siamese_loss(values, -values, values, values).item() == pytest.approx(2)  # one direction agrees
    assert siamese_loss(values, values, -values, -values).item() == pytest.approx(4)
    others = [draw(5, 4, seed) for seed in range(4)]
    cosine = lambda a, b: (a @ b / a.norm() / b.norm()).item()  # noqa: E731
    expected = [2 - cosine(others[0][i], others[3][i]) - cosine(others[1][i], others[2][i]) for i in range(5)]
    assert siamese_loss(*others).item() == pytest.approx(np.mean(expected))


def test_no_gradient_reaches_the_siamese_targets():
    values = [draw(5, 4, seed).requires_grad_() for seed in range(4)]
    siamese_loss(*values).backward()
    assert [v.grad is not None for v in values] == [True, True, False, False]


def test_assignments_sum_to_one_and_use_prototypes_equally():
    cosines = unit(0) @ unit(1).T
    found = assignments(cosines, epsilon=0.05, iterations=200)
    torch.testing.assert_close(found.sum(1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(found.sum(0), torch.ones(5, dtype=torch.float64))  # as many prototypes as rows
    few = assignments(cosines)
    torch.testing.assert_close(few.sum(1), torch.ones(5, dtype=torch.float64))


def test_assignments_scale_prototypes_first_and_samples_last():
    """SwAV's order, entry by entry on exponentials: its matrix has prototypes in rows and sums to 1."""
    cosines = (unit(0) @ F.normalize(draw(3, 4, 1), dim=1).T).tolist()
    rows, prototypes = range(5), range(3)
    q = [[math.exp(cosines[row][k] / 0.05) for row in rows] for k in prototypes]
    for _ in range(3):
        for k in prototypes:  # every prototype: a third of the mass
            total = sum(q[k])
            q[k] = [value / total / 3 for value in q[k]]
        for row in rows:  # every sample: a fifth
            total = sum(q[k][row] for k in prototypes)
            for k in prototypes:
                q[k][row] /= total * 5
    expected = 5 * torch.tensor(q, dtype=torch.float64).T
    found = assignments(torch.tensor(cosines, dtype=torch.float64))
    torch.testing.assert_close(found, expected)
    # The other order, OTTER's, gives other assignments.
    other = sinkhorn(-torch.tensor(cosines, dtype=torch.float64), 0.05, 3)
    assert (found - other / other.sum(1, keepdim=True)).abs().max() > 0.01


def test_assignments_stay_finite_where_exponentials_overflow():
    found = assignments(100 * (unit(0) @ unit(1).T).float(), epsilon=0.05)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(1), torch.ones(5))
    with pytest.raises(ValueError, match="epsilon 0.0 and iterations 3"):
        assignments(torch.zeros(2, 2), epsilon=0.0)


def test_a_pair_predicts_the_opposite_pairs_assignment():
    images, texts = [unit(0), unit(1)], [unit(2), unit(3)]
    total = 0.0
    for i in (0, 1):
        for j in (0, 1):
            for rows, columns, other_rows, other_columns in (
                (images[i], texts[j], images[1 - i], texts[1 - j]),
                (texts[j], images[i], texts[1 - j], images[1 - i]),
            ):
                target = assignments(other_rows @ other_columns.T)
                for row in range(5):
                    total -= (target[row] * (8.0 * columns @ rows[row]).log_softmax(0)).sum() / 5 / 8
    torch.testing.assert_close(swapped_pairs_loss(images, texts, 8.0), total)


def test_assignments_carry_no_gradient():
    """The gradient is that of a cross entropy with constant targets."""
    images, texts = [[unit(s).requires_grad_() for s in pair] for pair in ((0, 1), (2, 3))]
    swapped_pairs_loss(images, texts, 8.0).backward()
    again = [[v.detach().clone().requires_grad_() for v in views] for views in (images, texts)]
    loss = 0.0
    for rows, columns in (again, again[::-1]):
        for i in (0, 1):
            for j in (0, 1):
                constant = assignments(rows[1 - i].detach() @ columns[1 - j].detach().T)
                loss = loss + F.cross_entropy(8.0 * rows[i] @ columns[j].T, constant) / 8
    loss.backward()
    for mine, reference in zip([*images, *texts], [*again[0], *again[1]], strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)


def test_prototypes_are_predicted_across_modalities():
    image, text, prototypes = unit(0), unit(1), F.normalize(draw(3, 4, 2), dim=1)
    expected = sum(
        F.cross_entropy(a @ prototypes.T / 0.1, assignments(b @ prototypes.T)) / 2
        for a, b in ((image, text), (text, image))
    )
    torch.testing.assert_close(prototype_loss(image, text, prototypes), expected)


def test_swapping_needs_two_views_of_each():
    with pytest.raises(ValueError, match="1 image views and 2 text views"):
        swapped_pairs_loss([unit(0)], [unit(1), unit(2)], 1.0)
