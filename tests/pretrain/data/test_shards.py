"""Tar shards: the index against tarfile and webdataset, the order against a plain walk, damage counted and survived."""

import io
import json
import os
import pickle
import runpy
import sys
import tarfile
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.config import AugmentationConfig, ConfigError, DataConfig, PhaseConfig
from pretrain.data import shard_index, shards
from pretrain.data.loader import ShardPlan, build_loader
from pretrain.data.shard_index import load_index, scan_shard
from pretrain.data.shards import ShardOrder, ShardSource, expand_shards
from pretrain.data.views import plain_views


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 20), (value, 0, 0)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def pair(number: int) -> dict[str, bytes]:
    text = f"caption {number}"
    fields = {"caption": text, "alt": [f"other {number}", "third"], "width": 24}
    return {
        f"{number:05d}.jpg": jpeg(number % 200),
        f"{number:05d}.txt": text.encode(),
        f"{number:05d}.json": json.dumps(fields).encode(),
    }


def write_tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def folder(tmp_path):
    """Shards of 3, 5, 4 and 6 pairs, numbered through."""
    first = 0
    for shard, count in enumerate((3, 5, 4, 6)):
        members = {}
        for number in range(first, first + count):
            members |= pair(number)
        write_tar(tmp_path / f"{shard:05d}.tar", members)
        first += count
    return tmp_path


@pytest.fixture
def pattern(folder):
    return f"{folder}/{{00000..00003}}.tar"


def source(pattern: str, **options) -> ShardSource:
    return ShardSource(expand_shards(pattern), **options)


def test_pairs_come_in_the_order_of_the_files(pattern):
    pairs = source(pattern)
    assert len(pairs) == 18 and pairs.sizes.tolist() == [3, 5, 4, 6]
    for number in (17, 0, 2, 3, 7, 8, 11, 12, 5):
        picture, row = pairs.read(number)
        assert row == {"captions": [f"caption {number}"]}
        assert abs(picture.resize((1, 1)).getpixel((0, 0))[0] - number) <= 2


def test_the_same_pairs_as_webdataset(pattern):
    wds = pytest.importorskip("webdataset")
    theirs = [
        (sample["jpg"], sample["txt"].decode())
        for sample in wds.DataPipeline(wds.SimpleShardList(pattern), wds.tarfile_to_samples())
    ]
    pairs = source(pattern)
    ours = [pairs.read(i) for i in range(len(pairs))]
    assert [(picture._content, row["captions"][0]) for picture, row in ours] == theirs


def test_long_names_folders_and_endings_are_understood(tmp_path):
    long = "a/" * 60 + "x" * 120
    members = {
        f"{long}.JPG": jpeg(1), f"{long}.txt": b"long", "b/k.en.txt": b"no", "b/k.png": jpeg(2), "b/k.txt": b"short",
        "README": b"", "b/._k.jpg": b"resource fork",
    }  # fmt: skip
    index = scan_shard(write_tar(tmp_path / "x.tar", members))
    pairs = ShardSource([tmp_path / "x.tar"])
    assert [pairs.read(i)[1]["captions"] for i in range(len(pairs))] == [["long"], ["short"]]
    assert index.without_image == 1 and not index.cut  # README; hidden files count for nothing


@pytest.mark.parametrize(
    ("keys", "expected"),
    [(["txt"], ["caption 4"]), (["alt"], ["other 4", "third"]), (["txt", "alt"], ["caption 4", "other 4", "third"])],
)
def test_captions_come_from_the_named_fields(pattern, keys, expected):
    assert source(pattern, caption_keys=keys).read(4)[1]["captions"] == expected


def test_a_field_that_is_absent_or_no_text_is_no_caption(pattern):
    for key in ("nothing", "width"):
        with pytest.raises(OSError, match=f"00001.tar/00004.jpg: no caption in {key}"):
            source(pattern, caption_keys=[key]).read(4)
    with pytest.raises(ConfigError, match="data.caption_keys is empty"):
        source(pattern, caption_keys=[])


