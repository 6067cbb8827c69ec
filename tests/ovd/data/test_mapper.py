"""The mapper's geometry against the pixels themselves, and what it does with pictures it cannot use."""

import logging
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import MapDataset
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from pycocotools import mask as mask_tools

from ovd.data.images import ImageError
from ovd.data.mapper import OpenVocabularyMapper
from ovd.detector import OpenVocabularyDetector
from ovd.text.vocabulary import Vocabulary


def rle(mask):
    return mask_tools.encode(np.asfortranarray(mask.astype(np.uint8)))


@pytest.fixture
def record(tmp_path) -> dict:
    """A black picture with one red rectangle (x 10–39, y 5–24), annotated as RLE and once more as a polygon."""
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[5:25, 10:40, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    common = {"bbox": [10, 5, 30, 20], "bbox_mode": BoxMode.XYWH_ABS}
    return {
        "file_name": str(tmp_path / "a.png"), "height": 60, "width": 80, "image_id": 7,
        "annotations": [
            {**common, "category_id": 3, "segmentation": rle(pixels[..., 0] > 0)},
            {**common, "category_id": 4, "segmentation": [[10, 5, 40, 5, 40, 25, 10, 25]]},
            {**common, "category_id": 5, "segmentation": [[10, 5, 40, 5, 40, 25, 10, 25]], "iscrowd": 1},
        ],
    }  # fmt: skip


def test_masks_follow_the_pixels_through_flip_scale_crop_and_padding(record):
    mapper = OpenVocabularyMapper(is_train=True, image_size=64, colour_jitter=0.0)
    np.random.seed(0)
    seen = 0
    for _ in range(40):
        out = mapper(record)
        assert out["image"].shape == (3, 64, 64) and out["image"].dtype == torch.uint8
        # Outside the picture the canvas is grey (128, 128, 128); the object is red: R high, G low.
        red = (out["image"][0] > 128) & (out["image"][1] < 100)
        instances = out["instances"]
        if red.sum() < 30:
            continue
        assert instances.gt_classes.tolist() == [3, 4]  # the crowd region is not an instance
        for mask in instances.gt_masks.tensor:
            assert (mask & red).sum() / (mask | red).sum() > 0.8
        y, x = torch.nonzero(instances.gt_masks.tensor[0], as_tuple=True)
        expected = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
        torch.testing.assert_close(instances.gt_boxes.tensor[0], expected)
        seen += 1
    assert seen > 20


def test_boxes_alone_agree_with_boxes_from_masks(record):
    for seed in range(10):
        boxes = []
        for with_masks in (True, False):
            np.random.seed(seed)
            mapper = OpenVocabularyMapper(is_train=True, image_size=64, with_masks=with_masks)
            boxes.append(mapper(record)["instances"].gt_boxes.tensor)
        if len(boxes[0]) == len(boxes[1]):
            assert (boxes[0] - boxes[1]).abs().max() <= 2.0 if len(boxes[0]) else True


def test_picture_without_objects_gives_empty_instances(record):
    record["annotations"] = []
    instances = OpenVocabularyMapper(is_train=True, image_size=64)(record)["instances"]
    assert len(instances) == 0 and instances.gt_masks.tensor.shape == (0, 64, 64)


def test_regions_kept_in_files_come_with_the_picture(record, tmp_path):
    from ovd.data.regions import precompute_regions

    boxes, embeddings = torch.tensor([[0.0, 0, 80, 60], [10, 10, 30, 30]]), torch.eye(2)
    record["image_id"] = 7
    precompute_regions([record], lambda _: (boxes, embeddings), tmp_path / "regions", teacher="abc")
    mapper = OpenVocabularyMapper(
        is_train=True, image_size=64, scale_range=(0.7, 0.7), regions=str(tmp_path / "regions"), regions_teacher="abc"
    )
    regions = mapper(record)["regions"]
    whole = regions.teacher_embeddings[:, 0] == 1
    x1, y1, x2, y2 = regions.proposal_boxes.tensor[whole][0].tolist()
    assert (x2 - x1) / (y2 - y1) == pytest.approx(80 / 60, rel=0.05)
    with pytest.raises(ValueError, match="was made by the image-text model 'abc'"):
        OpenVocabularyMapper(is_train=True, regions=str(tmp_path / "regions"), regions_teacher="xyz")(record)
    with pytest.raises(ValueError, match="is no folder"):
        OpenVocabularyMapper(is_train=True, regions=str(tmp_path / "none"))


def test_testing_scales_the_longer_side_and_keeps_rgb(record):
    out = OpenVocabularyMapper(is_train=False, image_size=40)(record)
    assert out["image"].shape == (3, 30, 40)  # 60 x 80, halved
    assert "instances" not in out and (out["height"], out["width"]) == (60, 80)
    assert out["image"][:, 6, 10].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(80, 60, (40, 30)), (60, 80, (30, 40)), (50, 50, (40, 40)), (1, 1, (40, 40)), (10, 10000, (1, 40))],
)
def test_the_detector_and_the_evaluation_see_the_same_pixels(tmp_path, height, width, expected):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    seen = []

    def inference(inputs, **_):
        seen.append(inputs[0]["image"])
        return [{"instances": empty}]

    empty = Instances((height, width), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0))
    empty.pred_classes = torch.zeros(0, dtype=torch.int64)
    model = SimpleNamespace(
        architecture=SimpleNamespace(image_size=40), device=torch.device("cpu"), inference=inference, eval=lambda: model
    )
    detector = OpenVocabularyDetector(model, image_text=None)
    detector.vocabulary = Vocabulary.parse("cat")
    detector.predict(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "image_id": 1, "annotations": []}
    mapped = OpenVocabularyMapper(is_train=False, image_size=40)(record)["image"]
    assert tuple(mapped.shape[1:]) == expected
    assert torch.equal(mapped, seen[0])


