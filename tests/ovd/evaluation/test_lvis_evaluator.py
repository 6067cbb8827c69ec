"""LVIS evaluation against the lvis package on real ground truth, and against numbers derived by hand."""

import copy
import json
import math

import numpy as np
import pycocotools.mask as mask_codec
import pytest
import torch
from detectron2.structures import Boxes, Instances

from ovd.evaluation.lvis_evaluator import OpenVocabularyEvaluator, evaluate_report, evaluate_results

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR@300", "ARs@300", "ARm@300", "ARl@300")


@pytest.fixture(scope="module")
def lvis_100(shared_data):
    return json.loads((shared_data / "lvis_v05_val_100.json").read_text())


def polygon_mask(annotation, image):
    codes = mask_codec.frPyObjects(annotation["segmentation"], image["height"], image["width"])
    return mask_codec.decode(mask_codec.merge(codes))


def as_result(mask, category_id, score, image_id, with_box=True):
    code = mask_codec.encode(np.asfortranarray(mask))
    box = {"bbox": mask_codec.toBbox(code).tolist()} if with_box else {}
    segmentation = {"size": code["size"], "counts": code["counts"].decode("ascii")}
    return {"image_id": image_id, "category_id": category_id, "score": score, "segmentation": segmentation, **box}


def perturbed_detections(ground_truth, seed, per_image_clutter):
    """Shift, repeat, drop and mislabel the real objects; some scores are equal and some pictures stay empty."""
    random = np.random.default_rng(seed)
    images = {image["id"]: image for image in ground_truth["images"]}
    empty = set(random.choice(sorted(images), 7, replace=False).tolist())
    all_ids = [category["id"] for category in ground_truth["categories"]]
    results = []
    for annotation in ground_truth["annotations"]:
        image = images[annotation["image_id"]]
        if image["id"] in empty or random.random() < 0.15:
            continue
        mask = polygon_mask(annotation, image)
        for _ in range(random.integers(1, 3)):
            moved = np.roll(mask, random.integers(-4, 5, size=2), axis=(0, 1))
            checked = image["neg_category_ids"] + image["not_exhaustive_category_ids"] + all_ids[:5]
            wrong = random.random() < 0.2
            label = int(random.choice(checked)) if wrong else annotation["category_id"]
            results.append(as_result(moved, label, round(random.random(), 1), image["id"]))
    for image in images.values():
        labels = [a["category_id"] for a in ground_truth["annotations"] if a["image_id"] == image["id"]]
        labels += image["neg_category_ids"] + image["not_exhaustive_category_ids"] or all_ids[:1]
        for _ in range(0 if image["id"] in empty else per_image_clutter):
            mask = np.zeros((image["height"], image["width"]), np.uint8)
            y, x = random.integers(0, image["height"] - 40), random.integers(0, image["width"] - 40)
            mask[y : y + random.integers(3, 40), x : x + random.integers(3, 40)] = 1
            results.append(as_result(mask, int(random.choice(labels)), round(random.random(), 2), image["id"]))
    return results


def reference(ground_truth, results, iou_type, tmp_path, monkeypatch):
    """Return the lvis package's metrics; -1, which it writes where nothing can be measured, becomes NaN."""
    monkeypatch.setattr(np, "float", float, raising=False)  # lvis 0.5.3 uses the name that numpy dropped
    from lvis import LVIS, LVISEval, LVISResults

    path = tmp_path / "ground_truth.json"
    path.write_text(json.dumps(ground_truth))
    results = copy.deepcopy(results)
    for result in results:
        result.pop("bbox" if iou_type == "segm" else "segmentation")
    gt = LVIS(str(path))
    evaluation = LVISEval(gt, LVISResults(gt, results), iou_type)
    evaluation.run()
    return {key: math.nan if value == -1 else float(value) for key, value in evaluation.get_results().items()}


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed, clutter", [(0, 0), (1, 5)])
def test_metrics_equal_the_lvis_package(lvis_100, tmp_path, monkeypatch, iou_type, seed, clutter):
    results = perturbed_detections(lvis_100, seed, clutter)
    expected = reference(lvis_100, results, iou_type, tmp_path, monkeypatch)
    measured = evaluate_results(lvis_100, results, iou_type)
    assert 0.1 < expected["AP"] < 0.9
    for name in NAMES:
        assert measured[name] == pytest.approx(expected[name], abs=1e-10, nan_ok=True), name


