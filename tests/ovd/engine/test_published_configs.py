"""The published configurations: they load, scale to the batch, and build with towers of the right kind."""

import json
import math

import numpy as np
import open_clip
import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf

from ovd.engine.defaults import build_sgd, scale_lr, scale_steps, warmup_steps
from ovd.engine.lazy_config import load_config
from ovd.modeling.rcnn import build_detector
from pretrain.config import ConfigError
from pretrain.config import load_config as load_pretraining
from pretrain.modeling.checkpoint import ImageTextModel
from pretrain.modeling.clip import open_clip_config

LVIS = ["configs/ovd/reclip_vit_b16_lvis.py", "configs/ovd/reclip_vit_l16_lvis.py"]
ALL = [*LVIS, "configs/ovd/reclip_vit_l16_coco.py"]


@pytest.mark.parametrize("path", LVIS)
def test_the_schedule_is_the_published_one_at_its_batch(path):
    cfg = load_config(path)
    assert (cfg.train.batch_size, cfg.train.max_iter, cfg.schedule.warmup_iters) == (256, 46100, 1000)
    assert cfg.optimizer.lr == pytest.approx(0.18) and cfg.optimizer.backbone_lr_factor == 0.6
    assert cfg.data.train.batch_size == 256 and cfg.schedule.max_iter == 46100


def test_rates_and_steps_follow_the_batch_at_hand_and_given_numbers_stay():
    cfg = load_config(LVIS[0], ["train.batch_size=64"])
    assert cfg.optimizer.lr == pytest.approx(0.045)
    assert (cfg.train.max_iter, cfg.schedule.warmup_iters, cfg.schedule.max_iter) == (184400, 4000, 184400)
    cfg = load_config(LVIS[0], ["train.batch_size=64", "train.max_iter=10", "optimizer.lr=0.5"])
    assert (cfg.train.max_iter, cfg.optimizer.lr, cfg.schedule.max_iter) == (10, 0.5, 10)


@pytest.mark.parametrize("batch_size", [1, 48, 256, 1000])
def test_scaled_runs_see_as_many_pictures(batch_size):
    steps = scale_steps(46100, 256, batch_size)
    assert 0 <= steps * batch_size - 46100 * 256 < batch_size
    assert scale_lr(0.18, 256, batch_size) * steps == pytest.approx(0.18 * 46100, rel=1e-3)
    with pytest.raises(ConfigError, match="at least 1"):
        scale_steps(10, 256, 0)


def test_the_step_schedule_warms_up_and_drops_three_times():
    schedule = warmup_steps(46100, 1000, 0.0178)
    assert schedule(0.0) == pytest.approx(0.0178)
    assert schedule(500 / 46100) == pytest.approx((0.0178 + 1) / 2, rel=1e-3)
    assert [schedule(x) for x in (0.03, 0.79, 0.81, 0.91, 0.96)] == pytest.approx([1, 1, 0.1, 0.01, 0.001])


def test_sgd_leaves_the_tower_undecayed_and_slower(image_text):
    model = build_detector(image_text=image_text)
    optimizer = build_sgd(model, lr=1.0, backbone_lr_factor=0.6, weight_decay=0.1)
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tower = name.startswith("backbone.net.")
            decay = 0.0 if tower or parameter.ndim <= 1 else 0.1
            assert settings[id(parameter)] == (0.6 if tower else 1.0, decay), name


def published_towers(config_name: str) -> ImageTextModel:
    """The towers of a pretraining configuration with random weights; of the text tower one layer."""
    config = load_pretraining(f"configs/pretrain/{config_name}.yaml").model
    config.text.layers = 1
    definition = open_clip_config(config)
    model = open_clip.CustomTextCLIP(**{key: definition[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}).eval()
    return ImageTextModel(model, _tokenizer, 224, (0.5,) * 3, (0.5,) * 3, config.embed_dim, "")


def _tokenizer(texts):
    return torch.zeros(len(texts), 64, dtype=torch.int64)


@pytest.mark.parametrize(
    ("path", "tower", "depth", "width", "blocks"),
    [
        (LVIS[0], "reclip_b16_64px_550k_ft20k", 12, 768, {2, 5, 8, 11}),
        (LVIS[1], "reclip_l16_64px_550k_ft20k", 24, 1024, {5, 11, 17, 23}),
    ],
)
def test_the_detector_builds_at_full_size_on_the_meta_device(path, tower, depth, width, blocks):
    cfg = load_config(path)
    with torch.device("meta"):
        towers = published_towers(tower)
        # Without the empty prompt: there is no data to embed it with.
        model = _build(cfg, towers, background="learned", vlm_background=False)
    net = model.backbone.net
    assert (len(net.blocks), net.pos_embed.shape[-1], net.global_blocks) == (depth, width, blocks)
    assert (net.window_size, net.image_size, model.architecture.detections_per_image) == (16, 1024, 300)
    assert {p.device.type for p in model.backbone.parameters()} == {"meta"}


def _build(cfg, towers, **overrides):
    return build_detector(instantiate(cfg.model.architecture), towers, **overrides)


def test_vit_b_trains_one_tiny_step_with_the_published_heads():
    torch.manual_seed(0)
    towers = published_towers("reclip_b16_64px_550k_ft20k")
    model = _build(load_config(LVIS[0]), towers, image_size=64, window_size=2, roi_batch_size=4).train()
    model.set_text_embeddings(torch.randn(5, towers.embed_dim))
    boxes = Boxes(torch.tensor([[8.0, 8.0, 44.0, 50.0]]))
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, 8:50, 8:44] = True
    target = Instances((64, 64), gt_boxes=boxes, gt_classes=torch.tensor([2]), gt_masks=BitMasks(mask))
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 64, 64), dtype=np.uint8))
    with EventStorage():
        losses = model([{"image": picture, "height": 64, "width": 64, "instances": target}])
    predictor = model.roi_heads.box_predictor
    assert (predictor.box_reg_loss_type, predictor.smooth_l1_beta) == ("smooth_l1", 1.0)  # Huber's loss
    assert torch.equal(
        model.roi_heads.image_text_head.background,
        torch.nn.functional.normalize(predictor.cls_score.background_embedding, dim=-1)[None],
    )
    sum(losses.values()).backward()
    assert all(math.isfinite(loss.item()) for loss in losses.values())
    assert model.backbone.net.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("path", ALL)
def test_each_configuration_opens_with_its_command_and_says_what_was_not_measured(path):
    text = open(path).read().split('"""')[1]
    assert f"--config {path}" in text and "Hardware and time: not yet measured" in text
    assert "Expected numbers: not yet measured" in text and "quoted" in text
    cfg = load_config(path)
    assert json.dumps(OmegaConf.to_container(cfg.train, resolve=True))
    assert tuple(cfg.data.train.mapper.scale_range) == (0.1, 2.0) and cfg.data.train.mapper.image_size == 1024


@pytest.mark.parametrize("path", ALL)
def test_the_text_embeddings_average_the_80_templates_of_imagenet(path):
    templates = list(load_config(path).text.templates)
    assert len(templates) == 80 and "a photo of a {}." in templates and all(t.count("{}") == 1 for t in templates)