def test_input_dict_is_left_alone_and_mapper_survives_pickling(record):
    before = pickle.dumps(record)
    mapper = pickle.loads(pickle.dumps(OpenVocabularyMapper(is_train=True, image_size=64)))
    mapper(record)
    assert pickle.dumps(record) == before


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("annotated", ["upright", "as stored"])
@pytest.mark.parametrize("is_train", [True, False])
def test_boxes_land_on_the_object_in_pictures_that_a_camera_turned(tmp_path, orientation, annotated, is_train):
    upright = np.zeros((60, 100, 3), np.uint8)
    upright[8:28, 62:92, 0] = 255  # off both axes, so that no flip or turn maps it onto itself
    turns = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]  # quarter turns to the left from upright to stored
    stored = np.rot90(upright, turns)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    if annotated == "as stored" and turns % 2 == 0:
        pytest.skip("the sizes agree, so nothing tells that the annotation is not upright")
    seen = upright if annotated == "upright" else stored
    rows, columns = np.nonzero(seen[..., 0])
    box = [int(v) for v in (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)]
    record = {
        "file_name": str(tmp_path / "a.png"), "height": seen.shape[0], "width": seen.shape[1], "image_id": 1,
        "annotations": [{"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}],
    }  # fmt: skip
    np.random.seed(0)
    mapper = OpenVocabularyMapper(is_train, image_size=200, scale_range=(1, 1), colour_jitter=0.0, with_masks=False)
    out = mapper(record)
    red = (out["image"][0] > 128) & (out["image"][1] < 100)
    y, x = torch.nonzero(red, as_tuple=True)
    pixels = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
    if is_train:
        boxes = out["instances"].gt_boxes.tensor
    else:  # the evaluation's way back: from the scaled picture to the annotated one
        scale = seen.shape[1] / out["image"].shape[2]
        pixels, boxes = pixels * scale, torch.tensor([[box[0], box[1], box[0] + box[2], box[1] + box[3]]])
    torch.testing.assert_close(boxes[0].float(), pixels, atol=2.0, rtol=0)


def test_unreadable_picture_is_skipped_counted_and_reported_once(record, tmp_path, caplog):
    broken = dict(record, file_name=str(tmp_path / "broken.jpg"))
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    turned = dict(record, height=80, width=60)
    mapper = OpenVocabularyMapper(is_train=True, image_size=64)
    with caplog.at_level(logging.WARNING):
        assert mapper(broken) is None and mapper(turned) is None
    assert mapper.skipped == 2
    assert len(caplog.records) == 1 and "broken.jpg" in caplog.text
    assert MapDataset([broken, record], mapper)[0]["image_id"] == 7
    with pytest.raises(ImageError, match="broken.jpg"):
        OpenVocabularyMapper(is_train=False)(broken)


@pytest.mark.parametrize("wrong", [{"image_size": 0}, {"scale_range": (1.6, 0.5)}, {"colour_jitter": 1.0}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OpenVocabularyMapper(is_train=True, **wrong)
