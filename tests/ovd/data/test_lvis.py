"""Reading LVIS files, removing the novel classes, and finding planted leaks."""

import copy
import json

import numpy as np
import pytest

from ovd.data import lvis as lvis_data
from ovd.data.leak_check import check_leaks
from ovd.data.lvis import base_novel_split, filter_to_base, load_lvis, normalise_name, read_ground_truth


def category(i, name, frequency, synonyms=()):
    return {"id": i, "name": name, "frequency": frequency, "synonyms": [name, *synonyms], "def": "", "synset": ""}


@pytest.fixture
def ground_truth() -> dict:
    def box(i, image, kind):
        return {
            "id": i, "image_id": image, "category_id": kind, "bbox": [1.0, 2.0, 3.0, 4.0], "area": 12.0,
            "segmentation": [[1, 2, 4, 2, 4, 6, 1, 6]],
        }  # fmt: skip

    def image(i, neg, not_exhaustive):
        return {
            "id": i, "width": 10, "height": 8, "file_name": f"{i}.jpg",
            "neg_category_ids": neg, "not_exhaustive_category_ids": not_exhaustive,
        }  # fmt: skip

    kinds = [category(70, "banjo", "r", ["lute"]), category(5, "dog", "f"), category(30, "bat_(animal)", "c")]
    return {
        "images": [image(2, [30, 70], []), image(1, [5], [70])],
        "annotations": [box(1, 2, 5), box(2, 2, 70), box(3, 1, 30), box(4, 1, 30)],
        "categories": kinds,
    }


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_names_normalise_to_comparable_words():
    assert normalise_name("Bat_(animal)") == "bat"
    assert normalise_name("bat_(animal)", keep_qualifier=True) == "bat animal"
    assert normalise_name("  Christmas_tree ") == "christmas tree"


def test_filter_removes_novel_ids_from_every_list(ground_truth):
    before = copy.deepcopy(ground_truth)
    filtered, report = filter_to_base(ground_truth)
    assert ground_truth == before
    assert [c["id"] for c in filtered["categories"]] == [5, 30]
    assert [a["id"] for a in filtered["annotations"]] == [1, 3, 4]
    assert [i["neg_category_ids"] for i in filtered["images"]] == [[30], [5]]
    assert [i["not_exhaustive_category_ids"] for i in filtered["images"]] == [[], []]
    assert report == {
        "removed_categories": 1, "removed_annotations": 1, "removed_neg_category_ids": 1,
        "removed_not_exhaustive_category_ids": 1, "kept_categories": 2, "kept_annotations": 3,
    }  # fmt: skip
    assert '"id": 70' not in json.dumps(filtered)


def test_split_needs_a_frequency():
    with pytest.raises(ValueError, match="frequency None"):
        base_novel_split([{"id": 1, "name": "dog"}])


def test_classes_are_numbered_by_sorted_id(ground_truth, tmp_path):
    records, metadata = load_lvis(write(tmp_path / "gt.json", ground_truth), tmp_path)
    assert metadata["thing_classes"] == ["dog", "bat_(animal)", "banjo"]
    assert metadata["thing_dataset_id_to_contiguous_id"] == {5: 0, 30: 1, 70: 2}
    assert metadata["is_base"] == [True, True, False]
    assert [(c["id"], c["image_count"]) for c in metadata["class_image_count"]] == [(5, 1), (30, 1), (70, 1)]
    assert [r["image_id"] for r in records] == [1, 2]
    assert [a["category_id"] for a in records[1]["annotations"]] == [0, 2]
    assert records[0]["file_name"] == str(tmp_path / "1.jpg")


def test_pictures_of_real_lvis_are_found_through_their_url(ground_truth, tmp_path):
    for image in ground_truth["images"]:
        del image["file_name"]
        image["coco_url"] = f"http://host/train2017/{image['id']:012d}.jpg"
    records, _ = load_lvis(write(tmp_path / "gt.json", ground_truth), tmp_path)
    assert records[0]["file_name"] == str(tmp_path / "train2017" / "000000000001.jpg")


def test_records_agree_with_the_lvis_package(ground_truth, tmp_path):
    path = write(tmp_path / "gt.json", ground_truth)
    api = lvis_data.import_lvis().LVIS(str(path))
    records, metadata = load_lvis(path, tmp_path)
    back = {v: k for k, v in metadata["thing_dataset_id_to_contiguous_id"].items()}
    for record in records:
        theirs = api.load_anns(api.get_ann_ids(img_ids=[record["image_id"]]))
        ours = [(a["id"], back[a["category_id"]], a["bbox"]) for a in record["annotations"]]
        assert ours == [(a["id"], a["category_id"], a["bbox"]) for a in theirs]
    assert np.float is float


