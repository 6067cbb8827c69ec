"""Read any picture a user may hand over as upright 8-bit RGB, or say in one sentence why it cannot be read.

Colour profiles are ignored. Writing and drawing are not done here.
"""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pretrain.data.jpeg import picture_formats

# Pillow refuses beyond twice its warning threshold; using the same figure keeps one limit whoever opens the file.
MAX_PIXELS = 178_956_970
SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
ImageSource = str | os.PathLike | bytes | bytearray | Image.Image | np.ndarray


class ImageError(ValueError):
    """A picture that cannot be used; the message names it and the reason."""


def read_pixels(source: Any) -> np.ndarray:
    """As `read_image`, also of a uint8 tensor (3, H, W) or (H, W)."""
    if hasattr(source, "detach"):  # a tensor; reading files needs no torch, which is slow to import and large
        source = source.detach().cpu()
        source = (source.permute(1, 2, 0) if source.dim() == 3 else source).numpy()
    return read_image(source)


def read_image(source: ImageSource, upright: bool = True) -> np.ndarray:
    """Read a picture as upright RGB.

    EXIF orientation is applied (unless `upright` is off: pixels as stored), transparency is laid on white, 16-bit
    values are scaled to 8 bit, and of an animation the first frame is taken.

    Args:
        source: path, encoded bytes, PIL image, or uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) in RGB order.

    Returns:
        uint8 array (H, W, 3), RGB, contiguous.

    Raises:
        ImageError: missing, empty, truncated or corrupt file, no pixels, more than `MAX_PIXELS`, unsupported array.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    name = _describe(source)
    if isinstance(source, Image.Image):
        return _decode(source, name, upright)
    stream: io.BytesIO | Path
    if isinstance(source, bytes | bytearray):
        if not source:
            raise ImageError(f"{name} is empty (0 bytes)")
        stream = io.BytesIO(source)
    elif isinstance(source, str | os.PathLike):
        stream = Path(source)
        _check_file(stream, name)
    else:
        raise ImageError(
            f"a picture cannot be read from {type(source).__name__}: pass a path, bytes, a PIL image or an array"
        )
    try:
        with Image.open(stream, formats=picture_formats()) as image:
            return _decode(image, name, upright)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(_too_large(name)) from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a picture in a format that is read here") from error
    except PermissionError as error:
        raise ImageError(f"{name} may not be read: permission denied") from error
    except Exception as error:  # decoders raise many types on damaged input
        raise ImageError(f"{name} cannot be decoded: {_reason(error)}") from error


def _decode(image: Image.Image, name: str, turn: bool) -> np.ndarray:
    width, height = image.size
    if width == 0 or height == 0:
        raise ImageError(f"{name} has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise ImageError(_too_large(name))
    try:
        if getattr(image, "n_frames", 1) > 1:
            image.seek(0)
        image.load()
        return np.ascontiguousarray(_to_rgb(ImageOps.exif_transpose(image) if turn else image, name))
    except ImageError:
        raise
    except Exception as error:  # decoders raise many types on damaged input
        raise ImageError(f"{name} cannot be decoded: {_reason(error)}") from error


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255 instead of scaling
        grey = np.asarray(image).astype(np.float32)
        if grey.max() > 255:
            grey /= 257.0
        grey = np.clip(np.rint(grey, out=grey), 0, 255, out=grey).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise ImageError(f"{name} holds floating-point values without a known range: save it with 8 bits a channel")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return np.asarray(Image.alpha_composite(white, coloured).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _from_array(array: np.ndarray) -> np.ndarray:
    name = f"the array of shape {array.shape} and type {array.dtype}"
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        raise ImageError(f"{name} is not a picture: values must be uint8 in 0–255")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.size == 0:
        raise ImageError(f"{name} has no pixels")
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(f"{name} is not a picture: expected (H, W), (H, W, 3) or (H, W, 4)")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise ImageError(_too_large(name))
    return np.ascontiguousarray(_to_rgb(Image.fromarray(array), name))


def _check_file(path: Path, name: str) -> None:
    try:
        if path.is_dir():
            raise ImageError(f"{name} is a folder, not a picture")
        if not path.exists():
            raise ImageError(f"{name}: no such file")
        if not path.is_file():  # a pipe would wait forever, a device never end
            raise ImageError(f"{name} is a pipe or a device, not a file")
        if path.stat().st_size == 0:
            raise ImageError(f"{name} is empty (0 bytes)")
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise ImageError(f"{name} cannot be opened: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _too_large(name: str) -> str:
    return f"{name} has more than {MAX_PIXELS // 1_000_000} megapixels, the limit: scale it down first"


def _describe(source: object) -> str:
    if isinstance(source, Image.Image):
        return f"picture {source.filename}" if getattr(source, "filename", "") else "the PIL image"
    if isinstance(source, bytes | bytearray):
        return f"the picture of {len(source)} bytes"
    return f"picture {source}"


def list_images(path: str | os.PathLike) -> list[Path]:
    """List the pictures of a folder (by file name ending, not below it), sorted; a single file is a list of one.

    Raises:
        ImageError: the path does not exist, or the folder holds no picture.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ImageError(f"{path}: no such picture or folder")
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise ImageError(f"folder {path} holds no picture ({', '.join(s[1:] for s in SUFFIXES)})")
    return found
