"""The Detections container: what it refuses, how it is cut, and that its results form is what COCO tools read."""

import json

import numpy as np
import pycocotools.mask as mask_codec
import pytest
import torch
from detectron2.structures import Boxes, Instances

from ovd.detections import Detections

SIZE = (30, 40)


def three(with_masks=True):
    masks = np.zeros((3, *SIZE), bool)
    masks[0, 2:10, 3:9] = masks[1, 0:30, 0:40] = True
    return Detections(
        boxes=[[3, 2, 9, 10], [0, 0, 40, 30], [5, 5, 5.5, 6.25]],
        scores=[0.25, 0.75, 0.5],
        labels=[2, 0, 1],
        names=["owl", "cat", "dog"],
        image_size=SIZE,
        masks=masks if with_masks else None,
    )


def test_types_are_those_of_the_contract():
    detections = three()
    assert (detections.boxes.dtype, detections.scores.dtype) == (np.float32, np.float32)
    assert (detections.labels.dtype, detections.masks.dtype) == (np.int64, np.bool_)
    assert len(detections) == 3 and detections.image_size == (30, 40)


@pytest.mark.parametrize("masks", [None, np.zeros((0, *SIZE), bool), []])
def test_no_detection_is_a_valid_answer(masks):
    empty = Detections([], [], [], [], SIZE, masks)
    assert len(empty) == 0 and empty.boxes.shape == (0, 4)
    assert len(empty.filter(0.5)) == len(empty.top(3)) == len(empty[[]]) == 0
    assert empty.to_coco(1, [7]) == []
    if masks is not None:
        assert empty.masks.shape == (0, *SIZE)


def test_filter_keeps_the_order_and_top_sorts():
    detections = three()
    assert detections.filter(0.5).names == ["cat", "dog"]
    assert detections.top(2).names == ["cat", "dog"]
    assert detections.top(9).names == ["cat", "dog", "owl"]
    assert detections.top(0).names == []
    with pytest.raises(ValueError, match="k is -1"):
        detections.top(-1)


@pytest.mark.parametrize(
    "index, names",
    [
        (1, ["cat"]),
        (-1, ["dog"]),
        (slice(1, None), ["cat", "dog"]),
        ([2, 0], ["dog", "owl"]),
        (np.array([True, False, True]), ["owl", "dog"]),
    ],
)
def test_indexing_cuts_every_field_alike(index, names):
    detections = three()
    cut = detections[index]
    assert cut.names == names
    for row, name in enumerate(names):
        source = detections.names.index(name)
        assert np.array_equal(cut.boxes[row], detections.boxes[source])
        assert np.array_equal(cut.masks[row], detections.masks[source])
        assert (cut.scores[row], cut.labels[row]) == (detections.scores[source], detections.labels[source])


def test_indexing_outside_is_an_index_error_so_that_iteration_ends():
    assert [item.names[0] for item in three()] == ["owl", "cat", "dog"]
    with pytest.raises(IndexError, match="a bool index needs shape"):
        three()[np.array([True, False])]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"boxes": [[0, 0, 1, 1]]}, r"scores must have shape \(1,\)"),
        ({"boxes": [[0, 0, 1]] * 3}, r"boxes must have shape \(N, 4\)"),
        ({"labels": [1]}, r"labels must have shape \(3,\)"),
        ({"names": ["a"]}, "1 names for 3 boxes"),
        ({"masks": np.zeros((3, 5, 5), bool)}, "masks must have shape"),
        ({"scores": [0.1, np.nan, 0.2]}, "not a finite number"),
        ({"boxes": [[0, 0, 1, 1], [9, 0, 1, 1], [0, 0, 1, 1]]}, "x1 > x2"),
        ({"image_size": (0, 5), "masks": None}, "at least 1 pixel"),
    ],
)
def test_fields_that_disagree_are_refused(change, message):
    good = three()
    fields = {name: getattr(good, name) for name in ("boxes", "scores", "labels", "names", "image_size", "masks")}
    with pytest.raises(ValueError, match=message):
        Detections(**{**fields, **change})


def test_the_results_form_is_json_and_decodes_to_the_same_boxes_and_masks():
    detections = three()
    results = json.loads(json.dumps(detections.to_coco(17, [101, 102, 103])))
    assert [r["category_id"] for r in results] == [103, 101, 102]
    assert [r["image_id"] for r in results] == [17] * 3
    assert [r["bbox"] for r in results] == [[3, 2, 6, 8], [0, 0, 40, 30], [5, 5, 0.5, 1.25]]
    assert [r["score"] for r in results] == [0.25, 0.75, 0.5]
    for result, mask in zip(results, detections.masks, strict=True):
        assert np.array_equal(mask_codec.decode(result["segmentation"]).astype(bool), mask)
    assert [r["category_id"] for r in detections.to_coco(1)] == [2, 0, 1]
    assert "segmentation" not in three(with_masks=False).to_coco(1)[0]


def test_a_label_without_a_category_id_is_refused():
    with pytest.raises(ValueError, match="labels run from 0 to 2 but there are 2 category ids"):
        three().to_coco(1, [5, 6])


def test_detectron2_instances_are_taken_over():
    instances = Instances(SIZE)
    instances.pred_boxes = Boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 9.0, 9.0]]))
    instances.scores = torch.tensor([0.5, 0.25], requires_grad=True)
    instances.pred_classes = torch.tensor([1, 0])
    instances.pred_masks = torch.ones(2, *SIZE, dtype=torch.bool)
    detections = Detections.from_instances(instances, ["cat", "dog"])
    assert detections.names == ["dog", "cat"] and detections.masks.all()
    assert detections.boxes.tolist() == [[1, 2, 3, 4], [0, 0, 9, 9]]
    assert Detections.from_instances(instances).names == ["1", "0"]
    with pytest.raises(ValueError, match="vocabulary has 1 words"):
        Detections.from_instances(instances, ["cat"])


def test_plot_returns_a_picture_of_the_same_size_with_something_drawn():
    image = np.full((*SIZE, 3), 90, np.uint8)
    drawn = three().plot(image)
    assert drawn.shape == image.shape and drawn.dtype == np.uint8 and (drawn != image).any()
