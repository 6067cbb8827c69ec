"""The whole network: training step, vocabulary change, fusion, modes."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from ovd.modeling.detector_config import DetectorConfig
from ovd.modeling.rcnn import OpenVocabularyRCNN, build_detector
from pretrain.modeling.checkpoint import load_checkpoint
from pretrain.modeling.clip import set_image_size

SMALL = {"image_size": 160, "pyramid_channels": 16, "box_fc_dim": 32, "box_conv_dim": 16, "mask_conv_dim": 16}


def small_detector(image_text, seed: int = 0, **fields) -> OpenVocabularyRCNN:
    torch.manual_seed(seed)
    return build_detector(DetectorConfig(**SMALL), image_text, **fields)


def words(count: int) -> torch.Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(11))


def picture(seed: int = 0, height: int = 160, width: int = 160) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {"image": torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)}


def training_picture(seed: int, objects: int = 2) -> dict:
    inputs, target = picture(seed), Instances((160, 160))
    boxes = torch.tensor([[10.0, 20.0, 80.0, 90.0], [60.0, 50.0, 150.0, 140.0]])[:objects]
    masks = torch.zeros(objects, 160, 160, dtype=torch.bool)
    for mask, box in zip(masks, boxes.long(), strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = True
    target.gt_boxes, target.gt_masks = Boxes(boxes), BitMasks(masks)
    target.gt_classes = torch.arange(objects) % 3
    return inputs | {"instances": target}


def parts_of(model: OpenVocabularyRCNN, inputs: dict):
    return model.inference([inputs], return_parts=True)[0]["parts"]


def test_a_training_step_reaches_every_trainable_parameter(image_text) -> None:
    model = small_detector(image_text).train()
    model.set_text_embeddings(words(3))
    with EventStorage():
        losses = model([training_picture(0), training_picture(1)])
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    sum(losses.values()).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing and all(torch.isfinite(loss) for loss in losses.values())


def test_pictures_without_objects_train(image_text) -> None:
    model = small_detector(image_text).train()
    model.set_text_embeddings(words(3))
    with EventStorage():
        losses = model([training_picture(0, objects=0), training_picture(1, objects=0)])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["loss_mask"] == 0 and losses["loss_box_reg"] == 0


def test_training_learns_two_pictures(image_text) -> None:
    model = small_detector(image_text, vlm_mode="off").train()
    model.set_text_embeddings(words(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batch, totals = [training_picture(0), training_picture(1)], []
    with EventStorage():
        for _ in range(25):
            total = sum(model(batch).values())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            totals.append(total.item())
    assert sum(totals[-3:]) / 3 < 0.6 * totals[0]


@pytest.mark.parametrize("mode", ["backbone", "frozen_copy", "crops"])
def test_frozen_weights_stay_bit_identical(image_text, mode: str) -> None:
    model = small_detector(image_text, freeze_backbone=True, vlm_mode=mode).train()
    model.set_text_embeddings(words(3))
    frozen = ("backbone.net.", "roi_heads.image_text_head.")
    before = {n: v.clone() for n, v in model.state_dict().items() if n.startswith(frozen)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with EventStorage():
        sum(model([training_picture(0)]).values()).backward()
    optimizer.step()
    assert before and all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_boxes_do_not_depend_on_the_vocabulary(image_text) -> None:
    model, inputs = small_detector(image_text).eval(), picture()
    model.set_text_embeddings(words(4))
    first = parts_of(model, inputs)
    model.set_text_embeddings(torch.randn(9, 64))
    second = parts_of(model, inputs)
    assert torch.equal(first.boxes, second.boxes) and torch.equal(first.objectness, second.objectness)


@pytest.mark.parametrize("mode", ["backbone", "frozen_copy", "crops", "off"])
@pytest.mark.parametrize("background", [False, True])
def test_permuting_the_vocabulary_permutes_the_scores(image_text, mode: str, background: bool) -> None:
    model = small_detector(image_text, vlm_mode=mode, vlm_background=background).eval()
    inputs, order = picture(), torch.tensor([3, 0, 4, 1, 2])
    is_base = torch.tensor([True, False, True, False, False])
    model.set_text_embeddings(words(5), is_base)
    scores = parts_of(model, inputs).fused(model.roi_heads.is_base, 0.35, 0.65, 0.0)
    model.set_text_embeddings(words(5)[order], is_base[order])
    permuted = parts_of(model, inputs).fused(model.roi_heads.is_base, 0.35, 0.65, 0.0)
    columns = torch.cat([torch.tensor([0]), order + 1])
    torch.testing.assert_close(permuted, scores[:, columns], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 5000])
@pytest.mark.parametrize("background", [False, True])
def test_a_vocabulary_of_any_size_is_scored_as_the_formula_says(image_text, count: int, background: bool) -> None:
    model = small_detector(image_text, detections_per_image=20, vlm_background=background).eval()
    model.set_text_embeddings(words(count), torch.zeros(count, dtype=torch.bool))
    output = model.inference([picture() | {"height": 80, "width": 100}], return_parts=True)[0]
    instances, parts = output["instances"], output["parts"]
    assert instances.pred_masks.shape == (len(instances), 80, 100) and len(instances) <= 20
    z, p = parts.detector.double().numpy(), parts.image_text.double().numpy()
    np.testing.assert_allclose(z.sum(axis=1), 1, rtol=1e-4)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-4)
    assert (p[:, 0] > 0).all() == background and ((p[:, 1] < 1).all() or (count == 1 and not background))
    classes = z[:, 1:] ** 0.35 * p[:, 1:] ** 0.65  # all are novel
    fused = classes / (z[:, :1] + classes.sum(axis=1, keepdims=True))
    # NMS leaves the best of each class alone, so the best of all is the first detection.
    region, label = np.unravel_index(fused.argmax(), fused.shape)
    assert instances.scores[0].item() == pytest.approx(fused.max(), rel=1e-4)
    assert fused[:, int(instances.pred_classes[0])].max() == pytest.approx(fused[region, label], rel=1e-4)
    assert (instances.scores.diff() <= 0).all() and int(instances.pred_classes.max()) < count


def test_the_background_of_the_image_text_score_is_the_empty_prompt(image_text) -> None:
    inputs, empty = picture(), image_text.model.encode_text(image_text.tokenizer([""]))[0].detach()
    plain, with_background = (small_detector(image_text, vlm_background=on).eval() for on in (False, True))
    assert set(plain.state_dict()) == set(with_background.state_dict())
    for model in (plain, with_background):
        model.set_text_embeddings(words(3))
    before, expected = parts_of(plain, inputs).image_text, parts_of(with_background, inputs).image_text
    assert (before[:, 0] == 0).all() and (expected[:, 0] > 0).all()
    # The words' shares among themselves are those of before.
    torch.testing.assert_close(
        expected[:, 1:] / expected[:, 1:].sum(1, keepdim=True), before[:, 1:], rtol=1e-3, atol=1e-6
    )
    plain.set_text_embeddings(words(3), vlm_background=empty)
    assert torch.equal(parts_of(plain, inputs).image_text, expected)
    plain.set_text_embeddings(words(3))
    assert torch.equal(parts_of(plain, inputs).image_text, before)


def test_independent_scores_fuse_with_a_background_too(image_text) -> None:
    model = small_detector(image_text, classification="sigmoid", vlm_background=True).eval()
    model.set_text_embeddings(words(1), torch.tensor([False]))
    parts = parts_of(model, picture())
    assert parts.independent and (parts.image_text[:, 1] < 1).all()
    expected = parts.detector[:, 1] ** 0.35 * parts.image_text[:, 1] ** 0.65
    torch.testing.assert_close(parts.fused(model.roi_heads.is_base, 0.35, 0.65, 0.0)[:, 1], expected)


def test_candidate_limit_keeps_the_best_detections(image_text) -> None:
    model = small_detector(image_text, detections_per_image=10).eval()
    model.set_text_embeddings(words(30))
    everything = model([picture()])[0]["instances"]
    model.roi_heads.max_candidates = 1200  # of 60 regions x 30 words
    limited = model([picture()])[0]["instances"]
    assert torch.equal(limited.scores, everything.scores) and torch.equal(limited.pred_classes, everything.pred_classes)


def test_fusion_off_equals_zero_weights(image_text) -> None:
    inputs, alone = picture(), small_detector(image_text, vlm_mode="off").eval()
    zero = small_detector(image_text, vlm_mode="backbone", alpha=0.0, beta=0.0).eval()
    for model in (alone, zero):
        model.set_text_embeddings(words(4))
    first, second = alone([inputs])[0]["instances"], zero([inputs])[0]["instances"]
    torch.testing.assert_close(first.scores, second.scores)
    assert torch.equal(first.pred_classes, second.pred_classes)


def test_kept_parts_fused_again_give_the_detections(image_text) -> None:
    model = small_detector(image_text, alpha=0.2, beta=0.7, objectness_delta=1.0).eval()
    model.set_text_embeddings(words(4), torch.tensor([True, True, False, False]))
    output = model.inference([picture()], return_parts=True)[0]
    again = model.roi_heads.select_detections([output["parts"]])[0]
    assert torch.equal(again.scores, output["instances"].scores)
    scores = output["parts"].fused(model.roi_heads.is_base, 0.2, 0.7, 1.0)
    assert output["instances"].scores.max() == pytest.approx(scores[:, 1:].max().item())


def test_frozen_copy_scores_with_the_pretrained_tower(image_text) -> None:
    model = small_detector(image_text, vlm_mode="frozen_copy").eval()
    model.set_text_embeddings(words(4))
    before = parts_of(model, picture())
    with torch.no_grad():
        model.backbone.net.blocks[0].attn.proj.weight.add_(0.1)  # as training would change the backbone
    images = model.preprocess_image([picture()])
    proposal = Instances(
        (160, 160), proposal_boxes=Boxes(before.proposals), objectness_logits=torch.zeros(len(before.boxes))
    )
    features = model.backbone(images.tensor, images.image_sizes)
    after = model.roi_heads.score_regions(images, features, [proposal])[0]
    assert torch.equal(after.image_text, before.image_text) and not torch.equal(after.detector, before.detector)


def test_padding_in_a_batch_does_not_change_the_image_text_map(image_text) -> None:
    model = small_detector(image_text).eval()
    small, large = picture(0, 96, 160), picture(1, 160, 160)
    alone = model.preprocess_image([small])
    both = model.preprocess_image([small, large])
    assert isinstance(both, ImageList) and both.tensor.shape[-2:] == (160, 160)
    with torch.no_grad():
        expected = model.backbone(alone.tensor, alone.image_sizes)["vit"]
        padded = model.backbone(both.tensor, both.image_sizes)["vit"]
    torch.testing.assert_close(padded[:1, :, :6], expected, atol=1e-4, rtol=1e-4)


def test_sides_that_do_not_divide_by_the_coarsest_stride_are_padded(image_text) -> None:
    model = small_detector(image_text)
    assert model.preprocess_image([picture(0, 90, 130)]).tensor.shape[-2:] == (96, 160)


def test_pixels_are_normalised_with_the_image_text_models_statistics(image_text) -> None:
    model = small_detector(image_text)
    image = torch.full((3, 160, 160), 128, dtype=torch.uint8)
    for channel in range(3):
        expected = (128 / 255 - image_text.mean[channel]) / image_text.std[channel]
        assert model.preprocess_image([{"image": image}]).tensor[0, channel, 0, 0].item() == pytest.approx(
            expected, abs=1e-5
        )


def test_running_without_a_vocabulary_says_so(image_text) -> None:
    with pytest.raises(ValueError, match="no vocabulary yet"):
        small_detector(image_text).eval()([picture()])


def test_configuration_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="vlm_mode is 'copy'"):
        DetectorConfig(vlm_mode="copy")
    with pytest.raises(ValueError, match="unknown detector field.*windowsize"):
        DetectorConfig.from_dict({"windowsize": 3})


def test_lazy_config_builds_the_detector(image_text_folder) -> None:
    from detectron2.config import LazyConfig, instantiate

    root = Path(__file__).parents[3]
    config = LazyConfig.load(str(root / "configs/ovd/common/model.py"))
    config.model.image_text = str(image_text_folder)
    config = LazyConfig.apply_overrides(
        config, ["model.architecture.pyramid_channels=16", "model.architecture.alpha=0.1"]
    )
    model = instantiate(config.model)
    crops = {"vlm_mode": "crops", "vlm_crop_size": 0, "vlm_box_scale": 1.1}  # the config's own choice
    assert model.architecture == DetectorConfig(pyramid_channels=16, alpha=0.1, **crops)


@pytest.mark.parametrize(
    "fields",
    [
        {"proposals": "localization", "rpn_quality_target": "iou", "rpn_box_coding": "deltas", "rpn_num_conv": 2},
        {"proposals": "localization", "background": "empty_prompt", "learn_classifier_scale": False},
        {"classification": "sigmoid"},
        {"classification": "sigmoid", "federated_loss": "sampled", "federated_classes": 2},
        {"classification": "sigmoid", "federated_loss": "verified"},
    ],
)
def test_every_choice_trains_all_its_parameters_and_detects(image_text, fields: dict) -> None:
    model = small_detector(image_text, **fields).train()
    model.set_text_embeddings(words(3))
    batch = [training_picture(0) | {"verified_classes": [0, 2]}, training_picture(1, 0) | {"verified_classes": []}]
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(torch.isfinite(loss) for loss in losses.values())
    instances = model.eval()([picture() | {"height": 80, "width": 100}])[0]["instances"]
    assert len(instances) and instances.scores.isfinite().all()


def test_the_empty_prompts_embedding_is_the_background(image_text) -> None:
    classifier = small_detector(image_text, background="empty_prompt").roi_heads.box_predictor.cls_score
    with torch.no_grad():
        expected = image_text.model.encode_text(image_text.tokenizer([""]), normalize=True)[0]
    torch.testing.assert_close(classifier.background_embedding, expected)


def test_another_background_comes_with_the_vocabulary(image_text) -> None:
    model, background = small_detector(image_text, background="empty_prompt"), words(1)[0]
    model.set_text_embeddings(words(3), background_embedding=background)
    classifier = model.roi_heads.box_predictor.cls_score
    torch.testing.assert_close(classifier.background_embedding, background / background.norm())


def test_a_choice_that_has_no_use_is_named() -> None:
    with pytest.raises(ValueError, match="'empty_prompt' has no use with sigmoid"):
        DetectorConfig(background="empty_prompt", classification="sigmoid")
    with pytest.raises(ValueError, match="background is 'zero'"):
        DetectorConfig(background="zero")


@pytest.fixture
def native(tmp_path):
    """A loaded checkpoint folder whose image tower is open_clip's own ViT, pooled by its class token."""
    config = {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 80, "layers": 4, "width": 64, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    }
    torch.manual_seed(5)
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return load_checkpoint(tmp_path)


