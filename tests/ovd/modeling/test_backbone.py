"""The windowed ViT against timm's own forward pass, and its independence of padding."""

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from ovd.modeling.backbone import ViTFeaturePyramid, WindowedViT, global_block_indices


def make_trunk(prefix: int = 1, seed: int = 0) -> nn.Module:
    """test_vit4 (96 wide, 9 deep, patch 16, 160 px) with `prefix` register tokens and weights that matter."""
    torch.manual_seed(seed)
    trunk = timm.create_model("test_vit4", num_classes=0, reg_tokens=prefix).eval()
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():
            if "pos_embed" in name or "reg_token" in name:
                parameter.normal_(std=0.5)
            if name.endswith(".gamma"):
                parameter.fill_(0.5)
    return trunk


def features_of_timm(trunk: nn.Module, images: torch.Tensor) -> torch.Tensor:
    tokens = trunk.forward_features(images)[:, trunk.num_prefix_tokens :]
    side = int(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).reshape(len(images), -1, side, side)


@pytest.mark.parametrize(
    ("depth", "indices"), [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (9, (1, 3, 5, 8)), (2, (0, 1))]
)
def test_global_blocks_are_evenly_spaced_and_include_the_last(depth: int, indices: tuple[int, ...]) -> None:
    assert global_block_indices(depth) == indices


