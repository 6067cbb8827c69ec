"""The command line that evaluates any open_clip folder."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from pretrain.data.folder import ImageStore, read_table
from pretrain.evaluation.tasks import TASKS, describe
from pretrain.evaluation.zero_shot import evaluate_zero_shot
from pretrain.modeling.checkpoint import CONFIG_FILE, save_checkpoint

TOOL = Path(__file__).resolve().parents[3] / "tools" / "evaluate.py"


@pytest.fixture
def folder(tmp_path, model, model_config):
    return save_checkpoint(tmp_path / "checkpoint", model, model_config)


def run(*arguments):
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True)


@torch.no_grad()
def accuracy_by_open_clip(folder, table, split, template):
    """Top-1 from open_clip's own loading, tokenizer and classifier; images as PIL squares on white."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    preprocess = json.loads((folder / CONFIG_FILE).read_text())["preprocess_cfg"]
    rows = read_table(table)
    classes = sorted({row["caption"] for row in rows})
    classifier = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, classes, [template.format])
    rows, hits = [row for row in rows if row["split"] == split], 0
    for row in rows:
        drawing = Image.open(table.parent / row["image"])
        white = Image.new("RGB", drawing.size, "white")
        white.paste(drawing, mask=drawing.getchannel("A"))
        transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
        feature = model.encode_image(transform(white)[None])
        hits += classes[int((feature @ classifier).argmax())] == row["caption"]
    return hits / len(rows)


def test_the_result_equals_open_clips_own_with_foreign_normalisation(folder, pairs_table):
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["preprocess_cfg"].update(mean=[0.2, 0.3, 0.9], std=[0.1, 0.5, 0.3])
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    done = run("--checkpoint", folder, "--table", pairs_table, "--split", "train", "--template", "my {}", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["top1"] == pytest.approx(accuracy_by_open_clip(folder, pairs_table, "train", "my {}"))
    assert (result["images"], result["classes"], result["templates"]) == (36, 12, ["my {}"])


def test_a_model_of_open_clips_classic_kind_is_evaluated_too(pairs_table):
    """Not a CustomTextCLIP, and with a class token: only ours must be average-pooled."""
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    rows = read_table(pairs_table)
    classes, store = sorted({row["caption"] for row in rows}), ImageStore(pairs_table.parent)
    result = evaluate_zero_shot(model, rows, classes, store, ["{}"], torch.device("cpu"))
    assert result.images == 48 and 0 <= result.top1 <= result.top5 <= 1


def test_the_plain_output_names_accuracy_and_chance(folder, pairs_table):
    done = run("--checkpoint", folder, "--table", pairs_table, "--split", "val", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "12 images of split val, 12 classes" and second.endswith("chance 8.33%")
    assert "mean per class" in second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"--checkpoint": "nowhere"}, "error: nowhere is not a checkpoint folder"),
        ({"--table": "nowhere.csv"}, "error: no table of image-text pairs at nowhere.csv"),
        ({"--split": "test"}, "has no row with split 'test'; its splits: train, val"),
        ({"--template": "a thing"}, "error: --template 'a thing' has no {}"),
        ({"--template": "{}", "--templates": "t.txt"}, "leave one of them out"),
        ({"--batch-size": "0"}, "error: --batch-size 0 is below 1"),
        ({"--image-size": "40"}, "error: image_size 40 is not a multiple of the patch size 16: use 32"),
        ({"--task": "folder"}, "error: task folder needs --data FOLDER"),
        ({"--task": "imagenet", "--data": "nowhere"}, "error: no folder of images at nowhere"),
        ({"--task": "retrieval"}, "error: task retrieval needs --captions FILE.json"),
    ],
)
def test_errors_are_one_line_on_stderr(folder, pairs_table, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))  # the tool changes its first entry
    main = runpy.run_path(str(TOOL))["main"]
    given = {"--checkpoint": folder, "--table": pairs_table, "--split": "val", **arguments}
    assert main([str(part) for item in given.items() for part in item]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err and len(printed.err.strip().splitlines()) == 1


def main_of(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # the tool changes its first entry
    return runpy.run_path(str(TOOL))


@pytest.fixture
def class_folders(pairs_table, tmp_path):
    """The table's drawings, a folder for each colour, and one file that is no image."""
    for path in pairs_table.parent.glob("*.png"):
        folder = tmp_path / "images" / path.name.split("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    (tmp_path / "images" / "red" / "broken.png").write_bytes(b"no image")
    return tmp_path / "images"


def test_a_folder_with_a_broken_image_is_evaluated_and_reported(folder, class_folders, tmp_path, monkeypatch, capsys):
    main, output = main_of(monkeypatch)["main"], tmp_path / "out" / "result.json"
    (tmp_path / "templates.txt").write_text("a {}\nmy {}\n")
    given = ("--checkpoint", folder, "--task", "folder", "--data", class_folders, "--output", output, "--quiet")
    given += ("--templates", tmp_path / "templates.txt", "--image-size", 32, "--batch-size", 10, "--device", "cpu")
    assert main([str(part) for part in given]) == 0
    printed = capsys.readouterr()
    assert "48 images of folder" in printed.out and "1 could not be read and are left out" in printed.out
    result = json.loads(output.read_text())
    assert (result["images"], result["broken"], result["classes"], result["image_size"]) == (48, 1, 4, 32)
    assert "broken.png" in result["broken_examples"][0] and result["templates"] == ["a {}", "my {}"]
    assert result["preprocess"]["resize_mode"] == "squash" and 0 <= result["mean_per_class"] <= 1


def test_retrieval_is_printed_both_ways_with_the_mean(folder, pairs_table, tmp_path, monkeypatch, capsys):
    images = [
        {"split": "test", "filename": f"{colour}_circle_0.png", "sentences": [{"raw": f"{colour} {i}"} for i in "abcd"]}
        for colour in ("red", "green", "blue")
    ]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images}))
    given = ("--checkpoint", folder, "--task", "retrieval", "--captions", tmp_path / "captions.json", "--quiet")
    given += ("--data", pairs_table.parent, "--json", "--captions-per-image", 3, "--precision", "bf16")
    tool = main_of(monkeypatch)
    assert tool["main"]([str(part) for part in given]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["images"], result["captions"]) == (3, 9)
    assert result["mean_r1"] == pytest.approx((result["image_to_text_r1"] + result["text_to_image_r1"]) / 2)
    lines = describe(result).splitlines()
    assert lines[0] == "3 images with 9 captions of split test" and len(lines) == 5
    assert lines[2].startswith("image to text") and lines[3].startswith("text to image")


def test_the_command_line_offers_all_tasks():
    from pretrain.commands.evaluate import TASKS as offered

    assert offered == TASKS


def test_the_progress_has_a_rate(folder, pairs_table):
    done = run("--checkpoint", folder, "--table", pairs_table, "--split", "val", "--device", "cpu", "--json")
    assert "images/s" in done.stderr and json.loads(done.stdout)["task"] == "table"
