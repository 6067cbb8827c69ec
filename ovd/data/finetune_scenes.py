"""Scenes of a few rare classes of the miniature, to fine-tune on.

They are drawn by the train vendors, so that the validation and test scenes show the same classes by vendors never seen.
Composition is `scenes`'; the miniature itself is made by `mini`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ovd.data.mini import OBJECTS, read_categories
from ovd.data.scenes import SceneSpec, write_scene
from pretrain.atomic import write_atomically

ANNOTATIONS = "finetune.json"


def build_finetuning_scenes(
    root: str | Path, words: Sequence[str], count: int, folder: str | Path, seed: int = 0
) -> Path:
    """Compose scenes that hold the named classes and nothing else; what is there for the same arguments is kept.

    Args:
        root: the miniature's folder.
        words: LVIS names of categories of the miniature.
        count: scenes.
        folder: for the pictures and the annotation file; made when missing.

    Returns:
        The LVIS file, its file names relative to `folder`.

    Raises:
        ValueError: a word that the miniature does not draw, or no scene.
    """
    root, folder = Path(root), Path(folder)
    asked = {"words": list(words), "count": count, "seed": seed}
    path = folder / ANNOTATIONS
    if path.is_file() and json.loads(path.read_text()).get("info") == asked:
        return path
    known = {c.lvis["name"]: c for c in read_categories(root)}
    missing = [word for word in words if word not in known]
    if missing or not words or count < 1:
        raise ValueError(
            f"the miniature draws no {missing[0]!r}; words are LVIS names such as {', '.join(list(known)[:3])}"
            if missing
            else f"{count} scenes of {len(words)} words: give at least one of each"
        )
    chosen = [known[word] for word in words]
    photos = tuple(str(p.relative_to(root)) for p in sorted((root / "backgrounds" / "train").glob("*.jpg")))
    folder.mkdir(parents=True, exist_ok=True)
    content: dict = {"info": asked, "images": [], "annotations": [], "categories": [c.lvis for c in chosen]}
    ids = [c.lvis["id"] for c in chosen]
    for number in range(count):
        rng = np.random.default_rng((seed, 3, number))  # 0 to 2 are the miniature's own splits
        objects = []
        for place in rng.integers(len(chosen), size=rng.integers(OBJECTS[0], OBJECTS[1] + 1)):
            drawings = chosen[place].drawings["train"]
            objects.append((ids[place], drawings[rng.integers(len(drawings))]))
        scene = write_scene(SceneSpec(number + 1, (seed, 3, number), tuple(objects), photos), root, folder)
        present = {a["category_id"] for a in scene["annotations"]}
        lists = {"neg_category_ids": sorted(set(ids) - present), "not_exhaustive_category_ids": []}
        image = {**scene["image"], **lists, "file_name": f"{number + 1:06d}.jpg"}
        content["images"].append(image)
        for a in scene["annotations"]:
            content["annotations"].append({"id": len(content["annotations"]) + 1, "image_id": image["id"], **a})
    return write_atomically(path, json.dumps(content))
