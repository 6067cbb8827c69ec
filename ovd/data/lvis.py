"""Read LVIS annotation files (the real ones and the miniature's) and hand them to Detectron2.

Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation" (2019), section 3 for the federated fields.
Novel classes are LVIS frequency "r", base classes "f" and "c", as in ViLD (Gu et al., 2022, section 4). Detectron2's
own loader is not used because it only takes polygons. Evaluation is in `ovd.evaluation`.
"""

import functools
import logging
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ovd.data.annotation_check import check_structure
from pretrain.parsing import parse_json

logger = logging.getLogger(__name__)

_BOX_TOLERANCE = 2.0  # pixels; LVIS itself rounds boxes to 0.01 px and has polygons a little over the border


def import_lvis() -> ModuleType:
    """Import the `lvis` package, giving numpy back the alias `np.float` that its 0.5.3 release still uses."""
    if not hasattr(np, "float"):
        np.float = float  # type: ignore[attr-defined]
    import lvis

    return lvis


def normalise_name(name: str, keep_qualifier: bool = False) -> str:
    """Bring a category name into comparable form: lower case, `_` as space, `_(qualifier)` dropped or kept as words."""
    text = name.lower().replace("_", " ")
    text = re.sub(r"[()]", " ", text) if keep_qualifier else re.sub(r"\([^)]*\)", " ", text)
    return " ".join(text.split())


