"""Reading pictures of every kind, and the sentences for those that cannot be read."""

import io

import numpy as np
import pytest
from PIL import Image

from ovd.data import images
from ovd.data.images import ImageError, list_images, read_image


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def colours() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("as_source", ["path", "string", "bytes", "image", "array"])
def test_every_kind_of_source_gives_the_same_pixels(as_source, colours, tmp_path):
    picture = Image.fromarray(colours)
    path = tmp_path / "a.png"
    picture.save(path)
    source = {"path": path, "string": str(path), "bytes": path.read_bytes(), "image": picture, "array": colours}
    read = read_image(source[as_source])
    assert read.dtype == np.uint8 and read.flags.c_contiguous
    np.testing.assert_array_equal(read, colours)


def test_exif_orientation_is_applied():
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0] = 255  # orientation 6: the stored picture must be turned by 90° clockwise, top left -> top right
    exif = Image.Exif()
    exif[0x0112] = 6
    read = read_image(encode(Image.fromarray(upright), exif=exif))
    assert read.shape == (6, 4, 3)
    assert read[0, 3].tolist() == [255] * 3 and read.sum() == 255 * 3


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (3, 2), 77), (77, 77, 77)),
        (Image.new("1", (3, 2), 1), (255, 255, 255)),
        (Image.new("LA", (3, 2), (0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("CMYK", (3, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("I;16", (3, 2), 65535), (255, 255, 255)),
        (Image.new("I;16", (3, 2), 257 * 40), (40, 40, 40)),
        (Image.new("P", (3, 2), 0), (0, 0, 0)),
    ],
    ids=lambda v: getattr(v, "mode", None),
)
def test_any_mode_becomes_rgb(image, expected):
    read = read_image(image)
    assert read.shape == (2, 3, 3)
    assert (read == np.array(expected, np.uint8)).all()


def test_transparent_palette_entry_becomes_white():
    picture = Image.new("P", (2, 2), 0)
    picture.putpalette([10, 20, 30, 40, 50, 60])
    read = read_image(encode(picture, transparency=0))
    assert (read == 255).all()


def test_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_image(content)[0, 0], [255, 0, 0])


def test_damaged_or_absent_files_are_named_in_one_sentence(tmp_path):
    whole = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
    cases = {"cut.jpg": whole[: len(whole) // 2], "empty.jpg": b"", "words.jpg": b"not a picture at all"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "absent.jpg")
    with pytest.raises(ImageError, match="folder"):
        read_image(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncation_anywhere_gives_an_image_error_or_a_picture(kind):
    whole = encode(Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)), kind)
    for length in np.linspace(1, len(whole) - 1, 23).astype(int):
        try:
            assert read_image(whole[:length]).shape == (32, 32, 3)
        except ImageError as error:
            assert "bytes" in str(error)


def test_too_many_pixels_are_refused(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 50)
    with pytest.raises(ImageError, match="megapixels"):
        read_image(Image.new("RGB", (8, 8)))
    bomb = encode(Image.new("1", (8, 8)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match="megapixels"):
        read_image(bomb)


@pytest.mark.parametrize(
    "array",
    [np.zeros((0, 4, 3), "u1"), np.zeros((4, 4, 3), "f4"), np.zeros((4, 4, 2), "u1"), np.zeros(4, "u1")],
)
def test_arrays_that_are_no_picture_are_refused(array):
    with pytest.raises(ImageError):
        read_image(array)


def test_list_images_sorts_and_says_what_is_wrong(tmp_path):
    with pytest.raises(ImageError, match="no picture"):
        list_images(tmp_path)
    for name in ("b.JPG", "a.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert [p.name for p in list_images(tmp_path)] == ["a.png", "b.JPG"]
    assert list_images(tmp_path / "a.png") == [tmp_path / "a.png"]
    with pytest.raises(ImageError, match="no such"):
        list_images(tmp_path / "absent")
