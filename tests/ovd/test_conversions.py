"""Other tools' formats, against the tools themselves where they are here, and against what was drawn."""

import json
import sys
from types import ModuleType, SimpleNamespace

import cv2
import numpy as np
import pytest

from ovd.conversions import outlines
from ovd.detections import Detections


def sample(masks: bool = True) -> Detections:
    mask = np.zeros((2, 50, 80), bool)
    mask[0, 10:30, 20:60] = True
    mask[1, 5:8, 70:80] = mask[1, 20:21, 75:76] = True
    boxes = np.array([[20, 10, 60, 30], [70.25, 5, 80, 21]])
    return Detections(boxes, [0.9, 0.25], [1, 0], ["fire engine", "猫"], (50, 80), mask if masks else None)


def empty() -> Detections:
    return Detections(np.zeros((0, 4)), [], [], [], (50, 80))


@pytest.mark.parametrize("masks", [True, False])
def test_supervision_reads_what_we_hand_over(masks) -> None:
    supervision = pytest.importorskip("supervision")
    source = sample(masks)
    found = source.to_supervision()
    assert isinstance(found, supervision.Detections) and len(found) == 2
    np.testing.assert_array_equal(found.xyxy, source.boxes)
    np.testing.assert_array_equal(found.confidence, source.scores)
    assert found.class_id.tolist() == [1, 0] and found["class_name"].tolist() == ["fire engine", "猫"]
    assert (found.mask is None) == (not masks)
    picture = np.zeros((50, 80, 3), np.uint8)
    assert supervision.BoxAnnotator().annotate(picture.copy(), found).any()
    assert len(found[found.confidence > 0.5]) == 1 and len(empty().to_supervision()) == 0


def test_fiftyone_gets_its_documented_fields(monkeypatch) -> None:
    fake = ModuleType("fiftyone")
    fake.Detection = lambda **fields: SimpleNamespace(**fields)
    fake.Detections = lambda detections: SimpleNamespace(detections=detections)
    monkeypatch.setitem(sys.modules, "fiftyone", fake)
    first, second = sample().to_fiftyone().detections
    assert first.label == "fire engine" and first.confidence == pytest.approx(0.9)
    assert first.bounding_box == pytest.approx([20 / 80, 10 / 50, 40 / 80, 20 / 50])
    assert first.mask.shape == (20, 40) and first.mask.all()  # the mask of the box alone
    assert second.mask.shape == (16, 10) and second.mask.sum() == 31


@pytest.mark.parametrize("tool", ["supervision", "fiftyone"])
def test_a_missing_tool_is_named_with_the_command(monkeypatch, tool) -> None:
    monkeypatch.setitem(sys.modules, tool, None)
    with pytest.raises(ImportError, match=f"{tool} is not installed; run: pip install {tool}"):
        getattr(sample(), f"to_{tool}")()


def test_outlines_drawn_again_give_the_mask() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = np.zeros((60, 90), np.uint8)
        centre, axes = rng.integers(15, 45, 2).tolist(), rng.integers(5, 25, 2).tolist()
        cv2.ellipse(mask, centre, axes, float(rng.integers(0, 180)), 0, 360, 1, -1)
        again = np.zeros((600, 900), np.uint8)
        for shape in outlines(mask.astype(bool)):
            cv2.fillPoly(again, [np.round(shape * 10).astype(np.int32)], 1)
        large = np.kron(mask, np.ones((10, 10), np.uint8))
        assert (again & large).sum() / (again | large).sum() > 0.9
    pixel = np.zeros((5, 5), bool)
    pixel[2, 3] = True
    assert outlines(~pixel & pixel) == [] and np.ptp(outlines(pixel)[0], axis=0).max() <= 1.0


def test_labelme_has_polygons_for_masks_and_rectangles_without() -> None:
    content = json.loads(json.dumps(sample().to_labelme("../a.jpg")))
    assert content["imagePath"] == "../a.jpg" and (content["imageHeight"], content["imageWidth"]) == (50, 80)
    assert content["imageData"] is None
    first, *rest = content["shapes"]
    assert first["label"] == "fire engine" and first["shape_type"] == "polygon" and first["group_id"] is None
    x, y = np.array(first["points"]).T
    np.testing.assert_allclose([x.min(), y.min(), x.max(), y.max()], [20, 10, 60, 30], atol=0.5)
    assert [s["group_id"] for s in rest] == [1, 1]  # two pieces of one object
    boxes = sample(masks=False).to_labelme("a.jpg")["shapes"]
    assert boxes[0]["shape_type"] == "rectangle" and boxes[0]["points"] == [[20, 10], [60, 30]]


def test_yolo_lines_are_centre_and_size_as_shares() -> None:
    lines = sample().to_yolo().splitlines()
    assert lines[0] == "1 0.500000 0.400000 0.500000 0.400000"
    back = np.array([float(v) for v in lines[1].split()[1:]]) * [80, 50, 80, 50]
    np.testing.assert_allclose([*(back[:2] - back[2:] / 2), *(back[:2] + back[2:] / 2)], [70.25, 5, 80, 21], atol=1e-3)
    assert sample().to_yolo(scores=True).splitlines()[1].endswith(" 0.250000") and empty().to_yolo() == ""
    outline = np.array([float(v) for v in sample().to_yolo(segments=True).splitlines()[0].split()[1:]]).reshape(-1, 2)
    assert (outline >= 0).all() and (outline <= 1).all() and len(outline) >= 4
    with pytest.raises(ValueError, match="makes no masks"):
        sample(masks=False).to_yolo(segments=True)
