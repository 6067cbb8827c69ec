"""Pictures from bytes, JPEGs decoded no larger than needed: at 1/2, 1/4 or 1/8 by the decoder itself, then resized.

The decoder computes the reduced picture from the low frequencies of each 8 x 8 block, which costs less and is itself an
anti-aliased reduction. Nothing here chooses the region: that is the training view's draw, made from the header's size.
"""

import io
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# The decoder leaves at least this many times the wanted pixels per side; the resize does the rest. Against full
# decoding (17 photographs, qualities 75 to 95, random regions to 64 px, bilinear) the mean error of an image is at most
# 1.9 of 255 and of a pixel at most 18; two would give 1.2 and 10 at three quarters of the speed, one 4.4 and 49.
KEPT_RATIO = 1.5
_SCALES = (8, 4, 2)  # the decoder's denominators

_Transpose = Image.Transpose
# EXIF orientation: what makes the stored picture upright; then how an upright point (x, y) is found in the stored one:
# whether x and y swap, and which stored coordinate then counts from the far side.
_ORIENTATIONS = {
    2: (_Transpose.FLIP_LEFT_RIGHT, False, True, False),
    3: (_Transpose.ROTATE_180, False, True, True),
    4: (_Transpose.FLIP_TOP_BOTTOM, False, False, True),
    5: (_Transpose.TRANSPOSE, True, False, False),
    6: (_Transpose.ROTATE_270, True, False, True),
    7: (_Transpose.TRANSVERSE, True, True, True),
    8: (_Transpose.ROTATE_90, True, True, False),
}


# Pillow knows more, but some of those start another program (EPS does Ghostscript), and a file is what its content says
# it is, whatever it is called. HEIF and JXL are there where a plugin for them is.
_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "JXL", "MPO", "PCX", "PNG", "PPM", "SGI", "TGA",
    "TIFF", "WEBP",
)  # fmt: skip


def picture_formats() -> tuple[str, ...]:
    """The formats that files of others are read as, for `PIL.Image.open`: those that only decode."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def picture_endings() -> tuple[str, ...]:
    """Lower-case endings, with their dot, of the files of those formats."""
    formats = picture_formats()
    return tuple(ending for ending, name in Image.registered_extensions().items() if name in formats)


def open_file(path: str | Path) -> Image.Image:
    """Open a picture file, with only its header read.

    Raises:
        OSError: if it is no regular file (a pipe would wait forever, a device never end) or no picture.
    """
    path = Path(path)
    check_regular(path)
    return Image.open(path, formats=picture_formats())


def check_regular(path: Path) -> None:
    """Raise OSError where something is there that is no file."""
    if path.exists() and not path.is_file():
        raise OSError("it is a folder, a pipe or a device, not a file")


def unreadable(name: str, error: Exception) -> OSError:
    """The one sentence about a picture that cannot be decoded."""
    if isinstance(error, UnidentifiedImageError):  # its own text names an object in memory
        return OSError(f"{name} cannot be read as an image (no format that is read here)")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return OSError(f"{name} cannot be read as an image ({reason})")


def upright(file: Image.Image) -> Image.Image:
    """Decode whole: RGBA for a picture with transparency, RGB otherwise, turned as its EXIF orientation says."""
    has_alpha = file.mode in ("RGBA", "LA", "PA") or "transparency" in file.info
    return ImageOps.exif_transpose(file).convert("RGBA" if has_alpha else "RGB")


def open_picture(content: bytes, name: str) -> "Image.Image | JpegPicture":
    """A JPEG with only its header read, or any other picture decoded (RGB or RGBA, upright).

    Args:
        content: the bytes of an image file.
        name: what an error calls it.

    Raises:
        OSError: if it is no image, or (not a JPEG) does not decode; a damaged JPEG shows when it is resized.
    """
    try:
        file = Image.open(io.BytesIO(content), formats=picture_formats())
        return JpegPicture(file, content, name) if file.format == "JPEG" else upright(file)
    except Exception as error:  # decoders raise many types
        raise unreadable(name, error) from error


class JpegPicture:
    """A JPEG that is decoded when it is resized; it stands for its upright RGB picture.

    `mode`, `width`, `height`, `size` and `resize` are as a PIL image has them.
    """

    mode = "RGB"

    def __init__(self, file: Image.Image, content: bytes, name: str):
        self._file, self._content, self._name = file, content, name
        # Reading EXIF costs as much as opening; most web pictures have none.
        has_exif = "exif" in file.info or "xmp" in file.info
        orientation = file.getexif().get(ExifTags.Base.Orientation) if has_exif else None
        self._turn = _ORIENTATIONS.get(orientation)
        swapped = self._turn is not None and self._turn[1]
        self.size: tuple[int, int] = file.size[::-1] if swapped else file.size

    @property
    def width(self) -> int:
        """Pixels, upright."""
        return self.size[0]

    @property
    def height(self) -> int:
        """Pixels, upright."""
        return self.size[1]

    def resize(
        self,
        size: tuple[int, int],
        resample: Image.Resampling = Image.Resampling.BICUBIC,
        box: tuple[float, float, float, float] | None = None,
        **options: Any,
    ) -> Image.Image:
        """As PIL's `resize`: the region `box` (left, top, right, bottom, in upright pixels; None: all) at `size`.

        Raises:
            OSError: if the picture does not decode; the message names it.
        """
        try:
            return self._resize(size, resample, box or (0, 0, *self.size), options)
        except Exception as error:
            raise unreadable(self._name, error) from error

    def _resize(
        self, size: tuple[int, int], resample: Image.Resampling, box: tuple[float, ...], options: dict[str, Any]
    ) -> Image.Image:
        # A decoded file cannot be decoded at another scale: a second call opens it again.
        file = self._file or Image.open(io.BytesIO(self._content), formats=("JPEG",))
        self._file = None
        if self._turn:
            box = self._stored_box(box, file.size)
            size = size[::-1] if self._turn[1] else size
        spare = min((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1])
        scale = next((s for s in _SCALES if spare / s >= KEPT_RATIO), 1)
        if scale > 1:
            # PIL takes the largest scale at which both sides are at least these.
            file.decodermaxblock = len(self._content)  # the decoder gets everything in one call
            file.draft(None, (max(1, file.width // scale), max(1, file.height // scale)))
            scale = file.decoderconfig[0] if file.decoderconfig else 1
            # Sides are rounded up; the last column may stand for fewer pixels than the others.
            box = tuple(min(edge / scale, file.size[i % 2]) for i, edge in enumerate(box))
        picture = file if file.mode == "RGB" else file.convert("RGB")
        resized = picture.resize(size, resample, box=box, **options)
        return resized.transpose(self._turn[0]) if self._turn else resized

    def _stored_box(self, box: tuple[float, ...], stored: tuple[int, int]) -> tuple[float, ...]:
        _, swap, mirror_x, mirror_y = self._turn
        x, y = (box[0], box[2]), (box[1], box[3])
        if swap:
            x, y = y, x
        if mirror_x:
            x = stored[0] - x[1], stored[0] - x[0]
        if mirror_y:
            y = stored[1] - y[1], stored[1] - y[0]
        return x[0], y[0], x[1], y[1]
