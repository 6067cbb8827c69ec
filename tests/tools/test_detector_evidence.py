"""The commands that measure retention and proposals, and run detector studies: they answer, or say what to mend."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def call(tool: str, *arguments: str | Path) -> int:
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location(f"tools_{tool}", TOOLS / f"{tool}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module.main([str(a) for a in arguments])


@pytest.fixture
def annotations(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "1.png")
    image = {"id": 1, "file_name": "1.png", "height": 90, "width": 120}
    polygon = [[5, 5, 65, 5, 65, 65, 5, 65]]
    content = {
        "images": [image | {"neg_category_ids": [], "not_exhaustive_category_ids": []}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": i, "bbox": [5, 5, 60, 60], "area": 3600, "segmentation": polygon}
            for i in (1, 2)
        ],
        "categories": [{"id": 1, "name": "cat", "frequency": "f"}, {"id": 2, "name": "taco", "frequency": "r"}],
    }
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(content))
    return path


def test_retention_reports_both_groups_of_words(weights, annotations, tmp_path, capsys):
    options = ("--before", weights, "--after", weights, "--annotations", annotations, "--output", tmp_path / "out",
               "--samples", "3", "--device", "cpu")  # fmt: skip
    assert call("retention", *options, "--fine-tuned", "taco") == 0
    assert "untouched" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "retention.json").read_text())
    assert content["segm"]["fine-tuned: AP"]["change"]["value"] == 0 and content["bbox"]["untouched: AP"]["words"] == 1
    assert (tmp_path / "out" / "before.json").read_text() == (tmp_path / "out" / "after.json").read_text()
    (tmp_path / "words.txt").write_text("tacco\n")
    assert call("retention", *options, "--fine-tuned", tmp_path / "words.txt") == 1
    assert "'tacco' stands for 0 categories" in capsys.readouterr().err


def test_retention_joins_the_old_words_pictures_and_the_new_ones(weights, annotations, tmp_path, capsys):
    own = json.loads(annotations.read_text())
    for a in own["annotations"]:
        del a["segmentation"]  # a COCO file of boxes alone, one class of which the other file has too
    own["categories"] = [{"id": 2, "name": "Taco"}, {"id": 1, "name": "tree"}]
    own["images"] = [{"id": 1, "file_name": "1.png", "height": 90, "width": 120}]
    (tmp_path / "own.json").write_text(json.dumps(own))
    options = ("--before", weights, "--after", weights, "--fine-tuned", "tree", "--output", tmp_path / "out",
               "--samples", "3", "--device", "cpu", "--annotations", tmp_path / "own.json", annotations)  # fmt: skip
    assert call("retention", *options) == 0
    content = json.loads((tmp_path / "out" / "retention.json").read_text())
    assert content.keys() == {"bbox"} and content["bbox"]["untouched: AP"]["words"] == 2  # cat, and taco of both
    assert call("retention", *options, "--image-root", tmp_path) == 1
    assert "1 folders for 2 files" in capsys.readouterr().err


def test_proposal_recall_is_told_for_base_and_novel(weights, annotations, tmp_path, capsys):
    options = ("--annotations", annotations, "--limits", "5", "20", "--device", "cpu", "--output", tmp_path / "n.json")
    assert call("proposal_recall", "--detector", weights, *options) == 0
    assert "| novel" in capsys.readouterr().out
    assert {"AR@5_base", "AR@20_novel"} <= json.loads((tmp_path / "n.json").read_text()).keys()
    assert call("proposal_recall", "--detector", tmp_path / "none", *options) == 1
    assert "is no detector" in capsys.readouterr().err


def test_a_sweep_measures_masks_when_asked_for(weights, annotations, tmp_path, capsys):
    options = ("--detector", weights, "--annotations", annotations, "--output", tmp_path / "out", "--device", "cpu",
               "--alpha", "0,0.5", "--beta", "0.5", "--masks", "--metric", "mask_AP")  # fmt: skip
    assert call("sweep_scores", *options) == 0
    assert "mask_APr" in capsys.readouterr().out


def test_a_study_lists_what_is_to_be_done_and_names_mistakes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(TOOLS.parent)
    assert call("study_detector", "--study", "configs/studies/retention_mini.yaml", "--list") == 0
    assert len(capsys.readouterr().out.splitlines()) == 15
    assert call("study_detector", "--study", tmp_path / "none.yaml") == 1
    assert "no study file" in capsys.readouterr().err
