"""Regions computed before a run: the command, and the run that distils them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import normalize, pad, resized_crop

from ovd.data.regions import precompute_regions, read_regions
from ovd.engine import trainer
from ovd.engine.lazy_config import load_config
from ovd.losses.distillation import RegionTeacher
from pretrain.modeling.checkpoint import load_checkpoint

CONFIG = "configs/ovd/mini_lvis.py"


@pytest.fixture(scope="module")
def main(command):
    return command("prepare_data")


@pytest.fixture
def detector(config) -> Path:
    """A detector that was trained before, without distillation."""
    config.train.max_iter = 1
    config.train.output += "_before"
    return trainer.train(config)


def counts(output: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", output.splitlines()[0])]


def test_the_command_writes_what_the_run_then_distils_and_a_second_call_adds_what_is_missing(
    main, detector, config_overrides, tmp_path, capsys, monkeypatch
) -> None:
    folder = tmp_path / "regions"
    (tmp_path / "train2.png").write_bytes(b"no picture")
    arguments = ["regions", "--config", CONFIG, "--detector", str(detector), "--output", str(folder), "--limit", "7"]
    assert main([*arguments, *config_overrides]) == 0
    assert counts(capsys.readouterr().out) == [6, 5, 35, 0, 1]
    assert sorted(path.name for path in folder.iterdir()) == [*(f"{i}.npz" for i in (1, 3, 4, 5, 6)), "settings.json"]
    (folder / "3.npz").unlink()
    assert main([*arguments, *config_overrides]) == 0
    assert counts(capsys.readouterr().out) == [6, 1, 7, 4, 1]

    def no_crops(*_):
        raise AssertionError("embeddings were computed again")

    monkeypatch.setattr(RegionTeacher, "__call__", no_crops)
    fields = ["model.architecture.distillation=ensemble", "model.architecture.distillation_regions=4"]
    trainer.train(load_config(CONFIG, [*config_overrides, *fields, f"data.train.mapper.regions={folder}"]))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["loss_distill"] > 0 for row in rows)


def square_crops(pixels: torch.Tensor, boxes: np.ndarray, factor: float, margin: int = 200) -> torch.Tensor:
    """Whole-pixel squares (R, 3, 160, 160) around boxes, by torchvision; outside the picture is the mean colour, 0."""
    padded, crops = pad(pixels, [margin] * 4), []
    for x1, y1, x2, y2 in boxes.tolist():
        side = factor * max(x2 - x1, y2 - y1)
        left, top = (x1 + x2 - side) / 2 + margin, (y1 + y2 - side) / 2 + margin
        crops.append(resized_crop(padded, round(top), round(left), round(side), round(side), [160, 160]))
    return torch.stack(crops)


@torch.no_grad()
def test_files_hold_the_image_towers_embeddings_of_the_boxes_crops(
    main, detector, config_overrides, image_text_folder, tmp_path
) -> None:
    folder = tmp_path / "regions"
    arguments = ["regions", "--config", CONFIG, "--detector", str(detector), "--output", str(folder)]
    assert main([*arguments, *config_overrides]) == 0
    towers, own, others = load_checkpoint(image_text_folder), [], []
    for image_id in range(1, 7):
        boxes, embeddings = read_regions(folder, image_id, towers.fingerprint)
        assert boxes.min() >= 0 and boxes.max() <= 96
        large = (boxes[:, 2:] - boxes[:, :2]).max(axis=1) > 24  # of smaller ones whole pixels say too little
        boxes, embeddings = boxes[large], torch.from_numpy(embeddings[large])
        pixels = torch.from_numpy(np.array(Image.open(tmp_path / f"train{image_id}.png"))).permute(2, 0, 1) / 255
        pixels = normalize(pixels, towers.mean, towers.std)
        parts = [towers.model.encode_image(square_crops(pixels, boxes, factor)) for factor in (1.0, 1.5)]
        expected = sum(torch.nn.functional.normalize(part, dim=1) for part in parts)
        cosines = torch.nn.functional.cosine_similarity(embeddings[:, None], expected[None], dim=2)
        own.append(cosines.diagonal())
        others.append(cosines[~torch.eye(len(cosines), dtype=torch.bool)])
    own, others = torch.cat(own), torch.cat(others)
    assert len(own) > 100 and own.min() > 0.98 and others.mean() < 0.95


def test_a_run_refuses_the_regions_of_another_image_text_model(config_overrides, tmp_path) -> None:
    embed = torch.zeros(1, 4), torch.zeros(1, 64)
    precompute_regions([{"image_id": i} for i in range(1, 7)], lambda _: embed, tmp_path / "regions", "another tower")
    fields = ["model.architecture.distillation=shared", f"data.train.mapper.regions={tmp_path}/regions"]
    with pytest.raises(ValueError, match="made by the image-text model 'another tower'.*prepare_data.py regions again"):
        trainer.train(load_config(CONFIG, [*config_overrides, *fields]))


def test_files_made_with_other_settings_are_not_mixed(main, detector, config_overrides, tmp_path, capsys) -> None:
    folder = tmp_path / "regions"

    def write(*overrides: str, proposals: str = str(detector), limit: int = 2) -> int:
        options = ["--config", CONFIG, "--output", str(folder), "--detector", proposals, "--limit", str(limit)]
        return main(["regions", *options, *config_overrides, *overrides])

    assert write() == 0
    (folder / "3.npz").unlink()
    for overrides, options, changed in (
        ([], {"limit": 3}, "limit"),
        ([], {"proposals": "mini"}, "detector"),
        (["model.architecture.vlm_crop_size=32"], {}, "crop_size"),
        (["model.architecture.distillation_box_scales=[1.0]"], {}, "box_scales"),
        (["data.train.mapper.image_size=64"], {}, "image_size"),
    ):
        assert write(*overrides, **options) == 1
        assert f"holds regions made with another {changed}; remove {folder}" in capsys.readouterr().err
    assert not (folder / "3.npz").exists() and write("model.architecture.vlm_crop_size=160") == 0  # what 0 stands for
    for content, message in (("no json", "made with another image_text, detector, annot"), (None, "no settings.json")):
        (folder / "settings.json").unlink()
        if content:
            (folder / "settings.json").write_text(content)
        assert write() == 1
        assert message in capsys.readouterr().err


def test_what_is_wrong_is_one_sentence(main, config_overrides, tmp_path, capsys) -> None:
    arguments = ["regions", "--config", CONFIG, "--output", str(tmp_path / "regions"), *config_overrides]
    assert main([*arguments, "--detector", "mini", "--limit", "0"]) == 1
    assert capsys.readouterr().err.strip() == "error: a limit of 0 leaves no region: give at least 1"
    assert main([*arguments, "--detector", "none"]) == 1
    assert "'none' is no detector" in capsys.readouterr().err
    tuning = ["--config", "configs/ovd/finetune.py", "--detector", "mini", "--output", str(tmp_path)]
    assert main(["regions", *tuning]) == 1
    assert "fine-tunes a detector" in capsys.readouterr().err