def test_withheld_words_are_left_out_when_read(pattern):
    pairs = source(pattern, withhold=["4"])
    with pytest.raises(OSError, match="a word of data.withhold") as caught:
        pairs.read(4)
    pairs.read(14)
    pairs.count_left_out(4, caught.value)
    assert pairs.report() == ["1 reads of pairs withheld, replaced by the next pair"]


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.62, 0.9])
def test_a_cut_shard_gives_its_whole_pairs_and_says_so(folder, pattern, kept):
    path = folder / "00001.tar"
    content = path.read_bytes()
    whole = scan_shard(path)
    end = int(len(content.rstrip(b"\0")) * kept)
    path.write_bytes(content[:end])
    complete = [r for r in whole.members.tolist() if max(r[0] + r[1], r[2] + r[3]) <= end]
    found = scan_shard(path)
    assert found.cut
    assert found.pairs()[:, :4].tolist() == [r[:4] for r in complete]  # of the last one the JSON may be missing
    pairs = source(pattern)
    assert len(pairs) == 13 + len(found.pairs())
    assert any("1 shards are cut off or damaged" in note and "00001.tar" in note for note in pairs.notes)
    for i in range(len(pairs)):
        pairs.read(i)[0].resize((2, 2))


@pytest.mark.parametrize("content", [b"", b"not a tar file" * 100, bytes(5)])
def test_a_file_that_is_no_archive_counts_as_damaged(folder, pattern, content):
    (folder / "00002.tar").write_bytes(content)
    pairs = source(pattern)
    assert len(pairs) == 14 and any("00002.tar" in note for note in pairs.notes)


def test_a_damaged_header_in_the_middle_is_noticed(folder):
    path = folder / "00003.tar"
    content = bytearray(path.read_bytes())
    third = int(scan_shard(path).members[2, 0]) - 512
    content[third : third + 512] = b"\xff" * 512
    path.write_bytes(content)
    index = scan_shard(path)
    assert index.cut and len(index.members) == len(index.pairs()) == 2


def test_shards_without_any_pair_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.jpg": jpeg(1), "y.txt": b"alone"})
    with pytest.raises(ConfigError, match="0 pairs in 1 shards; 1 samples .*: no image; 1 samples .*: neither text"):
        ShardSource([tmp_path / "a.tar"])


def test_the_index_is_kept_and_follows_the_file(folder, monkeypatch):
    path = folder / "00000.tar"
    first = load_index(path)
    monkeypatch.setattr(shard_index, "scan_shard", lambda path: pytest.fail("scanned again"))
    assert np.array_equal(load_index(path).members, first.members)
    monkeypatch.undo()
    write_tar(path, pair(1))
    os.utime(path, ns=(1, 1))
    assert len(load_index(path).members) == 1
    for broken in (b"", b"junk"):
        shard_index._cache_places(path)[0].write_bytes(broken)
        assert len(load_index(path).members) == 1


