"""COCO evaluation against pycocotools on real ground truth, with its crowds, and base and novel classes apart."""

import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ovd.evaluation.coco_evaluator import evaluate_coco_results


@pytest.fixture(scope="module")
def coco_100(shared_data):
    return json.loads((shared_data / "coco_val2014_100.json").read_text())


def results_of(shared_data, iou_type):
    results = json.loads((shared_data / f"coco_val2014_100_{iou_type}_results.json").read_text())
    if iou_type == "segm":  # else pycocotools takes the sizes of masks from boxes
        for result in results:
            result.pop("bbox", None)
    return results


def reference(ground_truth, results, iou_type, category_ids):
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = json.loads(json.dumps(ground_truth))
        gt.createIndex()
        evaluation = COCOeval(gt, gt.loadRes(json.loads(json.dumps(results))), iou_type)
        evaluation.params.catIds = sorted(category_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats, evaluation.eval["precision"]


@pytest.mark.parametrize("iou_type, official_ap, official_ap50", [
    ("bbox", 0.5045806987, 0.6969727247), ("segm", 0.3195452758, 0.5622883972),
])  # fmt: skip
def test_metrics_equal_pycocotools_and_the_official_sample_numbers(
    coco_100, shared_data, iou_type, official_ap, official_ap50
):
    results = results_of(shared_data, iou_type)
    ids = [category["id"] for category in coco_100["categories"]]
    assert any(annotation["iscrowd"] for annotation in coco_100["annotations"])
    stats, _ = reference(coco_100, results, iou_type, ids)
    measured = evaluate_coco_results(coco_100, results, {k: k % 3 > 0 for k in ids}, iou_type)
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR@100", "ARs@100", "ARm@100", "ARl@100")
    for name, expected in zip(names, [*stats[:6], *stats[8:]], strict=True):
        assert measured[name] == pytest.approx(expected, abs=1e-10), name
    assert measured["AP"] == pytest.approx(official_ap, abs=1e-9)
    assert measured["AP50"] == pytest.approx(official_ap50, abs=1e-9)


def test_base_and_novel_are_measured_apart_and_other_classes_not_at_all(coco_100, shared_data):
    results = results_of(shared_data, "bbox")
    ids = sorted(category["id"] for category in coco_100["categories"])
    base, novel = ids[0:40:2], ids[1:41:2]
    measured = evaluate_coco_results(coco_100, results, {k: k in base for k in [*novel, *base]})
    for name, members in (("base", base), ("novel", novel)):
        stats, _ = reference(coco_100, results, "bbox", members)
        assert measured[f"AP_{name}"] == pytest.approx(stats[0], abs=1e-10)
        assert measured[f"AP50_{name}"] == pytest.approx(stats[1], abs=1e-10)
        assert measured[f"AR@100_{name}"] == pytest.approx(stats[8], abs=1e-10)
    both, _ = reference(coco_100, results, "bbox", base + novel)
    assert measured["AP50"] == pytest.approx(both[1], abs=1e-10)


def test_many_detections_of_one_crowd_are_neither_hits_nor_misses():
    annotation = {"image_id": 1, "category_id": 5, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 1}
    single = {**annotation, "id": 2, "bbox": [60, 60, 20, 20], "area": 400, "iscrowd": 0}
    ground_truth = {
        "images": [{"id": 1, "height": 100, "width": 100}],
        "categories": [{"id": 5, "name": "sheep"}],
        "annotations": [{**annotation, "id": 1}, single],
    }
    found = {"image_id": 1, "category_id": 5}
    results = [{**found, "bbox": [5 * i, 0, 20, 20], "score": 0.9} for i in range(5)]
    results.append({**found, "bbox": [60, 60, 20, 20], "score": 0.1})
    metrics = evaluate_coco_results(ground_truth, results, {5: True})
    assert metrics["AP"] == 1.0
    assert np.isnan(metrics["AP50_novel"])


def test_no_detections_are_zero_and_settings_that_cannot_be_are_refused(coco_100):
    ids = [category["id"] for category in coco_100["categories"]]
    assert evaluate_coco_results(coco_100, [], dict.fromkeys(ids, True))["AP"] == 0.0
    with pytest.raises(ValueError, match="names no category"):
        evaluate_coco_results(coco_100, [], {})
    with pytest.raises(ValueError, match="category 999"):
        evaluate_coco_results(coco_100, [], {999: True})
    with pytest.raises(ValueError, match="max_dets is 0"):
        evaluate_coco_results(coco_100, [], {1: True}, max_dets=0)
    with pytest.raises(ValueError, match="iou_type is 'mask'"):
        evaluate_coco_results(coco_100, [], {1: True}, "mask")
