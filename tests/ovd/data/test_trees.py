"""Aerial photographs as a COCO set: nothing of a picture lost or shown twice, boxes where the trees are."""

import hashlib
import io
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ovd.data.lvis import read_ground_truth
from ovd.data.trees import PACKAGE, PLACES, build_trees, clip_boxes, cut_into_tiles, read_voc_boxes, tiles
from pretrain.data.npm_archives import FetchError
from pretrain.data.pypi_archives import fetch_wheel

VOC = """<annotation><filename>a.png</filename><size><width>700</width><height>330</height></size>
<object><name>Tree</name><bndbox><xmin>10</xmin><ymin>20</ymin><xmax>40</xmax><ymax>60</ymax></bndbox></object>
<object><name>Tree</name><bndbox><xmin>335</xmin><ymin>100</ymin><xmax>365</xmax><ymax>112</ymax></bndbox></object>
</annotation>"""


@pytest.mark.parametrize("size", [(1, 1), (320, 320), (321, 320), (700, 330), (2299, 2472)])
def test_tiles_show_every_pixel_once_and_are_no_larger_than_asked(size):
    seen = np.zeros(size[::-1], int)
    for x1, y1, x2, y2 in tiles(*size, 320):
        assert 0 < x2 - x1 <= 320 and 0 < y2 - y1 <= 320
        seen[y1:y2, x1:x2] += 1
    assert (seen == 1).all()


def test_boxes_are_those_that_torchvision_reads():
    from xml.etree import ElementTree

    from torchvision.datasets import VOCDetection

    parsed = VOCDetection.parse_voc_xml(ElementTree.fromstring(VOC))["annotation"]["object"]
    expected = [[float(o["bndbox"][k]) for k in ("xmin", "ymin", "xmax", "ymax")] for o in parsed]
    assert read_voc_boxes(VOC).tolist() == expected
    assert read_voc_boxes("<annotation/>").shape == (0, 4)


def test_a_tree_belongs_to_the_tiles_that_show_enough_of_it():
    boxes = np.array([[90.0, 10, 110, 30], [94, 10, 134, 30], [92, 50, 112, 70]])
    left, right = (0, 0, 100, 100), (100, 0, 200, 100)
    assert clip_boxes(boxes, left).tolist() == [[90, 10, 100, 30], [92, 50, 100, 70]]  # half, 15 % and 40 % of it
    assert clip_boxes(boxes, right).tolist() == [[0, 10, 10, 30], [0, 10, 34, 30], [0, 50, 12, 70]]
    sliver = np.array([[98.0, 0, 102, 50]])
    assert clip_boxes(sliver, left).tolist() == []  # half of it, but two pixels wide


def test_boxes_of_tiles_lie_on_what_was_painted(tmp_path):
    boxes = np.array([[10.0, 20, 40, 60], [335, 100, 365, 112], [600, 300, 640, 330]])
    photo = Image.new("RGB", (700, 330))
    for x1, y1, x2, y2 in boxes:
        ImageDraw.Draw(photo).rectangle((x1, y1, x2 - 1, y2 - 1), fill="white")
    content = cut_into_tiles(photo, boxes, tmp_path / "train")
    painted = {}
    for image in content["images"]:
        pixels = np.asarray(Image.open(tmp_path / image["file_name"]).convert("L"))
        assert pixels.shape == (image["height"], image["width"])
        painted[image["id"]] = pixels > 0
    for a in content["annotations"]:
        x, y, w, h = map(int, a["bbox"])
        assert painted[a["image_id"]][y : y + h, x : x + w].all()
        painted[a["image_id"]][y : y + h, x : x + w] = False
    assert not any(left.any() for left in painted.values())


def test_the_set_is_built_from_the_package_alone(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / PACKAGE.file_name, "w") as wheel:
        picture = io.BytesIO()
        Image.new("RGB", (700, 330), "green").save(picture, "PNG")
        for place in PLACES:
            wheel.writestr(f"deepforest/data/{place.name}.png", picture.getvalue())
            wheel.writestr(f"deepforest/data/{place.name}.xml", VOC)
        wheel.writestr("deepforest-2.1.0.dist-info/licenses/LICENSE", "free")
    digest = hashlib.sha256((tmp_path / PACKAGE.file_name).read_bytes()).hexdigest()
    monkeypatch.setattr("ovd.data.trees.PACKAGE", replace(PACKAGE, sha256=digest))
    counts = build_trees(tmp_path / "trees", fetched=tmp_path)
    # 700 x 330 gives 4 x 2 tiles; the second tree is cut by a tile's border into two halves.
    assert counts == {place.split: {"tiles": 8, "trees": 3} for place in PLACES}
    for split in counts:
        content = read_ground_truth(tmp_path / "trees" / f"{split}.json")
        assert [c["name"] for c in content["categories"]] == ["tree"]
        assert all((tmp_path / "trees" / image["file_name"]).is_file() for image in content["images"])
    assert (tmp_path / "trees/LICENSE.txt").read_text() == "free"
    assert json.dumps(build_trees(tmp_path / "trees", fetched=tmp_path)) == json.dumps(counts)


def test_what_pip_cannot_fetch_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(FetchError, match="could not fetch deepforest==2.1.0 .*check the network"):
        fetch_wheel(PACKAGE, tmp_path / "packages")
    assert not list((tmp_path / "packages").iterdir())


def test_a_package_that_was_changed_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / PACKAGE.file_name, "w") as wheel:
        wheel.writestr("deepforest-2.1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: deepforest\nVersion: 2.1.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(FetchError, match="DO NOT MATCH|hash"):
        fetch_wheel(PACKAGE, tmp_path / "packages")
    assert not list((tmp_path / "packages").iterdir())
