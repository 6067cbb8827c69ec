"""COCO evaluation against pycocotools on real ground truth, with its crowds, and base and novel classes apart; its
intervals against pycocotools on resampled pictures."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ovd.evaluation import tables
from ovd.evaluation.bootstrap import interval
from ovd.evaluation.coco_evaluator import CocoEvaluator, evaluate_coco_intervals, evaluate_coco_results


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
    return evaluation.stats, evaluation.eval


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


def test_each_mask_of_the_ground_truth_is_decoded_once(coco_100, monkeypatch):
    decoded, decode = [], tables.run_lengths
    monkeypatch.setattr(tables, "run_lengths", lambda *given: decoded.append(1) or decode(*given))
    evaluate_coco_results(coco_100, [], {c["id"]: True for c in coco_100["categories"][:9]}, "segm")
    assert len(decoded) == len(coco_100["annotations"])


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


def without_ties(results):
    """Make all scores differ, so that no order is left open."""
    for place, result in enumerate(results):
        result["score"] += place * 1e-9
    return results


def resampled(ground_truth, results, drawn):
    """Write every picture as often as it was drawn, under new ids, in the order of the pictures."""
    images, annotations, found = [], [], []
    for old in sorted(drawn):
        new = {"image_id": len(images) + 1}
        images.append({**next(i for i in ground_truth["images"] if i["id"] == old), "id": new["image_id"]})
        mine = [a for a in ground_truth["annotations"] if a["image_id"] == old]
        annotations += [{**a, **new, "id": len(annotations) + number} for number, a in enumerate(mine, start=1)]
        found += [{**r, **new} for r in results if r["image_id"] == old]
    return {**ground_truth, "images": images, "annotations": annotations}, found


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_intervals_equal_those_of_pycocotools_on_each_resample(coco_100, shared_data, iou_type):
    images = sorted(image["id"] for image in coco_100["images"])
    results = results_of(shared_data, iou_type)
    results = without_ties(results)
    used = {a["category_id"] for a in coco_100["annotations"]}
    base, novel = sorted(used)[0:40:2], sorted(used)[1:41:2]
    split = {k: k in base for k in [*base, *novel]}
    is_novel = np.isin(sorted(split), novel)
    samples, parts = 5, {"": is_novel | True, "_base": ~is_novel, "_novel": is_novel}
    expected = {name + part: [] for name in ("AP", "AP50", "AR@100") for part in parts}
    random = np.random.default_rng(3)
    for sample in range(1 + samples):
        drawn = images if not sample else [images[i] for i in random.integers(0, len(images), len(images))]
        ground_truth, found = resampled(coco_100, results, drawn)
        _, tables = reference(ground_truth, found, iou_type, list(split))
        for part, members in parts.items():  # -1: a class without objects in the resample
            precision, recall = tables["precision"][:, :, members, 0, -1], tables["recall"][:, members, 0, -1]
            values = (precision, precision[0], recall)
            for name, of_name in zip(("AP", "AP50", "AR@100"), values, strict=True):
                expected[name + part].append(of_name[of_name > -1].mean())
    measured = evaluate_coco_intervals(coco_100, results, split, iou_type, samples=samples, seed=3)
    assert measured.keys() == expected.keys()
    points = evaluate_coco_results(coco_100, results, split, iou_type)
    for name, values in expected.items():
        wanted = interval(np.asarray(values), least=0.0)
        assert measured[name].value == pytest.approx(points[name], abs=1e-12)
        for found, value in zip(
            (measured[name].value, measured[name].low, measured[name].high),
            (wanted.value, wanted.low, wanted.high), strict=True,
        ):  # fmt: skip
            assert found == pytest.approx(value, abs=1e-10), name
    assert measured["AP50_novel"].low < measured["AP50_novel"].value < measured["AP50_novel"].high


def test_pictures_that_are_all_the_same_have_intervals_without_width(coco_100, shared_data):
    results = without_ties(results_of(shared_data, "bbox"))
    crowded = next(a["image_id"] for a in coco_100["annotations"] if a["iscrowd"])
    ground_truth, found = resampled(coco_100, results, [crowded] * 7)
    used = sorted({a["category_id"] for a in ground_truth["annotations"]})
    split = {k: place % 2 == 0 for place, k in enumerate(used)}
    measured = evaluate_coco_intervals(ground_truth, found, split, samples=9)
    assert measured["AP50"].value > 0 and len(used) > 1
    for name, of_name in measured.items():
        assert of_name.low == pytest.approx(of_name.value, abs=1e-12), name
        assert of_name.high == pytest.approx(of_name.value, abs=1e-12), name


def test_one_seed_gives_one_interval_and_another_another(coco_100, shared_data):
    results = results_of(shared_data, "bbox")
    split = {category["id"]: True for category in coco_100["categories"]}
    first, again, other = (
        evaluate_coco_intervals(coco_100, results, split, samples=4, seed=seed)["AP50"] for seed in (0, 0, 1)
    )
    assert first == again != other
    with pytest.raises(ValueError, match="samples is 0"):
        evaluate_coco_intervals(coco_100, results, split, samples=0)


def test_the_evaluator_writes_cocos_metrics_with_their_intervals_into_every_file(tmp_path):
    images = [{"id": i, "height": 100, "width": 100} for i in range(1, 9)]
    boxes = [[10, 10, 20, 20], [50, 50, 30, 30]]
    annotations = [
        {"id": 2 * i + k, "image_id": i, "category_id": k + 4, "bbox": box, "area": box[2] ** 2, "iscrowd": 0}
        for i in range(1, 9)
        for k, box in enumerate(boxes)
    ]
    categories = [{"id": 4, "name": "owl"}, {"id": 5, "name": "cat"}, {"id": 6, "name": "unmeasured"}]
    ground_truth = {"images": images, "annotations": annotations, "categories": categories}
    evaluator = CocoEvaluator(ground_truth, tmp_path, {4: False, 5: True}, samples=20)
    for image in images:
        found = Instances((100, 100))
        right = image["id"] % 2 * 1.0  # the owl, class 0, is found in every second picture
        found.pred_boxes = Boxes(torch.tensor([[10, 10, 30, 30 * right + 10], [50, 50, 80, 80.0]]))
        found.scores, found.pred_classes = torch.tensor([0.5 + image["id"] / 100, 0.9]), torch.tensor([0, 1])
        evaluator.process([{"image_id": image["id"]}], [{"instances": found}])
    metrics = evaluator.evaluate()["bbox"]
    assert metrics["AP50_base"] == 1.0 and 0 < metrics["AP50_novel"] < 1 and "APr" not in metrics
    results = json.loads((tmp_path / "detections.json").read_text())
    split = {4: False, 5: True}
    assert metrics == pytest.approx(evaluate_coco_results(ground_truth, results, split), rel=0, abs=0, nan_ok=True)
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["protocol"] == "coco" and content["metrics"]["bbox"]["AP50_novel"] == metrics["AP50_novel"]
    assert [(c["name"], c["AP50"]) for c in content["categories"]["bbox"]] == [
        ("owl", metrics["AP50_novel"]), ("cat", 1.0),
    ]  # fmt: skip
    novel = content["intervals"]["bbox"]["AP50_novel"]
    assert novel["low"] < novel["value"] == metrics["AP50_novel"] < novel["high"]
    expected = evaluate_coco_intervals(ground_truth, results, split, samples=20)
    assert str(expected["AP50_novel"]) in (text := (tmp_path / "summary.md").read_text())
    assert "COCO average precision (percent)" in text and "Intervals over 20 resamples, bbox" in text
    assert "LVIS" not in text and "APr" not in text