def read_ground_truth(path: str | Path, drop_empty_boxes: bool = False) -> dict[str, Any]:
    """Read and check an LVIS (or COCO) annotation file.

    Args:
        path: JSON file with `images`, `annotations`, `categories`.
        drop_empty_boxes: leave out annotations without width or height, with a warning that counts them (COCO's own
            training file has some), in place of an error.

    Returns:
        The parsed file, otherwise unchanged.

    Raises:
        FileNotFoundError: no such file; the message says which command makes it.
        ValueError: not JSON, a missing list, no annotation, a category without a name, an id used twice or unknown,
            a box that is empty or lies outside its picture.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"annotation file {path} does not exist: {_origin(path.name)}")
    try:
        ground_truth = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch or make it again") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(ground_truth, dict) or not isinstance(ground_truth.get(key), list):
            raise ValueError(f"{path} has no list {key!r}: it is not an LVIS or COCO annotation file")
    check_structure(ground_truth, str(path))
    if drop_empty_boxes:
        _drop_empty_boxes(path, ground_truth)
    if not ground_truth["annotations"]:
        raise ValueError(f"{path} has no annotation: a file without a single box can neither train nor be evaluated")
    _check_categories(path, ground_truth["categories"])
    _check_annotations(path, ground_truth)
    return ground_truth


def _origin(name: str) -> str:
    """Where an annotation file that is not there would come from."""
    if name.startswith("lvis_v1_"):
        return (
            "download LVIS v1 and run python tools/prepare_data.py lvis; if its files lie elsewhere, give their paths"
        )
    commands = {"mini_lvis_": "mini", "ovcoco_": "coco"}
    made_by = next((command for start, command in commands.items() if name.startswith(start)), None)
    if made_by:
        return f"python tools/prepare_data.py {made_by} makes it"
    return "give the path of an LVIS or COCO annotation file"


def _drop_empty_boxes(path: Path, ground_truth: dict) -> None:
    kept = [a for a in ground_truth["annotations"] if not (len(a.get("bbox") or ()) == 4 and min(a["bbox"][2:]) <= 0)]
    if dropped := len(ground_truth["annotations"]) - len(kept):
        logger.warning("%s: %d annotations whose box has no width or no height are left out", path, dropped)
    ground_truth["annotations"] = kept


def _check_categories(path: Path, categories: list[dict]) -> None:
    seen: set[int] = set()
    for category in categories:
        if "id" not in category:
            raise ValueError(f"{path}: category {category} has no id")
        if not str(category.get("name") or "").strip():
            raise ValueError(f"{path}: category {category['id']} has no name; every class needs one to be embedded")
        if category["id"] in seen:
            raise ValueError(f"{path}: category id {category['id']} is used twice")
        seen.add(category["id"])


def _check_annotations(path: Path, ground_truth: dict) -> None:
    category_ids = {c["id"] for c in ground_truth["categories"]}
    images = {i["id"]: i for i in ground_truth["images"]}
    if len(images) != len(ground_truth["images"]):
        raise ValueError(f"{path}: an image id is used twice")
    seen: set[int] = set()
    for a in ground_truth["annotations"]:
        where = f"{path}: annotation {a.get('id')}"
        if "id" not in a:
            raise ValueError(f"{where} has no id; give each annotation its own")
        if a["id"] in seen:
            raise ValueError(f"{where} exists twice; ids must be unique")
        seen.add(a["id"])
        if a.get("category_id") not in category_ids:
            raise ValueError(f"{where} has category {a.get('category_id')}, which the file does not list")
        if a.get("image_id") not in images:
            raise ValueError(f"{where} belongs to image {a.get('image_id')}, which the file does not list")
        if not isinstance(a.get("bbox"), list) or len(a["bbox"]) != 4:
            raise ValueError(f"{where} has no box [x, y, width, height]")
        image = images[a["image_id"]]
        if image.get("width") is None:
            raise ValueError(f"{path}: image {image['id']} has no width and height; add them, in pixels")
        x, y, w, h = a["bbox"]
        if w <= 0 or h <= 0:
            raise ValueError(f"{where} has an empty box {a['bbox']}")
        low, right, bottom = -_BOX_TOLERANCE, image["width"] + _BOX_TOLERANCE, image["height"] + _BOX_TOLERANCE
        if x < low or y < low or x + w > right or y + h > bottom:
            raise ValueError(
                f"{where} has box {a['bbox']} outside its picture of {image['width']} x {image['height']} pixels; "
                "boxes are x, y, width, height in pixels"
            )


def base_novel_split(categories: list[dict]) -> tuple[list[dict], list[dict]]:
    """Split categories into (base, novel) by LVIS frequency: "f" and "c" are base, "r" is novel.

    Raises:
        ValueError: a category without one of the three letters.
    """
    for category in categories:
        if category.get("frequency") not in ("f", "c", "r"):
            raise ValueError(
                f"category {category.get('name')!r} has frequency {category.get('frequency')!r}; "
                "LVIS gives f, c or r, which decides what is base and what is novel"
            )
    base = [c for c in categories if c["frequency"] != "r"]
    return base, [c for c in categories if c["frequency"] == "r"]


def filter_to_base(ground_truth: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """Remove every trace of the novel classes from an annotation file.

    Categories, annotations, and the ids in `neg_category_ids` and `not_exhaustive_category_ids` go: rare ids left in
    these lists would tell a federated loss which pictures lack which novel class. Pictures stay, even when empty.

    Returns:
        (filtered copy, report), the report counting what was removed and what stayed.
    """
    base, novel = base_novel_split(ground_truth["categories"])
    novel_ids = {c["id"] for c in novel}
    report = {"removed_neg_category_ids": 0, "removed_not_exhaustive_category_ids": 0}
    images = []
    for image in ground_truth["images"]:
        image = dict(image)
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            if key in image:
                kept = [i for i in image[key] if i not in novel_ids]
                report[f"removed_{key}"] += len(image[key]) - len(kept)
                image[key] = kept
        images.append(image)
    annotations = [a for a in ground_truth["annotations"] if a["category_id"] not in novel_ids]
    report |= {
        "removed_categories": len(novel),
        "removed_annotations": len(ground_truth["annotations"]) - len(annotations),
        "kept_categories": len(base),
        "kept_annotations": len(annotations),
    }
    return {**ground_truth, "categories": base, "annotations": annotations, "images": images}, report


def picture_path(image: dict, image_root: Path) -> str:
    """Where an image entry's picture lies: by `file_name`, or by the last two parts of `coco_url`."""
    if image.get("file_name"):
        return str(image_root / image["file_name"])
    if image.get("coco_url"):  # LVIS v1: …/train2017/000000155379.jpg
        return str(image_root.joinpath(*image["coco_url"].split("/")[-2:]))
    raise ValueError(f"image {image.get('id')} has neither file_name nor coco_url")


