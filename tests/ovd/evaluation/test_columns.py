"""Detections as columns: the same files and metrics as from dictionaries, in a counted number of bytes."""

import json
import tracemalloc

import numpy as np
import pycocotools.mask as mask_codec
import pytest
import torch
from detectron2.structures import Boxes, Instances

from ovd.detections import Detections
from ovd.evaluation import columns
from ovd.evaluation.benchmark import EvaluationBenchmark, make_ground_truth
from ovd.evaluation.benchmark_memory import pictures, with_masks
from ovd.evaluation.columns import DetectionColumns
from ovd.evaluation.lvis_evaluator import OpenVocabularyEvaluator, evaluate_fixed_ap, evaluate_results
from ovd.evaluation.results import write_json_atomic, write_json_list_atomic

BENCHMARK = EvaluationBenchmark(images=5, detections=24, classes=9, seed=2)


def instances(found: Detections) -> Instances:
    result = Instances(found.image_size)
    result.pred_boxes, result.scores = Boxes(torch.from_numpy(found.boxes)), torch.from_numpy(found.scores)
    result.pred_classes = torch.from_numpy(found.labels)
    if found.masks is not None:
        result.pred_masks = torch.from_numpy(found.masks)
    return result


def one_by_one(found, image_id, ids):
    """Return the results form, made without columns."""
    results = []
    for place, label in enumerate(found.labels):
        x1, y1, x2, y2 = (float(value) for value in found.boxes[place])
        result = {"image_id": image_id, "category_id": ids[label], "bbox": [x1, y1, x2 - x1, y2 - y1]}
        result["score"] = float(found.scores[place])
        if found.masks is not None:
            code = mask_codec.encode(np.asfortranarray(found.masks[place], np.uint8))
            result["segmentation"] = {"size": list(found.image_size), "counts": code["counts"].decode()}
        results.append(result)
    return results


@pytest.fixture(scope="module", params=[False, True], ids=["boxes", "masks"])
def data(request):
    """Annotations, detections by picture with one picture that has none, the results form of them."""
    ground_truth = with_masks(make_ground_truth(BENCHMARK))
    found = dict(pictures(BENCHMARK, ground_truth, request.param))
    found[3] = found[3][:0]
    ids = [category["id"] for category in ground_truth["categories"]]
    return ground_truth, found, [result for i, some in found.items() for result in one_by_one(some, i, ids)]


def collected(ground_truth, found):
    kept = DetectionColumns([category["id"] for category in ground_truth["categories"]])
    for image_id, detections in found.items():
        kept.add(image_id, detections)
    return kept


def test_the_file_is_to_the_byte_that_of_the_dictionaries(data, tmp_path):
    ground_truth, found, results = data
    whole = write_json_atomic(tmp_path / "list.json", results)
    streamed = write_json_list_atomic(tmp_path / "columns.json", collected(ground_truth, found).results())
    assert len(results) == 4 * 24 and streamed.read_bytes() == whole.read_bytes()
    empty = write_json_list_atomic(tmp_path / "empty.json", [[], []])
    assert empty.read_text() == "[]"


def test_metrics_are_exactly_those_of_the_dictionaries(data):
    ground_truth, found, results = data
    table = collected(ground_truth, found).table()
    for task in ("bbox", "segm") if found[1].masks is not None else ("bbox",):
        expected = evaluate_results(ground_truth, results, task, max_dets=20)
        assert 0 < expected["AP"] < 1
        assert evaluate_results(ground_truth, table, task, 20) == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
        expected = evaluate_fixed_ap(ground_truth, results, task, 5)
        assert evaluate_fixed_ap(ground_truth, table, task, 5) == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


def test_the_evaluator_writes_and_measures_what_the_dictionaries_do(data, tmp_path):
    ground_truth, found, results = data
    evaluator = OpenVocabularyEvaluator(ground_truth, tmp_path)
    for image_id, detections in found.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances(detections)}])
    metrics = evaluator.evaluate()
    assert list(metrics) == (["bbox", "segm"] if found[1].masks is not None else ["bbox"])
    for task, of_task in metrics.items():
        expected = evaluate_results(ground_truth, results, task)
        assert of_task == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert (tmp_path / "detections.json").read_text() == json.dumps(results)
    assert evaluator.evaluate().keys() == metrics.keys()  # nothing was used up


def test_a_detection_takes_24_bytes_and_a_mask_its_run_lengths_and_4(data):
    ground_truth, found, results = data
    kept = collected(ground_truth, found)
    masks = sum(4 + len(result["segmentation"]["counts"]) for result in results if "segmentation" in result)
    assert len(kept) == len(results) and kept.nbytes == 24 * len(results) + masks


