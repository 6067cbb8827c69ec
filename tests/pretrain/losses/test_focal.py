"""The focal contrastive loss against PyTorch's and torchvision's losses and a naive version."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from pretrain.losses.contrastive import similarity
from pretrain.losses.focal import focal_contrastive


def features(pairs: int = 7, dims: int = 5, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(pairs)
    image = F.normalize(torch.randn(pairs, dims, generator=generator, dtype=dtype), dim=-1)
    return image, F.normalize(torch.randn(pairs, dims, generator=generator, dtype=dtype), dim=-1)


def naive(image: torch.Tensor, text: torch.Tensor, scale: float, alpha: float, gamma: float) -> float:
    """The formula, one pair at a time."""
    total = 0.0
    for i, row in enumerate((scale * image.double() @ text.double().T).tolist()):
        for j, x in enumerate(row):
            p = 1 / (1 + math.exp(-x if i == j else x))
            total -= (2 * alpha if i == j else 2 * (1 - alpha)) * (1 - p) ** gamma * math.log(p)
    return total


def test_without_focus_it_is_the_summed_binary_cross_entropy():
    image, text = features()
    logits = similarity(image, text, 9.0)
    theirs = F.binary_cross_entropy_with_logits(logits, torch.eye(7), reduction="sum")
    torch.testing.assert_close(focal_contrastive(image, text, 9.0, alpha=0.5, gamma=0.0), theirs)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 2.5])
@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.9])
def test_is_twice_torchvisions_focal_loss(alpha, gamma):
    image, text = features()
    theirs = sigmoid_focal_loss(similarity(image, text, 6.0), torch.eye(7), alpha, gamma, reduction="sum")
    torch.testing.assert_close(focal_contrastive(image, text, 6.0, alpha, gamma), 2 * theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("pairs", "scale", "alpha", "gamma"), [(1, 3.0, 0.5, 1.0), (5, 10.0, 0.3, 2.0), (8, 1.0, 0.5, 0.5)]
)
def test_equals_the_formula(pairs, scale, alpha, gamma):
    image, text = features(pairs)
    expected = naive(image, text, scale, alpha, gamma)
    assert focal_contrastive(image, text, scale, alpha, gamma).item() == pytest.approx(expected, rel=1e-5)


def test_defaults_are_those_of_the_authors_code():
    image, text = features()
    assert torch.equal(focal_contrastive(image, text, 9.0), focal_contrastive(image, text, 9.0, alpha=0.5, gamma=1.0))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("chunk_size", [1, 3, 7])
@pytest.mark.parametrize("gather", [False, True])
def test_chunks_give_the_same_loss_and_gradients(dtype, tolerance, chunk_size, gather):
    results = []
    for options in ({}, {"chunk_size": chunk_size, "gather": gather}):
        image, text = (f.requires_grad_() for f in features(dtype=dtype))
        scale = torch.tensor(8.0, dtype=dtype, requires_grad=True)
        loss = focal_contrastive(image, text, scale, gamma=2.0, alpha=0.4, **options)
        loss.backward()
        results.append([loss.detach() / 49, image.grad / 49, text.grad / 49, scale.grad / 49])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=10 * tolerance)


def test_gradients_by_finite_differences():
    image, text = (f.requires_grad_() for f in features(4, dtype=torch.float64))
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *given: focal_contrastive(*given, chunk_size=3), (image, text, scale))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_certain_pairs_have_finite_gradients(gamma):
    """Similarities of 200 either way: 1 - p underflows, and its power of 0.5 would have an infinite slope."""
    image = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    focal_contrastive(image, image.detach().clone(), 200.0, gamma=gamma).backward()
    assert image.grad.isfinite().all()


def test_easy_pairs_count_less_with_focus():
    image, text = features()
    losses = [focal_contrastive(image, text, 4.0, gamma=gamma).item() for gamma in (0.0, 1.0, 2.0, 4.0)]
    assert losses == sorted(losses, reverse=True)


def test_stays_float32_under_bfloat16_autocast():
    image, text = features()
    with torch.autocast("cpu", torch.bfloat16):
        inside = focal_contrastive(image, text, 50.0)
    assert inside.dtype == torch.float32 and torch.equal(inside, focal_contrastive(image, text, 50.0))


@pytest.mark.parametrize(("alpha", "gamma"), [(-0.1, 1.0), (1.1, 1.0), (0.5, -1.0)])
def test_impossible_weights_are_refused(alpha, gamma):
    with pytest.raises(ValueError, match=f"alpha {alpha} and gamma {gamma}: alpha must be between 0 and 1"):
        focal_contrastive(*features(), 1.0, alpha, gamma)
