"""The command that chooses fusion settings: one run of the network, a table of all settings, clear mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def main(command):
    return command("sweep_scores")


@pytest.fixture
def annotations(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "1.png")
    image = {"id": 1, "file_name": "1.png", "height": 90, "width": 120}
    content = {
        "images": [image | {"neg_category_ids": [2], "not_exhaustive_category_ids": []}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 60, 60], "area": 3600}],
        "categories": [{"id": 1, "name": "cat", "frequency": "f"}, {"id": 2, "name": "taco", "frequency": "r"}],
    }
    path = tmp_path / "toy_val.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def run(main, weights, annotations, tmp_path):
    def call(*more: str, detector: Path = weights, file: Path = annotations) -> int:
        return main(
            ["--detector", str(detector), "--annotations", str(file), "--output", str(tmp_path / "out"),
             "--device", "cpu", *more]
        )  # fmt: skip

    return call


def test_all_settings_are_measured_and_the_best_is_named(run, tmp_path, capsys) -> None:
    options = ("--alpha", "0:1:0.5", "--beta", "0.2,0.65", "--delta", "0,3", "--detector-temperature", "1,2")
    assert run(*options) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert len(content["rows"]) == 3 * 2 * 2 * 2 and content["metric"] == "AP" and content["note"] is None
    best = max(row["metrics"]["AP"] for row in content["rows"])
    assert content["best"]["metrics"]["AP"] == best and "best AP" in printed
    assert content["best"]["metrics"]["APr"] is None  # no rare object: n/a, not a number
    assert len((tmp_path / "out" / "sweep.md").read_text().splitlines()) == 24 + 2
    assert [p.name for p in (tmp_path / "out" / "cache" / "pictures").iterdir()] == ["1.safetensors"]


def test_a_second_sweep_does_not_run_the_network(run, monkeypatch) -> None:
    options = ("--alpha", "0.5", "--beta", "0.5")
    assert run(*options) == 0
    from ovd.modeling.backbone import ViTFeaturePyramid

    def fail(*_, **__):
        raise AssertionError("the network ran")

    monkeypatch.setattr(ViTFeaturePyramid, "forward", fail)
    assert run("--alpha", "0.1", "--beta", "0.5") == 0


def test_a_test_split_is_warned_about(run, annotations, capsys) -> None:
    test = annotations.rename(annotations.with_name("toy_test.json"))
    assert run("--alpha", "0.5", "--beta", "0.5", file=test) == 0
    assert "note: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--alpha", "0:1"), "from:to:step"),
        (("--beta", "2"), "beta is 2.0"),
        (("--image-text-temperature", "0"), "image_text_temperature is 0"),
        (("--alpha", "0", "--beta", "0", "--metric", "APx"), "no metric 'APx'"),
        (("--alpha", "0", "--beta", "0", "--metric", "APr"), "APr cannot be measured"),
        (("--limit", "0"), "limit is 0"),
    ],
)
def test_mistakes_get_one_sentence(run, capsys, more, message) -> None:
    assert run(*more) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
