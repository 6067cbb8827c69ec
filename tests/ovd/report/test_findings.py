"""Which word wins on an object: against a naive count over random boxes, and on a hand-made picture."""

import numpy as np
import pytest
import torch
import torchvision

from ovd.evaluation.benchmark import EvaluationBenchmark, as_list, make_detections, make_ground_truth
from ovd.evaluation.tables import read_lvis, read_results
from ovd.report.findings import box_iou, confusions, find, outcomes
from ovd.report.pictures import examples


@pytest.fixture(scope="module")
def data():
    benchmark = EvaluationBenchmark(images=15, detections=60, classes=12, seed=5)
    ground_truth = make_ground_truth(benchmark)
    return ground_truth, as_list(make_detections(benchmark, ground_truth))


def overlap(a, b):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def find_in(ground_truth, results):
    truth = read_lvis(ground_truth, "bbox")
    return find(truth, read_results(results, truth, "bbox"))


def test_iou_is_torchvisions():
    boxes = np.random.default_rng(0).uniform(1, 50, (2, 20, 4))
    corners = [torch.from_numpy(np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], axis=1)) for b in boxes]
    np.testing.assert_allclose(box_iou(*boxes), torchvision.ops.box_iou(*corners).numpy(), atol=1e-12)


def test_winners_and_outcomes_are_those_of_a_naive_count(data):
    ground_truth, results = data
    findings = find_in(*data)
    frequency = {c["id"]: c["frequency"] for c in ground_truth["categories"]}
    counts = {f: dict.fromkeys(("objects", "right", "r", "c", "f", "none"), 0) for f in "rcf"}
    for row, annotation in enumerate(ground_truth["annotations"]):
        near = [
            r for r in results
            if r["image_id"] == annotation["image_id"] and overlap(r["bbox"], annotation["bbox"]) >= 0.5
        ]  # fmt: skip
        best = max(near, key=lambda r: r["score"], default=None)
        mine = findings.winner[row]
        assert (mine < 0) == (best is None)
        if best is not None:
            assert findings.detections.scores[mine] == best["score"]
        group = counts[frequency[annotation["category_id"]]]
        group["objects"] += 1
        if best is None:
            group["none"] += 1
        elif best["category_id"] == annotation["category_id"]:
            group["right"] += 1
        else:
            group[frequency[best["category_id"]]] += 1
    assert outcomes(findings) == {f: c for f, c in counts.items() if c["objects"]}
    listed = sum(c.count for c in confusions(findings, limit=10**6))
    assert listed == sum(c["r"] + c["c"] + c["f"] for c in counts.values()) > 0


def test_examples_are_the_surest_and_one_of_a_word(data):
    findings = find_in(*data)
    found = examples(findings, each=5)
    for kind in ("right", "wrong word", "nowhere"):
        scores = [e.score for e in found[kind]]
        assert scores == sorted(scores, reverse=True) and len(scores) <= 5
    assert all(e.word == e.truth for e in found["right"])
    assert all(e.word != e.truth for e in found["wrong word"])
    assert len({e.truth for e in found["right"]}) == len(found["right"])
    assert all(e.truth is None and findings.nowhere.any() for e in found["nowhere"])
    areas = [e.truth_box[2] * e.truth_box[3] for e in found["missed"]]
    assert areas == sorted(areas, reverse=True) and all(e.word is None for e in found["missed"])


def test_a_detection_of_an_unchecked_class_may_win_but_is_no_false_alarm():
    image = {"id": 7, "neg_category_ids": [2], "not_exhaustive_category_ids": [], "height": 100, "width": 100}
    names = {1: "cup", 2: "mug", 3: "tin"}
    truth = {
        "images": [image],
        "categories": [{"id": i, "name": n, "frequency": "rcf"[i - 1]} for i, n in names.items()],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100}],
    }
    far = [60, 60, 10, 10]
    found = [(1, [0, 0, 10, 10], 0.4), (3, [0, 0, 10, 11], 0.6), (2, far, 0.9), (3, far, 0.8)]
    findings = find_in(truth, [{"image_id": 7, "category_id": c, "bbox": b, "score": s} for c, b, s in found])
    (confusion,) = confusions(findings)
    assert (confusion.truth, confusion.winner, confusion.count, confusion.score) == ("cup", "tin", 1, 0.6)
    assert findings.nowhere.tolist() == [False, False, True, False]
