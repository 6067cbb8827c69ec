"""The towers' parts put together again are the towers."""

import copy

import pytest
import torch
import torch.nn.functional as F

from pretrain.modeling.clip import set_context_length, set_image_size
from pretrain.modeling.head_encoder import HeadEncoder
from pretrain.modeling.tower_features import (
    feature_widths,
    image_features,
    position_resampling,
    project_image,
    project_text,
    text_features,
)


@pytest.fixture
def towers(model):
    set_image_size(model, 48)
    set_context_length(model, 8)
    return model


@pytest.fixture
def tokens():
    tokens = torch.randint(1, 49000, (3, 8), generator=torch.Generator().manual_seed(0))
    tokens[:, 0], tokens[0, -1] = 49406, 49407
    tokens[1:, 4], tokens[1:, 5:] = 49407, 0
    return tokens


@torch.no_grad()
def test_features_and_last_maps_are_the_towers(towers, tokens):
    images = torch.randn(3, 3, 48, 48)
    image, text = image_features(towers, images), text_features(towers, tokens)
    assert (image.shape[1], text.shape[1]) == feature_widths(towers)
    assert torch.equal(project_image(towers, image), towers.visual(images))
    assert torch.equal(project_text(towers, text), towers.text(tokens))


@torch.no_grad()
def test_another_image_size_is_what_the_resized_tower_sees(towers):
    images, other = torch.randn(2, 3, 64, 64), copy.deepcopy(towers)
    set_image_size(other, 64)
    features = image_features(towers, images, position_resampling(towers, 64))
    torch.testing.assert_close(features, image_features(other, images), atol=1e-5, rtol=1e-5)
    assert torch.equal(position_resampling(towers, 48), torch.eye(9))
    with pytest.raises(ValueError, match="50 is not a multiple of the patch size 16: use 48"):
        position_resampling(towers, 50)


@torch.no_grad()
def test_text_dropout_acts_in_training_only(towers, tokens):
    plain = text_features(towers, tokens)
    assert torch.equal(text_features(towers, tokens, dropout=0.3), plain)
    towers.train()
    assert torch.equal(text_features(towers, tokens), plain)
    assert not torch.equal(text_features(towers, tokens, dropout=0.3), plain)


@torch.no_grad()
def test_a_head_encoder_has_unit_embeddings_whose_cosine_is_the_weighted_one(towers, tokens):
    image_width, text_width = feature_widths(towers)
    heads = torch.nn.Linear(image_width, 6), torch.nn.Linear(text_width, 6)
    images, cosines = torch.randn(3, 3, 48, 48), {}
    for weight in (0.0, 0.25, 1.0):
        encoder = HeadEncoder(towers, *heads, weight)
        image, text = encoder.encode_image(images, normalize=True), encoder.encode_text(tokens, normalize=False)
        torch.testing.assert_close(image.norm(dim=1), torch.ones(3))
        cosines[weight] = image @ text.T
    own = F.normalize(towers.encode_image(images), dim=1) @ F.normalize(towers.encode_text(tokens), dim=1).T
    torch.testing.assert_close(cosines[1.0], own)
    torch.testing.assert_close(cosines[0.25], 0.25 * own + 0.75 * cosines[0.0])
