"""Soft targets against PyTorch's own cross entropy and a double loop."""

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.losses.contrastive import info_nce
from pretrain.losses.soft_targets import smoothed_targets, soft_contrastive, true_pairs


def features(pairs: int = 6, dimensions: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return tuple(F.normalize(torch.randn(pairs, dimensions), dim=-1).requires_grad_() for _ in range(2))


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def smoothing_loss(image, text, scale, smoothing):
    targets = smoothed_targets(true_pairs(len(image), image.device), smoothing)
    return soft_contrastive(image, text, scale, targets, targets)


def test_without_smoothing_it_is_info_nce_with_its_gradients():
    image, text = features()
    scale = torch.tensor(14.2857, requires_grad=True)
    ours, reference = smoothing_loss(image, text, scale, 0.0), info_nce(image, text, scale)
    torch.testing.assert_close(ours, reference)
    assert ours.item() == pytest.approx(6.858957290649414, rel=1e-6)
    for found, wanted in zip(
        gradients(ours, image, text, scale), gradients(reference, image, text, scale), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_smoothing_is_pytorchs_times_b_over_b_minus_one(smoothing):
    image, text = features()
    logits, labels = 14.2857 * image @ text.T, torch.arange(6)
    expected = [F.cross_entropy(x, labels, label_smoothing=smoothing * 6 / 5) for x in (logits, logits.T)]
    torch.testing.assert_close(smoothing_loss(image, text, 14.2857, smoothing), sum(expected) / 2)


def test_smoothing_has_the_values_that_otters_code_gives_for_these_features():
    """6.7689… for rows of images; its loss is the sum of both directions, twice ours."""
    image, text = features()
    of_images, of_texts = 6.768904209136963, 6.559004306793213
    assert 2 * smoothing_loss(image, text, 14.2857, 0.1).item() == pytest.approx(of_images + of_texts, rel=1e-6)


def test_targets_of_both_directions_by_a_double_loop():
    image, text = (F.normalize(x.detach().double(), dim=-1) for x in features(4))
    image_targets, text_targets = (torch.rand(4, 4, dtype=torch.float64).softmax(1) for _ in range(2))
    total = 0.0
    for i in range(4):
        for own, others, targets in ((image, text, image_targets), (text, image, text_targets)):
            scores = [3.0 * float(own[i] @ other) for other in others]
            log_sum = math.log(sum(math.exp(s) for s in scores))
            total -= sum(float(targets[i, j]) * (scores[j] - log_sum) for j in range(4)) / 4 / 2
    found = soft_contrastive(image, text, 3.0, image_targets, text_targets)
    assert found.item() == pytest.approx(total, rel=1e-12)
    entropy = -sum(float((t * t.log()).sum()) for t in (image_targets, text_targets)) / 8
    divergence = soft_contrastive(image, text, 3.0, image_targets, text_targets, divergence=True)
    assert divergence.item() == pytest.approx(total - entropy, rel=1e-10)


def test_the_divergence_from_its_own_prediction_is_zero_and_impossible_targets_count_nothing():
    image, text = features()
    logits = (image @ text.T).detach()
    targets = logits.softmax(1), logits.T.softmax(1)
    loss = soft_contrastive(image, text, 1.0, *targets, divergence=True)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients(loss, image, text))
    diagonal = torch.eye(6)
    torch.testing.assert_close(
        soft_contrastive(image, text, 1.0, diagonal, diagonal, divergence=True), info_nce(image, text, 1.0)
    )


def test_bfloat16_autocast_does_not_lower_the_precision():
    image, text = (x.detach() for x in features())
    with torch.autocast("cpu", torch.bfloat16):
        lowered = smoothing_loss(image, text, 14.2857, 0.1)
    assert torch.equal(lowered, smoothing_loss(image, text, 14.2857, 0.1))


def test_rows_of_smoothed_targets_sum_to_one():
    targets = smoothed_targets(true_pairs(5, torch.device("cpu")), 0.2)
    torch.testing.assert_close(targets.sum(1), torch.ones(5))
    assert targets[2].tolist() == pytest.approx([0.05, 0.05, 0.8, 0.05, 0.05])


def test_what_makes_no_distribution_is_refused():
    pairs = true_pairs(4, torch.device("cpu"))
    for smoothing in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match=f"label smoothing {smoothing} over 4 texts"):
            smoothed_targets(pairs, smoothing)
    with pytest.raises(ValueError, match="over 1 texts: use 0 to 1 .excluded., and at least 2"):
        smoothed_targets(pairs[:1, :1], 0.1)
    assert smoothed_targets(pairs[:1, :1], 0.0).item() == 1
    with pytest.raises(ValueError, match=r"targets have the shape \(4, 3\): give \(4, 4\)"):
        soft_contrastive(torch.randn(4, 2), torch.randn(4, 2), 1.0, torch.rand(4, 4), torch.rand(4, 3))
