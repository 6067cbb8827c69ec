"""Towers whose patch side is no power of two: the backbone's copy is resampled, what belongs to the words is not."""

import json

import numpy as np
import open_clip
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn

from ovd.detector_folder import read_detector, save_detector
from ovd.modeling.backbone import ViTFeaturePyramid, WindowedViT, next_power_of_two, resample_patches
from ovd.modeling.rcnn import OpenVocabularyRCNN, build_detector
from pretrain.modeling.checkpoint import load_checkpoint
from pretrain.modeling.plain_tower import plain_tower

SMALL = {
    "image_size": 160, "window_size": 3, "pyramid_channels": 16, "box_fc_dim": 32, "box_conv_dim": 16,
    "mask_conv_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="session")
def native14_folder(tmp_path_factory):
    """Checkpoint folder whose image tower is open_clip's own ViT with patches of 14 px, pooled by its class token."""
    folder = tmp_path_factory.mktemp("native14")
    config = {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 140, "layers": 3, "width": 64, "head_width": 16, "patch_size": 14},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    }
    torch.manual_seed(5)
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return folder


@pytest.fixture
def towers(request, patch14_folder, native14_folder):
    """A folder with timm's tower, or with open_clip's own, and the image-text score that it can have."""
    return {"timm": (patch14_folder, "backbone"), "open_clip": (native14_folder, "crops")}[request.param]


both_kinds = pytest.mark.parametrize("towers", ["timm", "open_clip"], indirect=True)