def test_the_index_goes_to_the_cache_where_the_folder_is_read_only(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    place = shard_index._cache_places(folder / "00000.tar")[0]
    place.mkdir()  # nothing can be written there, whoever runs the test
    load_index(folder / "00000.tar")
    assert len(list(cache.rglob("*.npz"))) == 1
    monkeypatch.setattr(shard_index, "scan_shard", lambda path: pytest.fail("scanned again"))
    load_index(folder / "00000.tar")


@pytest.fixture
def scanned(tmp_path, monkeypatch):
    """A function that returns the names of the shards that were scanned, in this and in started processes."""
    log, original = tmp_path / "scanned.txt", shard_index.scan_shard

    def scan(path):
        with log.open("a") as file:
            file.write(f"{path.name} {os.getpid()}\n")
        return original(path)

    monkeypatch.setattr(shard_index, "scan_shard", scan)
    return lambda: [tuple(line.split()) for line in (log.read_text() if log.exists() else "").splitlines()]


def test_processes_scan_what_has_no_index_once(folder, pattern, scanned):
    load_index(folder / "00001.tar")
    paths = expand_shards(pattern)
    counts = shard_index.count_shards(paths, processes=2)
    assert [c.pairs for c in counts] == [len(scan_shard(path).members) for path in paths] == [3, 5, 4, 6]
    names, processes = zip(*scanned()[:4], strict=True)
    assert sorted(names) == [f"{n:05d}.tar" for n in range(4)]  # the first by load_index, above
    assert names[0] == "00001.tar" and str(os.getpid()) not in processes[1:]
    before = len(scanned())
    assert shard_index.count_shards(paths, processes=2) == counts and len(scanned()) == before


def test_machines_that_see_no_index_of_each_other_scan_every_shard_once_each(folder, tmp_path, monkeypatch):
    """Two machines of two processes, played by threads: nothing can be kept beside the shards."""
    barrier, me, log = threading.Barrier(4), threading.local(), []
    original = shard_index.scan_shard

    class Played:
        world = 4

        def __init__(self, rank):
            self.rank, self.wait = rank, barrier.wait

    def work(rank):
        me.machine, me.place = rank // 2, (rank % 2, 2)
        return shard_index.count_shards(paths, Played(rank), processes=1)

    def scan(path):
        log.append((me.machine, path.name))
        return original(path)

    monkeypatch.setattr(shard_index, "local_place", lambda: me.place)
    monkeypatch.setattr(shard_index, "scan_shard", scan)
    monkeypatch.setattr(shard_index, "_cache_places", lambda path: [tmp_path / f"cache{me.machine}" / path.name])
    # Reading kept indices is for other threads, which would not know whose they are.
    monkeypatch.setattr(shard_index, "ThreadPoolExecutor", lambda count: nullcontext(types.SimpleNamespace(map=map)))
    paths = expand_shards(f"{folder}/*.tar")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    assert all([counts.pairs for counts in one] == [3, 5, 4, 6] for one in found)
    # A machine's shards of the first meeting are kept; its others are shared by its processes at the second.
    assert sorted(log) == [(machine, path.name) for machine in (0, 1) for path in paths]


def test_the_command_indexes_and_counts_and_says_where_nothing_can_be_kept(folder, pattern, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))  # the tool changes its first entry
    main = runpy.run_path(str(Path(__file__).resolve().parents[3] / "tools/prepare_data.py"))["main"]
    (folder / "00003.tar").write_bytes((folder / "00003.tar").read_bytes()[:4000])
    assert main(["shards", pattern, "--processes", "2"]) == 0
    assert {path.name for path in folder.glob(".*.npz")} == {f".{n:05d}.tar.index.npz" for n in range(4)}
    printed = capsys.readouterr().out
    assert "13 images in 4 shards, 13 of them with text or JSON" in printed and "1 shards are cut off" in printed
    monkeypatch.setattr(shard_index, "_cache_places", lambda path: [])
    assert main(["shards", pattern, "--processes", "1"]) == 1
    assert "error: the indices of 4 shards cannot be kept" in capsys.readouterr().err
    assert main(["shards", f"{folder}/none*.tar"]) == 1 and main(["shards", pattern, "--processes", "0"]) == 1


def test_patterns_name_files_or_say_which_is_missing(folder):
    assert len(expand_shards(f"{folder}/*.tar")) == 4
    assert [p.name for p in expand_shards(f"{folder}/00003.tar::{folder}/0000{{0,1}}.tar")] == [
        "00003.tar", "00000.tar", "00001.tar",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="no file .*00004.tar"):
        expand_shards(f"{folder}/{{00000..00004}}.tar")
    with pytest.raises(ConfigError, match="no file .*none"):
        expand_shards(f"{folder}/none*.tar")


@pytest.mark.parametrize("window", [1, 4, 7, 18, 100])
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_has_every_row_once_shuffled_within_windows(window, epoch):
    sizes = np.array([3, 5, 0, 4, 6])
    rows = ShardOrder(sizes, window, seed=2).rows(epoch, 0, 18)
    assert sorted(rows) == list(range(18))
    shard_of = np.repeat(np.arange(5), sizes)[rows]
    # Independent of how it is made: windows hold the shards one after the other, in the epoch's order.
    order = [s for s in np.random.default_rng([2, epoch]).permutation(5)]
    walked = np.concatenate([np.full(sizes[s], s) for s in order])
    for first in range(0, 18, window):
        assert sorted(shard_of[first : first + window]) == sorted(walked[first : first + window])


def test_any_stretch_of_an_order_is_that_part_of_the_whole():
    sizes, rng = np.array([30, 50, 40, 60]), np.random.default_rng(0)
    whole = {epoch: ShardOrder(sizes, 37, 5).rows(epoch, 0, 180) for epoch in (0, 1)}
    assert not np.array_equal(whole[0], whole[1])
    order = ShardOrder(sizes, 37, 5)
    for _ in range(40):
        epoch, start = int(rng.integers(2)), int(rng.integers(180))
        stop = int(rng.integers(start, 181))
        assert np.array_equal(order.rows(epoch, start, stop), whole[epoch][start:stop])


