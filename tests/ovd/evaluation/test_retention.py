"""Retention: words that were fine-tuned gain, others lose, and the interval of the change is a paired one."""

import math

import numpy as np
import pytest

from ovd.evaluation.benchmark import EvaluationBenchmark, as_list, make_detections, make_ground_truth
from ovd.evaluation.lvis_evaluator import evaluate_report
from ovd.evaluation.retention import retention_report

BENCHMARK = EvaluationBenchmark(images=40, detections=30, classes=15, seed=2)
TUNED = ["class 1", "class 2", 3]


@pytest.fixture(scope="module")
def data():
    ground_truth = make_ground_truth(BENCHMARK)
    return ground_truth, as_list(make_detections(BENCHMARK, ground_truth))


@pytest.fixture(scope="module")
def after(data):
    """Detections of fine-tuned classes are now where the objects are; four fifths of the others are gone."""
    ground_truth, results = data
    exact = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in ground_truth["annotations"]
        if a["category_id"] <= 3
    ]
    return exact + [r for r in results if r["category_id"] > 3][::5]


def test_groups_have_the_means_of_their_classes_and_move_as_they_should(data, after):
    report = retention_report(*data, after, TUNED, samples=30)
    for results, side in ((data[1], "before"), (after, "after")):
        classes = {c.id: c for c in evaluate_report(data[0], results).categories if c.num_ground_truth}
        tuned = np.mean([classes[k].AP for k in (1, 2, 3)])
        others = np.mean([c.AP for k, c in classes.items() if k > 3])
        rare = np.mean([c.AP for k, c in classes.items() if k > 3 and c.frequency == "r"])
        assert getattr(report.rows["fine-tuned", "AP"], side).value == pytest.approx(tuned)
        assert getattr(report.rows["untouched", "AP"], side).value == pytest.approx(others)
        assert getattr(report.rows["untouched, rare", "AP"], side).value == pytest.approx(rare)
    gained, lost = report.rows["fine-tuned", "AP"], report.rows["untouched", "AP"]
    assert gained.after.value == 1.0 and gained.change.low > 0
    assert lost.change.high < 0
    assert lost.change.value == pytest.approx(lost.after.value - lost.before.value)
    assert gained.words == 3 and "untouched, frequent" in report.to_markdown()


def test_no_change_is_exactly_zero_because_the_resamples_are_the_same(data):
    change = retention_report(*data, data[1], TUNED, samples=10).rows["untouched", "AP"].change
    assert (change.value, change.low, change.high) == (0.0, 0.0, 0.0)


def test_the_change_is_known_better_than_its_two_sides(data):
    slightly_worse = [r for number, r in enumerate(data[1]) if number % 25]
    row = retention_report(*data, slightly_worse, TUNED, samples=60).rows["untouched", "AP50"]
    assert row.change.high - row.change.low < 0.5 * (row.before.high - row.before.low)


def test_a_group_without_objects_is_na(data):
    ground_truth = {**data[0], "categories": [{**c, "frequency": "f"} for c in data[0]["categories"]]}
    report = retention_report(ground_truth, data[1], data[1], TUNED, samples=2)
    assert math.isnan(report.rows["untouched, rare", "AP"].change.value)
    line = next(line for line in report.to_markdown().splitlines() if "untouched, rare" in line)
    assert line.count("n/a") == 3 and line.split("|")[2].strip() == "0"


@pytest.mark.parametrize("words, message", [
    (["owl"], "'owl' stands for 0 categories"), ([], "0 of 15"), (range(1, 16), "15 of 15"), ("class 1", "give a list"),
])  # fmt: skip
def test_words_that_cannot_be_split_off_are_named(data, words, message):
    with pytest.raises(ValueError, match=message):
        retention_report(*data, data[1], words, samples=1)
