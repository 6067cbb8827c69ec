"""Tables and images on disk: what is read, what is refused, what is left out."""

import csv

import numpy as np
import pytest
from PIL import Image

from pretrain.config import ConfigError
from pretrain.data.folder import ImageStore, read_backgrounds, read_table, select_split, split_captions, withhold_words
from pretrain.data.jpeg import JpegPicture

ROWS = [
    {"image": "a.png", "caption": "hot dog", "keywords": "sausage|bun", "split": "train"},
    {"image": "b.png", "caption": "dog", "keywords": "hot|dog", "split": "train"},
    {"image": "c.png", "caption": "crêpe, sweet", "keywords": "", "split": "val"},
]


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_csv_rows_come_back_as_written(tmp_path):
    assert read_table(write_csv(tmp_path / "t.csv", ROWS)) == ROWS


def test_parquet_equals_csv(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame(ROWS).replace("", None)
    frame.to_parquet(tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet") == read_table(write_csv(tmp_path / "t.csv", ROWS))


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"no table of image-text pairs at {tmp_path}/t.csv$"):
        read_table(tmp_path / "t.csv")
    with pytest.raises(ConfigError, match="prepare_data.py mini"):
        read_table(tmp_path / "mini" / "pairs.csv")


@pytest.mark.parametrize("content", ["", "image,caption\n"])
def test_an_empty_table_is_refused(tmp_path, content):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(ConfigError, match="t.csv has no rows"):
        read_table(tmp_path / "t.csv")


def test_a_missing_column_is_named_with_those_there(tmp_path):
    (tmp_path / "t.csv").write_text("path,caption\na.png,x\n")
    with pytest.raises(ConfigError, match=r"lacks the column\(s\) image; it has path, caption"):
        read_table(tmp_path / "t.csv")


def test_several_captions_stand_in_for_one(tmp_path):
    (tmp_path / "t.csv").write_text("image,captions\na.png,an axe | a hatchet\nb.png,\n")
    rows = read_table(tmp_path / "t.csv")
    assert [row["caption"] for row in rows] == ["an axe", ""]
    assert [split_captions(row) for row in rows] == [["an axe", "a hatchet"], []]
    (tmp_path / "t.csv").write_text("image,caption,captions\na.png,tool,an axe|\nb.png,tool,\n")
    rows = read_table(tmp_path / "t.csv")
    assert [row["caption"] for row in rows] == ["tool", "tool"]
    assert [split_captions(row) for row in rows] == [["an axe"], ["tool"]]


def test_any_of_several_captions_can_be_withheld():
    rows = [{"image": "a", "caption": "tool", "captions": "tool|an axe"}, {"image": "b", "caption": "tool"}]
    kept, dropped = withhold_words(rows, ["axe"])
    assert [row["image"] for row in kept] == ["b"] and dropped == 1


def test_splits_are_selected_and_unknown_ones_listed():
    assert [r["image"] for r in select_split(ROWS, "train", "t.csv")] == ["a.png", "b.png"]
    assert select_split(ROWS, None, "t.csv") == ROWS
    with pytest.raises(ConfigError, match="t.csv has no row with split 'test'; its splits: train, val"):
        select_split(ROWS, "test", "t.csv")


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["dog"], ["c.png"]),  # captions and keywords
        (["Hot Dog"], ["b.png", "c.png"]),  # any case; not across two keywords
        (["hot_dog"], ["b.png", "c.png"]),  # LVIS writes names so
        (["do", "dogs", "sweetcorn"], ["a.png", "b.png", "c.png"]),  # whole words only
        (["sausage"], ["b.png", "c.png"]),
        (["crêpe"], ["a.png", "b.png"]),  # not only ASCII; next to a comma
        (["", "  ", "-"], ["a.png", "b.png", "c.png"]),  # blank lines of a file withhold nothing
    ],
)
def test_withheld_words(words, kept):
    rows, dropped = withhold_words(ROWS, words)
    assert [row["image"] for row in rows] == kept and dropped == 3 - len(kept)


def test_rows_without_keywords_can_be_withheld():
    rows, dropped = withhold_words([{"image": "a", "caption": "an axe"}, {"image": "b", "caption": "a taxi"}], ["axe"])
    assert [row["image"] for row in rows] == ["b"] and dropped == 1


