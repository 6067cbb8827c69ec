"""Generated LVIS-like data: the lvis package is the reference, also for fixed AP, ties and empty pictures."""

import json
import math
from collections import defaultdict

import numpy as np
import pytest

pytest.importorskip("lvis")

from ovd.evaluation.benchmark import SHARED_METRICS, EvaluationBenchmark, as_list, make_detections, make_ground_truth
from ovd.evaluation.lvis_evaluator import evaluate_fixed_ap, evaluate_results
from ovd.evaluation.tables import DetectionTable


@pytest.fixture(autouse=True)
def _old_numpy_name(monkeypatch):
    monkeypatch.setattr(np, "float", float, raising=False)  # lvis 0.5.3 uses the name that numpy dropped


def lvis_metrics(ground_truth, results, tmp_path, max_dets=300):
    from lvis import LVIS, LVISEval, LVISResults

    path = tmp_path / "ground_truth.json"
    path.write_text(json.dumps(ground_truth))
    loaded = LVIS(str(path))
    evaluation = LVISEval(loaded, LVISResults(loaded, [dict(result) for result in results], max_dets=max_dets), "bbox")
    evaluation.run()
    return {key: math.nan if value == -1 else float(value) for key, value in evaluation.get_results().items()}


def generated(seed, images=15, detections=40, classes=17):
    """Scores of one decimal, so many are equal; a picture without detections; an object of every size."""
    benchmark = EvaluationBenchmark(images, detections, classes, seed)
    ground_truth = make_ground_truth(benchmark)
    columns = make_detections(benchmark, ground_truth)
    columns["scores"] = columns["scores"].round(1)
    kept = columns["image_ids"] != 3
    return ground_truth, {name: column[kept] for name, column in columns.items()}


@pytest.mark.parametrize("seed", range(8))
def test_metrics_equal_the_lvis_package_on_generated_sets(seed, tmp_path):
    ground_truth, columns = generated(seed)
    results = as_list(columns)
    expected = lvis_metrics(ground_truth, results, tmp_path)
    measured = evaluate_results(ground_truth, results)
    assert 0.05 < expected["AP"] < 0.9
    for name in SHARED_METRICS:
        assert measured[name] == pytest.approx(expected[name], abs=1e-10, nan_ok=True), name
    assert evaluate_results(ground_truth, DetectionTable(**columns)) == pytest.approx(measured, abs=0, nan_ok=True)


def test_fixed_ap_equals_the_lvis_package_given_each_classs_best_and_no_limit_per_picture(tmp_path):
    ground_truth, columns = generated(0, images=6, detections=420)
    columns["scores"] = np.random.default_rng(0).random(len(columns["scores"]))  # without ties the cut is unique
    results, limit = as_list(columns), 60
    by_class = defaultdict(list)
    for result in sorted(results, key=lambda result: -result["score"]):
        by_class[result["category_id"]].append(result)
    assert max(map(len, by_class.values())) > limit
    best = [result for found in by_class.values() for result in found[:limit]]
    expected = lvis_metrics(ground_truth, best, tmp_path, max_dets=-1)
    measured = evaluate_fixed_ap(ground_truth, results, max_dets_per_class=limit)
    capped = evaluate_results(ground_truth, results)
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"):
        assert measured[name] == pytest.approx(expected[name], abs=1e-10, nan_ok=True), name
    assert f"AR@{limit}" in measured and measured["AP"] != capped["AP"]


def test_every_object_found_and_equal_boxes_agree_too(tmp_path):
    ground_truth, _ = generated(3)
    # Two exact copies of each object: the second is a false alarm, and equal IoUs decide which object it takes.
    ground_truth["annotations"] += [{**a, "id": a["id"] + 10_000} for a in ground_truth["annotations"][::3]]
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": list(a["bbox"]), "score": 0.5}
        for a in ground_truth["annotations"]
        for _ in range(2)
    ]
    expected = lvis_metrics(ground_truth, results, tmp_path)
    measured = evaluate_results(ground_truth, results)
    for name in SHARED_METRICS:
        assert measured[name] == pytest.approx(expected[name], abs=1e-10, nan_ok=True), name
