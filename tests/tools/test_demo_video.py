"""Videos through the demo command: frames, size, rate, what is looked at, labels, and videos that are broken."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from ovd import OpenVocabularyDetector
from ovd.commands.demo import main
from ovd.video import detect_video

FRAMES, RATE, SIZE = 7, 12.5, (96, 64)  # width, height


@pytest.fixture
def video(tmp_path) -> Path:
    """A square that moves over a grey ground, 7 frames."""
    path = tmp_path / "in" / "street.mp4"
    path.parent.mkdir()
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), RATE, SIZE)
    for i in range(FRAMES):
        frame = np.full((SIZE[1], SIZE[0], 3), 90, np.uint8)
        frame[20:40, 8 * i : 8 * i + 20] = (0, 0, 255)
        writer.write(frame)
    writer.release()
    return path


@pytest.fixture
def run(weights, tmp_path):
    def call(*inputs, **changes):
        options = {"--weights": weights, "--output": tmp_path / "out", "--device": "cpu", "--threshold": 0} | changes
        flat = [str(part) for pair in options.items() for part in pair]
        extra = ["--max-detections", "3", "--save", "json", "csv", "labelme", "yolo", "--input", *map(str, inputs)]
        return main(["--vocabulary", "koala, taco", *flat, *extra])

    return call


def opened(path: Path) -> tuple[int, float, tuple[int, int]]:
    capture, frames, shape = cv2.VideoCapture(str(path)), 0, (0, 0)
    while (read := capture.read())[0]:
        frames, shape = frames + 1, read[1].shape
    return frames, capture.get(cv2.CAP_PROP_FPS), (shape[1], shape[0])


def test_a_video_comes_out_with_the_same_frames_size_and_rate(run, video, tmp_path, capsys) -> None:
    assert run(video, **{"--every": 3}) == 0
    assert opened(tmp_path / "out" / "street.mp4") == (FRAMES, RATE, SIZE)
    assert "9 detections in 3 of 7 frames" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "street.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == [0, 3, 6] and lines[1]["seconds"] == round(3 / RATE, 3)
    assert all(len(line["detections"]) == 3 and line["width"] == 96 for line in lines)
    rows = list(csv.DictReader((tmp_path / "out" / "street.csv").open()))
    assert len(rows) == 9 and rows[0]["file_name"] == str(video) and rows[3]["frame"] == "3"
    x, y, w, h = lines[1]["detections"][0]["bbox"]
    assert float(rows[3]["x2"]) == pytest.approx(x + w, abs=0.01) and rows[3]["name"] in ("koala", "taco")
    labels = tmp_path / "out" / "street_frames"
    assert sorted(p.name for p in (labels / "labelme").iterdir()) == [
        f"00000{i}.{kind}" for i in (0, 3, 6) for kind in ("json", "png")
    ]
    content = json.loads((labels / "labelme" / "000003.json").read_text())
    assert Image.open(labels / "labelme" / content["imagePath"]).size == SIZE
    assert (labels / "yolo" / "classes.txt").read_text() == "koala\ntaco\n"
    assert len((labels / "yolo" / "000006.txt").read_text().splitlines()) == 3
    assert not list((tmp_path / "out").rglob(".*"))  # no temporary files


def test_frames_are_read_as_they_are_needed_and_never_kept(weights, video, tmp_path) -> None:
    detector = OpenVocabularyDetector.from_checkpoint(weights)
    alive, most, seen = 0, 0, []
    predict = detector.predict

    def counting(pictures, **options):
        seen.append(len(pictures))
        return predict(pictures, **options)

    detector.predict = counting

    def progress(frames, total):
        nonlocal alive, most
        assert total == FRAMES
        for entry in frames:
            alive += 1
            most = max(most, alive - sum(seen[:-1]) if seen else alive)
            yield entry

    summary = detect_video(detector, video, tmp_path / "out", batch_size=2, progress=progress, formats=[])
    assert seen == [2, 2, 2, 1] and most <= 4 and summary.frames == summary.looked_at == FRAMES
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["street.mp4"]
    stopped = detect_video(detector, video, tmp_path / "out", max_frames=3, formats=[])
    assert stopped.frames == 3 and opened(stopped.video)[0] == 3


def test_ctrl_c_leaves_a_complete_video_of_the_frames_so_far(weights, video, tmp_path) -> None:
    detector = OpenVocabularyDetector.from_checkpoint(weights)

    def progress(frames, total):
        for i, entry in enumerate(frames):
            if i == 4:
                raise KeyboardInterrupt
            yield entry

    summary = detect_video(detector, video, tmp_path / "out", batch_size=2, progress=progress)
    assert summary.interrupted and summary.frames == 4 and opened(summary.video)[0] == 4
    assert len(summary.files["json"].read_text().splitlines()) == 4


def test_broken_videos_are_named_and_the_others_go_on(run, video, tmp_path, capsys) -> None:
    (tmp_path / "in" / "bad.mp4").write_bytes(b"no video at all")
    (tmp_path / "in" / "empty.avi").write_bytes(b"")
    (tmp_path / "in" / "cut.mp4").write_bytes(video.read_bytes()[:200])
    Image.new("RGB", (40, 30)).save(tmp_path / "in" / "picture.png")
    assert run(tmp_path / "in") == 1
    captured = capsys.readouterr()
    left_out = [line for line in captured.err.splitlines() if line.startswith("left out: ")]
    assert len(left_out) == 3 and all("gives no frames" in line for line in left_out)
    out = tmp_path / "out"
    assert opened(out / "street.mp4")[0] == FRAMES and (out / "picture.png").is_file()
    assert not (out / "bad.mp4").exists() and not (out / "bad.jsonl").exists()


def test_pictures_get_labels_of_every_kind(run, tmp_path) -> None:
    path = tmp_path / "in" / "a b.png"
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(path)
    assert run(path) == 0
    out = tmp_path / "out"
    rows = list(csv.DictReader((out / "detections.csv").open()))
    annotations = json.loads((out / "detections.json").read_text())["annotations"]
    assert len(rows) == len(annotations) == 3 and rows[0]["frame"] == ""
    assert float(rows[0]["score"]) == pytest.approx(annotations[0]["score"], abs=1e-4)
    content = json.loads((out / "labelme" / "a b.json").read_text())
    assert (out / "labelme" / content["imagePath"]).resolve() == path.resolve()
    assert len((out / "yolo" / "a b.txt").read_text().splitlines()) == 3


def test_a_camera_that_is_not_there_is_one_sentence(run, capsys) -> None:
    assert run("97") == 1
    assert "left out: camera 97 gives no frames; is it plugged in and free?" in capsys.readouterr().err


def test_the_original_is_never_overwritten(run, video, capsys) -> None:
    before = video.read_bytes()
    assert run(video, **{"--output": video.parent}) == 1
    assert "would be overwritten" in capsys.readouterr().err and video.read_bytes() == before
