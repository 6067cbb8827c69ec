"""Batch noise by hand, by a loop, and over batches of a table."""

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.config import ConfigError
from pretrain.data.folder import ImageStore, read_table
from pretrain.data.tokenizer import build_tokenizer
from pretrain.evaluation.batch_noise import analyse_batches, noise_of_batch
from pretrain.evaluation.encoder import OWN_PREPROCESS, Encoder
from pretrain.modeling.clip import set_context_length, set_image_size


def test_three_pairs_by_hand():
    """Texts 0 and 1 are the same, so images 0 and 1 cannot tell them apart."""
    basis = torch.eye(3)
    diagonal, largest, others, count = noise_of_batch(basis[[0, 0, 2]], basis[[0, 0, 2]], math.log(4))
    # rows: (4, 4, 1) / 9 twice, then (1, 1, 4) / 6
    assert diagonal == pytest.approx((4 / 9 + 4 / 9 + 4 / 6) / 3)
    assert largest == pytest.approx((4 / 9 + 4 / 9 + 1 / 6) / 3)
    assert others == pytest.approx((5 / 9 + 5 / 9 + 2 / 6) / 6)
    assert count == 2


def test_it_agrees_with_a_loop():
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(7, 4), dim=-1) for _ in range(2))
    own, best, rest, count = [], [], [], 0
    for i in range(7):
        exponentials = [math.exp(6 * float(image[i] @ t)) for t in text]
        row = [e / sum(exponentials) for e in exponentials]
        others = [p for j, p in enumerate(row) if j != i]
        own.append(row[i])
        best.append(max(others))
        rest += others
        count += sum(p >= 0.2 for p in others)
    found = noise_of_batch(image, text, 6.0)
    assert found[:3] == pytest.approx((sum(own) / 7, sum(best) / 7, sum(rest) / 42), rel=1e-5) and found[3] == count


def test_a_model_that_knows_nothing_spreads_evenly():
    same = F.normalize(torch.ones(5, 3), dim=-1)
    assert noise_of_batch(same, same, 100.0) == pytest.approx((0.2, 0.2, 0.2, 20), rel=1e-5)


@pytest.fixture
def encoder(model):
    set_image_size(model, 32)
    set_context_length(model, 8)
    return Encoder(model, build_tokenizer(8), OWN_PREPROCESS, torch.device("cpu"), batch_size=10)


@pytest.fixture
def pairs(pairs_table):
    rows = read_table(pairs_table)
    return [row["image"] for row in rows], [row["caption"] for row in rows], ImageStore(pairs_table.parent)


def test_batches_of_a_table_are_counted_and_repeatable(encoder, pairs):
    first, again = (analyse_batches(encoder, *pairs, pairs=10, batches=0) for _ in range(2))
    assert first == again and (first.batches, first.pairs, first.broken) == (4, 10, 0)  # 48 pairs
    assert analyse_batches(encoder, *pairs, pairs=10, batches=3).batches == 3
    assert analyse_batches(encoder, *pairs, pairs=10, batches=0, seed=1) != first
    assert analyse_batches(encoder, *pairs, pairs=10, batches=1, logit_scale=100.0).logit_scale == 100


def test_one_batch_is_the_matrix_of_its_features(encoder, pairs):
    images, captions, store = pairs
    result = analyse_batches(encoder, images[:6], captions[:6], store, pairs=6)
    with torch.no_grad():
        image, text = torch.cat([f for _, f in encoder.images(images[:6], store)]), encoder.texts(captions[:6])
    expected = noise_of_batch(image, text, float(encoder.model.logit_scale.detach().exp()))  # the order does not matter
    found = (result.diagonal_mean, result.off_diagonal_max, result.off_diagonal_mean, result.confusable)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_broken_image_is_left_out_with_its_caption(encoder, pairs):
    images, captions, store = pairs
    result = analyse_batches(encoder, [*images[:6], "absent.png"], [*captions[:6], "no text"], store, pairs=6)
    whole = analyse_batches(encoder, images[:6], captions[:6], store, pairs=6)
    assert result.broken == 1 and result.diagonal_mean == pytest.approx(whole.diagonal_mean, rel=1e-5)


def test_too_few_pairs_are_refused(encoder, pairs):
    with pytest.raises(ConfigError, match=r"48 pairs make no batch of 64: choose 2 to 48 \(--pairs\)"):
        analyse_batches(encoder, *pairs, pairs=64)
    with pytest.raises(ConfigError, match="only 1 of 2 images could be read, too few for 2 pairs"):
        analyse_batches(encoder, [pairs[0][0], "absent.png"], ["a", "b"], pairs[2], pairs=2)