@pytest.mark.parametrize("prefix", [0, 1, 2])
@torch.no_grad()
def test_all_global_at_pretraining_size_equals_timm(prefix: int) -> None:
    trunk, images = make_trunk(prefix), torch.randn(2, 3, 160, 160)
    ours = WindowedViT(trunk, 160, window_size=0).eval()(images)["vit"]
    torch.testing.assert_close(ours, features_of_timm(trunk, images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_class_token_tower_with_final_norm_equals_timm() -> None:
    torch.manual_seed(0)
    trunk = timm.create_model("test_vit", num_classes=0, class_token=True, global_pool="token").eval()
    images = torch.randn(1, 3, 160, 160)
    ours = WindowedViT(trunk, 160, window_size=0).eval()(images)["vit"]
    torch.testing.assert_close(ours, features_of_timm(trunk, images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_larger_pictures_use_timms_resampled_positions() -> None:
    trunk, images = make_trunk(), torch.randn(1, 3, 320, 320)  # test_vit4 resamples by itself
    net = WindowedViT(trunk, 320, window_size=0).eval()
    torch.testing.assert_close(net(images)["vit"], features_of_timm(trunk, images), atol=1e-5, rtol=1e-5)
    expected = resample_abs_pos_embed(trunk.pos_embed, [20, 20], num_prefix_tokens=1)[:, 1:]
    positions, _ = net._positions([(20, 20)], (20, 20))
    torch.testing.assert_close(positions.reshape(1, 400, -1), expected)


@torch.no_grad()
def test_one_window_of_the_whole_grid_is_global_attention() -> None:
    trunk, images = make_trunk(), torch.randn(2, 3, 160, 160)
    windowed = WindowedViT(trunk, 160, window_size=10, global_blocks=1).eval()
    everywhere = WindowedViT(trunk, 160, window_size=0).eval()
    torch.testing.assert_close(windowed(images), everywhere(images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_window_larger_than_the_grid_changes_nothing() -> None:
    trunk, images = make_trunk(), torch.randn(1, 3, 160, 128)
    larger = WindowedViT(trunk, 160, window_size=13).eval()
    everywhere = WindowedViT(trunk, 160, window_size=0).eval()
    torch.testing.assert_close(larger(images), everywhere(images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_windows_are_independent_without_global_blocks_and_prefix() -> None:
    net = WindowedViT(make_trunk(0), 160, window_size=5, global_blocks=()).eval()
    images = torch.randn(1, 3, 160, 160)
    changed = images.clone()
    changed[:, :, :80, :80] += 1  # the top left window only
    difference = (net(images)["vit"] - net(changed)["vit"]).abs().amax(dim=(0, 1))
    assert (difference[:5, :5] > 1e-3).all()
    assert difference[5:].max() == 0 and difference[:5, 5:].max() == 0


@pytest.mark.parametrize("prefix", [0, 1])
@torch.no_grad()
def test_padding_does_not_change_the_picture(prefix: int) -> None:
    net = WindowedViT(make_trunk(prefix), 160, window_size=3).eval()
    picture, other = torch.randn(1, 3, 90, 130), torch.randn(1, 3, 160, 160)
    alone = net(picture)["vit"]
    batch = torch.full((2, 3, 224, 160), 0.0)
    batch[0, :, :90, :130] = picture[0]
    batch[1, :, :160] = other[0]
    together = net(batch, [(90, 130), (160, 160)])["vit"]
    torch.testing.assert_close(together[:1, :, :6, :9], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1:, :, :10, :10], net(other)["vit"], atol=1e-5, rtol=1e-5)
    assert together[0, :, 6:].abs().max() == 0 and together[0, :, :, 9:].abs().max() == 0


@pytest.mark.parametrize("size", [(90, 130), (128, 64), (33, 31)])
@torch.no_grad()
def test_no_map_of_the_pyramid_depends_on_how_far_a_picture_is_padded(size) -> None:
    torch.manual_seed(3)
    pyramid = ViTFeaturePyramid(WindowedViT(make_trunk(1), 160, window_size=3), 16).eval()
    for parameter in pyramid.parameters():  # biases are zero at first, and would hide a difference
        parameter.add_(0.1 * torch.randn_like(parameter))
    height, width = size
    picture = torch.randn(1, 3, height, width)

    def maps(canvas_height: int, canvas_width: int) -> dict[str, torch.Tensor]:
        canvas = torch.zeros(1, 3, canvas_height, canvas_width)
        canvas[..., :height, :width] = picture
        return pyramid(canvas, [size])

    least = maps(-(-height // 32) * 32, -(-width // 32) * 32)
    for name, padded in maps(160, 192).items():
        rows, columns = least[name].shape[-2:]
        torch.testing.assert_close(padded[..., :rows, :columns], least[name], atol=2e-5, rtol=1e-4, msg=name)
        assert padded[..., rows:, :].abs().sum() + padded[..., columns:].abs().sum() == 0, name


def test_frozen_backbone_is_bit_identical_after_a_step() -> None:
    pyramid = ViTFeaturePyramid(WindowedViT(make_trunk(), 160, frozen=True), 16).train()
    before = {name: value.clone() for name, value in pyramid.net.state_dict().items()}
    optimizer = torch.optim.AdamW(pyramid.parameters(), lr=0.1, weight_decay=0.1)
    head = pyramid.simfp_4[0].weight.detach().clone()
    sum(value.square().mean() for value in pyramid(torch.randn(1, 3, 160, 160)).values()).backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in pyramid.net.state_dict().items())
    assert not pyramid.net.training and not torch.equal(head, pyramid.simfp_4[0].weight)


def test_the_given_trunk_is_left_alone() -> None:
    trunk = make_trunk()
    net = WindowedViT(trunk, 160, frozen=True)
    with torch.no_grad():
        net.pos_embed.zero_()
        net.blocks[0].mlp.fc1.weight.zero_()
    assert trunk.pos_embed.abs().max() > 0 and trunk.blocks[0].mlp.fc1.weight.abs().max() > 0
    assert all(parameter.requires_grad for parameter in trunk.parameters())


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        net = WindowedViT(make_trunk(), 160, gradient_checkpointing=checkpointing).train()
        torch.manual_seed(5)
        net(torch.randn(1, 3, 160, 160))["vit"].square().mean().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    assert all(g is not None for g in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_pyramid_strides_and_channels() -> None:
    pyramid = ViTFeaturePyramid(WindowedViT(make_trunk(), 160), 16).eval()
    shapes = {name: tuple(value.shape) for name, value in pyramid(torch.randn(1, 3, 160, 128)).items()}
    assert shapes == {
        "p2": (1, 16, 40, 32),
        "p3": (1, 16, 20, 16),
        "p4": (1, 16, 10, 8),
        "p5": (1, 16, 5, 4),
        "vit": (1, 96, 10, 8),
    }
    assert {name: shape.stride for name, shape in pyramid.output_shape().items()} == {
        "p2": 4,
        "p3": 8,
        "p4": 16,
        "p5": 32,
        "vit": 16,
    }


def test_a_tower_that_is_no_plain_vit_is_refused() -> None:
    with pytest.raises(ValueError, match="is a Conv2d, but the backbone needs a timm VisionTransformer"):
        WindowedViT(nn.Conv2d(3, 3, 1), 160)
