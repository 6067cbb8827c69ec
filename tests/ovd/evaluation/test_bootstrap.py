"""Resampled pictures: a picture counted twice is a data set with a copy of it; intervals and their seeds."""

import math

import numpy as np
import pytest

from ovd.evaluation.average_precision import accumulate
from ovd.evaluation.benchmark import EvaluationBenchmark, as_list, make_detections, make_ground_truth
from ovd.evaluation.bootstrap import Interval, bootstrap, interval, intervals_table
from ovd.evaluation.lvis_evaluator import evaluate_intervals, evaluate_results, lvis_matches

BENCHMARK = EvaluationBenchmark(images=12, detections=30, classes=15, seed=4)


@pytest.fixture(scope="module")
def data():
    ground_truth = make_ground_truth(BENCHMARK)
    results = as_list(make_detections(BENCHMARK, ground_truth))
    scores = np.random.default_rng(0).permutation(len(results)) / len(results)  # no two equal
    return ground_truth, [{**result, "score": float(score)} for result, score in zip(results, scores, strict=True)]


def copied(ground_truth, results, weights):
    """Write every picture as often as its weight says, under new ids."""
    images, annotations, found = [], [], []
    for image, weight in zip(ground_truth["images"], weights, strict=True):
        for _ in range(weight):
            new = {"image_id": len(images) + 1}
            images.append({**image, "id": new["image_id"]})
            annotations += [{**a, **new} for a in ground_truth["annotations"] if a["image_id"] == image["id"]]
            found += [{**r, **new} for r in results if r["image_id"] == image["id"]]
    return {**ground_truth, "images": images, "annotations": annotations}, found


@pytest.mark.parametrize("seed", range(4))
def test_weights_measure_a_data_set_with_so_many_copies_of_each_picture(data, seed):
    weights = np.bincount(np.random.default_rng(seed).integers(0, 12, 12), minlength=12)
    assert weights.min() == 0 and weights.max() > 1
    scores = accumulate(lvis_matches(*data)[1], weights)
    expected = accumulate(lvis_matches(*copied(*data, weights))[1])
    np.testing.assert_allclose(scores.precision, expected.precision, atol=1e-11)
    np.testing.assert_allclose(scores.recall, expected.recall, atol=1e-11)


def test_the_value_is_the_metric_and_lies_within_its_interval(data):
    measured = evaluate_results(*data)
    intervals = evaluate_intervals(*data, samples=40)
    for name in ("AP", "AP50", "AR@300", "APr", "ARf@300", "AP_base", "AP50_novel", "AR@300_novel"):
        assert intervals[name].value == pytest.approx(measured[name], abs=1e-12, nan_ok=True), name
    assert intervals["AP"].low < intervals["AP"].value < intervals["AP"].high


def test_one_seed_gives_one_interval_and_another_another(data):
    first, again, other = (evaluate_intervals(*data, samples=10, seed=seed) for seed in (0, 0, 1))
    assert first == again and first["AP"] != other["AP"]


def test_more_pictures_give_a_narrower_interval():
    widths = []
    for images in (10, 90):
        ground_truth = make_ground_truth(benchmark := EvaluationBenchmark(images, 20, 6, 1))
        found = evaluate_intervals(ground_truth, as_list(make_detections(benchmark, ground_truth)), samples=60)
        widths.append(found["AP50"].high - found["AP50"].low)
    assert widths[1] < 0.7 * widths[0]


def test_nothing_to_measure_is_na():
    empty = interval(np.asarray([math.nan, math.nan]))
    assert str(empty) == "n/a"
    assert str(Interval(0.314, 0.29, 0.3321)) == "31.4 (29.0 to 33.2)"
    assert "| APr" in intervals_table({"APr": empty})
    assert interval(np.asarray([0.5, 0.4, math.nan, 0.6])).high == pytest.approx(0.595)


def test_an_interval_lies_about_the_value_where_resampling_raises_the_metric():
    resampled = np.linspace(0.6, 0.8, 101)  # all above the value
    found = interval(np.concatenate([[0.5], resampled]))
    assert (found.low, found.high) == (pytest.approx(0.5 - 0.095), pytest.approx(0.5 + 0.095))
    # A metric is not below 0, a difference may be.
    assert interval(np.asarray([0.0, 0.3, 0.5]), least=0.0).low == 0.0 > interval(np.asarray([0.0, 0.3, 0.5])).low


def test_no_samples_and_results_of_two_data_sets_are_refused(data):
    _, matches = lvis_matches(*data)
    groups = {"": np.ones(15, bool)}
    with pytest.raises(ValueError, match="samples is 0"):
        bootstrap([matches], groups, samples=0)
    fewer, results = copied(*data, [1] * 11 + [0])
    with pytest.raises(ValueError, match="different data sets"):
        bootstrap([matches, lvis_matches(fewer, results)[1]], groups, samples=1)
