"""OV-COCO: 48 base and 17 novel classes of COCO 2017, from a user's own download.

The split is that of Bansal et al., "Zero-Shot Object Detection" (2018), in the form of OVR-CNN (Zareian et al., 2021)
that later work uses: the 15 remaining classes of COCO are left out, and so are pictures without any object kept.
Measured by COCO's protocol, AP50 of novel and base classes together (`ovd.evaluation.coco_evaluator`).
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ovd.data.custom import drop_pictures_without_annotations, with_split
from ovd.data.leak_check import check_leaks
from ovd.data.lvis import base_novel_split, filter_to_base, read_ground_truth
from ovd.data.picture_check import check_pictures
from pretrain.atomic import write_atomically

# COCO's category ids, which have gaps.
BASE = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 7: "train", 8: "truck", 9: "boat", 15: "bench", 16: "bird",
    19: "horse", 20: "sheep", 23: "bear", 24: "zebra", 25: "giraffe", 27: "backpack", 31: "handbag", 33: "suitcase",
    34: "frisbee", 35: "skis", 38: "kite", 42: "surfboard", 44: "bottle", 48: "fork", 50: "spoon", 51: "bowl",
    52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot", 59: "pizza", 60: "donut",
    62: "chair", 65: "bed", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 78: "microwave",
    79: "oven", 80: "toaster", 82: "refrigerator", 84: "book", 85: "clock", 86: "vase", 90: "toothbrush",
}  # fmt: skip
NOVEL = {
    5: "airplane", 6: "bus", 17: "cat", 18: "dog", 21: "cow", 22: "elephant", 28: "umbrella", 32: "tie",
    36: "snowboard", 41: "skateboard", 47: "cup", 49: "knife", 61: "cake", 63: "couch", 76: "keyboard", 81: "sink",
    87: "scissors",
}  # fmt: skip
TRAIN_BASE, VAL, REPORT = "ovcoco_train_base.json", "ovcoco_val.json", "ovcoco_report.json"


def split_coco(ground_truth: dict[str, Any]) -> dict[str, Any]:
    """The 65 classes of OV-COCO with their annotations and pictures, base marked "f" and novel "r".

    Raises:
        ValueError: the file's classes are not COCO's.
    """
    names = {c["id"]: c["name"] for c in ground_truth["categories"]}
    for i, name in {**BASE, **NOVEL}.items():
        if names.get(i) != name:
            raise ValueError(
                f"category {i} is {names.get(i)!r} in the annotation file and {name!r} in COCO 2017: give "
                "instances_train2017.json and instances_val2017.json, or use the command for own data sets"
            )
    return drop_pictures_without_annotations(with_split(ground_truth, NOVEL.values(), BASE.values()))


def prepare_coco(root: str | Path, image_root: str | Path | None = None, sample: int = 200) -> dict[str, Any]:
    """Check the files and pictures of COCO 2017, write the base-only training file and the 65-class validation file.

    Args:
        root: folder with instances_train2017.json and instances_val2017.json, or with annotations/ that has them.
        image_root: folder with train2017/ and val2017/; None: `root`.
        sample: pictures of each file to open.

    Returns:
        The report that is also written as ovcoco_report.json.

    Raises:
        FileNotFoundError: an annotation file is missing.
        ValueError: a file is damaged or not COCO's.
    """
    root = Path(root)
    image_root = root if image_root is None else Path(image_root)
    parts = (("instances_val2017.json", "val2017"), ("instances_train2017.json", "train2017"))
    folder = next((f for f in (root / "annotations", root) if any((f / name).is_file() for name, _ in parts)), root)
    report = {}
    for name, part in parts:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{root} holds no annotations/{name}: download COCO 2017's annotations and unpack them there"
            )
        content = split_coco(read_ground_truth(folder / name, drop_empty_boxes=True))
        for image in content["images"]:  # COCO's names lack the folder
            image["file_name"] = f"{part}/{Path(image['file_name']).name}"
        target = folder / VAL
        if part == "train2017":
            base, novel = base_novel_split(content["categories"])
            content = drop_pictures_without_annotations(filter_to_base(content)[0])
            check_leaks(content, novel, [c["name"] for c in base]).raise_if_leaking()
            target = folder / TRAIN_BASE
        counts = {"images": len(content["images"]), "annotations": len(content["annotations"])}
        pictures = asdict(check_pictures(content, image_root, sample))
        report[target.name] = {"path": str(target), **counts, "categories": len(content["categories"]), **pictures}
        write_atomically(target, json.dumps(content))
    write_atomically(folder / REPORT, json.dumps(report, indent=1) + "\n")
    return report
