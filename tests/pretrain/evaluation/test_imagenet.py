"""ImageNet and its variants: classes, subsets, and folders named by WordNet id or number."""

import pytest
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image

from pretrain.config import ConfigError
from pretrain.evaluation.imagenet import IMAGENET_TASKS, class_indices, class_synsets, read_imagenet

# WordNet id, number, open_clip's name: well-known classes of the ILSVRC-2012 list, spread over its length.
KNOWN = [
    ("n01440764", 0, "tench"), ("n01498041", 6, "stingray"), ("n02123045", 281, "tabby cat"),
    ("n04285008", 817, "sports car"), ("n07753592", 954, "banana"), ("n15075141", 999, "toilet paper"),
]  # fmt: skip


def write_folders(root, names):
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(root / name / "a.JPEG")
    return root


def named(data):
    """Folder to the name that its image is to be found under."""
    return {image.split("/")[0]: data.classes[label] for image, label in zip(data.images, data.labels, strict=True)}


@pytest.mark.parametrize("task", ["imagenet", "imagenet-v2", "imagenet-sketch"])
def test_wordnet_ids_names_and_numbers_belong_together(task, tmp_path):
    assert class_indices(task) == list(range(1000))
    data = read_imagenet(task, write_folders(tmp_path, [synset for synset, _, _ in KNOWN]))
    assert len(data.classes) == 1000 and named(data) == {synset: name for synset, _, name in KNOWN}
    assert sorted(data.labels) == [number for _, number, _ in KNOWN]


@pytest.mark.parametrize("task", ["imagenet-a", "imagenet-r"])
def test_subsets_have_two_hundred_classes_in_imagenets_order(task):
    indices, synsets = class_indices(task), class_synsets(task)
    assert len(set(indices)) == len(set(synsets)) == 200
    assert indices == sorted(indices) and synsets == sorted(synsets)
    every = class_synsets("imagenet")
    assert [every[index] for index in indices] == synsets


def test_the_subsets_choose_among_their_own_classes(tmp_path):
    a = read_imagenet("imagenet-a", write_folders(tmp_path / "a", ["n01498041", "n07753592"]))
    assert class_indices("imagenet-a")[0] == 6 and a.classes[0] == "stingray"
    assert len(a.classes) == 200 and named(a) == {"n01498041": "stingray", "n07753592": "banana"}
    assert a.classes[199] == IMAGENET_CLASSNAMES[class_indices("imagenet-a")[199]]
    r = read_imagenet("imagenet-r", write_folders(tmp_path / "r", ["n01443537"]))
    assert class_indices("imagenet-r")[:3] == [1, 2, 4] and named(r) == {"n01443537": "goldfish"}
    assert "tench" not in a.classes + r.classes


def test_numbered_folders_are_class_numbers_and_not_places_in_a_listing(tmp_path):
    data = read_imagenet("imagenet-v2", write_folders(tmp_path, ["0", "10", "2", "999", "6"]))
    assert named(data) == {folder: IMAGENET_CLASSNAMES[int(folder)] for folder in ("0", "2", "6", "10", "999")}
    assert sorted(data.labels) == [0, 2, 6, 10, 999]


@pytest.mark.parametrize(
    ("task", "folders", "message"),
    [
        ("imagenet-a", ["n01498041", "n01440764"], "n01440764 is not a class of imagenet-a .1 such"),
        ("imagenet-r", ["1", "2"], "is not a class of imagenet-r .2 such"),
        ("imagenet-v2", ["5", "1000"], "1000 is not a class of imagenet-v2"),
        ("imagenet", ["val"], "val is not a class of imagenet .*WordNet ids from n01440764"),
        ("imagenet-x", ["n01440764"], "'imagenet-x' is not one of imagenet, "),
    ],
)
def test_folders_of_another_data_set_are_refused(tmp_path, task, folders, message):
    with pytest.raises(ConfigError, match=message):
        read_imagenet(task, write_folders(tmp_path, folders))


def test_all_tasks_have_names_for_all_classes():
    assert all(max(class_indices(task)) < len(IMAGENET_CLASSNAMES) for task in IMAGENET_TASKS)
