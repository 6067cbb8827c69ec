"""The contrastive loss against open_clip's ClipLoss, a NumPy version and its value for empty features."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from pretrain.losses.contrastive import info_nce, similarity


def oracle_features() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    image = F.normalize(torch.randn(6, 16), dim=-1)
    return image, F.normalize(torch.randn(6, 16), dim=-1)


def naive_info_nce(image: np.ndarray, text: np.ndarray, scale: float) -> float:
    """-log of the true pair's share, averaged over rows and columns, one pair at a time."""
    total = 0.0
    for i in range(len(image)):
        row = [math.exp(scale * float(image[i] @ text[j])) for j in range(len(text))]
        column = [math.exp(scale * float(image[j] @ text[i])) for j in range(len(image))]
        total += -math.log(row[i] / sum(row)) - math.log(column[i] / sum(column))
    return total / (2 * len(image))


def test_equals_open_clip_on_the_oracle():
    image, text = oracle_features()
    loss = info_nce(image, text, 14.2857)
    torch.testing.assert_close(loss, ClipLoss()(image, text, 14.2857), atol=1e-6, rtol=1e-6)
    assert loss.item() == pytest.approx(6.858957290649414, abs=1e-6)


@pytest.mark.parametrize(("pairs", "dims", "scale"), [(1, 4, 10.0), (2, 3, 1.0), (7, 5, 14.3), (12, 32, 30.0)])
def test_equals_a_naive_version(pairs, dims, scale):
    torch.manual_seed(pairs)
    image, text = (F.normalize(torch.randn(pairs, dims), dim=-1) for _ in range(2))
    naive = naive_info_nce(image.double().numpy(), text.double().numpy(), scale)
    assert info_nce(image, text, scale).item() == pytest.approx(naive, rel=1e-5, abs=1e-6)


def test_gradients_equal_open_clips():
    ours, theirs = [], []
    for loss, grads in ((info_nce, ours), (ClipLoss(), theirs)):
        image, text = (f.requires_grad_() for f in oracle_features())
        scale = torch.tensor(14.2857, requires_grad=True)
        loss(image, text, scale).backward()
        grads += [image.grad, text.grad, scale.grad]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_uninformative_features_give_log_batch():
    same = F.normalize(torch.ones(9, 4), dim=-1)
    assert info_nce(same, same, 20.0).item() == pytest.approx(math.log(9), rel=1e-6)


def test_is_symmetric_in_image_and_text():
    image, text = oracle_features()
    assert info_nce(image, text, 5.0).item() == pytest.approx(info_nce(text, image, 5.0).item(), rel=1e-6)


def test_similarities_stay_float32_under_bfloat16_autocast():
    image, text = oracle_features()
    plain = similarity(image, text, 50.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert (image @ text.T).dtype == torch.bfloat16  # what would happen without care
        inside = similarity(image, text, 50.0)
        loss = info_nce(image, text, 50.0)
    assert inside.dtype == torch.float32 and torch.equal(inside, plain)
    assert torch.equal(loss, info_nce(image, text, 50.0))


def test_bfloat16_features_are_compared_in_float32():
    image, text = (f.bfloat16() for f in oracle_features())
    assert torch.equal(info_nce(image, text, 14.0), info_nce(image.float(), text.float(), 14.0))