def test_the_limit_per_picture_counts_over_all_classes_like_the_lvis_package(lvis_100, tmp_path, monkeypatch):
    few = {**lvis_100, "images": lvis_100["images"][:4]}
    few["annotations"] = [a for a in lvis_100["annotations"] if a["image_id"] in {i["id"] for i in few["images"]}]
    random = np.random.default_rng(3)
    results = []
    for annotation in few["annotations"]:
        for _ in range(60):
            x, y, w, h = annotation["bbox"]
            box = [x + random.normal(0, 3), y + random.normal(0, 3), w, h]
            found = {"image_id": annotation["image_id"], "category_id": annotation["category_id"], "bbox": box}
            results.append({**found, "score": random.random(), "segmentation": None})
    counts = [sum(r["image_id"] == image["id"] for r in results) for image in few["images"]]
    assert max(counts) > 300
    expected = reference(few, results, "bbox", tmp_path, monkeypatch)
    measured = evaluate_results(few, results, "bbox")
    for name in NAMES:
        assert measured[name] == pytest.approx(expected[name], abs=1e-10, nan_ok=True), name


def box_to_polygon(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def tiny_ground_truth():
    """Two 100-px pictures; owl is rare, dog common, cat frequent; every object is 20 x 20 = 400 px, so small."""
    objects = [(1, 1, (10, 10)), (1, 2, (50, 10)), (2, 2, (10, 50)), (1, 3, (50, 50)), (2, 3, (50, 50))]
    return {
        "images": [
            {"id": 1, "height": 100, "width": 100, "neg_category_ids": [], "not_exhaustive_category_ids": []},
            {"id": 2, "height": 100, "width": 100, "neg_category_ids": [1], "not_exhaustive_category_ids": [3]},
        ],
        "categories": [
            {"id": 1, "name": "owl", "frequency": "r"},
            {"id": 2, "name": "dog", "frequency": "c"},
            {"id": 3, "name": "cat", "frequency": "f"},
        ],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [*corner, 20, 20],
                "area": 400,
                "segmentation": box_to_polygon(*corner, 20, 20),
            }
            for number, (image_id, category_id, corner) in enumerate(objects)
        ],
    }


def found(image_id, category_id, x, y, w, h, score):
    return {"image_id": image_id, "category_id": category_id, "bbox": [x, y, w, h], "score": score}


def test_the_tiny_case_gives_the_numbers_derived_by_hand():
    # owl: a false alarm of 0.9 in picture 2, where owl is checked and absent, ranks above the true owl (0.8). Recall 1
    #      is reached at precision 1/2, interpolated 1/2 at all 101 levels: AP = AP50 = 0.5, AR 1.
    # dog: picture 1 exact (0.9); picture 2 is never found. Recall 1/2 at precision 1: the levels 0.00 ... 0.50 are 51
    #      of 101: AP = AP50 = 51/101, AR 0.5.
    # cat: picture 1 with a box 20 x 16 inside the 20 x 20 object, IoU 0.8: a hit at the 7 thresholds 0.50 ... 0.80.
    #      picture 2 exact (0.7), and a stray cat (0.95) there that does not count: cat is not exhaustive in picture 2.
    #      At 7 thresholds both are hits, AP 1, recall 1. At 3 thresholds: the 0.9 is a miss above the hit of 0.7,
    #      precision 1/2 up to recall 1/2: AP 51/101/2. AP = (7 + 3 * 51/202) / 10, AR = (7 * 1 + 3 * 0.5) / 10.
    results = [
        found(2, 1, 10, 10, 20, 20, 0.9),
        found(1, 1, 10, 10, 20, 20, 0.8),
        found(1, 2, 50, 10, 20, 20, 0.9),
        found(1, 3, 50, 50, 20, 16, 0.9),
        found(2, 3, 50, 50, 20, 20, 0.7),
        found(2, 3, 10, 10, 20, 20, 0.95),
    ]
    owl, dog, cat = 0.5, 51 / 101, (7 + 3 * 51 / 202) / 10
    report = evaluate_report(tiny_ground_truth(), results, "bbox")
    metrics = report.metrics
    assert [metrics[key] for key in ("APr", "APc", "APf")] == pytest.approx([owl, dog, cat])
    assert metrics["AP"] == metrics["APs"] == pytest.approx((owl + dog + cat) / 3)
    assert metrics["AP50"] == pytest.approx((0.5 + 51 / 101 + 1) / 3)
    assert metrics["AP75"] == pytest.approx((0.5 + 51 / 101 + 1) / 3)
    assert metrics["AP_base"] == pytest.approx((dog + cat) / 2)
    assert metrics["AR@300"] == pytest.approx((1 + 0.5 + 0.85) / 3)
    assert metrics["AR@300_base"] == pytest.approx((0.5 + 0.85) / 2)
    assert metrics["AR@300_novel"] == metrics["ARr@300"] == pytest.approx(1.0)
    assert [metrics[key] for key in ("ARc@300", "ARf@300")] == pytest.approx([0.5, 0.85])
    assert metrics["AP50_base"] == pytest.approx((51 / 101 + 1) / 2) and metrics["AP_novel"] == metrics["APr"]
    assert [c.AP for c in report.categories] == pytest.approx([owl, dog, cat])
    assert [(c.name, c.num_ground_truth) for c in report.categories] == [("owl", 1), ("dog", 2), ("cat", 2)]


