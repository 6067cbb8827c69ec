"""Draw detections on pictures and put pictures side by side, with PIL; needs no display and no plotting library.

Lines and letters grow with the picture. Letters are those of PIL's built-in font, which covers Latin script; other
scripts need a font file (`font_path`).
"""

import io
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ovd.detections import Detections
from pretrain.atomic import write_atomically

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]

_HUES = 18
# OKLCH (Ottosson 2020) lightness and chroma: equally bright to the eye in every hue, strong on photographs and white.
_TONES = ((0.68, 0.20), (0.56, 0.18), (0.80, 0.16))
_SMALLEST_FONT, _LARGEST_FONT = 9, 160  # pixels; below 9 PIL's font cannot be read
_ELLIPSIS = "..."


def colour_of(name: str) -> Colour:
    """Return the RGB colour of a name: the same in every picture, run and machine.

    Two names may share one of the 54 colours; `distinct_colours` avoids it for a known vocabulary.
    """
    return _palette()[zlib.crc32(name.encode("utf-8")) % len(_palette())]


def distinct_colours(names: Sequence[str]) -> dict[str, Colour]:
    """Return a colour per name, hues as far apart as the number of names allows.

    A name keeps `colour_of(name)` unless one before it took the hue. Beyond 54 names colours repeat.
    """
    palette, taken, chosen = _palette(), set(), {}
    for name in dict.fromkeys(names):
        start = zlib.crc32(name.encode("utf-8")) % len(palette)
        if len(taken) == len(palette):
            taken.clear()
        free = [i for i in range(len(palette)) if i not in taken]
        used_hues = {i % _HUES for i in taken}

        def cost(i: int, start: int = start, used_hues: set[int] = used_hues) -> tuple[int, bool]:
            distance = min((min((i - h) % _HUES, (h - i) % _HUES) for h in used_hues), default=_HUES)
            return (-min(distance, 2), i != start)

        best = min(free, key=cost)
        taken.add(best)
        chosen[name] = palette[best]
    return chosen


@lru_cache(maxsize=1)
def _palette() -> list[Colour]:
    return [
        _oklch_to_rgb(lightness, chroma, 2 * math.pi * (hue + 0.5) / _HUES)
        for lightness, chroma in _TONES
        for hue in range(_HUES)
    ]


def _oklch_to_rgb(lightness: float, chroma: float, hue: float) -> Colour:
    """Convert by Ottosson, "A perceptual color space for image processing", 2020; out-of-range values are cut."""
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    light = [min(1.0, max(0.0, v)) for v in linear]
    encoded = [12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in light]
    return tuple(round(255 * v) for v in encoded)


def draw_detections(
    image: np.ndarray,
    detections: Detections,
    *,
    colours: Mapping[str, Colour] | None = None,
    show_scores: bool = True,
    show_labels: bool = True,
    mask_opacity: float = 0.35,
    scale: float = 1.0,
    font_path: str | Path | None = None,
) -> np.ndarray:
    """Return a copy of the picture with masks, boxes and labels drawn on it.

    Large objects are painted first so that small ones stay visible; labels of the best detections choose their places
    first and avoid one another. A label that cannot fit into the picture is shortened, then left out.

    Args:
        image: (H, W, 3) uint8 RGB, the picture that `detections.image_size` describes.
        detections: what to draw, boxes in pixels of `image`.
        colours: RGB per name; names it lacks, and None, take `colour_of`.
        show_scores: write the score in percent after the name.
        show_labels: write names at all.
        mask_opacity: 0 (only outlines) to 1 (covers the picture).
        scale: enlarges the picture before drawing, so that labels are readable on small pictures.
        font_path: a TrueType file for names in other scripts.

    Returns:
        (round(H * scale), round(W * scale), 3) uint8 RGB.

    Raises:
        ValueError: the picture is not uint8 RGB or has another size than the detections say, or an option is outside
            its range.
    """
    _check_image(image)
    if image.shape[:2] != tuple(detections.image_size):
        raise ValueError(
            f"the picture is {image.shape[:2]} (height, width) but the detections belong to one of "
            f"{tuple(detections.image_size)}; draw them on the picture they were made for"
        )
    if not 0 <= mask_opacity <= 1 or not scale > 0:
        raise ValueError(f"mask_opacity {mask_opacity} must lie in 0-1 and scale {scale} above 0")
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    canvas = _resize(image, height, width).copy()
    sx, sy = width / image.shape[1], height / image.shape[0]
    boxes = detections.boxes.astype(np.float64) * [sx, sy, sx, sy]
    colour = [(colours or {}).get(name) or colour_of(name) for name in detections.names]
    style = _Style.of(height, width, font_path)
    order = np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind="stable")
    if detections.masks is not None:
        for i in order:
            _paint_mask(canvas, detections.masks[i], colour[i], mask_opacity, style.outline)
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    for i in order:
        _paint_box(pen, boxes[i], colour[i], style, (height, width))
    if show_labels:
        _paint_labels(picture, detections, boxes, colour, style, show_scores)
    return np.asarray(picture).copy()