@pytest.mark.parametrize("mode", ["crops", "frozen_copy", "off"])
def test_open_clips_own_tower_makes_a_detector_that_trains_and_detects(native, mode) -> None:
    model = small_detector(native, vlm_mode=mode, distillation="shared").train()
    model.set_text_embeddings(words(3))
    with EventStorage():
        losses = model([training_picture(0)])
    sum(losses.values()).backward()
    assert model.backbone.net.patch_embed.weight.grad.abs().sum() > 0
    assert parts_of(model.eval(), picture()).detector.shape[1] == 4


def test_crops_have_the_size_that_the_towers_were_trained_at_last_unless_one_is_given(image_text) -> None:
    set_image_size(image_text.model, 64)
    image_text.image_size = 64
    assert small_detector(image_text, vlm_mode="crops").roi_heads.image_text_head.crop_size == 64
    assert small_detector(image_text, vlm_mode="crops", vlm_crop_size=32).roi_heads.image_text_head.crop_size == 32


@torch.no_grad()
def test_crops_of_open_clips_own_tower_have_its_own_embedding(native) -> None:
    head = small_detector(native, vlm_mode="crops", vlm_crop_size=80, vlm_box_scale=1.0).roi_heads.image_text_head
    pixels, whole = torch.randn(1, 3, 80, 80), torch.tensor([[0.0, 0.0, 80.0, 80.0]])
    expected = torch.nn.functional.normalize(native.model.encode_image(pixels), dim=-1)
    torch.testing.assert_close(head.embed_regions(pixels, [whole]), expected, atol=1e-4, rtol=1e-4)


def test_a_map_of_a_class_token_tower_is_refused_with_the_ways_that_work(native) -> None:
    with pytest.raises(ValueError, match="pools by 'token'.*use vlm_mode crops .or frozen_copy"):
        small_detector(native, vlm_mode="backbone")