def test_columns_do_not_keep_the_detectors_own_arrays_alive():
    wide = torch.rand(1000, 8)
    wide[:, 2:4] += 2
    found = Instances((10, 10))
    found.pred_boxes, found.scores = Boxes(wide[:1, :4]), wide[:1, 5]
    found.pred_classes = torch.zeros(1, dtype=torch.int64)
    kept = DetectionColumns([7])
    kept.add(1, Detections.from_instances(found))
    (picture,) = kept.pictures
    assert all(part.base is None and part.flags.owndata for part in (picture.boxes, picture.scores, picture.labels))
    before = picture.boxes.copy()
    wide[:] = 0
    assert np.array_equal(picture.boxes, before)


def peak_of_writing(path, kept):
    tracemalloc.start()
    try:
        write_json_list_atomic(path, kept.results())
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_writing_takes_the_memory_of_a_picture_however_many_there_are(tmp_path):
    found = dict(pictures(BENCHMARK, make_ground_truth(BENCHMARK), masks=False))
    few, many = DetectionColumns(range(1, 10)), DetectionColumns(range(1, 10))
    for number in range(400):
        for kept in (few, many) if number < 20 else (many,):
            kept.add(number, found[1])
    peak_of_writing(tmp_path / "warm.json", few)
    peaks = [peak_of_writing(tmp_path / "x.json", kept) for kept in (few, many)]
    size = (tmp_path / "x.json").stat().st_size
    assert peaks[1] < 1.2 * peaks[0] and peaks[1] < size / 8


def test_masks_that_only_some_pictures_have_are_refused_and_boxes_measured():
    ground_truth = with_masks(make_ground_truth(BENCHMARK))
    found = dict(pictures(BENCHMARK, ground_truth, masks=True))
    bare = Detections(found[2].boxes, found[2].scores, found[2].labels, found[2].names, found[2].image_size)
    table = collected(ground_truth, {**found, 2: bare}).table()
    assert evaluate_results(ground_truth, table)["AP"] > 0
    with pytest.raises(ValueError, match="no segmentation"):
        evaluate_results(ground_truth, table, "segm")


def test_a_mask_of_another_size_than_its_picture_is_named_and_a_label_without_id_too(data):
    ground_truth, found, _ = data
    with pytest.raises(ValueError, match="labels run from .* but there are 2 category ids"):
        collected({"categories": [{"id": 1}, {"id": 2}]}, found)
    if found[1].masks is not None:
        images = [{**image, "width": 600 if image["id"] == 2 else 640} for image in ground_truth["images"]]
        table = collected(ground_truth, found).table()
        message = r"result 24 has a mask of size \(640, 640\), but image 2 has \(640, 600\)"
        with pytest.raises(ValueError, match=message):
            evaluate_results({**ground_truth, "images": images}, table, "segm")


@pytest.mark.parametrize("other", [0, 1, 4, 5])
def test_pictures_of_another_process_come_in_pieces_behind_those_of_the_first(data, monkeypatch, other):
    """As comm does it, with the second process played here; `tests/ovd/engine/test_processes.py` has two real ones."""
    ground_truth, found, _ = data
    parts = [collected(ground_truth, {i: found[i] for i in ids}) for ids in ((1, 2, 3), range(6 - other, 6))]
    monkeypatch.setattr(columns, "_PICTURES_AT_ONCE", 2)
    monkeypatch.setattr(columns.comm, "all_gather", lambda data: [len(part.pictures) for part in parts])
    monkeypatch.setattr(columns.comm, "get_world_size", lambda: 2)
    sent = []
    monkeypatch.setattr(columns.comm, "is_main_process", lambda: False)
    monkeypatch.setattr(columns.comm, "gather", lambda data, dst: sent.append(data) or [])
    assert parts[1].gathered() is None and max(map(len, sent), default=0) <= 2
    waiting = iter(sent)
    monkeypatch.setattr(columns.comm, "is_main_process", lambda: True)
    monkeypatch.setattr(columns.comm, "gather", lambda data, dst: [data, next(waiting)])
    together = parts[0].gathered()
    assert [p.image_id for p in together.pictures] == [1, 2, 3, *range(6 - other, 6)]
    assert next(waiting, None) is None and len(parts[0].pictures) == 3
    assert list(together.results()) == [*parts[0].results(), *parts[1].results()]


def test_packed_masks_read_like_a_list(data):
    ground_truth, found, results = data
    table = collected(ground_truth, found).table()
    if found[1].masks is None:
        assert table.masks is None
        return
    expected = [{**r["segmentation"], "counts": r["segmentation"]["counts"].encode()} for r in results]
    assert list(table.masks) == expected and table.masks[-1] == expected[-1]
    assert list(table.masks[3:9:2]) == expected[3:9:2]
    assert list(table.take(np.asarray([5, 2])).masks) == [expected[5], expected[2]]
    with pytest.raises(IndexError):
        table.masks[len(expected)]
