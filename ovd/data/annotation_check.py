"""Check that an LVIS or COCO annotation file holds what its readers take for granted: types, finite numbers, masks.

JSON parses NaN, and any value may stand in any place; a mask's run lengths may be of another size than its picture, or
stand for gigabytes. Which ids and boxes make sense together is checked by the readers themselves.
"""

import math
import re
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np

MAX_SIDE = 100_000  # pixels of a picture: a mask of it is decoded
MAX_PIXELS = 178_956_970  # as for reading pictures
_LARGEST_ID = 2**63 - 1  # evaluation keeps ids in int64
# Compressed run lengths (pycocotools): numbers of five bits a letter, the last letter of each without the sixth bit. A
# decoder in C trusts that, and reads on behind a text that ends within a number.
_RUN_LENGTHS = re.compile("(?:[P-o]{0,6}[0-O])*")


def check_structure(content: Mapping[str, Any], source: str) -> None:
    """Look at every entry of `images`, `categories` and `annotations`, which must be there.

    Args:
        content: the parsed file.
        source: what messages call it.

    Raises:
        ValueError: a list is none, or an entry lacks a field or has one of the wrong type, not finite or too large.
    """
    for key in ("images", "categories", "annotations"):
        if not isinstance(content[key], list):
            raise ValueError(f"{source}: {key!r} is no list: it is not an LVIS or COCO annotation file")
        for place, entry in enumerate(content[key], start=1):
            where = f"{source}: entry {place} of {key!r}"
            if not isinstance(entry, Mapping):
                raise ValueError(f"{where} is {_short(entry)}, not a group of fields; remove it")
            if key != "annotations" or "id" in entry:  # evaluation needs none of annotations
                _check_id(entry, "id", where)
    sizes = {}
    for image in content["images"]:
        sizes[image["id"]] = _check_image(image, f"{source}: image {image['id']}")
    for category in content["categories"]:
        _check_category(category, f"{source}: category {category['id']}")
    for place, annotation in enumerate(content["annotations"], start=1):
        _check_annotation(annotation, sizes, f"{source}: annotation {annotation.get('id', place)}")


def _check_id(entry: dict, field: str, where: str) -> None:
    value = entry.get(field)
    if not isinstance(value, Integral) or isinstance(value, bool) or not -_LARGEST_ID <= value <= _LARGEST_ID:
        raise ValueError(f"{where} has {field} {_short(value)}; it must be a whole number of at most 64 bits")


def _check_image(image: dict, where: str) -> tuple[int, int] | None:
    """The size (height, width), None where the file does not tell it (box evaluation needs none)."""
    for field in ("file_name", "coco_url"):
        if not isinstance(image.get(field, ""), str) or "\0" in image.get(field, ""):
            raise ValueError(f"{where} has {field} {_short(image[field])}; it must be a text")
    for field in ("neg_category_ids", "not_exhaustive_category_ids"):
        ids = image.get(field, [])
        if not isinstance(ids, list):
            raise ValueError(f"{where} has {field} {_short(ids)}; it must be a list of category ids")
        for value in ids:
            _check_id({field: value}, field, where)
    size = image.get("height"), image.get("width")
    if size == (None, None):
        return None
    for name, side in zip(("height", "width"), size, strict=True):
        if not _is_side(side):
            raise ValueError(f"{where} has {name} {_short(side)}; it must be 1 to {MAX_SIDE} pixels, a whole number")
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{where} has {size[1]} x {size[0]} pixels, more than {MAX_PIXELS // 1_000_000} megapixels")
    return size


def _check_category(category: dict, where: str) -> None:
    if not isinstance(category.get("name") or "", str):
        raise ValueError(f"{where} has name {_short(category['name'])}; it must be a text")
    if not isinstance(category.get("frequency", ""), str):
        raise ValueError(f"{where} has frequency {_short(category['frequency'])}; LVIS gives f, c or r")
    synonyms = category.get("synonyms", [])
    if not isinstance(synonyms, list) or not all(isinstance(text, str) for text in synonyms):
        raise ValueError(f"{where} has synonyms {_short(synonyms)}; they must be a list of texts")


def _check_annotation(annotation: dict, sizes: dict[int, tuple[int, int] | None], where: str) -> None:
    for field in ("image_id", "category_id"):
        _check_id(annotation, field, where)
    box = annotation.get("bbox")
    if box is not None and not (
        isinstance(box, list | tuple | np.ndarray) and len(box) == 4 and all(map(_is_finite, box))
    ):
        raise ValueError(f"{where} has bbox {_short(box)}; it must be x, y, width, height, finite numbers in pixels")
    for field in ("area", "iscrowd", "ignore"):
        if not _is_finite(annotation.get(field, 0)):
            raise ValueError(f"{where} has {field} {_short(annotation[field])}; it must be a finite number")
    mask = annotation.get("segmentation")
    if mask:
        check_mask(mask, sizes.get(annotation["image_id"]), where)
    elif mask is not None and mask != []:
        raise ValueError(f"{where} has segmentation {_short(mask)}; it must be polygons or run lengths")


def check_mask(mask: Any, size: tuple[int, int] | None, where: str) -> None:
    """Refuse a mask that is neither polygons of at least three points nor run lengths of the picture's size.

    Compressed run lengths are not decoded here; their decoder refuses those that do not fill the size exactly.

    Args:
        mask: a "segmentation".
        size: (height, width) of the picture in pixels; None where it is not known.
        where: what messages call the mask.
    """
    if isinstance(mask, list):
        for polygon in mask:
            if not isinstance(polygon, list | tuple | np.ndarray) or len(polygon) < 6 or len(polygon) % 2:
                raise ValueError(f"{where} has the polygon {_short(polygon)}; it needs x and y of at least 3 points")
            # Rasterising takes memory in proportion to the coordinates, not only to the picture.
            if not all(_is_finite(value) and abs(value) <= MAX_SIDE for value in polygon):
                raise ValueError(f"{where} has a polygon with a value that is no number of pixels up to {MAX_SIDE}")
        return
    if not isinstance(mask, Mapping) or not isinstance(mask.get("size"), list | tuple):
        raise ValueError(f"{where} has segmentation {_short(mask)}; give polygons, or run lengths with their size")
    stated = mask["size"]
    whole = len(stated) == 2 and all(map(_is_side, stated))
    if not whole or stated[0] * stated[1] > MAX_PIXELS or (size is not None and tuple(stated) != size):
        raise ValueError(f"{where} has a mask of size {_short(stated)} in a picture of {size} (height, width)")
    counts = mask.get("counts")
    if isinstance(counts, list):
        if (
            not all(isinstance(count, Integral) and count >= 0 for count in counts)
            or sum(counts) != stated[0] * stated[1]
        ):
            raise ValueError(f"{where} has run lengths that do not fill its mask of size {stated}; encode it again")
        return
    text = counts.decode("ascii", "replace") if isinstance(counts, bytes) else counts
    if not isinstance(text, str) or not _RUN_LENGTHS.fullmatch(text):
        raise ValueError(f"{where} has counts {_short(counts)}, which are no run lengths; encode its mask again")


def _is_finite(value: Any) -> bool:
    # Compared first: a whole number of hundreds of digits cannot become a float.
    return isinstance(value, Real) and abs(value) < 1e15 and math.isfinite(value)


def _is_box(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray) and len(value) == 4 and all(map(_is_finite, value))


def _is_side(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 1 <= value <= MAX_SIDE and value == int(value)


def _short(value: Any) -> str:
    """A value for a message; a whole number of thousands of digits has no text."""
    try:
        return repr(value)[:60]
    except ValueError:
        return f"a {type(value).__name__}"
