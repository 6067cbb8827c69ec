"""Any COCO-format data set: say which classes are base and which are novel, and get files that the detector can use.

Base and novel are written as LVIS frequencies ("f" and "r"), and a COCO file's promise that everything is labelled as
LVIS's lists of absent classes, so that training, leak check and evaluation need to know one format only.
"""

import difflib
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ovd.data.leak_check import check_leaks
from ovd.data.lvis import base_novel_split, filter_to_base, normalise_name, read_ground_truth
from ovd.data.picture_check import check_pictures
from pretrain.atomic import write_atomically


def with_split(
    ground_truth: dict[str, Any], novel: Iterable[str] = (), base: Iterable[str] | None = None
) -> dict[str, Any]:
    """Mark categories as base or novel, and state for every picture which classes are certainly absent.

    Args:
        ground_truth: parsed COCO file. LVIS fields that it has already are kept, but for the frequency.
        novel: names of the novel classes, in any case, with `_` or space.
        base: names of the base classes; classes in neither list are dropped with their annotations. None: all others.

    Returns:
        A new file content; pictures, annotations and categories are copies where they change.

    Raises:
        ValueError: a name that the file does not have (the nearest is named), or one in both lists, or no base class.
    """
    categories = ground_truth["categories"]
    novel_ids = _ids(categories, novel)
    base_ids = {c["id"] for c in categories} - novel_ids if base is None else _ids(categories, base)
    if both := [c["name"] for c in categories if c["id"] in novel_ids & base_ids]:
        raise ValueError(f"class {both[0]!r} is named as base and as novel: take it out of one list")
    if not base_ids:
        raise ValueError("no base class is left to train on: name fewer novel classes")
    ids = base_ids | novel_ids
    kept = [{**c, "frequency": "r" if c["id"] in novel_ids else "f"} for c in categories if c["id"] in ids]
    annotations, present = [], defaultdict(set)
    for a in ground_truth["annotations"]:
        if a["category_id"] in ids:
            annotations.append({"area": float(a["bbox"][2] * a["bbox"][3]), **a})
            present[a["image_id"]].add(a["category_id"])
    images = [
        {
            "neg_category_ids": sorted(ids - present[image["id"]]),
            "not_exhaustive_category_ids": [],
            **image,
        }
        for image in ground_truth["images"]
    ]
    return {**ground_truth, "images": images, "annotations": annotations, "categories": kept}


def _ids(categories: list[dict], names: Iterable[str]) -> set[int]:
    """Ids of the categories of these names."""
    known = {normalise_name(c["name"], keep_qualifier=True): c["id"] for c in categories}
    found = set()
    for name in names:
        key = normalise_name(name, keep_qualifier=True)
        if key not in known:
            near = difflib.get_close_matches(key, list(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(list(known)[:10])}"
            raise ValueError(f"the annotation file has no class {name!r}: {hint}")
        found.add(known[key])
    return found


def drop_pictures_without_annotations(ground_truth: dict[str, Any]) -> dict[str, Any]:
    """Keep the pictures that have an annotation left."""
    used = {a["image_id"] for a in ground_truth["annotations"]}
    return {**ground_truth, "images": [image for image in ground_truth["images"] if image["id"] in used]}


def prepare_custom(
    annotations: str | Path,
    image_root: str | Path,
    output: str | Path,
    novel: Iterable[str] = (),
    base: Iterable[str] | None = None,
    sample: int = 200,
) -> dict[str, Any]:
    """Check a COCO-format file with its pictures; write `train_base.json` (nothing novel) and `all.json` into a folder.

    Args:
        annotations: COCO file. Masks may be missing: train with `with_masks=False` and `mask_on=False` then.
        image_root: folder the pictures' names are relative to.
        output: folder for the two files and report.json; made when missing.
        novel, base: see `with_split`.
        sample: pictures to open.

    Returns:
        The report: paths, counts, whether every annotation has a mask.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see `read_ground_truth`, `with_split`; or pictures are missing or of another size.
    """
    output = Path(output)
    content = with_split(read_ground_truth(annotations), novel, base)
    check_pictures(content, image_root, sample).raise_if_bad(image_root)
    if not content["annotations"]:
        raise ValueError(f"{annotations} has no annotation of the classes named: nothing can be trained")
    train, _ = filter_to_base(content)
    if not train["annotations"]:
        raise ValueError(f"{annotations} has no annotation of a base class: name fewer novel classes")
    base_classes, novel_classes = base_novel_split(content["categories"])
    check_leaks(train, novel_classes, [c["name"] for c in base_classes]).raise_if_leaking()
    write_atomically(output / "train_base.json", json.dumps(train))
    write_atomically(output / "all.json", json.dumps(content))
    report = {
        "train": str(output / "train_base.json"), "all": str(output / "all.json"), "image_root": str(image_root),
        "pictures": len(content["images"]), "annotations": len(content["annotations"]),
        "base_annotations": len(train["annotations"]), "base": len(base_classes), "novel": len(novel_classes),
        "masks": all(a.get("segmentation") for a in content["annotations"]),
    }  # fmt: skip
    write_atomically(output / "report.json", json.dumps(report, indent=1) + "\n")
    return report
