"""Annotations and detections as columns (arrays), checked once; which of them count is not decided here.

Six million detections take 300 MB as columns and several GB as dictionaries, so everything behind this file reads
columns. Formats: LVIS and COCO annotation files, and their results files (Gupta et al. 2019; Lin et al. 2014).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_codec

from ovd.data.annotation_check import check_mask, check_structure
from ovd.evaluation.packed_masks import PackedMasks
from pretrain.parsing import parse_json

IOU_TYPES = ("bbox", "segm")
FREQUENCIES = ("r", "c", "f")  # LVIS: seen in 1-10, 11-100, more than 100 training pictures


@dataclass(frozen=True)
class DetectionTable:
    """Detections as columns, a cheap form of a results list.

    image_ids, category_ids (N,) integers; scores (N,); boxes (N, 4) x, y, width, height in pixels, or None; masks N run
    lengths ({"size": [height, width], "counts": …}), a list or `PackedMasks`, or None.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray | None = None
    masks: Sequence[Mapping[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, rows: np.ndarray) -> "DetectionTable":
        """Return these rows (places or a boolean per row), in this order."""
        places = np.flatnonzero(rows) if rows.dtype == bool else rows
        masks = self.masks
        if masks is not None:
            masks = masks.take(places) if isinstance(masks, PackedMasks) else [masks[i] for i in places]
        boxes = None if self.boxes is None else self.boxes[places]
        return DetectionTable(self.image_ids[places], self.category_ids[places], self.scores[places], boxes, masks)


@dataclass(frozen=True)
class GroundTruth:
    """Annotations as columns; `image` and `category` (G,) are places in the sorted `image_ids`, `category_ids`.

    frequencies: one of r, c, f per category, or "" where the file has none. checked: sorted keys (`keys`) of the
    (picture, class) pairs in which detections count; None: all. not_exhaustive: sorted keys of the pairs in which an
    unmatched detection does not count. crowd (G,): COCO's iscrowd.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    names: list[str]
    frequencies: np.ndarray
    image: np.ndarray
    category: np.ndarray
    area: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    sizes: list[tuple[int | None, int | None]]
    masks: list[Mapping[str, Any]] | None = None
    checked: np.ndarray | None = None
    not_exhaustive: np.ndarray | None = None

    def keys(self, image: np.ndarray, category: np.ndarray) -> np.ndarray:
        """Number the pairs of places: picture * number of classes + class."""
        return image.astype(np.int64) * len(self.category_ids) + category


def read_json(source: Any) -> Any:
    """Return the content of a path; anything else is returned as it is."""
    if not isinstance(source, (str, Path)):
        return source
    try:
        return parse_json(Path(source).read_bytes())
    except ValueError as error:
        raise ValueError(f"{source} is not valid JSON ({error}); write it again") from error


def places(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return where each id stands in the sorted `known`, -1 where it does not."""
    if not len(ids):
        return np.zeros(0, np.int64)
    found = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.where(known[found] == ids, found, -1)


def is_member(keys: np.ndarray, sorted_keys: np.ndarray) -> np.ndarray:
    """Return for each key whether it is among the sorted ones."""
    if not len(sorted_keys):
        return np.zeros(len(keys), bool)
    return places(keys, sorted_keys) >= 0


def read_lvis(source: str | Path | Mapping[str, Any], iou_type: str) -> GroundTruth:
    """Read an LVIS annotation file or its content, with what its federated protocol needs.

    Raises:
        ValueError: a field that the protocol reads is missing or impossible.
    """
    content = _checked_content(source)
    for image in content["images"]:
        for field in ("neg_category_ids", "not_exhaustive_category_ids"):
            # Without the list every class that is absent from a picture would go unchecked, and AP would look better.
            if field not in image:
                raise ValueError(
                    f"image {image['id']} of the ground truth has no {field}; LVIS counts only checked classes, "
                    "so list them (every absent class if the picture is labelled exhaustively)"
                )
    for category in content["categories"]:
        if category.get("frequency") not in FREQUENCIES:
            raise ValueError(
                f"category {category['id']} ({category.get('name')}) has frequency {category.get('frequency')!r}; "
                "LVIS needs r, c or f"
            )
    # The protocol has no crowds: the lvis package reads such an annotation as an ordinary one.
    table = _columns(content, iou_type, content["annotations"], with_crowds=False)
    present = table.keys(table.image, table.category)
    absent = _listed_keys(content, table, "neg_category_ids")
    not_exhaustive = _listed_keys(content, table, "not_exhaustive_category_ids")
    return replace(table, checked=np.union1d(present, absent), not_exhaustive=not_exhaustive)


def _listed_keys(content: Mapping[str, Any], table: GroundTruth, field: str) -> np.ndarray:
    """Return the sorted keys of the (picture, class) pairs that the pictures' lists name; unknown classes are left
    out."""
    lists = [image[field] for image in content["images"]]
    image_ids = np.asarray([image["id"] for image in content["images"]], np.int64)
    image = np.repeat(places(image_ids, table.image_ids), [len(listed) for listed in lists])
    category = places(np.asarray(list(chain.from_iterable(lists)), np.int64), table.category_ids)
    return np.unique(table.keys(image, category)[category >= 0])


def best_per(keys: np.ndarray, scores: np.ndarray, limit: int) -> np.ndarray:
    """Return whether each row is among the `limit` best scores of its key; of equal scores the earlier row wins.

    Args:
        keys: (N,) whole numbers of at least 0, for example the picture of each detection.
    """
    if not len(keys) or np.unique(keys, return_counts=True)[1].max() <= limit:
        return np.ones(len(keys), bool)
    order = np.lexsort((-scores, keys))
    first = np.flatnonzero(np.diff(keys[order], prepend=-1))
    rank = np.arange(len(keys)) - np.repeat(first, np.diff(np.append(first, len(keys))))
    kept = np.zeros(len(keys), bool)
    kept[order[rank < limit]] = True
    return kept


def read_coco(source: str | Path | Mapping[str, Any], iou_type: str) -> GroundTruth:
    """Read a COCO annotation file or its content.

    Raises:
        ValueError: a field is missing or impossible.
    """
    content = _checked_content(source)
    return _columns(content, iou_type, content["annotations"], with_crowds=True)


def only_categories(table: GroundTruth, category_ids: Collection[int]) -> GroundTruth:
    """Keep the categories named and their annotations, of a table of `read_coco`.

    Raises:
        ValueError: a category is not in the file.
    """
    unknown = sorted(set(category_ids) - set(table.category_ids.tolist()))
    if unknown:
        raise ValueError(f"is_base names category {unknown[0]}, which the ground truth does not list")
    kept = np.isin(table.category_ids, list(category_ids))
    rows = np.flatnonzero(kept[table.category])
    return replace(
        table,
        category_ids=table.category_ids[kept],
        names=[name for name, keep in zip(table.names, kept, strict=True) if keep],
        frequencies=table.frequencies[kept],
        image=table.image[rows],
        category=(np.cumsum(kept) - 1)[table.category[rows]],
        area=table.area[rows],
        boxes=table.boxes[rows],
        crowd=table.crowd[rows],
        masks=None if table.masks is None else [table.masks[row] for row in rows],
    )


def _checked_content(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    content = read_json(source)
    for field in ("images", "categories", "annotations"):
        if not isinstance(content, Mapping) or field not in content:
            raise ValueError(f"the ground truth has no {field!r}; give an LVIS or COCO annotation file")
    name = str(source) if isinstance(source, (str, Path)) else "the ground truth"
    check_structure(content, name)
    if not content["images"] or not content["categories"]:
        raise ValueError("the ground truth has no images or no categories; give an annotation file that has some")
    return content


def _columns(
    content: Mapping[str, Any], iou_type: str, annotations: Sequence[Mapping[str, Any]], with_crowds: bool
) -> GroundTruth:
    images = sorted(content["images"], key=lambda image: image["id"])
    categories = sorted(content["categories"], key=lambda category: category["id"])
    image_ids = np.asarray([image["id"] for image in images], np.int64)
    category_ids = np.asarray([category["id"] for category in categories], np.int64)
    image = places(np.asarray([a["image_id"] for a in annotations], np.int64), image_ids)
    category = places(np.asarray([a["category_id"] for a in annotations], np.int64), category_ids)
    for number in np.flatnonzero((image < 0) | (category < 0))[:1]:
        bad = annotations[number]
        raise ValueError(
            f"annotation {bad.get('id', number + 1)} names image {bad['image_id']} and category "
            f"{bad['category_id']}, one of which the ground truth does not list"
        )
    needed = ("bbox", "area") if iou_type == "bbox" else ("segmentation", "area")
    for number, annotation in enumerate(annotations, start=1):
        if annotation.get("ignore") and not with_crowds:  # COCO's own evaluation reads iscrowd instead
            raise ValueError(f"annotation {annotation.get('id', number)} is marked ignore; LVIS has none, remove it")
        for field in needed:
            if field not in annotation or annotation[field] is None or annotation[field] == []:
                raise ValueError(f"annotation {annotation.get('id', number)} has no {field}; {iou_type} needs it")
    sizes = [(i.get("height"), i.get("width")) for i in images]
    sizes = [(None, None) if None in size else (int(size[0]), int(size[1])) for size in sizes]
    if iou_type == "segm" and (None, None) in sizes:
        raise ValueError("an image of the ground truth has no width and height; segm evaluation needs them")
    boxes, masks = np.zeros((len(annotations), 4)), None
    if iou_type == "bbox":
        boxes = np.asarray([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
    else:
        masks = [run_lengths(a["segmentation"], sizes[i]) for a, i in zip(annotations, image, strict=True)]
    return GroundTruth(
        image_ids=image_ids,
        category_ids=category_ids,
        names=[str(c.get("name", c["id"])) for c in categories],
        frequencies=np.asarray([c.get("frequency", "") for c in categories], dtype="U1"),
        image=image,
        category=category,
        area=np.asarray([a["area"] for a in annotations], np.float64),
        boxes=boxes,
        crowd=np.asarray([with_crowds and bool(a.get("iscrowd", 0)) for a in annotations], bool),
        sizes=sizes,
        masks=masks,
    )


def run_lengths(segmentation: Any, size: tuple[int | None, int | None]) -> Mapping[str, Any]:
    """Return polygons or uncompressed run lengths as compressed ones; `size` is (height, width) in pixels."""
    if isinstance(segmentation, list):
        return mask_codec.merge(mask_codec.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return mask_codec.frPyObjects(segmentation, *segmentation["size"])
    return segmentation


def read_results(source: Any, ground_truth: GroundTruth, iou_type: str) -> DetectionTable:
    """Read a results list, a path of one or a `DetectionTable`; ids become places in the ground truth's.

    Raises:
        ValueError: a result names an unknown picture or class, lacks a field or has an impossible value.
    """
    results = read_json(source)
    key = "bbox" if iou_type == "bbox" else "segmentation"
    if not isinstance(results, DetectionTable):
        results = _table_of_list(results, key, iou_type)
    image = places(results.image_ids, ground_truth.image_ids)
    category = places(results.category_ids, ground_truth.category_ids)
    _refuse(image < 0, lambda n: f"names image {results.image_ids[n]}, which the ground truth does not list")
    _refuse(
        category < 0,
        lambda n: (
            f"names category {results.category_ids[n]}, which the ground truth does not list; write "
            f"{'LVIS ' if ground_truth.checked is not None else ''}category ids, not class indices"
        ),
    )
    bad = ~np.isfinite(results.scores)
    _refuse(bad, lambda n: f"has score {results.scores[n]}; scores must be finite numbers")
    boxes, masks = results.boxes, None
    if iou_type == "bbox":
        if boxes is None:
            raise ValueError("result 0 has no bbox; bbox evaluation needs it in every result")
        boxes = np.asarray(boxes, np.float64).reshape(len(results), 4)
        bad = ~np.isfinite(boxes).all(axis=1) | (boxes[:, 2:].min(axis=1, initial=np.inf) < 0)
        _refuse(bad, lambda n: f"has bbox {boxes[n].tolist()}; give finite x, y, width >= 0, height >= 0")
    else:
        if results.masks is None:
            raise ValueError("result 0 has no segmentation; segm evaluation needs it in every result")
        masks = _checked_masks(results, ground_truth, image)
    return DetectionTable(image, category, np.asarray(results.scores, np.float64), boxes, masks)


def _refuse(bad: np.ndarray, message: Callable[[int], str]) -> None:
    for number in np.flatnonzero(bad)[:1]:
        raise ValueError(f"result {number} {message(number)}")


def _table_of_list(results: Any, key: str, iou_type: str) -> DetectionTable:
    if isinstance(results, Mapping) or not isinstance(results, Sequence):
        raise ValueError(f"results must be a list of detections, got {type(results).__name__}")
    try:
        return _columns_of_list(results, key)
    except (TypeError, ValueError, KeyError, OverflowError, AttributeError):
        for number, result in enumerate(results):
            _refuse_row(result, number, key, iou_type)
        raise


def _columns_of_list(results: Sequence[Mapping[str, Any]], key: str) -> DetectionTable:
    columns = {field: [result[field] for result in results] for field in ("image_id", "category_id", "score", key)}
    boxes = None
    if key == "bbox":
        if any(len(box) != 4 for box in columns[key]):
            raise ValueError("a box has not four values")
        flat = np.fromiter((value for box in columns[key] for value in box), np.float64, 4 * len(results))
        boxes = flat.reshape(-1, 4)
    return DetectionTable(
        np.asarray(columns["image_id"], np.int64).reshape(len(results)),
        np.asarray(columns["category_id"], np.int64).reshape(len(results)),
        np.asarray(columns["score"], np.float64).reshape(len(results)),
        boxes,
        columns[key] if key == "segmentation" else None,
    )


def _refuse_row(result: Any, number: int, key: str, iou_type: str) -> None:
    """Say what is wrong with the row that `_columns_of_list` cannot read, if it is this one."""
    if not isinstance(result, Mapping):
        raise ValueError(f"result {number} is a {type(result).__name__}, not a detection with its fields")
    for field in ("image_id", "category_id", "score", key):
        if field not in result:
            raise ValueError(f"result {number} has no {field}; {iou_type} evaluation needs it in every result")
    if key == "bbox" and (not hasattr(result[key], "__len__") or len(result[key]) != 4):
        raise ValueError(f"result {number} has bbox {result[key]!r:.60}; give x, y, width and height")
    try:
        _columns_of_list([result], key)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"result {number} has a value that is no number in its range ({error})") from error


def _checked_masks(
    results: DetectionTable, ground_truth: GroundTruth, image: np.ndarray
) -> Sequence[Mapping[str, Any]]:
    if isinstance(results.masks, PackedMasks):  # this project encoded them itself: only their sizes may be wrong
        stated = results.masks.sizes[results.masks.picture]
        wrong = (stated != np.asarray(ground_truth.sizes, np.int64)[image]).any(axis=1)
        _refuse(wrong, lambda n: _wrong_size(stated[n].tolist(), results.image_ids[n], ground_truth.sizes[image[n]]))
        return results.masks
    for number, mask in enumerate(results.masks):
        if not isinstance(mask, Mapping) or "counts" not in mask:
            raise ValueError(f"result {number} has a segmentation that is not run lengths; encode its mask")
        size = ground_truth.sizes[image[number]]
        if not isinstance(mask.get("size"), (list, tuple)):
            raise ValueError(f"result {number} has a mask without its size (height, width); encode it again")
        if tuple(mask["size"]) != size:
            raise ValueError(f"result {number} {_wrong_size(mask['size'], results.image_ids[number], size)}")
        check_mask(mask, size, f"result {number}")
    return [run_lengths(mask, tuple(mask["size"])) for mask in results.masks]


def _wrong_size(stated: Sequence[Any], image_id: int, size: tuple[int | None, int | None]) -> str:
    return (
        f"has a mask of size {tuple(stated)}, but image {image_id} has {size} (height, width); "
        "resize masks to the original picture"
    )
