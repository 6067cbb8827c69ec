"""Recall of proposals against pycocotools without classes, and numbers derived by hand."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ovd.evaluation.proposal_recall import proposal_recall


@pytest.fixture(scope="module")
def lvis_100(shared_data):
    return json.loads((shared_data / "lvis_v05_val_100.json").read_text())


def noisy_proposals(ground_truth, seed=0):
    """Boxes near three quarters of the objects, each several times, and clutter; the first five pictures have none."""
    random = np.random.default_rng(seed)
    proposals = {}
    for image in ground_truth["images"][5:]:
        boxes = [a["bbox"] for a in ground_truth["annotations"] if a["image_id"] == image["id"]]
        boxes = [box for box in boxes if random.random() < 0.75] * 8
        boxes += [[*random.uniform(0, 300, 2), *random.uniform(5, 150, 2)] for _ in range(60)]
        boxes = np.asarray(boxes)
        boxes[:, :2] += random.normal(0, 0.1, (len(boxes), 2)) * boxes[:, 2:]
        boxes[:, 2:] += boxes[:, :2]
        proposals[image["id"]] = boxes, random.permutation(len(boxes)) / len(boxes)
    return proposals


def test_recall_equals_pycocotools_without_classes(lvis_100):
    proposals = noisy_proposals(lvis_100)
    results = [
        {"image_id": image, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(score)}
        for image, (boxes, scores) in proposals.items()
        for (x1, y1, x2, y2), score in zip(boxes.tolist(), scores, strict=True)
    ]
    limits = (10, 100, 300)
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = json.loads(json.dumps(lvis_100))
        for number, annotation in enumerate(gt.dataset["annotations"], start=1):
            annotation |= {"id": number, "iscrowd": 0}
        gt.createIndex()
        evaluation = COCOeval(gt, gt.loadRes(results), "bbox")
        evaluation.params.useCats, evaluation.params.maxDets = 0, list(limits)
        evaluation.evaluate()
        evaluation.accumulate()
    expected = evaluation.eval["recall"].mean(axis=0)[0]  # (areas, limits)
    measured = proposal_recall(lvis_100, proposals, limits)
    assert max(len(scores) for _, scores in proposals.values()) > 100
    for m, limit in enumerate(limits):
        for a, area in enumerate(("", "s", "m", "l")):
            assert measured[f"AR{area}@{limit}"] == pytest.approx(expected[a, m], abs=1e-12)


def two_pictures():
    """Picture 1 has a rare and a frequent object, picture 2 a frequent one; each 20 x 20 px."""
    objects = [(1, 1, (0, 0)), (1, 2, (50, 50)), (2, 2, (0, 0))]
    lists = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    return {
        "images": [{"id": i, "height": 100, "width": 100, **lists} for i in (1, 2)],
        "categories": [{"id": 1, "name": "owl", "frequency": "r"}, {"id": 2, "name": "cat", "frequency": "f"}],
        "annotations": [
            {"id": n, "image_id": i, "category_id": k, "bbox": [*corner, 20, 20], "area": 400}
            for n, (i, k, corner) in enumerate(objects)
        ],
    }


def test_the_best_proposals_of_each_picture_count_and_so_do_objects_without_any():
    # Picture 1: the first proposal finds the cat exactly, the second the owl with IoU 0.8 (7 of 10 thresholds).
    boxes = np.asarray([[0, 0, 20, 16], [50, 50, 70, 70]])
    recall = proposal_recall(two_pictures(), {1: (boxes, np.asarray([0.1, 0.9]))}, limits=(1, 2))
    assert recall["ARr@1"] == 0.0 and recall["ARr@2"] == recall["AR@2_novel"] == pytest.approx(0.7)
    assert recall["ARf@1"] == recall["ARf@2"] == recall["AR@2_base"] == pytest.approx(0.5)  # picture 2 counts as missed
    assert recall["AR@2"] == recall["ARs@2"] == pytest.approx((1 + 0.7 + 0) / 3)
    assert math.isnan(recall["ARc@2"]) and math.isnan(recall["ARl@2"])


def test_no_proposals_at_all_are_zero():
    recall = proposal_recall(two_pictures(), {1: (np.zeros((0, 4)), np.zeros(0))})
    assert recall["AR@100"] == recall["AR@300"] == recall["AR@1000"] == 0.0
    assert proposal_recall(two_pictures(), {}) == pytest.approx(recall, nan_ok=True)


@pytest.mark.parametrize("proposals, limits, message", [
    ({9: (np.zeros((1, 4)), np.zeros(1))}, (100,), "image 9"),
    ({1: (np.zeros((2, 4)), np.zeros(1))}, (100,), "2 boxes and 1 scores"),
    ({1: (np.asarray([[5, 0, 4, 9]]), np.zeros(1))}, (100,), "x2 < x1"),
    ({}, (0,), r"limits is \[0\]"),
])  # fmt: skip
def test_bad_proposals_are_named(proposals, limits, message):
    with pytest.raises(ValueError, match=message):
        proposal_recall(two_pictures(), proposals, limits)
