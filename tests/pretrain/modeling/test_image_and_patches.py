"""Patch embeddings in the joint space against the tower's own pieces, for timm's and open_clip's towers."""

import open_clip
import pytest
import torch
from open_clip.timm_model import TimmModel
from torch import nn

from pretrain.modeling.image_tower import encode_image, encode_image_and_patches, encode_tokens
from pretrain.modeling.plain_tower import plain_tower


def make_tower(kind: str) -> nn.Module:
    """64 px, patch 16, a joint space of 24 dimensions, positions that matter."""
    torch.manual_seed(0)
    if kind == "open_clip's own":
        tower = plain_tower(open_clip.transformer.VisionTransformer(64, 16, 48, 2, 4, 3.0, output_dim=24).eval())
    elif kind == "average":
        tower = TimmModel("test_vit4", embed_dim=24).eval()
        tower.set_input_size(64)
    else:
        tower = TimmModel("test_vit", embed_dim=24, pool="token" if kind == "class token" else "avg").eval()
        tower.set_input_size(64)
    with torch.no_grad():
        tower.trunk.pos_embed.normal_()
    return tower


KINDS = ("average", "class token", "class token not pooled", "open_clip's own")


@pytest.fixture(params=KINDS)
def tower(request):
    return make_tower(request.param)


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_image_is_the_plain_pass_and_all_patches_come_in_order(tower, images):
    image, patches = encode_image_and_patches(tower, images)
    torch.testing.assert_close(image, tower(images))
    assert patches.shape == (2, 16, 24)
    everything = torch.arange(16).expand(2, -1)
    for found, wanted in zip(encode_image_and_patches(tower, images, everything), (image, patches), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_patch_is_projected_as_the_pooled_token_is(tower, images):
    """A pooled token that is this patch: an average over it alone, or a class token in its place."""
    keep = torch.tensor([[3], [9]])
    image, patches = encode_image_and_patches(tower, images, keep)
    assert patches.shape == (2, 1, 24)
    if tower.trunk.global_pool == "avg":
        torch.testing.assert_close(patches[:, 0], image)
    else:
        tokens = encode_tokens(tower.trunk, images, keep)
        tokens[:, 0] = tokens[:, 1]
        torch.testing.assert_close(patches[:, 0], tower.head(tower.trunk.forward_head(tokens)))


@torch.no_grad()
def test_kept_patches_are_encoded_at_their_own_positions(tower, images):
    """Swapping two positions of the table and the patches' contents with them changes nothing but the order."""
    keep = torch.tensor([[2, 5, 11], [2, 5, 11]])
    _, patches = encode_image_and_patches(tower, images, keep)
    prefix = tower.trunk.num_prefix_tokens - (tower.trunk.num_prefix_tokens if tower.trunk.no_embed_class else 0)
    table = tower.trunk.pos_embed.clone()
    tower.trunk.pos_embed[:, [prefix + 2, prefix + 11]] = table[:, [prefix + 11, prefix + 2]]
    cut = images.unfold(2, 16, 16).unfold(3, 16, 16).flatten(2, 3).clone()  # (B, 3, N, 16, 16)
    cut[:, :, [2, 11]] = cut[:, :, [11, 2]]
    swapped = cut.unflatten(2, (4, 4)).transpose(3, 4).reshape(2, 3, 64, 64)
    _, other = encode_image_and_patches(tower, swapped, keep)
    torch.testing.assert_close(other, patches[:, [2, 1, 0]], atol=1e-5, rtol=1e-5)
    _, wrong = encode_image_and_patches(tower, images, keep)
    assert not torch.allclose(wrong, patches, atol=1e-3)


@torch.no_grad()
def test_what_a_mask_token_replaces_has_no_influence_but_a_position(tower, images):
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[:, 5], token = True, torch.full((tower.trunk.embed_dim,), 0.1)
    other = images.clone()
    other[:, :, 16:32, 16:32] = 3.0  # patch 5: second row, second column
    found, same = (encode_image_and_patches(tower, i, masked=masked, mask_token=token)[1] for i in (images, other))
    torch.testing.assert_close(found, same)
    masked[:, 5], masked[:, 6] = False, True
    assert not torch.allclose(encode_image_and_patches(tower, images, masked=masked, mask_token=token)[1], found)
    none = torch.zeros_like(masked)
    torch.testing.assert_close(
        encode_image_and_patches(tower, images, masked=none, mask_token=token)[0], encode_image(tower, images)
    )


def test_a_tower_that_pools_by_attention_is_refused(images):
    tower = TimmModel("test_vit3", embed_dim=24, pool="")
    tower.set_input_size(64)
    with pytest.raises(ValueError, match="pools by attention"):
        encode_image_and_patches(tower, images)
