"""The check of a download of LVIS v1, on a stand-in with its classes and a few pictures."""

import copy
import json

import pytest
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
from PIL import Image

from ovd.data.lvis import load_lvis
from ovd.data.lvis_v1 import TRAIN, TRAIN_BASE, VAL, prepare_lvis, report_lines

RARE = next(c["id"] for c in LVIS_CATEGORIES if c["frequency"] == "r")
FREQUENT = next(c["id"] for c in LVIS_CATEGORIES if c["frequency"] == "f")


def content(part: str, first: int) -> dict:
    images, annotations = [], []
    for i in range(first, first + 4):
        images.append({
            "id": i, "width": 12, "height": 8, "coco_url": f"http://host/{part}2017/{i:012d}.jpg",
            "neg_category_ids": [RARE, FREQUENT], "not_exhaustive_category_ids": [RARE],
        })  # fmt: skip
        for category in (RARE, FREQUENT):
            annotations.append({
                "id": len(annotations) + 1, "image_id": i, "category_id": category, "bbox": [1, 1, 4, 4], "area": 16,
                "segmentation": [[1, 1, 5, 1, 5, 5]],
            })  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": copy.deepcopy(LVIS_CATEGORIES)}


@pytest.fixture
def download(tmp_path):
    (tmp_path / "annotations").mkdir()
    for name, part, first in ((TRAIN, "train", 1), (VAL, "val", 100)):
        (tmp_path / "annotations" / name).write_text(json.dumps(content(part, first)))
        (tmp_path / f"{part}2017").mkdir()
        for i in range(first, first + 4):
            Image.new("RGB", (12, 8)).save(tmp_path / f"{part}2017" / f"{i:012d}.jpg")
    return tmp_path


def test_a_complete_download_is_counted_and_filtered(download):
    report = prepare_lvis(download)
    assert (report[TRAIN]["base"], report[TRAIN]["rare"], report[TRAIN]["images"]) == (866, 337, 4)
    assert report[VAL]["missing"] == [] and report[VAL]["sampled"] == 4 and report[VAL]["unusable"] == {}
    assert "4 images, the released file has 100,170" in report[TRAIN]["notes"]
    base = report[TRAIN_BASE]
    assert (base["kept_categories"], base["kept_annotations"]) == (866, 4)
    assert (base["removed_annotations"], base["removed_neg_category_ids"]) == (4, 4)
    records, metadata = load_lvis(download / "annotations" / TRAIN_BASE, download)
    assert len(metadata["thing_classes"]) == 866 and all(metadata["is_base"])
    contiguous = metadata["thing_dataset_id_to_contiguous_id"][FREQUENT]
    assert [r["verified_classes"] for r in records] == [[contiguous]] * 4
    text = "\n".join(report_lines(report))
    assert "1,203 categories (866 base, 337 rare)" in text and "4 rare" not in text
    assert json.loads((download / "annotations" / "lvis_v1_report.json").read_text()) == report


def test_missing_and_wrong_pictures_are_named(download):
    (download / "train2017" / f"{2:012d}.jpg").unlink()
    Image.new("RGB", (5, 5)).save(download / "val2017" / f"{101:012d}.jpg")
    (download / "val2017" / f"{102:012d}.jpg").write_bytes(b"no picture")
    report = prepare_lvis(download)
    assert [p[-8:] for p in report[TRAIN]["missing"]] == ["0002.jpg"]
    reasons = list(report[VAL]["unusable"].values())
    assert "5 x 5 pixels, annotated as 12 x 8" in reasons[0] and "not a readable picture" in reasons[1]
    text = "\n".join(report_lines(report))
    assert "missing: 1 pictures" in text and "sizes: 2 of 4 opened fit" in text


def test_what_is_not_lvis_v1_is_refused(download):
    with pytest.raises(FileNotFoundError, match="holds no lvis_v1_val.json.*annotations/"):
        prepare_lvis(download / "train2017")
    wrong = content("val", 100)
    wrong["categories"][0]["frequency"] = "r" if wrong["categories"][0]["frequency"] != "r" else "f"
    (download / "annotations" / VAL).write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="has another id or frequency.*LVIS v1 has 1203, 866 and 337"):
        prepare_lvis(download)
