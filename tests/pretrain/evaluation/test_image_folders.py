"""One folder a class: order, names, and what cannot be used."""

import json

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from pretrain.config import ConfigError
from pretrain.evaluation.image_folders import read_image_folder


@pytest.fixture
def folder(tmp_path):
    """Two images in each of three classes, one of them a level deeper, and files that are no images."""
    for name in ("traffic_light", "Axe", "bee"):
        (tmp_path / "images" / name / "more").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name / "1.PNG")
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name / "more" / "2.jpeg")
        (tmp_path / "images" / name / "notes.txt").write_text("")
    (tmp_path / "images" / "README.txt").write_text("")
    return tmp_path / "images"


def test_images_and_labels_are_those_of_torchvisions_image_folder(folder):
    data = read_image_folder(folder)
    theirs = ImageFolder(str(folder)).samples
    assert [(str(folder / image), label) for image, label in zip(data.images, data.labels, strict=True)] == theirs
    assert data.classes == ["Axe", "bee", "traffic light"]


def test_numbers_sort_as_numbers(tmp_path):
    for name in ("10", "2", "0"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    (tmp_path / "names.txt").write_text("zero\ntwo\nten\n")
    data = read_image_folder(tmp_path, tmp_path / "names.txt")
    named = {image: data.classes[label] for image, label in zip(data.images, data.labels, strict=True)}
    assert named == {"0/a.png": "zero", "2/a.png": "two", "10/a.png": "ten"}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("n.txt", "axe\nhoney bee\nlight\n"),
        ("n.tsv", "bee\thoney bee\ntraffic_light\tlight\nAxe\taxe\nunused\tx\n"),
        ("n.json", json.dumps(["axe", "honey bee", "light"])),
        ("n.json", json.dumps({"traffic_light": "light", "bee": "honey bee", "Axe": "axe"})),
    ],
)
def test_names_come_in_four_forms(folder, tmp_path, file, text):
    (tmp_path / file).write_text(text)
    assert read_image_folder(folder, tmp_path / file).classes == ["axe", "honey bee", "light"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("n.txt", "axe\nbee\n", "2 names and .* 3 folders"),
        ("n.tsv", "bee\tbee\nAxe\taxe\n", "no name for 1 folders .* 'traffic_light'"),
        ("n.json", "{", "is not JSON"),
        ("n.json", "[1, 2, 3]", "a list of names"),
        ("n.json", "3", "a list of names"),
    ],
)
def test_names_that_do_not_belong_to_the_folders_are_refused(folder, tmp_path, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_image_folder(folder, tmp_path / file)


def test_a_folder_without_classes_or_images_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no folder of images at"):
        read_image_folder(tmp_path / "none")
    with pytest.raises(ConfigError, match="has no sub-folders"):
        read_image_folder(tmp_path)
    (tmp_path / "axe").mkdir()
    with pytest.raises(ConfigError, match="no images in the 1 class folders"):
        read_image_folder(tmp_path)
    with pytest.raises(ConfigError, match="no file of class names"):
        read_image_folder(tmp_path, tmp_path / "names.txt")