def load_lvis(json_path: str | Path, image_root: str | Path) -> tuple[list[dict], dict[str, Any]]:
    """Load an annotation file as Detectron2 dataset dicts.

    Args:
        json_path: see `read_ground_truth`.
        image_root: folder the pictures' names are relative to.

    Returns:
        dataset dicts, by image id (boxes XYWH_ABS in pixels, `category_id` contiguous, `segmentation` as in the file,
        federated lists as LVIS ids, `verified_classes` the contiguous classes known to be in the picture or not), and
        metadata: `thing_classes`, `thing_dataset_id_to_contiguous_id`, `class_image_count` (Detectron2's federated loss
        reads it), `frequencies`, `is_base`, `synonyms`, `json_file`, `image_root`, `evaluator_type`. Class i is the
        i-th category by id.
    """
    ground_truth, image_root = read_ground_truth(json_path), Path(image_root)
    categories = sorted(ground_truth["categories"], key=lambda c: c["id"])
    index = {c["id"]: i for i, c in enumerate(categories)}
    by_image: dict[int, list[dict]] = {i["id"]: [] for i in ground_truth["images"]}
    for a in ground_truth["annotations"]:
        entry = {"bbox": a["bbox"], "bbox_mode": BoxMode.XYWH_ABS, "category_id": index[a["category_id"]]}
        entry["id"], entry["iscrowd"] = a["id"], int(a.get("iscrowd", 0))
        if a.get("segmentation"):
            entry["segmentation"] = a["segmentation"]
        by_image[a["image_id"]].append(entry)
    records = [
        {
            "file_name": picture_path(image, image_root),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "neg_category_ids": image.get("neg_category_ids", []),
            "not_exhaustive_category_ids": image.get("not_exhaustive_category_ids", []),
            "verified_classes": _verified(image, by_image[image["id"]], index),
            "annotations": by_image[image["id"]],
        }
        | ({"source": image["source"]} if "source" in image else {})
        for image in sorted(ground_truth["images"], key=lambda i: i["id"])
    ]
    counts: dict[int, int] = dict.fromkeys(index, 0)
    for category_id, _ in {(a["category_id"], a["image_id"]) for a in ground_truth["annotations"]}:
        counts[category_id] += 1
    metadata = {
        "thing_classes": [c["name"] for c in categories],
        "thing_dataset_id_to_contiguous_id": index,
        "class_image_count": [{"id": c["id"], "image_count": counts[c["id"]]} for c in categories],
        "frequencies": [c.get("frequency", "f") for c in categories],
        "is_base": [c.get("frequency", "f") != "r" for c in categories],
        "synonyms": [c.get("synonyms", [c["name"]]) for c in categories],
        "json_file": str(json_path),
        "image_root": str(image_root),
        "evaluator_type": "lvis",
    }
    return records, metadata


def _verified(image: dict, annotations: list[dict], index: dict[int, int]) -> list[int]:
    """Contiguous classes of which a picture has no instance without a label; of any other class a region may be one."""
    absent = {index[i] for i in image.get("neg_category_ids", ()) if i in index}
    incomplete = {index[i] for i in image.get("not_exhaustive_category_ids", ()) if i in index}
    return sorted((absent | {a["category_id"] for a in annotations}) - incomplete)


@functools.lru_cache(maxsize=8)
def _load_once(json_path: str, image_root: str) -> tuple[list[dict], dict[str, Any]]:
    return load_lvis(json_path, image_root)


def _records(json_path: str, image_root: str) -> list[dict]:
    return _load_once(json_path, image_root)[0]


def register_lvis(name: str, json_path: str | Path, image_root: str | Path) -> None:
    """Make an annotation file known to Detectron2 under a name; doing so again with the same file changes nothing.

    Raises:
        ValueError: the name already stands for another file.
    """
    json_path, image_root = str(json_path), str(image_root)
    if name in DatasetCatalog.list():
        known = getattr(MetadataCatalog.get(name), "json_file", None)
        if known == json_path:
            return
        raise ValueError(f"data set {name!r} is already registered for {known}: choose another name for {json_path}")
    _, metadata = _load_once(json_path, image_root)
    DatasetCatalog.register(name, functools.partial(_records, json_path, image_root))
    MetadataCatalog.get(name).set(**metadata)
