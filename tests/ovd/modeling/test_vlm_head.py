"""The image-text model's score of a region."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ovd.modeling import vlm_head
from ovd.modeling.backbone import WindowedViT
from ovd.modeling.score_fusion import fuse_scores
from ovd.modeling.vlm_head import CropTextHead, ImageTextHead, RegionTextHead, shrink_boxes, square_boxes


@torch.no_grad()
def test_whole_image_box_is_the_image_embedding(image_text) -> None:
    visual, images = image_text.model.visual, torch.randn(2, 3, 160, 160)
    head = ImageTextHead(visual, 64, scale=100.0, output_size=10)
    feature_map = WindowedViT(visual.trunk, 160, window_size=0).eval()(images)["vit"]
    box = torch.tensor([[0.0, 0.0, 160.0, 160.0]])
    regions = head.embed_regions(feature_map, [box, box])
    whole = F.normalize(image_text.model.encode_image(images), dim=-1)
    assert F.cosine_similarity(regions, whole).min() > 0.99


@torch.no_grad()
def test_default_grid_is_close_to_the_image_embedding_too(image_text) -> None:
    visual, images = image_text.model.visual, torch.randn(1, 3, 160, 160)
    head = ImageTextHead(visual, 64, scale=100.0)
    feature_map = WindowedViT(visual.trunk, 160, window_size=0).eval()(images)["vit"]
    region = head.embed_regions(feature_map, [torch.tensor([[0.0, 0.0, 160.0, 160.0]])])
    assert F.cosine_similarity(region, image_text.model.encode_image(images)).item() > 0.99


@torch.no_grad()
def test_logits_are_scaled_cosines_and_probabilities_have_no_background(image_text) -> None:
    head = ImageTextHead(image_text.model.visual, 64, scale=30.0)
    words = torch.randn(5, 64)
    head.set_text_embeddings(words)
    feature_map, boxes = torch.randn(1, 96, 10, 10), [torch.tensor([[16.0, 16.0, 90.0, 120.0], [0, 0, 40, 40]])]
    region = head.embed_regions(feature_map, boxes)
    expected = 30.0 * F.cosine_similarity(region[:, None], words[None], dim=-1)
    torch.testing.assert_close(head(feature_map, boxes), expected)
    probabilities = head.probabilities(feature_map, boxes)
    assert (probabilities[:, 0] == 0).all()
    torch.testing.assert_close(probabilities[:, 1:], expected.softmax(dim=1))


FEATURE_MAP, BOXES = torch.randn(1, 96, 10, 10), [torch.tensor([[16.0, 16.0, 90.0, 120.0], [0, 0, 40, 40]])]


@torch.no_grad()
@pytest.mark.parametrize("built_with", [True, False])
def test_the_softmax_is_over_the_background_too(image_text, built_with: bool) -> None:
    words, background = torch.randn(5, 64), torch.randn(64)
    head = ImageTextHead(image_text.model.visual, 64, 30.0, background=background if built_with else None)
    head.set_text_embeddings(words, None if built_with else background)
    region = head.embed_regions(FEATURE_MAP, BOXES).double().numpy()
    rows = np.concatenate([background[None].double().numpy(), words.double().numpy()])
    weights = np.exp(30.0 * region @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T)
    expected = weights / weights.sum(axis=1, keepdims=True)
    probabilities = head.probabilities(FEATURE_MAP, BOXES)
    np.testing.assert_allclose(probabilities.numpy(), expected, rtol=1e-4, atol=1e-7)
    assert (probabilities[:, 0] > 0).all() and head(FEATURE_MAP, BOXES).shape == (2, 5)
    head.set_text_embeddings(words)
    assert bool((head.probabilities(FEATURE_MAP, BOXES)[:, 0] > 0).all()) == built_with


@torch.no_grad()
def test_fusion_with_the_background_gives_the_published_numbers() -> None:
    """Oracle 9: both softmaxes are over [background, base, novel, novel]; here the head makes the image-text one."""

    class Given(RegionTextHead):  # cosines of 1 with basis vectors: the embeddings are the logits, up to their length
        def feature_map(self, features, images, image_sizes):
            return features

        def embed_regions(self, feature_map, boxes):
            return feature_map

    logits = torch.tensor([[0.0, 3, 1, 2], [0, 1, 4, 0.5]])
    head = Given(16, 4, scale=1.0, box_scale=1.0, background=torch.eye(4)[0])
    head.unused = torch.nn.Parameter(torch.zeros(1))  # says where the head is
    head.set_text_embeddings(torch.eye(4)[1:])
    z = torch.tensor([[2.0, 1, 0, -1], [0.5, 3, 0.2, 0.1]]).softmax(1)
    fused = fuse_scores(z, head.probabilities(logits, []), torch.tensor([True, False, False]), 0.35, 0.65)
    expected = torch.tensor([[0.543459, 0.283711, 0.073549, 0.099281], [0.093349, 0.410235, 0.451591, 0.044825]])
    torch.testing.assert_close(fused, expected, atol=2e-6, rtol=0)


@torch.no_grad()
def test_one_word_with_a_background_depends_on_the_region(image_text) -> None:
    head = ImageTextHead(image_text.model.visual, 64, scale=30.0)
    head.set_text_embeddings(torch.randn(1, 64))
    assert (head.probabilities(FEATURE_MAP, BOXES)[:, 1] == 1).all()
    background = torch.randn(64)
    head.set_text_embeddings(head.text_embeddings, background)
    alone = head.probabilities(FEATURE_MAP, BOXES)[:, 1]
    cosines = [
        F.cosine_similarity(head.embed_regions(FEATURE_MAP, BOXES), v[None])
        for v in (*head.text_embeddings, background)
    ]
    torch.testing.assert_close(alone, (30.0 * (cosines[0] - cosines[1])).sigmoid())


@torch.no_grad()
def test_permuting_words_beside_a_background_permutes_their_probabilities(image_text) -> None:
    head, words, order = ImageTextHead(image_text.model.visual, 64, 30.0), torch.randn(5, 64), torch.randperm(5)
    head.set_text_embeddings(words, words.sum(dim=0))
    before = head.probabilities(FEATURE_MAP, BOXES)
    head.set_text_embeddings(words[order], words.sum(dim=0))
    permuted = head.probabilities(FEATURE_MAP, BOXES)
    torch.testing.assert_close(permuted, before[:, torch.cat([torch.tensor([0]), 1 + order])])


@pytest.mark.parametrize("background", [torch.zeros(64), torch.full((64,), torch.nan), torch.randn(5)])
def test_a_background_that_is_no_embedding_is_refused(image_text, background) -> None:
    head = ImageTextHead(image_text.model.visual, 64, scale=30.0)
    with pytest.raises(ValueError, match="text embedding"):
        head.set_text_embeddings(torch.randn(2, 64), background)
    assert len(head.text_embeddings) == 0 and "background" not in str(head.state_dict().keys())


@torch.no_grad()
@pytest.mark.parametrize("background", [None, torch.ones(64)])
def test_probabilities_in_parts_are_those_of_the_whole(image_text, monkeypatch, background) -> None:
    head = ImageTextHead(image_text.model.visual, 64, scale=30.0)
    head.set_text_embeddings(torch.randn(5, 64), background)
    feature_map, boxes = torch.randn(1, 96, 10, 10), [torch.rand(9, 4) * 60 + torch.tensor([0.0, 0, 80, 80])]
    whole = head.probabilities(feature_map, boxes)
    monkeypatch.setattr(vlm_head, "_VALUES_AT_ONCE", 13)
    torch.testing.assert_close(head.probabilities(feature_map, boxes), whole)
    assert head.probabilities(feature_map, [torch.zeros(0, 4)]).shape == (0, 6)


def test_shrinking_keeps_the_centre() -> None:
    shrunk = shrink_boxes(torch.tensor([[10.0, 20.0, 30.0, 60.0]]), 0.5)
    assert shrunk.tolist() == [[15.0, 30.0, 25.0, 50.0]]


def test_nothing_is_trainable_and_it_stays_in_evaluation_mode(image_text) -> None:
    visual = image_text.model.visual
    head = ImageTextHead(visual, 64, 100.0, tower=WindowedViT(visual.trunk, 160, frozen=True)).train()
    assert not any(parameter.requires_grad for parameter in head.parameters())
    assert not any(module.training for module in head.modules())


@torch.no_grad()
def test_a_crop_of_the_whole_image_is_exactly_the_image_embedding(image_text) -> None:
    images = torch.randn(2, 3, 160, 160)
    head = CropTextHead(image_text.model.visual, 64, scale=100.0, crop_size=160, box_scale=1.0)
    box = torch.tensor([[0.0, 0.0, 160.0, 160.0]])
    regions = head.embed_regions(head.feature_map({}, images, [(160, 160)] * 2), [box, box])
    torch.testing.assert_close(regions, F.normalize(image_text.model.encode_image(images), dim=-1))


@torch.no_grad()
def test_a_crop_does_not_see_its_surroundings(image_text) -> None:
    head = CropTextHead(image_text.model.visual, 64, scale=100.0, crop_size=64, box_scale=1.0, batch_size=1)
    image = torch.randn(1, 3, 128, 128)
    elsewhere = image.clone()
    elsewhere[..., 80:, :] = 5.0
    box = [torch.tensor([[8.0, 8.0, 72.0, 72.0], [0.0, 0.0, 64.0, 64.0]])]
    assert torch.equal(head.embed_regions(image, box), head.embed_regions(elsewhere, box))


@torch.no_grad()
def test_a_picture_without_boxes_has_no_embeddings(image_text) -> None:
    head = CropTextHead(image_text.model.visual, 64, scale=100.0, crop_size=32, box_scale=1.0)
    image = torch.zeros(1, 3, 64, 64)
    assert head.embed_regions(image, [torch.zeros(0, 4)]).shape == (0, 64)
    assert head.embed_regions(image, [torch.tensor([[0.0, 0.0, 9.0, 9.0]])]).shape == (1, 64)


def test_crops_are_anti_aliased(image_text) -> None:
    head = CropTextHead(image_text.model.visual, 64, scale=100.0, crop_size=32, box_scale=1.0)
    stripes = torch.zeros(1, 3, 128, 128)
    stripes[..., ::2] = 2.0  # at a quarter of the size only their mean, 1, may remain
    box = [torch.tensor([[0.0, 0.0, 128.0, 128.0]])]
    flat = head.embed_regions(torch.ones(1, 3, 128, 128), box)
    assert F.cosine_similarity(head.embed_regions(stripes, box), flat).item() > 0.999


def test_squares_keep_the_centre_and_the_longer_side() -> None:
    assert square_boxes(torch.tensor([[10.0, 20.0, 30.0, 60.0]]), 1.5).tolist() == [[-10.0, 10.0, 50.0, 70.0]]


def test_a_crop_size_that_is_no_multiple_of_the_patch_is_refused(image_text) -> None:
    with pytest.raises(ValueError, match="not a multiple of the patch size 16"):
        CropTextHead(image_text.model.visual, 64, 100.0, crop_size=50, box_scale=1.0)