@pytest.mark.parametrize(
    ("mode", "expected"), [("RGBA", "RGBA"), ("LA", "RGBA"), ("RGB", "RGB"), ("L", "RGB"), ("1", "RGB"), ("P", "RGB")]
)
def test_images_are_rgb_or_rgba(tmp_path, mode, expected):
    Image.new(mode, (5, 4)).save(tmp_path / "x.png")
    image = ImageStore(tmp_path).read("x.png")
    assert (image.mode, image.size) == (expected, (5, 4))


def test_a_palette_with_transparency_keeps_it(tmp_path):
    Image.new("P", (3, 3)).save(tmp_path / "x.png", transparency=0)
    image = ImageStore(tmp_path).read("x.png")
    assert image.mode == "RGBA" and np.asarray(image)[..., 3].max() == 0


def test_a_rotated_photograph_comes_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: a viewer turns it by 90 degrees clockwise
    stored = Image.new("RGB", (8, 4), "blue")
    stored.paste("red", (0, 0, 4, 4))  # its left half is the top
    stored.save(tmp_path / "x.png", exif=exif)
    image = ImageStore(tmp_path).read("x.png")
    assert image.size == (4, 8)
    assert image.getpixel((0, 0)) == (255, 0, 0) and image.getpixel((0, 7)) == (0, 0, 255)


def damaged(folder, name, kind):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(folder / name)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes({"cut": content[: len(content) // 2], "text": b"not an image", "empty": b""}[kind])


@pytest.mark.parametrize("kind", ["cut", "text", "empty"])
def test_a_corrupt_image_is_named(tmp_path, kind):
    damaged(tmp_path, "x.png", kind)
    with pytest.raises(OSError, match=f"{tmp_path}/x.png cannot be read as an image"):
        ImageStore(tmp_path).read("x.png")


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(OSError, match="gone.png cannot be read as an image"):
        ImageStore(tmp_path).read("gone.png")


@pytest.mark.parametrize("kind", ["cut", "text", "empty"])
def test_an_opened_corrupt_jpeg_is_named_at_the_latest_when_resized(tmp_path, kind):
    damaged(tmp_path, "x.jpg", kind)
    for name in ("x.jpg", "gone.jpg"):
        with pytest.raises(OSError, match=f"{tmp_path}/{name} cannot be read as an image"):
            ImageStore(tmp_path).open(name).resize((8, 8))


def test_opening_is_reading_for_all_but_jpegs(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 4), np.uint8))
    image.save(tmp_path / "x.png")
    image.convert("RGB").save(tmp_path / "x.jpg")
    store, kept = ImageStore(tmp_path), ImageStore(tmp_path, preload=True)
    for each in (store, kept):
        assert np.array_equal(np.asarray(each.open("x.png")), np.asarray(image))
    assert isinstance(store.open("x.jpg"), JpegPicture) and isinstance(kept.open("x.jpg"), Image.Image)


def test_check_lists_the_broken_and_goes_on(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    damaged(tmp_path, "bad.png", "cut")
    broken = ImageStore(tmp_path).check(["bad.png", "good.png", "gone.png"])
    assert sorted(broken) == ["bad.png", "gone.png"] and "bad.png" in broken["bad.png"]


def test_preloaded_images_survive_their_files(tmp_path):
    Image.new("RGBA", (4, 4), (1, 2, 3, 4)).save(tmp_path / "x.png")
    kept, plain = ImageStore(tmp_path, preload=True), ImageStore(tmp_path)
    first = np.asarray(kept.read("x.png"))
    plain.read("x.png")
    (tmp_path / "x.png").unlink()
    assert np.array_equal(np.asarray(kept.read("x.png")), first)
    with pytest.raises(OSError):
        plain.read("x.png")


def test_backgrounds_are_reduced_photographs(tmp_path):
    Image.new("RGB", (1000, 300)).save(tmp_path / "b.jpg")
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert [(p.mode, p.size) for p in read_backgrounds(str(tmp_path))] == [("RGB", (30, 20)), ("RGB", (512, 154))]
    assert read_backgrounds(None) == []


def test_a_folder_without_backgrounds_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=f"data.backgrounds: no JPEG or PNG in {tmp_path}"):
        read_backgrounds(str(tmp_path))
