"""The two kinds of proposals."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import nn

from ovd.losses.proposals import centerness
from ovd.modeling.proposals import LocalizationRPN, build_rpn

SHAPES = {"p3": ShapeSpec(channels=8, stride=8), "p4": ShapeSpec(channels=8, stride=16)}
SIZE = 128
OBJECTS = [[10.0, 20.0, 60.0, 70.0], [70.0, 60.0, 120.0, 124.0]]
CODINGS = ("distances", "deltas")


def rpn(**fields) -> RPN:
    torch.manual_seed(0)
    return build_rpn(SHAPES, (32, 64), **{"kind": "localization", **fields})


def objects(boxes: list | None = None) -> Instances:
    boxes = torch.tensor(OBJECTS if boxes is None else boxes).reshape(-1, 4)
    return Instances((SIZE, SIZE), gt_boxes=Boxes(boxes), gt_classes=torch.zeros(len(boxes), dtype=torch.long))


def features(count: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        n: torch.randn(count, 8, SIZE // s.stride, SIZE // s.stride, generator=generator) for n, s in SHAPES.items()
    }


def images(count: int = 1) -> ImageList:
    return ImageList(torch.zeros(count, 3, SIZE, SIZE), [(SIZE, SIZE)] * count)


def predictions(model: RPN) -> tuple[list[Boxes], list[torch.Tensor], list[torch.Tensor]]:
    """Anchors, and leaf tensors in the shape that `losses` wants."""
    anchors = model.anchor_generator(list(features().values()))
    logits = [torch.randn(1, len(a), requires_grad=True) for a in anchors]
    deltas = [(0.5 + 0.1 * torch.randn(1, len(a), 4)).requires_grad_() for a in anchors]
    return anchors, logits, deltas


class Perfect(nn.Module):
    """Predicts, at each place inside an object, its centerness and its box; elsewhere a quality of nearly 0."""

    def __init__(self, model: RPN, boxes: torch.Tensor) -> None:
        super().__init__()
        self.model, self.boxes = [model], boxes

    def forward(self, maps: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        logits, deltas = [], []
        for anchors, level in zip(self.model[0].anchor_generator(maps), maps, strict=True):
            quality = torch.stack([centerness(anchors.get_centers(), b.expand(len(anchors), 4)) for b in self.boxes])
            best, which = quality.max(dim=0)
            # Outside of its object a place cannot say how far the sides are: there it gives its own anchor.
            target = torch.where((best > 0)[:, None], self.boxes[which], anchors.tensor)
            coded = self.model[0].box2box_transform.get_deltas(anchors.tensor, target)
            height, width = level.shape[-2:]
            logits.append(best.clamp(1e-6, 1 - 1e-6).logit().reshape(1, 1, height, width))
            deltas.append(coded.reshape(height, width, 4).permute(2, 0, 1)[None])
        return logits, deltas


@pytest.mark.parametrize("coding", CODINGS)
def test_proposals_of_a_perfect_head_are_the_objects(coding: str) -> None:
    model = rpn(box_coding=coding).eval()
    model.rpn_head = Perfect(model, torch.tensor(OBJECTS))
    found = model(images(), features())[0][0]
    confident = found[found.objectness_logits.sigmoid() > 0.3]
    unique = torch.unique(confident.proposal_boxes.tensor.round(decimals=2), dim=0)
    torch.testing.assert_close(unique, torch.tensor(OBJECTS), atol=0.02, rtol=0)


def test_what_is_learned_as_objectness_is_the_logit_of_the_centerness() -> None:
    model = rpn()
    anchors, logits, deltas = predictions(model)
    labels, boxes = model.label_and_sample_anchors(anchors, [objects()])
    optimizer = torch.optim.Adam(logits, lr=0.1)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        with EventStorage():
            loss = model.losses(anchors, logits, labels, deltas, boxes)["loss_rpn_quality"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sampled = labels[0][:, 0]
    found = torch.cat(logits, dim=1)[0][sampled].sigmoid()
    expected = centerness(Boxes.cat(anchors).get_centers()[sampled], boxes[0][sampled])
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("target", ["centerness", "iou"])
def test_a_perfect_head_has_no_box_loss_and_no_quality_loss(coding: str, target: str) -> None:
    model = rpn(box_coding=coding, quality_target=target).train()
    model.rpn_head = Perfect(model, torch.tensor(OBJECTS))
    with EventStorage():
        losses = model(images(), features(), [objects()])[1]
    assert losses["loss_rpn_loc"].item() == pytest.approx(0, abs=1e-4)
    if target == "centerness":
        assert losses["loss_rpn_quality"].item() == pytest.approx(0, abs=1e-4)
    else:  # every predicted box has IoU 1, the perfect head says centerness
        assert losses["loss_rpn_quality"].item() > 0.1


def test_distances_round_trip_and_start_as_the_anchor() -> None:
    transform, model = Box2BoxTransformLinear(), rpn()
    anchors = model.anchor_generator(list(features().values()))[1].tensor
    torch.testing.assert_close(transform.apply_deltas(torch.full((len(anchors), 4), 0.5), anchors), anchors)
    assert (model.rpn_head.anchor_deltas.bias == 0.5).all()
    box = torch.tensor(OBJECTS[:1]).expand(len(anchors), 4)
    inside = centerness((anchors[:, :2] + anchors[:, 2:]) / 2, box) > 0
    again = transform.apply_deltas(transform.get_deltas(anchors, box), anchors)
    assert inside.any()
    torch.testing.assert_close(again[inside], box[inside])


@pytest.mark.parametrize("target", ["centerness", "iou"])
def test_unlabelled_places_have_no_loss_and_no_gradient(target: str) -> None:
    model = rpn(quality_target=target)
    anchors, logits, deltas = predictions(model)
    labels, boxes = model.label_and_sample_anchors(anchors, [objects(OBJECTS[:1])])
    with EventStorage():
        losses = model.losses(anchors, logits, labels, deltas, boxes)
        sum(losses.values()).backward()
        with torch.no_grad():
            elsewhere = [a.get_centers().amin(dim=1) > 62 for a in anchors]  # right of and below it
            for level, mask in enumerate(elsewhere):
                logits[level][:, mask] += 5.0
        again = model.losses(anchors, logits, labels, deltas, boxes)
    assert all(mask.any() for mask in elsewhere) and again == losses
    for level, mask in enumerate(elsewhere):
        assert (logits[level].grad[:, mask] == 0).all() and (deltas[level].grad[:, mask] == 0).all()
    assert any((x.grad != 0).any() for x in logits) and any((x.grad != 0).any() for x in deltas)


def test_detectron2s_objectness_does_push_unlabelled_places_down() -> None:
    model = rpn(kind="standard", aspect_ratios=(1.0,), batch_size_per_image=10_000)
    anchors, logits, deltas = predictions(model)
    with EventStorage():
        labels, boxes = model.label_and_sample_anchors(anchors, [objects(OBJECTS[:1])])
        model.losses(anchors, logits, labels, deltas, boxes)["loss_rpn_cls"].backward()
    far = anchors[0].get_centers().amin(dim=1) > 90
    assert (logits[0].grad[:, far] > 0).any()  # what this file's other kind must not do


@pytest.mark.parametrize("boxes", [[], OBJECTS])
def test_empty_pictures_train_beside_others(boxes: list) -> None:
    model = rpn().train()
    with EventStorage():
        proposals, losses = model(images(2), features(2), [objects([]), objects(boxes)])
    sum(losses.values()).backward()
    assert len(proposals) == 2 and all(torch.isfinite(loss) for loss in losses.values())
    assert all(p.grad is not None for p in model.parameters())
    if not boxes:
        assert all(loss == 0 for loss in losses.values())


def test_sampling_keeps_to_the_limit_and_inside_objects() -> None:
    model = rpn(batch_size_per_image=8)
    anchors = predictions(model)[0]
    labels, boxes = model.label_and_sample_anchors(anchors, [objects()])
    assert labels[0].sum(dim=0).tolist()[::2] == [7, 0]  # int(8 * 255 / 256), no background
    centres = Boxes.cat(anchors).get_centers()
    for kind in labels[0].unbind(dim=1)[:2]:
        assert (centerness(centres[kind], boxes[0][kind]) > 0).all()


def test_background_fills_the_sample_only_when_asked_and_far_from_every_object() -> None:
    model = rpn(fill_background=True, batch_size_per_image=200)
    anchors, logits, deltas = predictions(model)
    for target in (objects(), objects([])):
        labels, boxes = model.label_and_sample_anchors(anchors, [target])
        for_quality, _, background = labels[0].unbind(dim=1)
        assert for_quality.sum() + background.sum() == 200
        if len(target):
            assert pairwise_iou(target.gt_boxes, Boxes.cat(anchors)).amax(dim=0)[background].max() < 0.1
    with EventStorage():  # the picture without objects: all of its sample is background
        losses = model.losses(anchors, logits, labels, deltas, boxes)
    expected = torch.cat(logits, dim=1)[0][background].sigmoid().sum() / 200
    torch.testing.assert_close(losses["loss_rpn_quality"], expected)
    assert losses["loss_rpn_loc"] == 0


def test_training_reduces_both_losses() -> None:
    model = rpn().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    history = []
    with EventStorage():
        for _ in range(60):
            losses = model(images(), features(), [objects()])[1]
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            history.append([losses["loss_rpn_quality"].item(), losses["loss_rpn_loc"].item()])
    first, last = torch.tensor(history[:3]).mean(dim=0), torch.tensor(history[-3:]).mean(dim=0)
    assert (last < 0.6 * first).all()


def test_each_mode_has_its_own_nms_and_one_switches_it_off() -> None:
    model = rpn(nms_thresholds=(0.1, 1.0), pre_nms_topk=(500, 500), post_nms_topk=(500, 500))
    places = sum(len(a) for a in predictions(model)[0])
    with EventStorage():
        trained = model.train()(images(), features(), [objects()])[0][0]
    tested = model.eval()(images(), features())[0][0]
    assert len(tested) == places and len(trained) < places


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="proposals is 'oln'.*standard, localization"):
        rpn(kind="oln")
    with pytest.raises(ValueError, match="rpn_quality_target is 'giou'"):
        rpn(quality_target="giou")
    with pytest.raises(ValueError, match="rpn_box_coding is 'ltrb'"):
        rpn(box_coding="ltrb")
    with pytest.raises(ValueError, match="3 anchor sizes for 2 pyramid levels"):
        build_rpn(SHAPES, (32, 64, 128))


def test_both_kinds_are_detectron2s_generator() -> None:
    assert isinstance(rpn(), LocalizationRPN) and isinstance(rpn(kind="standard"), RPN)
    assert rpn().anchor_generator.num_anchors == [1, 1] and rpn(kind="standard").anchor_generator.num_anchors == [3, 3]
