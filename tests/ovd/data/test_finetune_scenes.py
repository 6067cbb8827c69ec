"""Scenes to fine-tune on hold the classes named and nothing else, and come out the same every time."""

import json

import numpy as np
import pytest
from PIL import Image

from ovd.data import finetune_scenes
from ovd.data.finetune_scenes import build_finetuning_scenes
from ovd.data.lvis import load_lvis
from ovd.data.mini import MiniCategory


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "backgrounds" / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (400, 400, 3), dtype=np.uint8)).save(tmp_path / "backgrounds/train/a.jpg")
    categories = []
    for number, name in enumerate(("taco", "violin", "dog"), start=1):
        Image.new("RGBA", (40, 40), (80 * number, 0, 0, 255)).save(tmp_path / f"{name}.png")
        lvis = {"id": 10 * number, "name": name, "synonyms": [name], "frequency": "r"}
        categories.append(MiniCategory(lvis, 5, {"train": (f"{name}.png",), "val": (), "test": ("other.png",)}))
    monkeypatch.setattr(finetune_scenes, "read_categories", lambda _: categories)
    return tmp_path


def test_only_the_named_classes_are_drawn_each_with_its_annotation(root, tmp_path):
    path = build_finetuning_scenes(root, ["violin", "taco"], 6, tmp_path / "scenes")
    records, metadata = load_lvis(path, tmp_path / "scenes")
    assert len(records) == 6 and metadata["thing_classes"] == ["taco", "violin"]
    assert all(record["annotations"] for record in records)
    for record in records:
        pixels = np.asarray(Image.open(record["file_name"]))
        assert pixels.shape == (320, 320, 3)
        assert set(record["verified_classes"]) == {0, 1}


def test_the_same_arguments_give_the_same_bytes_and_are_not_drawn_again(root, tmp_path, monkeypatch):
    first = build_finetuning_scenes(root, ["taco"], 2, tmp_path / "one")
    second = build_finetuning_scenes(root, ["taco"], 2, tmp_path / "two")
    assert first.read_bytes() == second.read_bytes()
    assert (tmp_path / "one/000001.jpg").read_bytes() == (tmp_path / "two/000001.jpg").read_bytes()
    monkeypatch.setattr(finetune_scenes, "write_scene", lambda *_: pytest.fail("drawn again"))
    build_finetuning_scenes(root, ["taco"], 2, tmp_path / "one")


def test_a_word_that_is_not_drawn_is_named(root, tmp_path):
    with pytest.raises(ValueError, match="draws no 'tacco'"):
        build_finetuning_scenes(root, ["tacco"], 2, tmp_path)
    with pytest.raises(ValueError, match="0 scenes of 1 words"):
        build_finetuning_scenes(root, ["taco"], 0, tmp_path)
    with pytest.raises(ValueError, match="2 scenes of 0 words"):
        build_finetuning_scenes(root, [], 2, tmp_path)
    assert json.loads(build_finetuning_scenes(root, ["taco"], 1, tmp_path / "x").read_text())["info"]["count"] == 1
