"""The demo command: what it writes agrees with the detector's own answer, and every mistake gets one sentence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO

from ovd import OpenVocabularyDetector
from ovd.inference import collect_images, output_names

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def main(command):
    return command("demo")


def picture(path: Path, height: int = 60, width: int = 90, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def run(main, weights, tmp_path):
    def call(*arguments, vocabulary="koala, taco", threshold="0", limit="4", **changes):
        options = {"--weights": weights, "--output": tmp_path / "out", "--device": "cpu", **changes}
        flat = [str(part) for pair in options.items() for part in pair]
        return main(
            ["--vocabulary", vocabulary, "--threshold", threshold, "--max-detections", limit, *flat, "--input"]
            + [str(a) for a in arguments]
        )

    return call


def error_of(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_json_holds_what_the_detector_says_and_pycocotools_reads_it(run, weights, tmp_path):
    path = picture(tmp_path / "a.jpg")
    assert run(path) == 0
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    detector = OpenVocabularyDetector.from_checkpoint(weights)
    detector.set_vocabulary("koala, taco")
    expected = detector.predict(path, score_threshold=0.0, max_detections=4)
    assert [c["name"] for c in content["categories"]] == ["koala", "taco"]
    assert content["images"] == [{"id": 1, "file_name": str(path), "width": 90, "height": 60, "annotated": "a.png"}]
    assert len(expected) == len(content["annotations"]) == 4
    for i, found in enumerate(content["annotations"]):
        x, y, w, h = found["bbox"]
        np.testing.assert_allclose([x, y, x + w, y + h], expected.boxes[i], rtol=1e-6)
        assert found["score"] == float(expected.scores[i]) and found["category_id"] == expected.labels[i] + 1
        np.testing.assert_array_equal(mask_tools.decode(found["segmentation"]).astype(bool), expected.masks[i])
    coco = COCO(tmp_path / "out" / "detections.json")
    assert coco.annToMask(coco.loadAnns([1])[0]).shape == (60, 90)


def test_annotated_pictures_keep_the_size_and_differ_from_the_originals(run, tmp_path):
    path = picture(tmp_path / "a.png")
    run(path)
    drawn, original = (np.asarray(Image.open(p)) for p in (tmp_path / "out" / "a.png", path))
    assert drawn.shape == original.shape and (drawn != original).any()


def test_folders_files_and_a_vocabulary_file_go_together(run, tmp_path):
    picture(tmp_path / "pictures" / "b.jpg")
    picture(tmp_path / "pictures" / "a.png", 20, 300)
    single = picture(tmp_path / "c.bmp", 90, 30)
    (tmp_path / "words.txt").write_text("koala\n# remark\nfire engine\n")
    assert run(tmp_path / "pictures", single, single, vocabulary=str(tmp_path / "words.txt")) == 0
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [i["annotated"] for i in content["images"]] == ["a.png", "b.png", "c.png"]
    assert [c["name"] for c in content["categories"]] == ["koala", "fire engine"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "c.png", "detections.json"]


def test_unreadable_pictures_are_named_counted_and_do_not_stop_the_others(run, tmp_path, capsys):
    picture(tmp_path / "p" / "a.jpg")
    picture(tmp_path / "p" / "c.jpg")
    (tmp_path / "p" / "b.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (tmp_path / "p" / "d.png").write_bytes(b"")
    assert run(tmp_path / "p") == 1
    captured = capsys.readouterr()
    left_out = [line for line in captured.err.splitlines() if line.startswith("left out: ")]
    assert len(left_out) == 2 and "b.jpg" in left_out[0] and "d.png" in left_out[1]
    assert "2 of 4 pictures could not be read" in captured.err
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [i["annotated"] for i in content["images"]] == ["a.png", "c.png"]
    assert {a["image_id"] for a in content["annotations"]} == {1, 2}


def test_nothing_above_the_threshold_still_lists_the_picture(run, tmp_path, capsys):
    assert run(picture(tmp_path / "a.jpg"), threshold="1") == 0
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert content["annotations"] == [] and len(content["images"]) == 1
    assert "0 detections in 1 pictures" in capsys.readouterr().out


def test_duplicate_words_are_a_note_of_one_line(run, tmp_path, capsys):
    assert run(picture(tmp_path / "a.jpg"), vocabulary="koala, Koala") == 0
    assert capsys.readouterr().err.splitlines() == ["note: the comma list repeats Koala; each is kept once"]


def test_a_file_of_embeddings_serves_the_detector_that_made_it_alone(run, command, weights, tmp_path, capsys):
    path, embed = picture(tmp_path / "a.jpg"), command("embed_vocabulary")
    for checkpoint, name in ((weights, "own"), ("mini", "other")):
        output = str(tmp_path / f"{name}.safetensors")
        assert embed(["--checkpoint", str(checkpoint), "--vocabulary", "koala, taco", "--output", output]) == 0
    assert run(path) == 0
    expected = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert run(path, vocabulary=str(tmp_path / "own.safetensors")) == 0
    assert json.loads((tmp_path / "out" / "detections.json").read_text()) == expected
    capsys.readouterr()
    assert run(path, vocabulary=str(tmp_path / "other.safetensors")) == 1
    assert "other.safetensors" in (error := error_of(capsys)) and "tools/embed_vocabulary.py" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": " , "}, "holds no words"),
        ({"vocabulary": "words.txt"}, "words.txt does not exist"),
        ({"vocabulary": "words.safetensors"}, "words.safetensors does not exist"),
        ({"--weights": "missing/folder"}, "missing/folder is no detector checkpoint"),
        ({"--weights": "nothing"}, "no detector named 'nothing' ships"),
    ],
)
def test_wrong_options_get_one_sentence(run, tmp_path, capsys, changes, message):
    assert run(picture(tmp_path / "a.jpg"), **changes) == 1
    assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_missing_inputs_and_empty_folders_get_one_sentence(run, tmp_path, capsys):
    assert run(tmp_path / "none.jpg") == 1
    assert "none.jpg: no such picture or folder" in error_of(capsys)
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty") == 1
    assert "empty holds no picture" in error_of(capsys)


def test_a_checkpoint_of_another_shape_gets_one_sentence(run, weights, tmp_path, capsys):
    shutil.copytree(weights, tmp_path / "other")
    config = yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())
    config["architecture"]["box_fc_dim"] = 48
    (tmp_path / "other" / "config.yaml").write_text(yaml.safe_dump(config))
    assert run(picture(tmp_path / "a.jpg"), **{"--weights": tmp_path / "other"}) == 1
    assert "does not fit its own config.yaml" in error_of(capsys)


def test_originals_are_never_overwritten(run, tmp_path, capsys):
    path = picture(tmp_path / "p" / "a.png")
    before = path.read_bytes()
    assert run(tmp_path / "p", **{"--output": tmp_path / "p"}) == 1
    assert "would be overwritten" in error_of(capsys)
    assert path.read_bytes() == before


@pytest.mark.parametrize("bad", [["--threshold", "1.5"], ["--max-detections", "0"], ["--device", "abacus"]])
def test_values_out_of_range_are_refused_before_anything_loads(main, bad):
    with pytest.raises(SystemExit) as stop:
        main(["--input", "a.jpg", "--vocabulary", "cat", *bad])
    assert stop.value.code == 2


def test_output_names_do_not_collide_even_without_case(tmp_path):
    paths = [Path(p) for p in ("x/a.jpg", "x/a.png", "y/A.png", "x/b.jpg", "z/a_jpg.bmp")]
    names = output_names(paths)
    assert names[3] == "b.png" and names[:2] == ["a_jpg.png", "a_png.png"]
    assert len({n.casefold() for n in names}) == len(paths)


def test_a_picture_given_twice_is_taken_once(tmp_path):
    path = picture(tmp_path / "p" / "a.png")
    assert collect_images([path, tmp_path / "p", tmp_path / "p" / ".." / "p" / "a.png"]) == [path]