def test_areas_and_frequencies_without_ground_truth_are_nan():
    ground_truth = tiny_ground_truth()
    ground_truth["annotations"] = [a for a in ground_truth["annotations"] if a["category_id"] != 1]
    metrics = evaluate_results(ground_truth, [found(1, 2, 50, 10, 20, 20, 0.9)])
    for key in ("APm", "APl", "ARm@300", "APr", "AR@300_novel"):
        assert math.isnan(metrics[key]), key
    assert metrics["APf"] == 0.0


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_no_detection_at_all_is_zero_where_there_are_objects(iou_type):
    metrics = evaluate_results(tiny_ground_truth(), [], iou_type)
    assert metrics["AP"] == metrics["APs"] == metrics["APr"] == metrics["AR@300"] == 0.0
    assert math.isnan(metrics["APl"])


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_no_object_at_all_is_nothing_to_measure(iou_type):
    ground_truth = {**tiny_ground_truth(), "annotations": []}
    results = [as_result(np.ones((100, 100), np.uint8), 1, 0.9, 2)]
    assert all(math.isnan(value) for value in evaluate_results(ground_truth, results, iou_type).values())


def test_objects_of_pictures_without_detections_count_as_missed():
    metrics = evaluate_results(tiny_ground_truth(), [found(1, 3, 50, 50, 20, 20, 0.5)])
    assert metrics["AR@300"] == pytest.approx((0 + 0 + 0.5) / 3)


def test_a_class_that_was_not_checked_in_a_picture_does_not_count_there():
    ground_truth = tiny_ground_truth()
    ground_truth["images"][1]["neg_category_ids"] = []
    results = [found(2, 1, 10, 10, 20, 20, 0.9), found(1, 1, 10, 10, 20, 20, 0.8)]
    assert evaluate_results(ground_truth, results)["APr"] == pytest.approx(1.0)


def test_mask_sizes_come_from_masks_even_when_results_carry_boxes():
    # A hollow frame: its box of 99 x 99 px is large, its 392 px of mask are small.
    ground_truth = tiny_ground_truth()
    frame = np.zeros((100, 100), np.uint8)
    frame[0:99, 0:99] = 1
    frame[1:98, 1:98] = 0
    owl = np.zeros((100, 100), np.uint8)
    owl[10:30, 10:30] = 1
    results = [as_result(frame, 1, 0.9, 1), as_result(owl, 1, 0.8, 1)]
    # Counted as small, the frame is a false alarm ranked above the owl: APs 0.5. Taken for large it would not count: 1.
    ground_truth["annotations"] = ground_truth["annotations"][:1]
    assert evaluate_results(ground_truth, results, "segm")["APs"] == pytest.approx(0.5)


