"""The command that embeds words: its file is what the detector accepts, its findings are about these words."""

from pathlib import Path

import pytest
import torch

from ovd import OpenVocabularyDetector
from ovd.text.embedding_file import read_info


@pytest.fixture(scope="module")
def main(command):
    return command("embed_vocabulary")


def call(main, checkpoint: Path, words: str, output: Path, *more: str) -> int:
    return main(
        ["--checkpoint", str(checkpoint), "--vocabulary", words, "--output", str(output), "--device", "cpu", *more]
    )


def test_the_detector_takes_the_file_and_the_findings_are_printed(main, weights, tmp_path, capsys) -> None:
    templates = tmp_path / "templates.txt"
    templates.write_text("one {}\na small {}\n")
    output = tmp_path / "words.safetensors"
    long = "dog " * 30
    options = ("--templates", str(templates), "--threshold", "1")
    assert call(main, weights, f"koala, KOALA bear, taco, {long}", output, *options) == 0
    printed = capsys.readouterr()
    assert "4 words" in printed.out and "cut by the context length: 1" in printed.out
    assert "background: the detector's own" in printed.out and str(output) in printed.out
    assert read_info(output).templates == ("one {}", "a small {}")
    detector = OpenVocabularyDetector.from_checkpoint(weights)
    with pytest.warns(UserWarning, match="cut short"):
        detector.set_vocabulary(f"koala, KOALA bear, taco, {long}", templates=("one {}", "a small {}"))
    expected = detector.model.roi_heads.box_predictor.cls_score.text_embeddings.clone()
    detector.set_vocabulary(embeddings=output)
    torch.testing.assert_close(detector.model.roi_heads.box_predictor.cls_score.text_embeddings, expected)
    detector.set_vocabulary("dog")
    assert detector.set_vocabulary(str(output)).words[:2] == ("koala", "KOALA bear")
    torch.testing.assert_close(detector.model.roi_heads.box_predictor.cls_score.text_embeddings, expected)


def test_an_image_text_checkpoint_has_the_empty_prompt_for_background(
    main, image_text_folder, tmp_path, capsys
) -> None:
    assert call(main, image_text_folder, "koala", tmp_path / "w.safetensors") == 0
    assert "background: embedding of an empty prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "output", "more", "message"),
    [
        ("koala", "w.npy", (), "does not end in .safetensors"),
        ("none.txt", "w.safetensors", (), "none.txt does not exist"),
        (" , ", "w.safetensors", (), "holds no words"),
        ("koala", "w.safetensors", ("--templates", "none.txt"), "template file none.txt"),
        ("koala", "w.safetensors", ("--threshold", "3"), "threshold is 3"),
    ],
)
def test_mistakes_get_one_sentence(main, weights, tmp_path, capsys, words, output, more, message) -> None:
    assert call(main, weights, words, tmp_path / output, *more) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / output).exists()


def test_a_folder_that_is_no_checkpoint_is_named(main, tmp_path, capsys) -> None:
    assert call(main, tmp_path, "koala", tmp_path / "w.safetensors") == 1
    assert f"error: {tmp_path} is neither a detector nor a checkpoint folder: " in capsys.readouterr().err


def test_the_detector_that_ships_is_taken_by_its_name_and_others_are_named(main, tmp_path, capsys) -> None:
    assert call(main, Path("mini"), "koala", tmp_path / "w.safetensors") == 0
    assert "background: the detector's own" in capsys.readouterr().out
    assert read_info(tmp_path / "w.safetensors").words == ("koala",)
    assert call(main, Path("maxi"), "koala", tmp_path / "w.safetensors") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: maxi is neither a detector nor a checkpoint folder: ")
    assert "(mini)" in error and error.count("\n") == 1
