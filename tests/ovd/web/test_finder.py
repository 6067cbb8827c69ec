"""What the page lets through, refuses and answers, with a stand-in for the detector."""

import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovd.detections import Detections
from ovd.web.finder import MAX_DETECTIONS, Finder, Limits, RequestError, read_upload, split_words


class Standin:
    """Sees one object of the first word in every picture; notes how it was called."""

    def __init__(self) -> None:
        self.vocabularies: list[tuple[str, ...]] = []
        self.busy = threading.Lock()

    def set_vocabulary(self, vocabulary) -> None:
        self.vocabularies.append(vocabulary.words)

    def predict(self, image, threshold, max_detections) -> Detections:
        assert self.busy.acquire(blocking=False), "two requests were in the detector at once"
        self.called = (image, threshold, max_detections)
        self.busy.release()
        return Detections(
            boxes=np.array([[10.04, 20, 30, 40]], dtype=np.float32),
            scores=np.array([0.81249], dtype=np.float32),
            labels=np.array([0]),
            names=[self.vocabularies[-1][0]],
            masks=None,
            image_size=image.shape[:2],
        )


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.new("RGB", (64, 48), (200, 10, 10)).save(path)
    return path


@pytest.mark.parametrize(
    "text", ["cat, fire engine", "cat\nfire  engine\n", "cat;fire engine", " cat ,, fire engine, cat"]
)
def test_words_are_separated_by_commas_semicolons_or_lines(text: str) -> None:
    assert split_words(text, Limits()) == ("cat", "fire engine")


def test_the_name_of_a_file_is_only_a_word(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("password")
    assert split_words(str(secret), Limits()) == (str(secret),)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "no words"), (None, "no words"), (" ,\n;", "no words"), ("a,b,c,d", "4 words"), ("x" * 21, "21 letters")],
)
def test_no_words_and_too_many_are_refused(text: str | None, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        split_words(text, Limits(words=3, letters=20))


def _png_that_claims(width: int, height: int) -> bytes:
    """A few bytes whose header promises a picture of that size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 1000)
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("side", [10_000, 60_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(_png_that_claims(side, side))
    with pytest.raises(RequestError, match="more than 40 megapixels"):
        read_upload(bomb, Limits())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a picture",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"<svg xmlns='x'/>",
        b"\x89PNG\r\n\x1a\n",
    ],
)
def test_files_that_are_no_pictures_get_one_sentence_without_the_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    with pytest.raises(RequestError, match="cannot be read as a picture") as caught:
        read_upload(path, Limits())
    assert str(tmp_path) not in str(caught.value)


def test_a_truncated_picture_and_a_large_file_are_refused(picture: Path) -> None:
    whole = picture.read_bytes()
    with pytest.raises(RequestError, match="the limit is"):
        read_upload(picture, Limits(file_bytes=10))
    picture.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match="cannot be read as a picture"):
        read_upload(picture, Limits())


def test_no_picture_is_refused(tmp_path: Path) -> None:
    for path in (None, "", tmp_path, tmp_path / "absent.png"):
        with pytest.raises(RequestError, match="There is no picture"):
            read_upload(path, Limits())


def test_the_answer_has_the_box_in_pixels_of_the_picture_and_a_larger_drawing(picture: Path) -> None:
    standin = Standin()
    answer = Finder(standin)(picture, "taco, cat", 0.4)
    assert answer.rows == [["taco", 0.812, 10.0, 20.0, 30.0, 40.0]]
    assert answer.summary == "Found: taco (1)"
    image, threshold, most = standin.called
    assert image.shape == (48, 64, 3) and threshold == 0.4 and most == MAX_DETECTIONS
    assert answer.picture.shape == (480, 640, 3)
    assert (answer.picture != (200, 10, 10)).any(axis=-1).any()


def test_words_are_embedded_again_only_when_they_change(picture: Path) -> None:
    standin = Standin()
    finder = Finder(standin)
    for text in ("cat, dog", "cat,dog", "dog", "dog\n"):
        finder(picture, text, 0.3)
    assert standin.vocabularies == [("cat", "dog"), ("dog",)]


def test_visitors_at_once_get_their_own_words(picture: Path) -> None:
    finder, wrong = Finder(Standin()), []

    def visit(word: str) -> None:
        for _ in range(5):
            if finder(picture, word, 0.3).rows[0][0] != word:
                wrong.append(word)

    threads = [threading.Thread(target=visit, args=(f"word {i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), "0.5", None, True])
def test_a_threshold_that_no_slider_gives_is_refused(picture: Path, threshold) -> None:
    with pytest.raises(RequestError, match="threshold"):
        Finder(Standin())(picture, "cat", threshold)


def test_the_command_line_answers_without_loading_models() -> None:
    code = (
        "import sys; from ovd.web import cli; options = cli.parse([]); "
        "assert options.host == '127.0.0.1' and not options.share; "
        "assert not {'torch', 'gradio', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[3])
