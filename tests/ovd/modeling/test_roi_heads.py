"""Distillation, the ensemble of two heads and independent scores in the region heads."""

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from ovd.data.regions import place_regions, precompute_regions, read_regions
from ovd.modeling import roi_heads
from ovd.modeling.detector_config import DetectorConfig
from ovd.modeling.rcnn import OpenVocabularyRCNN, build_detector
from ovd.modeling.roi_heads import RegionScores

SMALL = {
    "image_size": 160, "pyramid_channels": 16, "box_fc_dim": 32, "box_conv_dim": 16, "mask_on": False,
    "vlm_mode": "off", "vlm_crop_size": 32, "rpn_post_nms_topk": (20, 10), "distillation_regions": 6,
}  # fmt: skip
IS_BASE = torch.tensor([True, True, False])


def detector(image_text, **fields) -> OpenVocabularyRCNN:
    torch.manual_seed(0)
    model = build_detector(DetectorConfig(**{**SMALL, **fields}), image_text)
    model.set_text_embeddings(words(3), IS_BASE)
    return model


def words(count: int, seed: int = 11) -> torch.Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


def picture(objects: int = 2, classes: tuple = (0, 1)) -> dict:
    image = torch.randint(256, (3, 160, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    boxes = torch.tensor([[10.0, 20.0, 80.0, 90.0], [60.0, 50.0, 150.0, 140.0]])[:objects]
    target = Instances((160, 160), gt_boxes=Boxes(boxes), gt_masks=BitMasks(torch.ones(objects, 160, 160)))
    target.gt_classes = torch.tensor(classes[:objects], dtype=torch.long)
    return {"image": image, "instances": target, "image_id": 1, "height": 320, "width": 320}


def losses_of(model: OpenVocabularyRCNN, inputs: dict, seed: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    with EventStorage():
        return model.train()([inputs])


@pytest.mark.parametrize("kind", ["shared", "ensemble"])
def test_distillation_reaches_its_head_and_the_backbone_without_any_object(image_text, kind: str) -> None:
    model = detector(image_text, distillation=kind)
    losses_of(model, picture(objects=0))["loss_distill"].backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    heads = {n.split(".")[1] for n in trained if n.startswith("roi_heads.")}
    if kind == "shared":
        assert (
            heads == {"box_head", "box_predictor"} and "roi_heads.box_predictor.cls_score.projection.weight" in trained
        )
        assert "roi_heads.box_predictor.bbox_pred.weight" not in trained
    else:
        assert heads == {"distilled_head"}
    assert any(n.startswith("backbone.") for n in trained)


@pytest.mark.parametrize("kind", ["shared", "ensemble"])
def test_the_teacher_is_no_part_of_the_network_and_stays_as_it_was(image_text, kind: str) -> None:
    model = detector(image_text, distillation=kind)
    before = {k: v.clone() for k, v in image_text.model.visual.state_dict().items()}
    sum(losses_of(model, picture()).values()).backward()
    teacher = model.roi_heads.distillation.teacher.head
    own = {id(p) for p in model.parameters()}
    assert all(p.grad is None and id(p) not in own for p in teacher.parameters())
    assert not any("teacher" in name for name in model.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in image_text.model.visual.state_dict().items())
    # Positions are resampled for the crops; all other weights are the image-text model's.
    assert all(torch.equal(v, before[k]) for k, v in teacher.visual.state_dict().items() if "pos_embed" not in k)


@pytest.mark.parametrize("kind", ["shared", "ensemble"])
def test_every_trainable_parameter_gets_a_gradient(image_text, kind: str) -> None:
    model = detector(image_text, distillation=kind)
    sum(losses_of(model, picture()).values()).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_distillation_reads_pixels_alone_neither_words_nor_annotations(image_text) -> None:
    model = detector(image_text, distillation="shared", distillation_regions=1000)  # all, so that no draw matters
    expected = losses_of(model, picture())["loss_distill"]
    torch.testing.assert_close(losses_of(model, picture(objects=1, classes=(1,)))["loss_distill"], expected)
    model.set_text_embeddings(words(9, seed=4))
    torch.testing.assert_close(losses_of(model, picture())["loss_distill"], expected)
    other = picture()
    other["image"] = 255 - other["image"]
    assert abs(losses_of(model, other)["loss_distill"] - expected) > 1e-3


def test_distillation_draws_at_most_its_number_of_regions(image_text) -> None:
    model, seen = detector(image_text, distillation="shared"), []
    teacher = model.roi_heads.distillation.teacher
    model.roi_heads.distillation.teacher = lambda pixels, boxes: seen.extend(boxes) or teacher(pixels, boxes)
    losses_of(model, picture())
    assert [len(b) for b in seen] == [6]


def given_regions(count: int) -> Instances:
    """Boxes whose left side tells them apart, each with an embedding that points to its own dimension."""
    left = torch.arange(float(count))
    boxes = torch.stack([left, left, left + 60, left + 50], dim=1)
    return Instances((160, 160), proposal_boxes=Boxes(boxes), teacher_embeddings=torch.eye(64)[:count])


@pytest.mark.parametrize("kind", ["shared", "ensemble"])
def test_given_regions_are_drawn_anew_in_each_step_and_keep_their_embeddings(image_text, kind, monkeypatch) -> None:
    model, drawn = detector(image_text, distillation=kind, distillation_regions=4), []
    pooler = model.roi_heads.box_pooler
    monkeypatch.setattr(
        pooler, "forward", lambda maps, boxes: drawn.append(boxes[0]) or type(pooler).forward(pooler, maps, boxes)
    )
    monkeypatch.setattr(roi_heads, "distillation_loss", lambda student, target: drawn.append(target) or student.sum())
    inputs, chosen = picture() | {"regions": given_regions(50)}, []
    for seed in (1, 1, 2):
        drawn.clear()
        losses_of(model, inputs, seed)
        boxes, target = drawn[:2]  # the head pools for distillation first
        assert len(boxes) == len(target) == 4
        assert boxes.tensor[:, 0].tolist() == target.argmax(dim=1).tolist()
        chosen.append(sorted(boxes.tensor[:, 0].tolist()))
    assert chosen[0] == chosen[1] != chosen[2] and len(set(chosen[2])) == 4


def test_fewer_given_regions_than_the_limit_are_all_distilled(image_text) -> None:
    losses = []
    for limit in (3, 1000):
        model = detector(image_text, distillation="shared", distillation_regions=limit)
        losses.append(losses_of(model, picture() | {"regions": given_regions(3)})["loss_distill"])
    torch.testing.assert_close(losses[0], losses[1])


def test_regions_of_another_detectors_proposals_have_this_ones_embeddings(image_text) -> None:
    model = detector(image_text, distillation="shared").eval()
    torch.manual_seed(7)
    other = build_detector(DetectorConfig(**{**SMALL, "distillation": "shared"}), image_text).eval()
    boxes, embeddings = model.embed_proposals(picture(), proposer=other)
    wanted, same_towers = other.embed_proposals(picture())
    assert torch.equal(boxes, wanted) and not torch.equal(boxes, model.embed_proposals(picture())[0])
    torch.testing.assert_close(embeddings, same_towers)


def test_the_distilled_heads_loss_falls(image_text) -> None:
    model = detector(image_text, distillation="ensemble", distillation_weight=1.0)
    optimizer = torch.optim.AdamW(model.roi_heads.distilled_head.parameters(), lr=5e-3)
    history = []
    for step in range(12):
        loss = losses_of(model, picture(), seed=step)["loss_distill"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.6 * history[0]


def test_ensemble_is_the_geometric_mean_of_its_two_heads(image_text) -> None:
    model = detector(image_text, distillation="ensemble").eval()
    heads = model.roi_heads
    with torch.no_grad():
        images = model.preprocess_image([picture()])
        features = model.backbone(images.tensor, images.image_sizes)
        proposals = model.proposal_generator(images, features)[0]
        pooled = heads.box_pooler([features[n] for n in heads.box_in_features], [p.proposal_boxes for p in proposals])
        text = heads.box_predictor(heads.box_head(pooled))[0].softmax(dim=1)
        image = heads.distilled_head.probabilities(pooled)[:, 1:]
        found = heads.score_regions(images, features, proposals)[0].detector
    expected = torch.empty_like(found)
    expected[:, 0] = text[:, 3]
    for c, base in enumerate(IS_BASE.tolist()):
        first, second = (2 / 3, 1 / 3) if base else (1 / 3, 2 / 3)
        expected[:, 1 + c] = text[:, c] ** first * image[:, c] ** second
    torch.testing.assert_close(found, expected / expected.sum(dim=1, keepdim=True))


def test_without_distillation_nothing_of_it_is_there(image_text) -> None:
    model = detector(image_text)
    assert model.roi_heads.distillation is None and model.roi_heads.distilled_head is None
    assert "loss_distill" not in losses_of(model, picture())


def test_precomputed_regions_give_the_loss_of_the_same_regions_on_the_fly(image_text, tmp_path) -> None:
    from detectron2.data.transforms import NoOpTransform

    model = detector(image_text, distillation="shared", distillation_regions=1000).eval()
    boxes, embeddings = model.embed_proposals(picture())
    assert boxes.max() > 160  # pixels of the original, which is twice as large
    precompute_regions([picture()], model.embed_proposals, tmp_path, image_text.fingerprint)
    kept_boxes, kept = read_regions(tmp_path, 1, image_text.fingerprint)
    inputs = picture()
    inputs["regions"] = place_regions(kept_boxes / 2, kept, NoOpTransform(), (160, 160))
    teacher, model.roi_heads.distillation.teacher = model.roi_heads.distillation.teacher, None
    from_files = losses_of(model, inputs)["loss_distill"]
    model.roi_heads.distillation.teacher = teacher
    # The same boxes in another order, as proposals.
    proposal = Instances((160, 160), proposal_boxes=Boxes(boxes / 2), objectness_logits=torch.zeros(len(boxes)))
    visible = proposal.proposal_boxes.nonempty(1.0)
    images = model.preprocess_image([inputs])
    features = model.backbone(images.tensor, images.image_sizes)
    direct = model.roi_heads._distillation_losses(images, features, [proposal[visible]], None)["loss_distill"]
    torch.testing.assert_close(from_files, direct, atol=2e-3, rtol=0)  # embeddings are kept in float16


def test_a_detector_without_a_teacher_cannot_precompute(image_text) -> None:
    with pytest.raises(ValueError, match="no distillation teacher"):
        detector(image_text).eval().embed_proposals(picture())


@pytest.mark.parametrize("distillation", ["off", "ensemble"])
def test_independent_scores_are_fused_word_by_word(image_text, distillation: str) -> None:
    model = detector(image_text, classification="sigmoid", distillation=distillation).eval()
    part = model.inference([picture()], return_parts=True)[0]["parts"]
    assert part.independent and (part.detector[:, 0] == 0).all()
    if distillation == "off":
        model.set_text_embeddings(words(3)[[2, 0]], IS_BASE[[2, 0]])
        subset = model.inference([picture()], return_parts=True)[0]["parts"]
        torch.testing.assert_close(subset.detector[:, 1:], part.detector[:, [3, 1]])
    p = torch.rand_like(part.detector)
    z = part.detector
    scores = RegionScores(part.proposals, part.boxes, z, p, part.objectness, (160, 160), True).fused(
        IS_BASE, 0.2, 0.6, 0
    )
    for c, weight in enumerate([0.2, 0.2, 0.6]):
        torch.testing.assert_close(scores[:, 1 + c], z[:, 1 + c] ** (1 - weight) * p[:, 1 + c] ** weight)


def test_distillation_settings_are_checked(image_text) -> None:
    with pytest.raises(ValueError, match="distillation is 'both'; choose one of off, shared, ensemble"):
        DetectorConfig(distillation="both")
    with pytest.raises(ValueError, match="distillation_weight is -1"):
        detector(image_text, distillation="shared", distillation_weight=-1)
