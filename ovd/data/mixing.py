"""Several annotation files as one to train on: a user's own boxes, mixed with the set that a detector came from.

Classes that read the same become one. Replaying a part of the old data is the oldest remedy against forgetting it
(Robins, "Catastrophic Forgetting, Rehearsal and Pseudorehearsal", 1995). What is trained on them is in
`ovd/engine/finetune.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovd.data.custom import with_split
from ovd.data.lvis import normalise_name, picture_path, read_ground_truth

_LISTS = ("neg_category_ids", "not_exhaustive_category_ids")


@dataclass(frozen=True)
class Source:
    """An annotation file, COCO or LVIS, and the folder of its pictures."""

    annotations: str | Path
    image_root: str | Path


def read_with_split(path: str | Path) -> dict[str, Any]:
    """Read an annotation file; one without LVIS's frequencies gets them, all its classes base."""
    content = read_ground_truth(path)
    return content if all("frequency" in c for c in content["categories"]) else with_split(content)


def merge(sources: Sequence[Source], more_words: Sequence[str] = ()) -> dict[str, Any]:
    """Join annotation files: classes by name, new ids, absolute file names.

    Args:
        sources: at least one; a class's description is that of the first file that has it.
        more_words: further classes without annotations, which then are absent from every picture.

    Returns:
        An annotation file's content; each image also has "source", the place of its file in `sources`.
    """
    categories: dict[str, dict[str, Any]] = {}
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    for place, source in enumerate(sources):
        own = read_with_split(source.annotations)
        ids = {c["id"]: _known(categories, c) for c in sorted(own["categories"], key=lambda c: c["id"])}
        images = {}
        for image in own["images"]:
            images[image["id"]] = len(content["images"]) + 1
            lists = {key: sorted(ids[i] for i in image.get(key, ()) if i in ids) for key in _LISTS}
            path = str(Path(picture_path(image, Path(source.image_root))).resolve())
            content["images"].append({**image, **lists, "id": images[image["id"]], "file_name": path, "source": place})
        for a in own["annotations"]:
            number = len(content["annotations"]) + 1
            moved = {"id": number, "image_id": images[a["image_id"]], "category_id": ids[a["category_id"]]}
            content["annotations"].append({**a, **moved})
    for word in more_words:
        _known(categories, {"name": word, "synonyms": [word], "frequency": "f"})
    content["categories"] = list(categories.values())
    return content


def _known(categories: dict[str, dict[str, Any]], category: dict[str, Any]) -> int:
    """The id of a category among those collected, after adding it where its name is new."""
    key = normalise_name(category["name"], keep_qualifier=True)
    return categories.setdefault(key, {**category, "id": len(categories) + 1})["id"]


def repeat_factors(places: Sequence[int], shares: Sequence[float]) -> np.ndarray:
    """How often to show each picture, so that the sources get their shares; the least shown once.

    Args:
        places: (N,) source of each picture.
        shares: of each source, in any unit.
    """
    places, shares = np.asarray(places), np.asarray(shares, float)
    if len(places) == 0 or places.max() >= len(shares):
        raise ValueError(f"{len(shares)} shares for pictures of {len(set(places.tolist()))} sources; give one for each")
    factors = (shares / np.bincount(places, minlength=len(shares)).clip(1))[places]
    return factors / factors.min()
