"""Columns: what is kept under a limit, forms of masks, and pictures with more masks than pycocotools takes at once."""

import numpy as np
import pycocotools.mask as mask_codec
import pytest

from ovd.evaluation.lvis_evaluator import evaluate_results
from ovd.evaluation.tables import DetectionTable, best_per, places, run_lengths


def test_the_best_of_each_key_are_kept_and_of_equal_scores_the_earlier():
    keys = np.asarray([2, 0, 2, 2, 0, 2])
    scores = np.asarray([0.5, 0.1, 0.9, 0.5, 0.2, 0.1])
    assert best_per(keys, scores, 2).tolist() == [True, True, True, False, True, False]
    assert best_per(keys, scores, 1).tolist() == [False, False, True, False, True, False]
    assert best_per(keys, scores, 9).all() and best_per(keys[:0], scores[:0], 1).shape == (0,)


def test_unknown_ids_have_no_place():
    assert places(np.asarray([7, 3, 8, 1]), np.asarray([3, 7])).tolist() == [1, 0, -1, -1]


def test_polygons_and_uncompressed_run_lengths_become_compressed_ones():
    mask = np.zeros((6, 8), np.uint8)
    mask[1:4, 2:5] = 1
    polygon = [[2, 1, 5, 1, 5, 4, 2, 4]]
    column_runs = {"size": [6, 8], "counts": [13, 3, 3, 3, 3, 3, 20]}
    for form in (polygon, column_runs, mask_codec.encode(np.asfortranarray(mask))):
        assert (mask_codec.decode(run_lengths(form, (6, 8))) == mask).all()


def one_class(size, segmentation):
    lists = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 1, 3, 3], "area": 9}
    return {
        "images": [{"id": 1, "height": size[0], "width": size[1], **lists}],
        "categories": [{"id": 1, "name": "owl", "frequency": "r"}],
        "annotations": [{**annotation, "segmentation": segmentation}],
    }


def test_three_hundred_masks_in_one_picture_are_measured():
    code = run_lengths([[2, 1, 5, 1, 5, 4, 2, 4]], (6, 8))
    results = [{"image_id": 1, "category_id": 1, "score": 1 - i / 400, "segmentation": code} for i in range(300)]
    assert evaluate_results(one_class((6, 8), [[2, 1, 5, 1, 5, 4, 2, 4]]), results, "segm")["AP"] == 1.0


def test_results_that_are_not_run_lengths_or_lack_boxes_are_named():
    ground_truth = one_class((6, 8), [[2, 1, 5, 1, 5, 4, 2, 4]])
    polygon = {"image_id": 1, "category_id": 1, "score": 1.0, "segmentation": [[2, 1, 5, 1, 5, 4]]}
    with pytest.raises(ValueError, match="not run lengths"):
        evaluate_results(ground_truth, [polygon], "segm")
    ones = np.ones(1, np.int64)
    with pytest.raises(ValueError, match="result 0 has no bbox"):
        evaluate_results(ground_truth, DetectionTable(ones, ones, ones / 2))
    with pytest.raises(ValueError, match="result 0 has bbox"):
        evaluate_results(ground_truth, [{"image_id": 1, "category_id": 1, "score": 1.0, "bbox": [0, 0, 1]}])


@pytest.mark.parametrize("field, message", [("area", "no area"), ("bbox", "no bbox")])
def test_annotations_without_what_is_read_are_named(field, message):
    ground_truth = one_class((6, 8), [])
    ground_truth["annotations"][0].pop(field)
    with pytest.raises(ValueError, match=f"annotation 1 has {message}"):
        evaluate_results(ground_truth, [])
