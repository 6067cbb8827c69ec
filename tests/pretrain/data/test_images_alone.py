"""Images without captions: what is read of each form, what still needs captions, and what an index of shards knows."""

import os

import numpy as np
import pytest
from PIL import Image

from pretrain.config import ConfigError, DataConfig
from pretrain.data import shard_index
from pretrain.data.folder import TableSource, read_table
from pretrain.data.pairs import Pairs, load_pairs
from pretrain.data.shards import ShardSource

READER = "phase finetune (info_nce)"


def every_sample(pairs: Pairs) -> list[tuple]:
    source = pairs.training
    source = source if isinstance(source, ShardSource) else TableSource(source, pairs.store)
    return [source.read(index) for index in range(len(source))]


def picture(folder, name: str) -> bytes:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (200, 0, 0)).save(folder / name)
    return (folder / name).read_bytes()


def test_every_image_is_read_where_nothing_reads_captions(images_alone):
    _, data = images_alone
    pairs = load_pairs(DataConfig(**data), [], caption_reader="")
    samples = every_sample(pairs)
    assert len(samples) == 12 and {image.size for image, _ in samples} == {(48, 48)}
    assert all(row["captions"] == [] for _, row in samples)
    assert pairs.classes == [] and pairs.notes[0].startswith("12 ") and "images" in pairs.notes[0]


def test_without_captions_the_reader_that_needs_them_is_named(images_alone):
    name, data = images_alone
    expected = {
        "no column": "lacks the column.s. caption; it has image: phase finetune .info_nce. needs captions",
        "empty captions": "12 pairs left out: empty caption, and phase finetune .info_nce. needs captions",
        "folder": "a folder of images without captions: phase finetune .info_nce. needs captions",
        "shard": "12 samples .* neither text nor JSON, and phase finetune .info_nce. needs captions",
    }
    if name in expected:
        with pytest.raises(ConfigError, match=expected[name]):
            load_pairs(DataConfig(**data), [], caption_reader=READER)
    else:  # what the JSON has is not known before it is read
        pairs = load_pairs(DataConfig(**data), [], caption_reader=READER)
        with pytest.raises(OSError, match="0000.png: no caption in txt"):
            pairs.training.read(0)
        assert pairs.training.remedy.endswith("(phase finetune (info_nce) needs captions)")


def test_withholding_words_needs_captions(images_alone, tmp_path):
    """Else what was to be withheld would be trained on."""
    (tmp_path / "words.txt").write_text("red circle\n")
    data = {**images_alone[1], "withhold": str(tmp_path / "words.txt")}
    if images_alone[0] == "shard with other JSON":
        with pytest.raises(OSError, match="no caption in txt"):
            load_pairs(DataConfig(**data), [], caption_reader="").training.read(0)
    else:
        with pytest.raises(ConfigError, match="data.withhold needs captions"):
            load_pairs(DataConfig(**data), [], caption_reader="")


def test_an_image_column_of_parquet_is_enough(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pandas.DataFrame({"image": ["a.png", "b.png"]}).to_parquet(tmp_path / "t.parquet")
    expected = [{"image": "a.png", "caption": ""}, {"image": "b.png", "caption": ""}]
    assert read_table(tmp_path / "t.parquet", caption_reader="") == expected


# --------------------------------------------------------------------------------------------------- folders


def test_a_folders_pictures_come_in_the_order_of_their_names_hidden_ones_left_out(tmp_path):
    for name in ("b.PNG", "a/z.jpg", "a/y/x.webp", ".hidden/c.png", ".d.png"):
        picture(tmp_path, name)
    (tmp_path / "a" / "labels.csv").write_text("")
    assert [row["image"] for row in read_table(tmp_path, "")] == ["a/y/x.webp", "a/z.jpg", "b.PNG"]
    store = load_pairs(DataConfig(table=str(tmp_path), train_split=None), [], caption_reader="").store
    assert store.read("a/y/x.webp").size == (20, 20)


def test_a_link_back_to_a_folder_does_not_repeat_its_pictures(tmp_path):
    for name in ("a/x.png", "b/y.png"):
        picture(tmp_path / "root", name)
    (tmp_path / "root" / "a" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "c").symlink_to(tmp_path / "root" / "b")
    picture(tmp_path, "elsewhere/z.png")
    (tmp_path / "root" / "d").symlink_to(tmp_path / "elsewhere")
    assert [row["image"] for row in read_table(tmp_path / "root", "")] == ["a/x.png", "b/y.png", "d/z.png"]


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    picture(tmp_path, "a/x.png")
    listing = os.scandir

    def scandir(place):
        if str(place).endswith("a"):
            raise PermissionError(13, "Permission denied", str(place))
        return listing(place)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ConfigError, match=f"{tmp_path}/a cannot be listed: Permission denied"):
        read_table(tmp_path, "")


