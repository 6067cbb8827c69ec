"""COCO-format data of one's own, and OV-COCO made of such files."""

import json

import pytest
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image

from ovd.data import coco
from ovd.data.coco import prepare_coco, split_coco
from ovd.data.custom import prepare_custom, with_split
from ovd.data.leak_check import check_leaks
from ovd.data.lvis import base_novel_split, load_lvis, read_ground_truth


def annotation(i, image, category, box=(1, 1, 4, 4), **more):
    return {"id": i, "image_id": image, "category_id": category, "bbox": list(box), **more}


@pytest.fixture
def data(tmp_path):
    """Three pictures of 10 x 8; crane and digger in the first, crane in the second, nothing in the third."""
    for i in (1, 2, 3):
        Image.new("RGB", (10, 8)).save(tmp_path / f"{i}.png")
    content = {
        "images": [{"id": i, "width": 10, "height": 8, "file_name": f"{i}.png"} for i in (1, 2, 3)],
        "annotations": [annotation(1, 1, 7), annotation(2, 1, 9), annotation(3, 2, 7)],
        "categories": [{"id": 7, "name": "Tower_crane"}, {"id": 9, "name": "digger"}, {"id": 2, "name": "helmet"}],
    }
    return content, tmp_path


def prepare(data, **options):
    content, folder = data
    (folder / "own.json").write_text(json.dumps(content))
    return prepare_custom(folder / "own.json", folder, folder / "out", **options)


def test_a_coco_file_becomes_base_only_training_and_whole_evaluation_files(data):
    report = prepare(data, novel=["tower crane"])
    assert (report["base"], report["novel"], report["base_annotations"], report["annotations"]) == (2, 1, 1, 3)
    assert report["masks"] is False
    train, everything = (read_ground_truth(report[key]) for key in ("train", "all"))
    assert [c["name"] for c in train["categories"]] == ["digger", "helmet"]
    assert [c["name"] for c in base_novel_split(everything["categories"])[1]] == ["Tower_crane"]
    assert [i["neg_category_ids"] for i in everything["images"]] == [[2], [2, 9], [2, 7, 9]]
    assert [i["neg_category_ids"] for i in train["images"]] == [[2], [2, 9], [2, 9]]
    assert everything["annotations"][0]["area"] == 16.0
    records, metadata = load_lvis(report["train"], report["image_root"])
    assert metadata["thing_classes"] == ["helmet", "digger"] and metadata["is_base"] == [True, True]
    assert [r["verified_classes"] for r in records] == [[0, 1]] * 3


def test_a_list_of_base_classes_leaves_the_others_out(data):
    content = with_split(data[0], novel=["helmet"], base=["digger"])
    assert [(c["name"], c["frequency"]) for c in content["categories"]] == [("digger", "f"), ("helmet", "r")]
    assert [a["id"] for a in content["annotations"]] == [2]
    assert data[0]["categories"][0].keys() == {"id", "name"}  # the input is left alone


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda c: c["categories"][1].update(name=""), {}, "category 9 has no name"),
        (lambda c: c["annotations"][0].update(bbox=[8, 1, 9, 4]), {}, "annotation 1 has box .* outside its picture"),
        (lambda c: c["annotations"].clear(), {}, "has no annotation"),
        (lambda c: c["images"][1].update(file_name="gone.png"), {}, "1 of 3 pictures are missing .*gone.png"),
        (lambda c: c["images"][0].update(width=11), {}, "1 of 3 opened .*10 x 8 pixels, annotated as 11 x 8"),
        (lambda c: None, {"novel": ["diger"]}, "no class 'diger': did you mean 'digger'"),
        (lambda c: None, {"novel": ["digger"], "base": ["digger"]}, "named as base and as novel"),
        (lambda c: None, {"novel": ["digger", "tower crane", "helmet"]}, "no base class"),
        (lambda c: None, {"novel": ["digger", "tower crane"]}, "no annotation of a base class"),
    ],
)
def test_what_cannot_be_used_gets_one_clear_sentence(data, change, options, message):
    change(data[0])
    with pytest.raises(ValueError, match=message) as caught:
        prepare(data, **options)
    assert "\n" not in str(caught.value)
    assert not (data[1] / "out").exists()


def coco_content(pictures):
    things = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    images = [{"id": i, "width": 10, "height": 8, "file_name": f"{i:012d}.jpg"} for i in pictures]
    kinds = [1, 17, 10]  # person (base), cat (novel), traffic light (neither): one kind a picture, in turn
    annotations = [annotation(n + 1, i, kinds[n % 3], area=16, iscrowd=0) for n, i in enumerate(pictures)]
    annotations.append(annotation(99, pictures[0], 1, (1, 1, 0, 3)))  # COCO has boxes without width
    return {"images": images, "annotations": annotations, "categories": things}


def test_the_split_is_48_and_17_of_cocos_own_classes():
    names = {c["id"]: c["name"] for c in COCO_CATEGORIES if c["isthing"]}
    assert (len(coco.BASE), len(coco.NOVEL), len(coco.BASE.keys() & coco.NOVEL.keys())) == (48, 17, 0)
    assert all(names[i] == name for i, name in {**coco.BASE, **coco.NOVEL}.items())


def test_ov_coco_trains_on_base_only_and_keeps_both_parts_for_evaluation(tmp_path):
    (tmp_path / "annotations").mkdir()
    for part, pictures in (("train", [1, 2, 3]), ("val", [11, 12, 13])):
        (tmp_path / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(coco_content(pictures)))
        (tmp_path / f"{part}2017").mkdir()
        for i in pictures:
            Image.new("RGB", (10, 8)).save(tmp_path / f"{part}2017" / f"{i:012d}.jpg")
    report = prepare_coco(tmp_path)
    train, val = (read_ground_truth(report[name]["path"]) for name in (coco.TRAIN_BASE, coco.VAL))
    assert (len(train["categories"]), len(val["categories"])) == (48, 65)
    assert [i["id"] for i in train["images"]] == [1] and [i["id"] for i in val["images"]] == [11, 12]
    assert len(train["annotations"]) == 1 and len(val["annotations"]) == 2
    base, novel = base_novel_split(val["categories"])
    assert (len(base), len(novel)) == (48, 17)
    assert check_leaks(train, novel, [c["name"] for c in base]).ok
    records, _ = load_lvis(report[coco.TRAIN_BASE]["path"], tmp_path)
    assert records[0]["file_name"].endswith("train2017/000000000001.jpg")
    assert not report[coco.VAL]["missing"] and not report[coco.VAL]["unusable"]


@pytest.mark.parametrize("folder", ["", "annotations"])
def test_a_missing_file_of_coco_is_named_at_its_documented_place(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no annotations/instances_val2017.json: download"):
        prepare_coco(tmp_path)


def test_other_classes_than_cocos_are_refused(data):
    with pytest.raises(ValueError, match="category 1 is None in the annotation file and 'person' in COCO"):
        split_coco(data[0])
