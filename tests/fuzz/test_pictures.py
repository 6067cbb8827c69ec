"""Pictures of strangers: every file becomes pixels, or one sentence of the error that its reader documents."""

import io
import os
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovd.data.images import ImageError, read_image
from ovd.web.finder import Limits, RequestError, read_upload, split_words
from pretrain.config import ConfigError
from pretrain.data.folder import ImageStore, read_backgrounds
from pretrain.data.jpeg import open_picture


def one_sentence(error: BaseException) -> bool:
    return bool(str(error)) and "\n" not in str(error) and "object at 0x" not in str(error)


def judge(content: bytes, path) -> None:
    """Give a file to every reader; another error than the documented one is the failure."""
    path.write_bytes(content)
    readers = (
        (lambda: read_image(content), ImageError),
        (lambda: read_upload(path, Limits()), RequestError),
        (lambda: ImageStore(path.parent).read(path.name), OSError),
        (lambda: open_picture(content, "it").resize((4, 4)), OSError),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for reader, documented in readers:
            try:
                reader()
            except documented as error:
                assert one_sentence(error), error


def test_odd_pictures_are_read_as_rgb_whatever_they_are_called(readable, tmp_path):
    for name, content in readable.items():
        path = tmp_path / "picture.jpg"
        path.write_bytes(content)
        for pixels in (read_image(content), read_image(path), read_image(path, upright=False)):
            assert (pixels.shape, pixels.dtype) == ((7, 9, 3), np.uint8), name


def test_broken_pictures_and_bombs_are_refused_with_one_sentence(refused, tmp_path):
    for name, content in refused.items():
        with pytest.raises(ImageError) as caught:
            read_image(content)
        assert one_sentence(caught.value), name
        judge(content, tmp_path / "it.png")


def test_truncated_pictures_are_read_or_refused(readable, tmp_path):
    for content in readable.values():
        for length in range(0, len(content), max(1, len(content) // 8)):
            judge(content[:length], tmp_path / "it.png")


@given(data=st.data())
def test_pictures_with_changed_bytes_are_read_or_refused(data, readable, tmp_path_factory):
    content = bytearray(readable[data.draw(st.sampled_from(sorted(readable)))])
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    judge(bytes(content), tmp_path_factory.getbasetemp() / "changed.png")


@given(content=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(content, tmp_path_factory):
    judge(content, tmp_path_factory.getbasetemp() / "any.png")


@pytest.mark.parametrize(
    "error", [RuntimeError("two\nlines"), TypeError(), ZeroDivisionError("x"), AttributeError("y")]
)
def test_any_error_of_a_decoder_is_one_about_the_picture(error, monkeypatch):
    # AVIF raises RuntimeError and a TIFF without its size TypeError; the next decoder another one.
    def fail(*_):
        raise error

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(ImageError, match="cannot be decoded") as caught:
        read_image(Image.new("RGB", (4, 4)))
    assert one_sentence(caught.value)


def test_no_program_is_started_for_postscript_that_is_called_a_picture(refused, monkeypatch, tmp_path):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    judge(refused["EPS"], tmp_path / "it.jpg")


def test_folders_pipes_devices_and_impossible_names_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name in (
        str(tmp_path / "pipe.png"),
        str(tmp_path),
        "/dev/zero",
        "a" * 5000,
        "a\0b.png",
        "\ud800.png",
        "none.png",
    ):
        with pytest.raises(ImageError):
            read_image(name)
        with pytest.raises(RequestError):
            read_upload(tmp_path / name if len(name) < 200 else None, Limits())
        for read in (ImageStore(tmp_path).read, ImageStore(tmp_path).open):
            with pytest.raises(OSError):
                read(name)


def test_a_broken_background_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="a.png"):
        read_backgrounds(str(tmp_path))


def test_sixteen_bits_are_scaled_to_eight_as_whole_numbers_are():
    values = np.arange(0, 65536, 97, dtype=np.uint16)
    expected = (values.astype(np.int64) * 2 + 257) // 514  # value / 257, rounded
    pixels = read_image(Image.fromarray(values[None]))
    assert np.array_equal(pixels[0, :, 0], expected)


def test_bombs_stay_below_four_gigabytes(refused, run_limited, tmp_path):
    for number, content in enumerate(refused.values()):
        (tmp_path / f"{number}.png").write_bytes(content)
    script = (
        "import sys; from pathlib import Path; from ovd.data.images import ImageError, read_image\n"
        "for path in Path(sys.argv[1]).iterdir():\n"
        "    try: read_image(path)\n"
        "    except ImageError: print('refused')\n"
    )
    assert run_limited(script, str(tmp_path)).count("refused") == len(refused)


@given(text=st.one_of(st.none(), st.text(max_size=200)))
def test_words_of_the_page_are_words_or_one_sentence(text):
    try:
        words = split_words(text, Limits())
    except ValueError as error:
        assert str(error)
    else:
        assert words and all(word.strip() for word in words)


def test_a_turned_photograph_and_extreme_sides_are_read():
    exif = Image.Exif()
    exif[0x112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7)).save(buffer, "JPEG", exif=exif)
    assert read_image(buffer.getvalue()).shape == (9, 7, 3)
    assert read_image(Image.new("RGB", (1, 30_000))).shape == (30_000, 1, 3)
