"""The loss over clean and augmented pairs: known numbers, an explicit double loop, identities."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.losses.augmented_pairs import augmented_pairs_loss, smoothed_info_nce
from pretrain.losses.contrastive import info_nce


def unit(generator: torch.Generator, rows: int = 6, dimensions: int = 16) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dimensions, generator=generator), dim=-1)


@pytest.fixture
def features():
    """A clean pair, two image views, two text views, drawn in this order."""
    generator = torch.Generator().manual_seed(0)
    return [unit(generator) for _ in range(6)]


def test_numbers_that_an_independent_computation_gave(features):
    image, text, *views = features
    for reduction, expected in (("avg", 6.858957), ("sum", 13.717914)):
        loss = augmented_pairs_loss((image, text), [], [], 14.2857, 14.2857, reduction=reduction).loss
        assert loss.item() == pytest.approx(expected, abs=2e-6)
    loss = augmented_pairs_loss((image, text), views[:2], views[2:], 14.2857, 14.2857).loss
    assert loss.item() == pytest.approx(5.4577265, abs=2e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("chunk_size", [0, 4])
def test_smoothing_is_torchs_in_value_and_gradient(features, smoothing, chunk_size):
    results = []
    for own in (True, False):
        image, text = (f.double().requires_grad_() for f in features[:2])
        scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
        if own:
            loss = smoothed_info_nce(image, text, scale, smoothing, chunk_size)
        else:
            logits, targets = scale * image @ text.T, torch.arange(6)
            both = [F.cross_entropy(x, targets, label_smoothing=smoothing) for x in (logits, logits.T)]
            loss = sum(both) / 2
        loss.backward()
        results.append((loss.detach(), image.grad, text.grad, scale.grad))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference)


def test_the_loss_is_the_formula_as_a_double_loop(features):
    image, text, *views = features
    images, texts = views[:2], views[2:]

    def cross_entropy(rows, columns, scale, smoothing):
        total = 0.0
        for i, row in enumerate(rows):
            log_p = (scale * columns @ row).log_softmax(0)
            total -= sum((smoothing / 6 + (1 - smoothing) * (i == j)) * log_p[j] for j in range(6))
        return total / 6

    directions = []
    for swap in (False, True):
        pair = (text, image) if swap else (image, text)
        clean = cross_entropy(*pair, 14.0, 0.0)
        augmented = 0.0
        for one in images:
            for other in texts:
                augmented += cross_entropy(*((other, one) if swap else (one, other)), 10.0, 0.1) / 4
        directions.append((clean + 2 * augmented) / 3)
    for reduction, expected in (("avg", sum(directions) / 2), ("sum", sum(directions))):
        loss = augmented_pairs_loss((image, text), images, texts, 14.0, 10.0, 0.1, reduction).loss
        torch.testing.assert_close(loss, expected)


def test_identical_views_without_smoothing_are_info_nce(features):
    image, text = features[:2]
    parts = augmented_pairs_loss((image, text), [image] * 3, [text] * 3, 9.0, 9.0, smoothing=0.0)
    for value in (parts.loss, parts.clean, parts.augmented):
        torch.testing.assert_close(value, info_nce(image, text, 9.0))


def test_unequal_views_and_another_reduction_are_named(features):
    image, text = features[:2]
    with pytest.raises(ValueError, match="1 augmented image views and 0 text views"):
        augmented_pairs_loss((image, text), [image], [], 1.0, 1.0)
    with pytest.raises(ValueError, match="'mean': use avg or sum"):
        augmented_pairs_loss((image, text), [], [], 1.0, 1.0, reduction="mean")