@dataclass(frozen=True)
class _Style:
    """Sizes in pixels that fit one picture."""

    line: int
    outline: int
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    pad: int
    radius: int

    @classmethod
    def of(cls, height: int, width: int, font_path: str | Path | None) -> "_Style":
        # The geometric mean keeps panoramas from getting letters that fill their height.
        side = min(math.sqrt(height * width), 2 * min(height, width))
        size = round(min(_LARGEST_FONT, max(_SMALLEST_FONT, side / 36)))
        return cls(
            line=max(1, round(side / 300)),
            outline=max(1, round(side / 500)),
            font=_font(size, None if font_path is None else str(font_path)),
            pad=max(2, round(size * 0.3)),
            radius=max(2, round(size * 0.3)),
        )


@lru_cache(maxsize=16)
def _font(size: int, path: str | None) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


def _check_image(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"the picture must be a uint8 array (height, width, 3) in RGB, got {kind}; convert it first")
    if 0 in image.shape:
        raise ValueError(f"the picture has shape {image.shape}; it must have at least one pixel")


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def _paint_mask(canvas: np.ndarray, mask: np.ndarray, colour: Colour, opacity: float, outline: int) -> None:
    """Blend a colour into the masked pixels of `canvas` (in place) and draw the mask's edge; works on its window."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    sy, sx = canvas.shape[0] / mask.shape[0], canvas.shape[1] / mask.shape[1]
    source = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top, bottom = round(rows[0] * sy), max(round((rows[-1] + 1) * sy), round(rows[0] * sy) + 1)
    left, right = round(columns[0] * sx), max(round((columns[-1] + 1) * sx), round(columns[0] * sx) + 1)
    window = canvas[top:bottom, left:right]
    if not window.size:
        return
    # Bilinear enlargement cut at one half rounds the staircase of a low-resolution mask.
    large = Image.fromarray(source.astype(np.uint8) * 255).resize(window.shape[1::-1], Image.Resampling.BILINEAR)
    inside = np.asarray(large) >= 128
    paint = np.asarray(colour, dtype=np.float32)
    window[inside] = (window[inside] * (1 - opacity) + paint * opacity + 0.5).astype(np.uint8)
    window[inside & ~_eroded(inside, outline)] = colour


def _eroded(inside: np.ndarray, steps: int) -> np.ndarray:
    """Return the pixels whose neighbours up to `steps` away, in the four directions, are inside too."""
    for _ in range(steps):
        padded = np.pad(inside, 1)
        inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside


def _paint_box(pen: ImageDraw.ImageDraw, box: np.ndarray, colour: Colour, style: _Style, size: tuple[int, int]) -> None:
    height, width = size
    x1, y1 = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
    x2, y2 = min(width - 1, math.ceil(box[2]) - 1), min(height - 1, math.ceil(box[3]) - 1)
    if x1 >= width or y1 >= height or box[2] < 0 or box[3] < 0:
        return  # wholly outside the picture
    x2, y2 = max(x1, x2), max(y1, y2)
    # A thin object must not vanish under its own frame.
    line = min(style.line, max(1, min(x2 - x1, y2 - y1) // 4))
    pen.rectangle((x1, y1, x2, y2), outline=colour, width=line)


def _paint_labels(
    picture: Image.Image,
    detections: Detections,
    boxes: np.ndarray,
    colour: Sequence[Colour],
    style: _Style,
    show_scores: bool,
) -> None:
    placed: list[Box] = []
    for i in np.argsort(-detections.scores, kind="stable"):
        text = detections.names[i]
        score = f" {100 * detections.scores[i]:.0f}%" if show_scores else ""
        text = _fitting_text(text, score, style, picture.width)
        if not text:
            continue
        chip = _chip(text, colour[i], style)
        if chip.width > picture.width or chip.height > picture.height:
            continue
        place = _free_place(boxes[i], chip.size, picture.size, placed, style)
        placed.append(place)
        picture.paste(chip, place[:2], chip)


def _fitting_text(name: str, score: str, style: _Style, width: int) -> str:
    """Return name and score, the name shortened to fit; "" when not even three letters do."""
    room = width - 2 * style.pad
    name = " ".join(name.split())
    if style.font.getlength(name + score) <= room:
        return name + score
    for length in range(min(len(name) - 1, 200), 2, -1):
        shortened = name[:length].rstrip() + _ELLIPSIS
        for ending in (score, ""):
            if style.font.getlength(shortened + ending) <= room:
                return shortened + ending
    return name if style.font.getlength(name) <= room else ""


def _chip(text: str, colour: Colour, style: _Style) -> Image.Image:
    """Return the label as an RGBA picture: text on a rounded rectangle whose corners are smooth."""
    top, bottom = style.font.getbbox("Ag")[1::2]
    width = math.ceil(style.font.getlength(text)) + 2 * style.pad
    height = math.ceil(bottom - top) + 2 * max(1, round(style.pad * 0.6))
    fine = 4  # PIL does not smooth shapes; drawn four times too large and shrunk, they are
    shape = Image.new("L", (width * fine, height * fine), 0)
    corners = (0, 0, width * fine - 1, height * fine - 1)
    ImageDraw.Draw(shape).rounded_rectangle(corners, radius=style.radius * fine, fill=255)
    chip = Image.new("RGBA", (width, height), (*colour, 0))
    chip.putalpha(shape.resize((width, height), Image.Resampling.BOX))
    ink = Image.new("L", (width, height), 0)
    ImageDraw.Draw(ink).text((style.pad, (height - (bottom - top)) / 2 - top), text, font=style.font, fill=255)
    # Rec. 709 weights: black letters on light colours, white on dark ones.
    light = 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2] > 150
    letters = Image.new("RGB", (width, height), (20, 20, 20) if light else (255, 255, 255))
    body = Image.composite(letters, chip.convert("RGB"), ink)
    body.putalpha(chip.getchannel("A"))
    return body


def _free_place(
    box: np.ndarray, size: tuple[int, int], picture: tuple[int, int], placed: Sequence[Box], style: _Style
) -> Box:
    """Return where the label goes: the first place around the box that hides no other label, else the least hidden."""
    (width, height), (right, bottom) = size, picture
    x1, y1, x2, y2 = (float(v) for v in box)
    inset = style.line
    candidates = [
        (x1, y1 - height),  # above the box, left, centre, right
        (x1 + inset, y1 + inset),  # inside its top left corner
        (x1, y2),  # below
        (x2 - width, y1 - height),
        (x2 - width, y2),
        (x1 + inset, y2 - height - inset),
        (x2 - width - inset, y1 + inset),
        *((x1, y1 - height + step * height) for step in range(1, 7)),  # down the left edge
    ]
    best, least = None, math.inf
    for rank, (x, y) in enumerate(candidates):
        left = round(min(max(x, 0), right - width))
        top = round(min(max(y, 0), bottom - height))
        place = (left, top, left + width, top + height)
        # A label pushed back into the picture has moved from its box; a small price, so that inside places win.
        moved = abs(left - x) + abs(top - y)
        hidden = sum(_overlap(place, other) for other in placed)
        cost = hidden * 1000 + moved + rank
        if hidden == 0 and moved <= 1:
            return place
        if cost < least:
            best, least = place, cost
    return best


def _overlap(a: Box, b: Box) -> int:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def image_grid(
    images: Sequence[np.ndarray],
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    *,
    cell: tuple[int, int] | None = None,
    gap: int | None = None,
    background: Colour = (255, 255, 255),
) -> np.ndarray:
    """Return pictures side by side in rows, each shrunk or enlarged to fit its cell, with captions below.

    Args:
        images: uint8 RGB arrays (height, width, 3), of any sizes.
        columns: pictures per row; None makes the grid about square.
        captions: one text per picture, shortened to its cell's width; None leaves no room for captions.
        cell: (width, height) in pixels; None takes the largest width and the largest height among the pictures.
        gap: pixels around cells; None takes a fortieth of the cell's width.
        background: RGB.

    Returns:
        uint8 RGB.

    Raises:
        ValueError: there is no picture, the captions are not as many as the pictures, or a size is below 1.
    """
    if not images:
        raise ValueError("image_grid got no pictures; give at least one")
    for image in images:
        _check_image(image)
    columns = columns if columns is not None else math.ceil(math.sqrt(len(images)))
    if columns < 1 or (cell is not None and min(cell) < 1):
        raise ValueError(f"columns {columns} and cell {cell} must be at least 1")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"there are {len(captions)} captions for {len(images)} pictures; give one each")
    columns = min(columns, len(images))
    width, height = cell or (max(i.shape[1] for i in images), max(i.shape[0] for i in images))
    gap = max(4, width // 40) if gap is None else gap
    style = _Style.of(width, width, None)
    line = 0 if captions is None else math.ceil(style.font.getbbox("Ag")[3] + 2 * style.pad)
    rows = math.ceil(len(images) / columns)
    size = (columns * (width + gap) + gap, rows * (height + line + gap) + gap)
    sheet = Image.new("RGB", size, background)
    pen = ImageDraw.Draw(sheet)
    ink = (40, 40, 40) if sum(background) > 380 else (230, 230, 230)
    for number, image in enumerate(images):
        left = gap + (number % columns) * (width + gap)
        top = gap + (number // columns) * (height + line + gap)
        ratio = min(width / image.shape[1], height / image.shape[0]) if cell else 1.0
        shown = _resize(image, max(1, round(image.shape[0] * ratio)), max(1, round(image.shape[1] * ratio)))
        spot = (left + (width - shown.shape[1]) // 2, top + (height - shown.shape[0]) // 2)
        sheet.paste(Image.fromarray(shown), spot)
        if captions is not None:
            text = _fitting_text(captions[number], "", style, width)
            middle = left + (width - style.font.getlength(text)) / 2
            pen.text((middle, top + height + style.pad), text, font=style.font, fill=ink)
    return np.asarray(sheet).copy()


def write_png_atomic(path: str | Path, image: np.ndarray) -> Path:
    """Write a uint8 RGB picture as PNG, whole or not at all; make the folder if needed. Return the path."""
    _check_image(image)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return write_atomically(path, buffer.getvalue())