def enlarge_patches(images: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """Every patch of (B, 3, H, W) enlarged by itself, by Pillow's bilinear resizing."""
    batch, channels, height, width = images.shape
    rows, columns = height // before, width // before
    patches = images.reshape(batch, channels, rows, before, columns, before).permute(0, 1, 2, 4, 3, 5)
    resized = [
        np.asarray(Image.fromarray(patch).resize((after, after), Image.Resampling.BILINEAR))
        for patch in patches.reshape(-1, before, before).numpy()
    ]
    patches = torch.from_numpy(np.stack(resized)).reshape(batch, channels, rows, columns, after, after)
    return patches.permute(0, 1, 2, 4, 3, 5).reshape(batch, channels, rows * after, columns * after)


@pytest.mark.parametrize(("side", "expected"), [(14, 16), (16, 16), (8, 8), (32, 32), (20, 32), (1, 1), (17, 32)])
def test_patches_grow_to_the_next_power_of_two_and_those_that_are_one_stay(side, expected) -> None:
    assert next_power_of_two(side) == expected


@pytest.mark.parametrize(("before", "after"), [(14, 16), (12, 16), (10, 16), (20, 32)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_patch_enlarged_bilinearly_keeps_its_embedding(before, after, bias) -> None:
    torch.manual_seed(0)
    embed, images = nn.Conv2d(3, 24, before, before, bias=bias), torch.randn(2, 3, 3 * before, 2 * before)
    resampled = resample_patches(embed, after)
    assert resampled.kernel_size == resampled.stride == (after, after)
    torch.testing.assert_close(resampled(enlarge_patches(images, before, after)), embed(images), atol=1e-5, rtol=1e-5)


@both_kinds
@torch.no_grad()
def test_a_resampled_tower_sees_in_larger_patches_what_the_tower_saw(towers) -> None:
    visual, images = load_checkpoint(towers[0]).model.visual, torch.randn(1, 3, 140, 140)
    tower = plain_tower(visual)
    tokens = tower.trunk.forward_features(images)[:, tower.trunk.num_prefix_tokens :]
    net = WindowedViT(tower.trunk, 160, window_size=0, power_of_two_patches=True).eval()
    found = net(enlarge_patches(images, 14, 16))["vit"]
    expected = tokens.transpose(1, 2).reshape(found.shape)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_patches_that_are_a_power_of_two_are_not_touched(image_text) -> None:
    net = build_detector(dict(SMALL), image_text).backbone.net
    embed = image_text.model.visual.trunk.patch_embed.proj
    assert torch.equal(net.patch_embed.weight, embed.weight) and net.patch_embed.weight is not embed.weight


def test_a_pyramid_on_other_patches_says_what_to_do(patch14_folder) -> None:
    net = WindowedViT(load_checkpoint(patch14_folder).model.visual.trunk, 160)
    with pytest.raises(ValueError, match="patches of 14 px.*build the WindowedViT with power_of_two_patches"):
        ViTFeaturePyramid(net)


def inputs(train: bool) -> dict:
    """A noise picture that no patch side divides, with two objects where it is to be trained on."""
    generator = torch.Generator().manual_seed(3)
    given = {"image": torch.randint(256, (3, 150, 130), dtype=torch.uint8, generator=generator)}
    if train:
        target, masks = Instances((150, 130)), torch.zeros(2, 150, 130, dtype=torch.bool)
        masks[0, 20:90, 10:80] = masks[1, 50:140, 60:120] = True
        target.gt_masks = BitMasks(masks)
        target.gt_boxes = Boxes(torch.tensor([[10.0, 20, 80, 90], [60, 50, 120, 140]]))
        target.gt_classes = torch.tensor([0, 1])
        given["instances"] = target
    return given


def detections(model: OpenVocabularyRCNN) -> list[torch.Tensor]:
    found = model.eval().inference([inputs(train=False)])[0]["instances"]
    return [found.pred_boxes.tensor, found.scores, found.pred_classes, found.pred_masks]


@both_kinds
@pytest.mark.parametrize("frozen", [False, True])
def test_a_detector_of_14_px_patches_trains_is_saved_and_detects_the_same_when_read_again(
    towers, frozen, tmp_path
) -> None:
    folder, mode = towers
    torch.manual_seed(0)
    fields = {**SMALL, "vlm_mode": mode, "distillation": "shared", "freeze_backbone": frozen}
    model = build_detector(fields, load_checkpoint(folder))
    strides = {name: shape.stride for name, shape in model.backbone.output_shape().items()}
    assert strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "vit": 16}
    words = torch.randn(3, 64)
    model.set_text_embeddings(words)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = model.backbone.net.patch_embed.weight.clone()
    with EventStorage():
        losses = model.train()([inputs(train=True)])
    sum(losses.values()).backward()
    optimizer.step()
    assert torch.equal(before, model.backbone.net.patch_embed.weight) == frozen
    save_detector(tmp_path, model, folder, base_names=["cat"])
    again, image_text, _ = read_detector(tmp_path)
    again.set_text_embeddings(words)
    wanted = detections(model)
    assert len(wanted[0]) > 0
    assert all(torch.equal(a, b) for a, b in zip(detections(again), wanted, strict=True))
    assert plain_tower(image_text.model.visual).trunk.patch_embed.proj.kernel_size == (14, 14)
    assert image_text.fingerprint == load_checkpoint(folder).fingerprint


@pytest.mark.parametrize(("mode", "side"), [("backbone", 16), ("frozen_copy", 14), ("crops", 14)])
def test_only_the_backbones_map_has_resampled_patches(patch14_folder, mode, side) -> None:
    image_text = load_checkpoint(patch14_folder)
    kept = {name: value.clone() for name, value in image_text.model.state_dict().items()}
    model = build_detector({**SMALL, "vlm_mode": mode}, image_text)
    head = model.roi_heads.image_text_head
    assert head.stride == side and model.backbone.net.patch_size == 16
    assert all(torch.equal(value, kept[name]) for name, value in image_text.model.state_dict().items())
    embeds = {"frozen_copy": lambda: head.tower.patch_embed, "crops": lambda: head.visual.trunk.patch_embed.proj}
    if mode in embeds:
        assert torch.equal(embeds[mode]().weight, kept["visual.trunk.patch_embed.proj.weight"])


@torch.no_grad()
def test_regions_are_read_where_they_are_on_a_resampled_map(patch14_folder) -> None:
    image_text = load_checkpoint(patch14_folder)
    model = build_detector({**SMALL, "vlm_mode": "backbone", "vlm_output_size": 2}, image_text).eval()
    head, torch_map = model.roi_heads.image_text_head, torch.zeros(1, 96, 10, 10)
    torch_map[:, :, 2:4, 6:8] = torch.randn(96, 1, 1)
    patch = head.embed_regions(torch_map, [torch.tensor([[104.0, 40.0, 120.0, 56.0]])])  # of 16 px, in the middle
    expected = head.projection(head.trunk_head(head.fc_norm(torch_map[:, :, 2, 6])))
    torch.testing.assert_close(patch, nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=1e-5)
