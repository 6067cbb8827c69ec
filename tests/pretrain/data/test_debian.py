"""Stamps, renders and landscapes from hand-made Debian packages, and what a full miniature does with them."""

import hashlib
import shutil
import subprocess
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovd.data.backgrounds import BACKGROUNDS, write_backgrounds
from pretrain.data import debian
from pretrain.data.npm_archives import FetchError


def png(size: int = 120, colour: str = "red", mode: str = "RGBA") -> bytes:
    """A disc on a transparent square."""
    image = Image.new("RGBA", (size, size))
    image.paste(Image.new("RGBA", (size // 2, size // 2), colour), (size // 4, size // 4))
    buffer = BytesIO()
    image.convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def unpacked(tmp_path) -> Path:
    """The three packages' folders, a few files each."""
    root = tmp_path / "unpacked"
    stamps = root / "usr/share/tuxpaint/stamps"
    files = {
        "animals/birds/owl": ("An owl.\nde.utf8=Eine Eule.", {".png": png()}),
        "animals/birds/owl_mirror": ("An owl.", {".png": png()}),
        "animals/birds/small": ("A small bird (very).", {".png": png(40, mode="LA")}),
        "food/taco": ("A taco.", {".svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">'
                                          b'<rect width="5" height="5" fill="red"/></svg>'}),
        "food/unsized": ("A bun.", {".svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="0" height="0"/>'}),
        "food/both": ("A bowl.", {".png": png(), ".svg": b"<svg"}),
        "food/boom": ("Boom!!!", {".png": png()}),
        "food/textonly": ("A plate.", {}),
        "symbols/money/euro": ("A euro.", {".png": png()}),
        "town/flags/red": ("A red flag.", {".png": png()}),
    }  # fmt: skip
    for name, (text, pictures) in files.items():
        path = stamps / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".txt").write_text(text)
        for suffix, content in pictures.items():
            path.with_suffix(suffix).write_bytes(content)
    catalogue = root / "usr/share/sweethome3d/furniture/Some.sh3f"
    catalogue.parent.mkdir(parents=True)
    lines = [
        "# name#9=comment", "name=Catalogue", "name#1=Caf\xe9 chair", "icon#1=/some/chair.png", "category#1=Garden",
        "tags#1=Blend Swap, Seat", "name#2=Bill 10\\u20ac", "icon#2=/some/bill.png", "name#10=Male",
        "icon#10=/some/chair2.png", "category#10=Characters", "name#11=Lost", "icon#11=/some/lost.png",
        "name#12=Chair again", "icon#12=/some/chair.png",
    ]  # fmt: skip
    with zipfile.ZipFile(catalogue, "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", "\r\n".join(lines).encode("latin-1"))
        archive.writestr("PluginFurnitureCatalog_de.properties", "name#1=Stuhl")
        for icon in ("chair", "chair2", "bill"):
            archive.writestr(f"some/{icon}.png", png(128))
    nature = root / "usr/share/backgrounds/mate/nature"
    nature.mkdir(parents=True)
    for name in ("Dune", "LadyBird", "YellowFlower"):
        Image.new("RGB", (1600, 800), "green").save(nature / f"{name}.jpg")
    return root


def test_stamps_are_the_named_objects_only(unpacked):
    drawings = {d.name: d for d in debian.read_stamps(unpacked)}
    assert {n: d.caption for n, d in drawings.items()} == {
        "animals-birds-owl": "owl",
        "animals-birds-small": "small bird",
        "food-taco": "taco",
        "food-both": "bowl",
    }
    owl = drawings["animals-birds-owl"]
    assert owl.keywords == ("animals", "birds") and owl.group == "stamps" and owl.large_enough
    assert not drawings["animals-birds-small"].large_enough
    taco = np.asarray(Image.open(BytesIO(drawings["food-taco"].source)))
    assert taco[10, 10].tolist() == [255, 0, 0, 255] and taco[-1, -1, 3] == 0


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("A koala.", "koala"),
        ("An albino peahen (a female peafowl, or peacock).", "albino peahen"),
        ("A pair of open scissors.", "open scissors"),
        ("A “Stop” sign. Stop here, then go when it’s your turn.", "stop sign"),
        ("A stethoscope lets your doctor listen to your heart and lungs.", "stethoscope"),
        ("The Eiffel tower in Paris.", "Eiffel tower in Paris"),
        ("Teddy bear.", "teddy bear"),
        ("A wizard’s hat.", "wizard's hat"),
        ("Eat your broccoli!", None),
        ("“Yield” means you have to let other people go first.", "yield"),
        ("We remember those who have died.", None),
        ("– Because a brain is a terrible thing to waste…", None),
        ("", None),
        ("A ", None),
    ],
)
def test_captions_name_the_thing_or_are_left_out(text, caption):
    assert debian.short_caption(text) == caption


def test_furniture_reads_latin1_catalogues_and_leaves_out_people_and_repeats(unpacked):
    drawings = debian.read_furniture(unpacked)
    assert [(d.name, d.caption, d.keywords, d.subgroup) for d in drawings] == [
        ("some-chair", "café chair", ("seat",), "garden"),
        ("some-bill", "bill 10€", (), ""),
    ]


def test_landscapes_without_objects_are_reduced_and_join_the_train_backgrounds_only(unpacked, tmp_path):
    assert debian.write_photographs(unpacked, tmp_path) == ["dune"]
    assert Image.open(tmp_path / "photographs" / "dune.jpg").size == (1024, 512)
    plain = {
        split: [p for p in paths if "photograph-" not in p] for split, paths in write_backgrounds(tmp_path).items()
    }
    full = write_backgrounds(tmp_path)
    assert full["train"] == [*plain["train"], "backgrounds/train/photograph-dune.jpg"]
    assert (full["val"], full["test"]) == (plain["val"], plain["test"])
    assert sum(map(len, plain.values())) == len(BACKGROUNDS)
    shutil.rmtree(tmp_path / "photographs")
    assert write_backgrounds(tmp_path) == plain
    assert not list(tmp_path.glob("backgrounds/*/photograph-*"))


@pytest.fixture
def package(unpacked, tmp_path):
    """A real .deb of the hand-made files, pinned by its own digest."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb, which makes the package for this test, is not on this machine")
    (unpacked / "DEBIAN").mkdir()
    (unpacked / "DEBIAN" / "control").write_text(
        "Package: handmade\nVersion: 1-1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: x\n"
    )
    target = tmp_path / "archives" / "handmade_1-1_all.deb"
    target.parent.mkdir()
    subprocess.run(["dpkg-deb", "-b", str(unpacked), str(target)], check=True, capture_output=True)
    return debian.DebianPackage("handmade", "1-1", hashlib.sha256(target.read_bytes()).hexdigest(), "v", "a", "l")


def test_a_package_put_there_by_hand_is_used_without_apt(package, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    path = debian.fetch_deb(package, tmp_path / "archives")
    monkeypatch.undo()
    debian.unpack(path, tmp_path / "again")
    assert len(debian.read_stamps(tmp_path / "again")) == 4
    assert not (tmp_path / "again" / "DEBIAN").exists()


def test_without_apt_or_dpkg_the_remedy_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    missing = replace(package, version="2-1")
    with pytest.raises(FetchError, match="lacks: put handmade_2-1_all.deb .* into .*archives by hand"):
        debian.fetch_deb(missing, tmp_path / "archives")
    with pytest.raises(FetchError, match="dpkg-deb, which this system lacks"):
        debian.unpack(tmp_path / "archives" / package.file_name, tmp_path / "again")


def fake_apt(tmp_path: Path, monkeypatch, script: str) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_version_that_is_gone_is_said_in_one_sentence(package, tmp_path, monkeypatch):
    fake_apt(tmp_path, monkeypatch, "echo \"E: Version '2-1' for 'handmade' was not found\" >&2; exit 100")
    with pytest.raises(FetchError) as error:
        debian.fetch_deb(replace(package, version="2-1"), tmp_path / "archives")
    assert "was not found" in str(error.value) and "by hand" in str(error.value) and "\n" not in str(error.value)


def test_a_changed_package_is_refused_and_not_kept(package, tmp_path, monkeypatch):
    fake_apt(tmp_path, monkeypatch, "echo other > handmade_1-1_all.deb")
    with pytest.raises(FetchError, match="has SHA-256 .* expected"):
        debian.fetch_deb(package, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_damaged_package_is_fetched_anew(package, tmp_path, monkeypatch):
    good = tmp_path / "good.deb"
    shutil.move(tmp_path / "archives" / package.file_name, good)
    (tmp_path / "archives" / package.file_name).write_bytes(b"half")
    fake_apt(tmp_path, monkeypatch, f"cp {good} handmade_1-1_all.deb")
    assert debian.fetch_deb(package, tmp_path / "archives").read_bytes() == good.read_bytes()


def test_a_full_build_adds_train_rows_and_a_plain_one_removes_them(package, unpacked, tmp_path, monkeypatch):
    """`build_pairs` with one hand-made emoji vendor."""
    from pretrain.data import emoji, mini

    names = emoji.Concept("1F989", "owl", ("bird",), "animals-nature", "animal-bird", frozenset({"owl"}))
    vendor = emoji.Vendor("one", emoji.NAMES, "train", "MIT", "nobody")
    monkeypatch.setattr(emoji, "VENDORS", (vendor,))
    monkeypatch.setattr(mini, "fetch", lambda package, folder: None)
    monkeypatch.setattr(mini, "Archive", lambda path: None)
    monkeypatch.setattr(emoji, "read_concepts", lambda archive: [names])
    monkeypatch.setattr(emoji, "match_icons", lambda archives, concepts: [(vendor, {"1F989": png(160)})])
    same = [replace(p, name="handmade", version="1-1", sha256=package.sha256) for p in debian.PACKAGES]
    root = tmp_path
    mini.build_pairs(root, workers=1)
    plain = {name: (root / name).read_bytes() for name in ("pairs.csv", "LICENSES.md", "manifest.json")}
    monkeypatch.setattr(debian, "PACKAGES", tuple(same))
    manifest = mini.build_pairs(root, workers=1, full=True)
    table = (root / "pairs.csv").read_text().splitlines()
    assert table[:2] == plain["pairs.csv"].decode().splitlines() and len(table) == 2 + 4 + 2
    owl = next(line for line in table if line.startswith("drawings/tuxpaint/animals-birds-owl.png"))
    assert (
        owl
        == "drawings/tuxpaint/animals-birds-owl.png,owl,animals|birds,1F989,owl,tuxpaint,train,stamps,animals/birds,1"
    )
    small = next(line for line in table if "birds-small" in line)
    assert small.endswith(",0")  # too small to be a cut-out
    assert manifest["drawings"] == {"one": 1, "sweethome3d": 2, "tuxpaint": 4}
    assert "| GPL-2 | 4 |" in (root / "LICENSES.md").read_text() and (root / "photographs" / "dune.jpg").exists()
    assert all(Image.open(root / line.split(",")[0]).size == (160, 160) for line in table[1:])
    mini.build_pairs(root, workers=1)
    assert {name: (root / name).read_bytes() for name in plain} == plain
    assert not (root / "photographs").exists()