def test_a_billion_pairs_are_planned_without_listing_them():
    order = ShardOrder(np.full(100_000, 10_000), window=1000, seed=0)
    plan = ShardPlan(order, 64, first=15_000_000, steps=15_000_002)
    first, second = plan
    assert len(first) == len(second) == 64 and not set(first) & set(second)
    assert all(row < 10**9 and epoch == 0 for epoch, row in first)
    with pytest.raises(ConfigError, match="data.shuffle_window is 0"):
        ShardOrder(np.array([4]), 0, 0)


@pytest.mark.parametrize("first", [0, 1, 3, 4, 9])
def test_a_resumed_plan_is_the_tail_and_the_ranks_parts_are_the_batch(first):
    def plan(first=0, **part):
        return list(ShardPlan(ShardOrder(np.array([3, 5, 4, 6]), 6, 1), 4, first, 10, **part))

    full = plan()
    assert len(full) == 10 and {epoch for batch in full for epoch, _ in batch} == {0, 1, 2}
    assert plan(first) == full[first:]
    assert [a + b for a, b in zip(plan(rank=0, world=2), plan(rank=1, world=2), strict=True)] == full


def test_too_few_pairs_for_a_batch_are_refused():
    with pytest.raises(ConfigError, match="4 pairs do not fill one batch of 5"):
        ShardPlan(ShardOrder(np.array([4]), 9, 0), 5, 0, 1)


def batches(pattern, workers=0, first=0, pairs=None, **data):
    config = DataConfig(shards=pattern, workers=workers, shuffle_window=7, augmentation=AugmentationConfig(), **data)
    phase = PhaseConfig(steps=8, image_size=16, context_length=8, batch_size=5)
    source = pairs or ShardSource.from_config(config)
    return list(build_loader(source, None, plain_views(config, phase), config, phase, 3, first))


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["tokens"], b["tokens"])


def test_batches_do_not_depend_on_workers_and_resume_exactly(pattern):
    full = batches(pattern)
    assert len(full) == 8 and full[0]["image"].shape == (5, 3, 16, 16) and full[0]["tokens"].shape == (5, 8)
    assert_same(batches(pattern, workers=2), full)
    assert_same(batches(pattern, first=5), full[5:])


def test_few_open_shards_give_the_same_batches(pattern, monkeypatch):
    full = batches(pattern)
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 1)
    assert_same(batches(pattern), full)


def test_a_source_survives_pickling(pattern):
    pairs = source(pattern)
    pairs.read(0)
    state = pairs.__getstate__()
    assert not state["_opened"] and pickle.dumps([state["sizes"], state["_paths"]])
    assert pairs.read(1)[1]["captions"] == ["caption 1"]


def test_broken_samples_are_counted_and_replaced(folder, pattern, capfd):
    members = pair(3) | pair(4) | pair(5) | pair(6) | pair(7)
    members["00004.jpg"] = members["00004.jpg"][:300]
    members["00005.txt"] = b"  \n"
    members["00006.jpg"] = b"text"
    members["00007.txt"] = b"\xff\xfe"
    write_tar(folder / "00001.tar", members)
    pairs = source(pattern)
    for batch in batches(pattern, workers=2, pairs=pairs):
        assert batch["image"].shape == (5, 3, 16, 16)
    report = " ".join(pairs.report())
    assert "pairs broken" in report and "pairs without caption" in report
    error = capfd.readouterr().err
    assert error.count("left out:") == 2 and "00001.tar/0000" in error


def test_only_unusable_pairs_stop_with_the_settings_to_check(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{i}.{e}": b"x" for i in range(6) for e in ("jpg", "txt")})
    with pytest.raises(OSError, match="none of 6 samples in a row can be used, the last: .*; check data.shards"):
        batches(str(tmp_path / "a.tar"))


def test_settings_that_do_not_go_with_shards_are_named(pattern, tmp_path):
    with pytest.raises(ConfigError, match="data.unique_by 'concept' needs a table"):
        batches(pattern, unique_by="concept")
    with pytest.raises(ConfigError, match="data.withhold: no word list at"):
        batches(pattern, withhold=str(tmp_path / "none.txt"))
