"""Annotation files joined for training: nothing lost, classes by name, sources shown as their shares say."""

import json

import numpy as np
import pytest
from PIL import Image

from ovd.data.lvis import load_lvis
from ovd.data.mapper import OpenVocabularyMapper
from ovd.data.mixing import Source, merge, repeat_factors
from ovd.engine.defaults import build_train_loader
from pretrain.config import ConfigError


@pytest.fixture
def write(tmp_path):
    def make(name: str, categories: dict[int, str], pictures: int, **more) -> Source:
        folder = tmp_path / name
        folder.mkdir()
        images, annotations = [], []
        for i in range(1, pictures + 1):
            Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(folder / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": 20, "width": 30, **more})
            for number, category in enumerate(categories):
                annotations.append({"id": 10 * i + number, "image_id": i, "category_id": category,
                                    "bbox": [1, 2, 5, 6], "area": 30, "iscrowd": 0})  # fmt: skip
        listed = [{"id": i, "name": n} | ({"frequency": "r"} if more else {}) for i, n in categories.items()]
        path = folder / "a.json"
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": listed}))
        return Source(path, folder)

    return make


def test_classes_join_by_name_and_everything_is_still_there(write):
    first = write("one", {7: "Fire Engine", 3: "cat"}, 2)
    second = write("two", {7: "dog", 9: "fire_engine"}, 3, neg_category_ids=[7], not_exhaustive_category_ids=[9])
    content = merge([first, second], ["cat", "taco"])
    names = {c["id"]: c["name"] for c in content["categories"]}
    assert list(names.values()) == ["cat", "Fire Engine", "dog", "taco"]
    counts = {name: sum(names[a["category_id"]] == name for a in content["annotations"]) for name in names.values()}
    assert counts == {"cat": 2, "Fire Engine": 5, "dog": 3, "taco": 0}
    last = content["images"][-1]
    assert [names[i] for i in last["neg_category_ids"]] == ["dog"]
    assert [names[i] for i in last["not_exhaustive_category_ids"]] == ["Fire Engine"]
    assert [i["source"] for i in content["images"]] == [0, 0, 1, 1, 1]
    assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"]) == 10


def test_the_joined_file_is_read_from_anywhere(write, tmp_path):
    path = tmp_path / "joined.json"
    path.write_text(json.dumps(merge([write("one", {1: "cat"}, 2), write("two", {1: "dog"}, 1)])))
    records, metadata = load_lvis(path, "")
    assert [r["source"] for r in records] == [0, 0, 1] and metadata["thing_classes"] == ["cat", "dog"]
    assert Image.open(records[2]["file_name"]).size == (30, 20)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (1, 3)])
def test_sources_are_shown_as_their_shares_say(shares):
    places = [0] * 5 + [1] * 40
    factors = repeat_factors(places, shares)
    assert factors.min() == 1
    seen = np.bincount(places, weights=factors)
    assert seen[0] / seen.sum() == pytest.approx(shares[0] / sum(shares))
    with pytest.raises(ValueError, match="1 shares for pictures of 2 sources"):
        repeat_factors(places, [1.0])


def test_the_loader_keeps_the_shares(write, tmp_path):
    path = tmp_path / "joined.json"
    path.write_text(json.dumps(merge([write("one", {1: "cat"}, 2), write("two", {1: "dog"}, 18)])))
    mapper = OpenVocabularyMapper(is_train=True, image_size=32, with_masks=False)
    loader = build_train_loader(str(path), "", mapper, batch_size=10, workers=0, shares=(0.5, 0.5))
    batches = iter(loader)
    sources = [picture["source"] for _ in range(20) for picture in next(batches)]
    assert np.mean(sources) == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ConfigError, match="both say how often a picture is shown"):
        build_train_loader(str(path), "", mapper, batch_size=2, workers=0, shares=(0.5, 0.5), repeat_threshold=0.1)
