"""Converted image towers against open_clip's own forward pass."""

import open_clip
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from ovd.modeling.backbone import WindowedViT
from ovd.modeling.image_tower import value_attention
from pretrain.modeling.plain_tower import plain_tower


def make_native(**options) -> nn.Module:
    """open_clip's own ViT (64 wide, 3 deep, patch 16, 80 px) with weights that matter."""
    torch.manual_seed(1)
    settings = {"mlp_ratio": 3.0, "output_dim": 24, **options}
    visual = open_clip.transformer.VisionTransformer(80, 16, 64, 3, 4, **settings).eval()
    with torch.no_grad():
        for name, parameter in visual.named_parameters():
            if parameter.ndim == 1:  # norms, biases, layer scales, the class token
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name == "positional_embedding":
                parameter.normal_()
    return visual


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"act_layer": open_clip.transformer.QuickGELU},
        {"ls_init_value": 0.5, "no_ln_pre": True},
        {"pool_type": "avg", "final_ln_after_pool": True},
        {"pool_type": "avg"},
        {"final_ln_after_pool": True},
    ],
)
@torch.no_grad()
def test_a_tower_of_open_clips_own_class_gives_the_same_features_and_embeddings(options) -> None:
    visual, images = make_native(**options), torch.randn(2, 3, 80, 80)
    tower = plain_tower(visual)
    torch.testing.assert_close(tower(images), visual(images), atol=1e-5, rtol=1e-5)
    normalise = not options.get("final_ln_after_pool", False)
    kept = visual.forward_intermediates(images, indices=1, normalize_intermediates=normalise)["image_intermediates"]
    ours = WindowedViT(tower.trunk, 80, window_size=0).eval()(images)["vit"]
    torch.testing.assert_close(ours, kept[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_converted_tower_takes_crops_of_another_size() -> None:
    visual, images = make_native(), torch.randn(2, 3, 48, 48)
    tower = plain_tower(visual)
    tower.set_input_size(48)
    table = visual.positional_embedding
    rows = resample_abs_pos_embed(table[None, 1:], [3, 3], [5, 5], num_prefix_tokens=0)[0]
    visual.positional_embedding = nn.Parameter(torch.cat([table[:1], rows]))
    torch.testing.assert_close(tower(images), visual(images), atol=1e-5, rtol=1e-5)


def test_a_timm_tower_is_given_back_and_what_cannot_be_converted_is_refused() -> None:
    tower = nn.Module()
    tower.trunk = timm.create_model("test_vit", num_classes=0)
    assert plain_tower(tower) is tower
    with pytest.raises(ValueError, match="pools by attention"):
        plain_tower(make_native(attentional_pool=True, attn_pooler_heads=4))
    with pytest.raises(ValueError, match="CustomResidualAttentionBlock"):
        plain_tower(make_native(qk_norm=True))
    with pytest.raises(ValueError, match="is a Linear"):
        plain_tower(nn.Linear(1, 1))


@torch.no_grad()
def test_value_attention_reads_patches_as_the_class_token_is_read() -> None:
    visual, images = make_native(), torch.randn(1, 3, 80, 80)
    tower = plain_tower(visual)
    ours = WindowedViT(value_attention(tower.trunk), 80, window_size=0).eval()(images)["vit"]
    # By hand from open_clip's own modules: MultiheadAttention that may attend to nothing but the token itself.
    tokens = visual._embeds(images)
    for block in visual.transformer.resblocks[:-1]:
        tokens = block(tokens)
    last = visual.transformer.resblocks[-1]
    itself = ~torch.eye(26, dtype=torch.bool)
    normed = last.ln_1(tokens)
    values = last.attn(normed, normed, normed, need_weights=False, attn_mask=itself)[0]
    expected = visual.ln_post(values)[:, 1:].transpose(1, 2).reshape(1, 64, 5, 5)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    with_class = tower.trunk.blocks[-1]
    assert hasattr(with_class, "mlp")  # the given trunk is left alone
