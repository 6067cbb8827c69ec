"""Check a user's own download of LVIS v1 and make the base-only training file from it. Nothing is fetched here."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ovd.data.leak_check import check_leaks
from ovd.data.lvis import base_novel_split, filter_to_base, read_ground_truth
from ovd.data.picture_check import check_pictures
from pretrain.atomic import write_atomically

TRAIN, VAL, TRAIN_BASE = "lvis_v1_train.json", "lvis_v1_val.json", "lvis_v1_train_base.json"
REPORT = "lvis_v1_report.json"
CATEGORIES, BASE, RARE = 1203, 866, 337
# (pictures, annotations) of the released files; training annotations are also the sum over LVIS's own category list.
EXPECTED = {TRAIN: (100_170, 1_270_141), VAL: (19_809, 244_707)}
_PLACES = ("", "annotations", "lvis", "lvis_v1", "annotations/lvis")


def prepare_lvis(root: str | Path, image_root: str | Path | None = None, sample: int = 200) -> dict[str, Any]:
    """Check the annotation files and pictures, write the base-only training file beside them.

    Args:
        root: folder with lvis_v1_train.json and lvis_v1_val.json, or with one of these in annotations/ or lvis/.
        image_root: folder that holds train2017/ and val2017/; None: `root`.
        sample: pictures of each file to open.

    Returns:
        The report that is also written as lvis_v1_report.json: for each file its path, counts, pictures missing, and
        `notes` where the counts differ from the release's; for training the path and counts of the base-only file.

    Raises:
        FileNotFoundError: an annotation file is missing.
        ValueError: a file is damaged or not LVIS v1, or novel classes are left after filtering.
    """
    root = Path(root)
    image_root = root if image_root is None else Path(image_root)
    report: dict[str, Any] = {}
    for name in (VAL, TRAIN):
        path = _find(root, name)
        ground_truth = read_ground_truth(path, drop_empty_boxes=name == TRAIN)
        report[name] = _describe(path, ground_truth) | asdict(check_pictures(ground_truth, image_root, sample))
        if name == TRAIN:
            report[TRAIN_BASE] = _write_base(path.with_name(TRAIN_BASE), ground_truth)
        del ground_truth  # the training file takes gigabytes
    write_atomically(_find(root, TRAIN).with_name(REPORT), json.dumps(report, indent=1) + "\n")
    return report


def _find(root: Path, name: str) -> Path:
    for place in _PLACES:
        if (root / place / name).is_file():
            return root / place / name
    raise FileNotFoundError(
        f"{root} holds no {name}, nor does a folder annotations/ or lvis/ in it: unpack LVIS v1's annotations there"
    )


def _describe(path: Path, ground_truth: dict[str, Any]) -> dict[str, Any]:
    """Counts of one file; it must have LVIS v1's classes."""
    from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

    base, rare = base_novel_split(ground_truth["categories"])
    released = {c["id"]: (c["name"], c["frequency"]) for c in LVIS_CATEGORIES}
    different = [c["name"] for c in base + rare if released.get(c["id"]) != (c["name"], c["frequency"])]
    if (len(base), len(rare)) != (BASE, RARE) or different:
        example = f"; {different[0]!r} has another id or frequency" if different else ""
        raise ValueError(
            f"{path} has {len(base) + len(rare)} categories, {len(base)} base and {len(rare)} rare{example}; LVIS v1 "
            f"has {CATEGORIES}, {BASE} and {RARE}: use the v1 files (v0.5 and subsets are other benchmarks)"
        )
    counts = {"images": len(ground_truth["images"]), "annotations": len(ground_truth["annotations"])}
    notes = [
        f"{found:,} {what}, the released file has {expected:,}"
        for (what, found), expected in zip(counts.items(), EXPECTED[path.name], strict=True)
        if found != expected
    ]
    return {"path": str(path), "base": len(base), "rare": len(rare), **counts, "notes": notes}


def _write_base(path: Path, ground_truth: dict[str, Any]) -> dict[str, Any]:
    """Filter, prove that nothing novel is left, write."""
    filtered, report = filter_to_base(ground_truth)
    novel = base_novel_split(ground_truth["categories"])[1]
    check_leaks(filtered, novel, [c["name"] for c in filtered["categories"]]).raise_if_leaking()
    write_atomically(path, json.dumps(filtered))
    return {"path": str(path), **report}


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report for a terminal."""
    lines = []
    for name in (TRAIN, VAL):
        part = report[name]
        lines.append(
            f"{name}: {part['base'] + part['rare']:,} categories ({part['base']} base, {part['rare']} rare), "
            f"{part['images']:,} pictures, {part['annotations']:,} annotations"
        )
        lines += [f"  note: {note}" for note in part["notes"]]
        if part["missing"]:
            lines.append(f"  missing: {len(part['missing']):,} pictures, the first is {part['missing'][0]}")
        lines.append(f"  sizes: {part['sampled'] - len(part['unusable'])} of {part['sampled']} opened fit")
        lines += [f"  {path}: {reason}" for path, reason in list(part["unusable"].items())[:5]]
    base = report[TRAIN_BASE]
    removed = ", ".join(
        f"{base[f'removed_{what}']:,} {words}"
        for what, words in (
            ("categories", "rare categories"),
            ("annotations", "annotations"),
            ("neg_category_ids", "ids in neg_category_ids"),
            ("not_exhaustive_category_ids", "ids in not_exhaustive_category_ids"),
        )
    )
    lines.append(f"{base['path']}: {base['kept_annotations']:,} annotations kept; removed: {removed}")
    return lines