def test_inputs_are_left_as_they_were(tmp_path):
    ground_truth, results = tiny_ground_truth(), [found(1, 3, 50, 50, 20, 20, 0.5)]
    before = copy.deepcopy((ground_truth, results))
    first = evaluate_results(ground_truth, results)
    assert (ground_truth, results) == before
    (tmp_path / "gt.json").write_text(json.dumps(ground_truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert evaluate_results(tmp_path / "gt.json", tmp_path / "results.json") == pytest.approx(first, nan_ok=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_id": 9}, "image 9, which the ground truth does not list"),
        ({"category_id": 0}, "category 0, which the ground truth does not list; write LVIS category ids"),
        ({"score": math.nan}, "score nan"),
        ({"bbox": [0, 0, -1, 5]}, "width >= 0"),
        ({"bbox": [0, 0, math.inf, 5]}, "finite"),
    ],
)
def test_a_bad_result_is_named(change, message):
    results = [found(1, 1, 0, 0, 5, 5, 0.1), {**found(1, 1, 0, 0, 5, 5, 0.1), **change}]
    with pytest.raises(ValueError, match="result 1 .*" + message):
        evaluate_results(tiny_ground_truth(), results)


def test_a_result_without_a_needed_field_and_a_mask_of_the_wrong_size_are_named():
    with pytest.raises(ValueError, match="result 0 has no segmentation"):
        evaluate_results(tiny_ground_truth(), [found(1, 1, 0, 0, 5, 5, 0.1)], "segm")
    with pytest.raises(ValueError, match=r"size \(50, 50\), but image 1 has \(100, 100\)"):
        evaluate_results(tiny_ground_truth(), [as_result(np.ones((50, 50), np.uint8), 1, 0.5, 1)], "segm")
    with pytest.raises(ValueError, match="must be a list"):
        evaluate_results(tiny_ground_truth(), {"annotations": []})


@pytest.mark.parametrize(
    "field, message",
    [("neg_category_ids", "no neg_category_ids"), ("frequency", "frequency None"), ("images", "no 'images'")],
)
def test_ground_truth_without_what_lvis_needs_is_refused(field, message):
    ground_truth = tiny_ground_truth()
    ground_truth.pop(field, None)
    for item in ground_truth.get("images", []) + ground_truth["categories"]:
        item.pop(field, None)
    with pytest.raises(ValueError, match=message):
        evaluate_results(ground_truth, [])


def test_unknown_iou_type_and_limit_are_refused():
    with pytest.raises(ValueError, match="iou_type is 'mask'"):
        evaluate_results(tiny_ground_truth(), [], "mask")
    with pytest.raises(ValueError, match="max_dets is 0"):
        evaluate_results(tiny_ground_truth(), [], max_dets=0)


def perfect_instances(ground_truth, image_id, with_masks):
    objects = [a for a in ground_truth["annotations"] if a["image_id"] == image_id]
    instances = Instances((100, 100))
    boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]
    instances.pred_boxes = Boxes(boxes)
    instances.scores = torch.full((len(objects),), 0.5)
    instances.pred_classes = torch.tensor([a["category_id"] - 1 for a in objects])
    if with_masks:
        masks = torch.zeros(len(objects), 100, 100, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = True
        instances.pred_masks = masks
    return instances


@pytest.mark.parametrize("with_masks", [False, True])
def test_the_detectron2_evaluator_gives_a_perfect_detector_full_marks_and_writes_files(tmp_path, with_masks):
    ground_truth = tiny_ground_truth()
    for item in ground_truth["categories"]:
        item["id"] += 40
    for item in ground_truth["annotations"]:
        item["category_id"] += 40
    ground_truth["images"][1]["neg_category_ids"] = [41]
    ground_truth["images"][1]["not_exhaustive_category_ids"] = [43]
    evaluator = OpenVocabularyEvaluator(ground_truth, tmp_path, class_ids=[43, 42, 41])
    for image in ground_truth["images"]:
        instances = perfect_instances(ground_truth, image["id"], with_masks)
        instances.pred_classes = 42 - instances.pred_classes  # class index 0 is category 43
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    metrics = evaluator.evaluate()
    assert list(metrics) == (["bbox", "segm"] if with_masks else ["bbox"])
    for task in metrics:
        assert metrics[task]["AP"] == pytest.approx(1.0)
        assert metrics[task]["AR@300"] == pytest.approx(1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["detections.json", "metrics.json", "summary.md"]
    results = json.loads((tmp_path / "detections.json").read_text())
    assert evaluate_results(ground_truth, results) == pytest.approx(metrics["bbox"], nan_ok=True)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["metrics"]["bbox"]["AP"] == pytest.approx(1.0)
    assert written["metrics"]["bbox"]["APl"] is None
    assert "| bbox | 100.0 |" in (tmp_path / "summary.md").read_text().replace("  ", " ")


def test_the_detectron2_evaluator_writes_intervals_and_fixed_ap_when_asked(tmp_path):
    ground_truth = tiny_ground_truth()
    evaluator = OpenVocabularyEvaluator(ground_truth, tmp_path, max_dets=1, samples=5, fixed_ap=True)
    for image in ground_truth["images"]:
        instances = perfect_instances(ground_truth, image["id"], False)
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    metrics = evaluator.evaluate()["bbox"]
    assert metrics["AP_fixed"] == metrics["APr_fixed"] == 1.0 and metrics["AP"] < 1.0  # one detection a picture
    written = json.loads((tmp_path / "metrics.json").read_text())["intervals"]["bbox"]
    assert written["AP"]["value"] == pytest.approx(metrics["AP"])
    text = (tmp_path / "summary.md").read_text()
    assert "Intervals over 5 resamples, bbox" in text and "Fixed AP (10,000 a class, percent)" in text


def test_reset_forgets_and_unseen_pictures_are_reported(caplog):
    ground_truth = tiny_ground_truth()
    evaluator = OpenVocabularyEvaluator(ground_truth, None)
    evaluator.process([{"image_id": 1}], [{"instances": perfect_instances(ground_truth, 1, False)}])
    with caplog.at_level("WARNING"):
        assert evaluator.evaluate()["bbox"]["AR@300"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert "1 of 2 pictures of the ground truth were never shown" in caplog.text
    evaluator.reset()
    assert evaluator.evaluate()["bbox"]["AP"] == 0.0


def test_unknown_class_ids_are_refused():
    with pytest.raises(ValueError, match="category 7"):
        OpenVocabularyEvaluator(tiny_ground_truth(), None, class_ids=[1, 7])
