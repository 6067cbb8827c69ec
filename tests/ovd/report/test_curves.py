"""Precision over recall: the mean of a curve is the average precision that the evaluation measures."""

import numpy as np
import pytest

from ovd.evaluation.average_precision import accumulate
from ovd.evaluation.benchmark import EvaluationBenchmark, as_list, make_detections, make_ground_truth
from ovd.evaluation.lvis_evaluator import class_groups, evaluate_results, lvis_matches
from ovd.report.curves import group_curves, precision_curves


@pytest.fixture(scope="module")
def data():
    benchmark = EvaluationBenchmark(images=25, detections=40, classes=20, seed=3)
    ground_truth = make_ground_truth(benchmark)
    return ground_truth, as_list(make_detections(benchmark, ground_truth))


def test_the_mean_of_each_classs_curve_is_its_average_precision(data):
    matches = lvis_matches(*data)[1]
    curves = precision_curves(matches)
    np.testing.assert_allclose(curves.mean(axis=2), accumulate(matches).precision[..., 0], atol=1e-12)


def test_the_mean_of_each_groups_curves_is_its_ap_and_ap50(data):
    truth, matches = lvis_matches(*data)
    measured = evaluate_results(*data)
    curves = group_curves(precision_curves(matches), class_groups(truth.frequencies))
    for name in ("r", "c", "f"):
        assert curves[name][1].mean() == pytest.approx(measured[f"AP{name}"], abs=1e-12)
    assert curves["novel"][0].mean() == pytest.approx(measured["AP50_novel"], abs=1e-12)


def test_a_hand_made_curve():
    """Two objects; detections by score: hit, miss, hit: precision 1 up to recall 0.5, then 2/3."""
    boxes = [[0, 0, 10, 10], [50, 0, 10, 10]]
    image = {"id": 1, "neg_category_ids": [], "not_exhaustive_category_ids": []}
    truth = {
        "images": [image],
        "categories": [{"id": 1, "name": "a", "frequency": "r"}, {"id": 2, "name": "b", "frequency": "c"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": b, "area": 100} for i, b in enumerate(boxes, 1)
        ],
    }
    found = [(0.9, boxes[0]), (0.8, [100, 100, 10, 10]), (0.7, boxes[1])]
    results = [{"image_id": 1, "category_id": 1, "bbox": b, "score": s} for s, b in found]
    table, matches = lvis_matches(truth, results)
    curves = precision_curves(matches)
    np.testing.assert_allclose(curves[0, 0], np.where(np.arange(101) <= 50, 1, 2 / 3))
    assert np.isnan(curves[:, 1]).all()
    assert set(group_curves(curves, class_groups(table.frequencies))) == {"r", "novel"}