def test_registering_twice_is_harmless_and_a_clash_is_named(ground_truth, tmp_path):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    path = write(tmp_path / "gt.json", ground_truth)
    name = f"test_lvis_{tmp_path.name}"
    try:
        lvis_data.register_lvis(name, path, tmp_path)
        lvis_data.register_lvis(name, path, tmp_path)
        assert len(DatasetCatalog.get(name)) == 2
        assert MetadataCatalog.get(name).evaluator_type == "lvis"
        with pytest.raises(ValueError, match="already registered"):
            lvis_data.register_lvis(name, write(tmp_path / "other.json", ground_truth), tmp_path)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def set_in(key, index, **values):
    def change(ground_truth):
        ground_truth[key][index].update(values)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("categories", 0, name=" "), "category 70 has no name"),
        (set_in("categories", 0, id=5), "category id 5 is used twice"),
        (set_in("annotations", 0, bbox=[5.0, 2.0, 9.0, 1.0]), "annotation 1 has box .* outside its picture of 10 x 8"),
        (set_in("annotations", 0, bbox=[5.0, 2.0, 0.0, 1.0]), "empty box"),
        (set_in("annotations", 0, category_id=6), "category 6, which the file does not list"),
        (set_in("annotations", 0, image_id=6), "image 6, which the file does not list"),
        (set_in("annotations", 0, id=2), "exists twice"),
        (lambda g: g["annotations"].clear(), "no annotation"),
        (lambda g: g.pop("categories"), "no list 'categories'"),
    ],
)
def test_faulty_files_get_a_clear_sentence(change, message, ground_truth, tmp_path):
    change(ground_truth)
    with pytest.raises(ValueError, match=message):
        read_ground_truth(write(tmp_path / "gt.json", ground_truth))


def test_absent_or_broken_files_get_a_clear_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="tools/prepare_data.py mini makes it"):
        read_ground_truth(tmp_path / "mini_lvis_train.json")
    with pytest.raises(FileNotFoundError, match="download LVIS v1 and run python tools/prepare_data.py lvis"):
        read_ground_truth(tmp_path / "lvis_v1_train_base.json")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_ground_truth(write(tmp_path / "gt.json", "{"))


def test_filtered_file_does_not_leak(ground_truth):
    base, novel = base_novel_split(ground_truth["categories"])
    report = check_leaks(filter_to_base(ground_truth)[0], novel, [c["name"] for c in base])
    assert report.ok and report.counts["vocabulary_words"] == 2 and report.counts["novel_categories"] == 1
    report.raise_if_leaking()


def plant_category_name(g):
    g["categories"].append(category(99, "Banjo", "f"))


@pytest.mark.parametrize(
    ("plant", "words", "kind"),
    [
        (lambda g: g["annotations"].append({"id": 9, "image_id": 1, "category_id": 70}), [], "annotations"),
        (lambda g: g["categories"].append(category(70, "banjo", "r")), [], "categories"),
        (lambda g: g["images"][0]["neg_category_ids"].append(70), [], "neg_category_ids"),
        (lambda g: g["images"][0]["not_exhaustive_category_ids"].append(70), [], "not_exhaustive_category_ids"),
        (plant_category_name, [], "category names"),
        (lambda g: None, ["dog", "BANJO"], "vocabulary"),
        (lambda g: None, ["dog", "lute"], "vocabulary"),
    ],
)
def test_each_planted_leak_is_found(plant, words, kind, ground_truth):
    novel = base_novel_split(ground_truth["categories"])[1]
    clean = filter_to_base(ground_truth)[0]
    plant(clean)
    report = check_leaks(clean, novel, words)
    assert [f.kind for f in report.findings] == [kind]
    assert not report.to_dict()["ok"]
    with pytest.raises(ValueError, match="(?i)banjo|lute"):
        report.raise_if_leaking()


def test_base_name_wins_over_a_novel_synonym(ground_truth):
    novel = [category(70, "wolf", "r", ["dog"]), category(71, "bat_(sport)", "r")]
    report = check_leaks(filter_to_base(ground_truth)[0], novel, ["dog", "bat"])
    assert report.ok
    assert report.shared_synonyms == ["bat", "dog"]


def test_pictures_are_counted(ground_truth, tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"x")
    counts = check_leaks(ground_truth, [], [], image_folder=tmp_path).counts
    assert (counts["pictures_present"], counts["pictures_missing"]) == (1, 1)


def test_of_a_class_that_is_not_labelled_exhaustively_nothing_is_known(tmp_path):
    """Classes 3 (absent), 5 (labelled, all of them) and 7 (labelled, more may be there); of 9 nothing is said."""
    truth = {
        "images": [{"id": 1, "width": 9, "height": 9, "file_name": "a.png", "neg_category_ids": [3],
                    "not_exhaustive_category_ids": [7]}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": c, "bbox": [1, 1, 4, 4], "area": 16} for i, c in ((1, 5), (2, 7))
        ],
        "categories": [{"id": i, "name": f"thing {i}", "frequency": "f"} for i in (3, 5, 7, 9)],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(truth))
    assert load_lvis(tmp_path / "a.json", tmp_path)[0][0]["verified_classes"] == [0, 1]