def test_a_folder_is_another_when_it_has_another_picture(tmp_path):
    def fingerprint() -> str:
        pairs = load_pairs(DataConfig(table=str(tmp_path), train_split=None), [], caption_reader="")
        return pairs.fingerprints[f"{tmp_path} (names)"]

    picture(tmp_path, "a.png")
    first = fingerprint()
    assert fingerprint() == first
    picture(tmp_path, "b.png")
    assert fingerprint() != first


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no row with split 'train'; its splits: .none.; data.train_split=null trains on every row"),
        ({"train_split": None, "root": "elsewhere"}, "data.root is for the paths in a table"),
    ],
)
def test_fields_that_a_folder_does_not_go_with_are_named(tmp_path, fields, message):
    picture(tmp_path, "a.png")
    with pytest.raises(ConfigError, match=message):
        load_pairs(DataConfig(table=str(tmp_path), **fields), [], caption_reader="")


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ConfigError, match=f"no picture in {tmp_path} or below"):
        read_table(tmp_path, "")


# ------------------------------------------------------------------------------------------ evaluation splits


def table(tmp_path, *lines: str) -> DataConfig:
    (tmp_path / "t.csv").write_text("\n".join(["image,caption,split", *lines]) + "\n")
    return DataConfig(table=str(tmp_path / "t.csv"))


def test_splits_are_evaluated_on_where_they_have_names(tmp_path):
    """An empty caption is neither a class nor an image's class."""
    config = table(tmp_path, "a.png,,train", "b.png,,train", "c.png,cat,val", "d.png,dog,val", "e.png, ,val")
    pairs = load_pairs(config, ["val"], caption_reader="")
    assert len(pairs.training) == 2 and pairs.classes == ["cat", "dog"]
    assert [row["image"] for row in pairs.evaluation["val"]] == ["c.png", "d.png"]
    assert "1 rows of split val are not evaluated on: empty caption" in pairs.notes


def test_a_split_without_names_cannot_be_evaluated_on(tmp_path):
    config = table(tmp_path, "a.png,,train", "b.png,,val")
    with pytest.raises(ConfigError, match="with split 'val' has a caption, .* set evaluation.splits=.. for none"):
        load_pairs(config, ["val"], caption_reader="")
    (tmp_path / "t.csv").write_text("image,split\na.png,train\n")
    with pytest.raises(ConfigError, match="evaluation.splits .set it to .. for none. needs captions"):
        load_pairs(config, ["train"], caption_reader="")


# ------------------------------------------------------------------------------------------ the shards' index


@pytest.fixture
def mixed(tmp_path, write_shard):
    """A shard of an image alone, a pair, a text alone and another pair."""
    image = picture(tmp_path, "x.png")
    members = {"0.png": image, "1.png": image, "1.txt": b"one", "2.txt": b"two", "3.png": image, "3.txt": b"three"}
    return write_shard(tmp_path / "mixed.tar", members)


def test_one_index_serves_training_with_and_without_captions(mixed, monkeypatch):
    alone = ShardSource([mixed], caption_reader="")
    assert alone.notes[0] == "3 images in 1 shards, 2 of them with text or JSON"
    assert alone.notes[1:] == ["1 samples of shards left out: no image"]
    monkeypatch.setattr(shard_index, "scan_shard", lambda path: pytest.fail("scanned again"))
    pairs = ShardSource([mixed], caption_reader=READER)
    assert [pairs.read(i)[1]["captions"] for i in range(len(pairs))] == [["one"], ["three"]]
    again = ShardSource([mixed], caption_reader="")
    assert [again.read(i)[1]["captions"] for i in range(len(again))] == [[], [], []]
    assert alone.fingerprint() == again.fingerprint() != pairs.fingerprint()


def test_an_index_of_the_version_before_is_not_taken_for_one_of_all_images(mixed):
    """It had the pairs only."""
    status, place = mixed.stat(), shard_index._cache_places(mixed)[0]
    whole = shard_index.scan_shard(mixed)
    stamp = np.array([1, status.st_size, status.st_mtime_ns])
    with place.open("wb") as file:
        np.savez(file, stamp=stamp, members=whole.pairs(), incomplete=2, without_image=1, cut=False)
    assert len(ShardSource([mixed], caption_reader="")) == 3


def test_texts_are_not_opened_where_nothing_reads_them(tmp_path, write_shard):
    """Damage in them costs no image."""
    image = picture(tmp_path, "x.png")
    members = {"0.png": image, "0.txt": b"\xff\xfe", "1.png": image, "1.json": b"{"}
    path = write_shard(tmp_path / "damaged.tar", members)
    alone = ShardSource([path], ["txt", "caption"], caption_reader="")
    assert [alone.read(i)[1] for i in range(2)] == [{"captions": []}] * 2
    pairs = ShardSource([path], ["txt", "caption"])
    for index in range(2):
        with pytest.raises(OSError, match="its text cannot be read"):
            pairs.read(index)
