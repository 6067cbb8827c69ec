"""Composed scenes: exact names, visible masks, no novel class in training, the same bytes every time."""

import csv
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as mask_tools

from ovd.data import mini, scenes
from ovd.data.backgrounds import BACKGROUNDS, background_licences, write_backgrounds
from ovd.data.leak_check import check_leaks
from ovd.data.lvis import load_lvis, read_ground_truth
from ovd.data.mini import annotation_path, build_scenes, class_shares, match_categories, novel_words

# label, LVIS frequency; "mail box" and "mouse" must not become LVIS classes
LABELS = {"cat": "f", "dog": "f", "bird": "f", "horse": "f", "deer": "c", "tiger": "c", "banjo": "r", "wolf": "r"}
VENDORS = {"one": "train", "two": "train", "three": "val", "four": "test"}


@pytest.fixture
def root(tmp_path):
    """Drawings of coloured ellipses and boxes by four vendors."""
    rows = []
    for i, label in enumerate([*LABELS, "mail box", "mouse"]):
        for vendor, split in VENDORS.items():
            path = tmp_path / "drawings" / vendor / f"{i:X}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            drawing = Image.new("RGBA", (160, 160))
            pen = ImageDraw.Draw(drawing)
            shape = pen.ellipse if split == "train" else pen.rectangle
            shape((10, 30, 150, 130), fill=(20 * i, 255 - 20 * i, 90, 255))
            drawing.save(path)
            relative = path.relative_to(tmp_path).as_posix()
            rows.append({"image": relative, "label": label, "vendor": vendor, "split": split, "cutout": "1"})
    with (tmp_path / "pairs.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


def small(root, **changes):
    return build_scenes(root, **{"train": 12, "val": 6, "test": 12, "workers": 1, **changes})


def contents(root):
    files = [*root.glob("mini_lvis_*.json"), *root.glob("scenes/*/*.jpg"), root / "novel_words.txt"]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


def test_names_match_exactly_and_homonyms_are_left_out(root):
    names = {c.lvis["name"]: c.lvis["frequency"] for c in mini.read_categories(root)}
    assert names == LABELS
    assert "mouse_(computer_equipment)" in mini.HOMONYMS


def test_a_category_needs_two_train_drawings_and_a_test_drawing(root):
    with (root / "pairs.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    cat = {"id": 1, "name": "cat", "frequency": "f", "synonyms": ["cat"]}
    assert match_categories(rows, [cat], {})
    for lost in ("drawings/one/0.png", "drawings/four/0.png"):
        changed = [dict(r, cutout="0") if r["image"] == lost else r for r in rows]
        assert match_categories(changed, [cat], {}) == []
    with pytest.raises(ValueError, match="HOMONYMS"):
        match_categories(rows, [cat, dict(cat, id=2, name="cat_(toy)")], {})


def test_train_scenes_hold_nothing_of_the_novel_classes(root):
    small(root)
    train, test = (read_ground_truth(annotation_path(root, s)) for s in ("train", "test"))
    novel = [c for c in test["categories"] if c["frequency"] == "r"]
    assert {c["name"] for c in novel} == {"banjo", "wolf"}
    report = check_leaks(train, novel, [c["name"] for c in train["categories"]], image_folder=root)
    assert report.ok and report.counts["pictures_missing"] == 0
    words = (root / "novel_words.txt").read_text().split("\n")
    assert "banjo" in words and "wolf" in words and "cat" not in words


def test_annotations_are_consistent(root):
    small(root)
    for split in mini.SPLITS:
        gt = read_ground_truth(annotation_path(root, split))
        by_image = Counter()
        for a in gt["annotations"]:
            mask = mask_tools.decode(a["segmentation"])
            y, x = np.nonzero(mask)
            assert a["area"] == mask.sum() >= scenes.MIN_VISIBLE_PIXELS
            assert a["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            assert isinstance(a["segmentation"]["counts"], str)
            by_image[a["image_id"]] += 1
        known = {c["id"] for c in gt["categories"]}
        for image in gt["images"]:
            present = {a["category_id"] for a in gt["annotations"] if a["image_id"] == image["id"]}
            assert set(image["neg_category_ids"]) <= known - present
            with Image.open(root / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
        assert max(by_image.values()) <= 6
        for c in gt["categories"]:
            theirs = [a for a in gt["annotations"] if a["category_id"] == c["id"]]
            assert c["instance_count"] == len(theirs) and c["image_count"] == len({a["image_id"] for a in theirs})
        records, metadata = load_lvis(annotation_path(root, split), root)
        assert len(records) == len(gt["images"]) and metadata["thing_classes"]


def test_masks_are_disjoint_and_cover_what_differs_from_the_background(root):
    photos = write_backgrounds(root)["train"]
    objects = tuple((i, f"drawings/one/{i:X}.png") for i in range(6))
    for seed in range(5):
        spec = scenes.SceneSpec(1, (seed,), objects, tuple(photos))
        picture, kept = scenes.compose(spec, root)
        empty, _ = scenes.compose(scenes.SceneSpec(1, (seed,), (), tuple(photos)), root)
        assert len(kept) >= 4
        cover = np.sum([m for _, m in kept], axis=0)
        assert cover.max() == 1
        changed = np.abs(np.asarray(picture).astype(int) - np.asarray(empty)).max(-1) > 0
        # Outside the masks only the soft edges (alpha up to one half) may differ.
        assert (changed & (cover == 0)).sum() < 0.08 * cover.sum()


def test_hidden_objects_are_moved_not_left_unannotated(root, monkeypatch):
    monkeypatch.setattr(scenes, "LONG_SIDE", (150, 150))
    photos = write_backgrounds(root)["train"]
    objects = tuple((i, f"drawings/four/{i:X}.png") for i in range(8))
    full = 150 * 150 * 100 / 140  # a drawing of 140 x 100 pixels scaled to a long side of 150
    for seed in range(8):
        _, kept = scenes.compose(scenes.SceneSpec(1, (seed,), objects, tuple(photos)), root)
        # turning by up to 15° and trimming changes an object's area; half the limit leaves room for both
        assert all(mask.sum() > 0.5 * scenes.MIN_VISIBLE_SHARE * full for _, mask in kept)


def test_same_seed_gives_the_same_bytes_for_any_number_of_workers(root, monkeypatch):
    monkeypatch.setattr(mini, "_CHUNK", 5)
    small(root)
    first = contents(root)
    for split in mini.SPLITS:
        annotation_path(root, split).unlink()
        for path in (root / "scenes" / split).rglob("*"):
            if path.is_file():
                path.unlink()
    (root / "scenes" / "manifest.json").unlink()
    small(root, workers=2)
    assert contents(root) == first
    small(root, seed=1)
    assert contents(root).keys() == first.keys() and contents(root) != first


def test_interrupted_build_goes_on_and_gives_the_same_bytes(root, monkeypatch):
    small(root)
    first = contents(root)
    monkeypatch.setattr(mini, "_CHUNK", 4)
    small(root, seed=1)  # wipes

    def stop_in_test_scenes(split, done, total):
        if split == "test" and done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(root, progress=stop_in_test_scenes)
    written = {p: p.stat().st_mtime_ns for p in (root / "scenes").glob("*/*.jpg")}
    assert len(list((root / "scenes/test").glob("*.jpg"))) == 4
    small(root)
    assert contents(root) == first
    assert all(p.stat().st_mtime_ns == t for p, t in written.items())


def test_finished_build_is_kept_and_a_changed_drawing_rebuilds_its_splits(root):
    small(root)
    times = {p: p.stat().st_mtime_ns for p in (root / "scenes").glob("*/*.jpg")}
    small(root)
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())
    with Image.open(root / "drawings/four/0.png") as opened:
        changed = Image.new("RGBA", opened.size, "red")
    changed.save(root / "drawings/four/0.png")
    small(root)
    moved = {p.parent.name for p, t in times.items() if p.stat().st_mtime_ns != t}
    assert moved == {"test"}


def test_train_law_is_ten_to_one_and_falls_with_rank(root):
    categories = [
        mini.MiniCategory({"id": i, "name": str(i), "frequency": f}, 1000 - i, {})
        for i, f in enumerate(["f"] * 30 + ["c"] * 20)
    ]
    shares = class_shares(categories, "train")
    assert shares.sum() == pytest.approx(1)
    assert shares[:30].mean() / shares[30:].mean() == pytest.approx(10)
    assert (np.diff(shares[:30]) < 0).all() and (np.diff(shares[30:]) < 0).all()
    assert shares[0] / shares[29] == pytest.approx((30 + 10) / (1 + 10))


def test_test_scenes_deal_every_class_its_share(root):
    small(root, test=60)
    gt = json.loads(annotation_path(root, "test").read_text())
    counts = {c["name"]: c["instance_count"] for c in gt["categories"]}
    base = [counts[n] for n, f in LABELS.items() if f != "r"]
    novel = [counts[n] for n, f in LABELS.items() if f == "r"]
    assert min(novel) > 1.5 * max(base) and min(base) > 0.7 * max(base)


def test_photographs_belong_to_one_split_and_name_their_licence():
    assert len({b.file for b in BACKGROUNDS}) == len(BACKGROUNDS) == len(background_licences())
    assert all(b.licence in line for b, line in zip(BACKGROUNDS, background_licences(), strict=True))


def test_novel_words_leave_base_names_alone():
    def of(name, frequency, synonyms):
        return mini.MiniCategory({"id": 1, "name": name, "frequency": frequency, "synonyms": synonyms}, 0, {})

    words = novel_words([of("dog", "f", ["dog"]), of("wild_dog", "r", ["wild_dog", "dog", "dingo_(animal)"])])
    assert words == ["dingo", "wild dog"]


def test_missing_inputs_are_named(tmp_path, root):
    with pytest.raises(FileNotFoundError, match=r"pairs\.csv does not exist"):
        build_scenes(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="val scenes: 0"):
        build_scenes(root, val=0)
    with pytest.raises(ValueError, match="split 'dev'"):
        annotation_path(root, "dev")
