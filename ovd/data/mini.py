"""Compose the miniature's detection half: scenes with LVIS annotations, made of the drawings listed in `pairs.csv`.

Classes are the LVIS v1 categories whose name, or else a synonym of theirs alone, is exactly a drawing's label. Train
scenes hold base classes drawn by the train vendors; validation and test scenes hold base and novel classes, each drawn
by a vendor never seen in training.
Result, below the root: `scenes/<split>/000001.jpg`, `mini_lvis_<split>.json` (file names relative to the root),
`backgrounds/`, `novel_words.txt`, `scenes_contact_sheet.png`, `scenes/manifest.json`. The drawings themselves are made
by `pretrain.data.mini`.
"""

import csv
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ovd.data.backgrounds import background_licences, write_backgrounds
from ovd.data.lvis import base_novel_split, filter_to_base, normalise_name
from ovd.data.scenes import LONG_SIDE, MAX_ANGLE, SCENE_SIZE, SceneSpec, write_chunk
from pretrain.atomic import replacing, write_atomically

__all__ = ["SPLITS", "annotation_path", "background_licences", "build_scenes", "match_categories", "novel_words"]

SPLITS = ("train", "val", "test")
FORMAT = 2  # counts up when the same parameters would give other scenes
OBJECTS = (2, 6)  # per scene
NEGATIVES = (10, 20)  # absent classes named per scene, as in LVIS's federated annotation
_CHUNK = 50  # scenes between two points an interrupted build resumes from

# Names that read the same while the drawing shows something else than LVIS's definition.
HOMONYMS = {
    "mouse_(computer_equipment)": "the drawing is the animal",
    "turkey_(food)": "the drawing is the living bird",
    "octopus_(food)": "the drawing is the animal, which LVIS lists as octopus_(animal)",
    "squid_(food)": "the drawing is the animal",
    "fish_(food)": "the drawing is the animal, which LVIS lists as fish",
    "necktie": "the drawing is mostly a shirt",
    "sparkler_(fireworks)": "the drawing is a night sky, at some vendors a framed one",
}
# The same for synonyms: LVIS lists them as other names, the drawing does not show the category.
FALSE_SYNONYMS = {"placard": "a blank board on a stick, which LVIS would not box as a poster"}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class MiniCategory:
    """A category of the miniature: its LVIS entry, LVIS picture count, and drawings (paths below the root) by split."""

    lvis: dict[str, Any]
    lvis_images: int
    drawings: dict[str, tuple[str, ...]]

    @property
    def is_novel(self) -> bool:
        """True for LVIS frequency "r"."""
        return self.lvis["frequency"] == "r"


def annotation_path(root: str | Path, split: str) -> Path:
    """Path of a split's LVIS file below the miniature's root."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    return Path(root) / f"mini_lvis_{split}.json"


def _label_of(categories: list[dict], labels: set[str]) -> dict[int, str]:
    """The drawing label of each category id: its name, else a synonym that no other category claims."""
    names = {normalise_name(c["name"]) for c in categories}
    owners: dict[str, set[int]] = {}
    for category in categories:
        for synonym in category["synonyms"]:
            owners.setdefault(normalise_name(synonym), set()).add(category["id"])
    label_of = {}
    for category in categories:
        # A homonym is wrong by its name; a synonym ("computer mouse") may still be right.
        name = normalise_name(category["name"])
        candidates = [] if category["name"] in HOMONYMS else [name]
        candidates += [
            s
            for s in map(normalise_name, category["synonyms"])
            if s not in names | FALSE_SYNONYMS.keys() and owners[s] == {category["id"]}
        ]
        found = next((c for c in candidates if c in labels), None)
        if found:
            label_of[category["id"]] = found
    return label_of


def match_categories(
    rows: list[dict[str, str]], categories: list[dict], image_counts: dict[int, int]
) -> list[MiniCategory]:
    """Match drawings to LVIS categories by exact normalised name, else by exact unambiguous synonym.

    A category needs two or more train drawings and a test drawing usable as cut-outs. `HOMONYMS` are left out.

    Args:
        rows: lines of `pairs.csv`.
        categories: LVIS categories (`id`, `name`, `synonyms`, `def`, `synset`, `frequency`).
        image_counts: LVIS's number of train pictures by category id.

    Raises:
        ValueError: two categories claim the same label; one of them belongs into `HOMONYMS`.
    """
    drawings: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row["cutout"] == "1":
            by_split = drawings.setdefault(normalise_name(row["label"]), {s: [] for s in SPLITS})
            by_split[row["split"]].append(row["image"])
    usable = {label: found for label, found in drawings.items() if len(found["train"]) >= 2 and found["test"]}
    label_of = _label_of(categories, set(usable))
    matched, claimed = [], {}
    for category in sorted(categories, key=lambda c: c["id"]):
        label = label_of.get(category["id"])
        if label is None:
            continue
        other = claimed.setdefault(label, category["name"])
        if other != category["name"]:
            raise ValueError(f"{other} and {category['name']} both match one drawing: add the wrong one to HOMONYMS")
        by_split = {split: tuple(sorted(paths)) for split, paths in usable[label].items()}
        matched.append(MiniCategory(category, image_counts.get(category["id"], 0), by_split))
    return matched


def read_categories(root: Path) -> list[MiniCategory]:
    """Match the drawings below root to the LVIS v1 categories.

    Raises:
        FileNotFoundError: `pairs.csv` is missing.
        ValueError: nothing matches.
    """
    from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
    from detectron2.data.datasets.lvis_v1_category_image_count import LVIS_CATEGORY_IMAGE_COUNT

    table = root / "pairs.csv"
    if not table.is_file():
        raise FileNotFoundError(f"{table} does not exist: python tools/prepare_data.py makes drawings and list")
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    matched = match_categories(rows, LVIS_CATEGORIES, {c["id"]: c["image_count"] for c in LVIS_CATEGORY_IMAGE_COUNT})
    if not any(not c.is_novel for c in matched):
        raise ValueError(f"no drawing of {table} matches a base category of LVIS: make the drawings again")
    return matched


def novel_words(categories: list[MiniCategory]) -> list[str]:
    """Names and synonyms of the novel classes, normalised, without words that are also a base class's name."""
    base = {normalise_name(c.lvis["name"]) for c in categories if not c.is_novel}
    words = {normalise_name(w) for c in categories if c.is_novel for w in (c.lvis["name"], *c.lvis["synonyms"])}
    return sorted(words - base)


def class_shares(categories: list[MiniCategory], split: str) -> np.ndarray:
    """Share of the objects each category gets, float (C,), sums to 1.

    Train: by rank r of the LVIS picture count within a frequency letter of n classes, 1 / (r + n / 3), the letters
    scaled to a mean of 10 : 1 between "f" and "c" (LVIS: above and below 100 pictures). The shift keeps the rarest
    class of a letter at a quarter of the commonest instead of 1/n. Elsewhere: equal, novel classes twice, since APr
    rests on few classes.
    """
    letters = np.array([c.lvis["frequency"] for c in categories])
    if split != "train":
        shares = np.where(letters == "r", 2.0, 1.0)
        return shares / shares.sum()
    shares = np.zeros(len(categories))
    counts = np.array([c.lvis_images for c in categories])
    for letter, mean in (("f", 10.0), ("c", 1.0)):
        members = np.flatnonzero(letters == letter)
        if len(members):
            order = members[np.argsort(-counts[members], kind="stable")]
            law = 1 / (np.arange(1, len(members) + 1) + len(members) / 3)
            shares[order] = mean * law / law.mean()
    return shares / shares.sum()


def _deal(shares: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """Deal `total` class indices in random order, each class within one of its share (largest remainders)."""
    exact = shares * total
    counts = np.floor(exact).astype(int)
    counts[np.argsort(-(exact - counts), kind="stable")[: total - counts.sum()]] += 1
    return rng.permutation(np.repeat(np.arange(len(shares)), counts))


def plan_scenes(
    categories: list[MiniCategory], split: str, count: int, seed: int, photos: list[str]
) -> tuple[list[MiniCategory], list[SceneSpec]]:
    """Decide the objects of every scene of a split.

    Returns:
        the categories of the split (train: base only; else those its vendor draws) and one specification a scene.
    """
    usable = [c for c in categories if c.drawings[split] and not (split == "train" and c.is_novel)]
    if not usable:
        raise ValueError(f"no category has a drawing for the {split} scenes: make the drawings again")
    rng = np.random.default_rng((seed, SPLITS.index(split)))
    sizes = rng.integers(OBJECTS[0], OBJECTS[1] + 1, count)
    dealt = iter(_deal(class_shares(usable, split), int(sizes.sum()), rng))
    specs = []
    for i, size in enumerate(sizes):
        objects = []
        for _ in range(size):
            category = usable[next(dealt)]
            choices = category.drawings[split]
            objects.append((category.lvis["id"], choices[rng.integers(len(choices))]))
        specs.append(SceneSpec(i + 1, (seed, SPLITS.index(split), i), tuple(objects), tuple(photos)))
    return usable, specs


def _fingerprint(root: Path, split: str, count: int, seed: int, categories: list[MiniCategory], specs) -> str:
    """Hash of everything a split's scenes follow from: parameters, categories, plan, drawings and photographs."""
    digest = hashlib.sha256(repr((FORMAT, split, count, seed, SCENE_SIZE, LONG_SIDE, MAX_ANGLE, NEGATIVES)).encode())
    digest.update(json.dumps([c.lvis for c in categories], sort_keys=True).encode())
    digest.update(repr(specs).encode())
    for path in sorted({p for s in specs for _, p in s.objects} | {p for s in specs for p in s.photos}):
        digest.update(path.encode() + b"\0" + (root / path).read_bytes())
    return digest.hexdigest()


@contextmanager
def _mapper(workers: int) -> Iterator[Callable]:
    if workers <= 1:
        yield map
        return
    # spawn: a fork would copy the threads' locks of whatever library the caller has loaded
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield pool.map


def _compose_split(
    root: Path, split: str, key: str, specs: list[SceneSpec], workers: int, progress: Progress | None
) -> list[dict]:
    """Compose the scenes that are not there yet; returns one {"image", "annotations"} a scene, in order."""
    folder = root / "scenes" / split
    records = folder / f".records-{key[:16]}"
    if folder.exists() and not records.exists():
        annotation_path(root, split).unlink(missing_ok=True)  # made for other parameters, as are the scenes
        shutil.rmtree(folder)
    records.mkdir(parents=True, exist_ok=True)
    chunks = [specs[i : i + _CHUNK] for i in range(0, len(specs), _CHUNK)]
    paths = [records / f"{i:05d}.json" for i in range(len(chunks))]
    jobs = [(root, folder, p, c) for p, c in zip(paths, chunks, strict=True) if not _is_complete(folder, p, c)]
    done = len(specs) - sum(len(j[3]) for j in jobs)
    if progress:
        progress(split, done, len(specs))
    with _mapper(min(workers, len(jobs))) as run:
        for written in run(write_chunk, jobs):
            done += written
            if progress:
                progress(split, done, len(specs))
    return [scene for p in paths for scene in json.loads(p.read_text())]


def _is_complete(folder: Path, record: Path, specs: list[SceneSpec]) -> bool:
    return record.exists() and all((folder / s.file_name).exists() for s in specs)


def _lvis_file(split: str, categories: list[MiniCategory], scenes: list[dict], seed: int) -> dict[str, Any]:
    """Assemble an LVIS v1 file; absent classes are named as negatives, counts are those of this split."""
    rng = np.random.default_rng((seed, SPLITS.index(split), 1 << 20))
    ids = np.array([c.lvis["id"] for c in categories])
    images, annotations = [], []
    for scene in scenes:
        present = [a["category_id"] for a in scene["annotations"]]
        absent = np.setdiff1d(ids, present)
        wanted = min(int(rng.integers(NEGATIVES[0], NEGATIVES[1] + 1)), len(absent))
        image = dict(scene["image"], file_name=f"scenes/{split}/{scene['image']['id']:06d}.jpg")
        image["neg_category_ids"] = sorted(rng.choice(absent, wanted, replace=False).tolist())
        image["not_exhaustive_category_ids"] = []
        images.append(image)
        for a in scene["annotations"]:
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **a})
    instances = Counter(a["category_id"] for a in annotations)
    pictures = Counter(c for c, _ in {(a["category_id"], a["image_id"]) for a in annotations})
    listed = [
        {
            **{k: c.lvis[k] for k in ("id", "name", "synset", "synonyms", "def", "frequency")},
            "image_count": pictures[c.lvis["id"]],
            "instance_count": instances[c.lvis["id"]],
        }
        for c in categories
    ]
    info = {"description": f"composed scenes, {split} split", "version": f"mini {FORMAT}"}
    return {"info": info, "images": images, "annotations": annotations, "categories": listed, "licenses": []}


def _build_split(
    root: Path, split: str, count: int, seed: int, categories: list[MiniCategory], photos: list[str], known: dict, **how
) -> dict[str, Any]:
    usable, specs = plan_scenes(categories, split, count, seed, photos)
    key = _fingerprint(root, split, count, seed, usable, specs)
    target = annotation_path(root, split)
    complete = target.exists() and all((root / "scenes" / split / s.file_name).exists() for s in specs)
    if complete and known.get("fingerprint") == key:
        if hashlib.sha256(target.read_bytes()).hexdigest() == known.get("sha256"):
            if how["progress"]:
                how["progress"](split, count, count)
            return known
    content = _lvis_file(split, usable, _compose_split(root, split, key, specs, **how), seed)
    if split == "train" and filter_to_base(content)[0] != content:
        raise RuntimeError("the train scenes hold a novel class; this is a fault of plan_scenes")
    text = json.dumps(content) + "\n"
    write_atomically(target, text)
    base, novel = base_novel_split([c.lvis for c in usable])
    per_class = Counter(a["category_id"] for a in content["annotations"])
    return {
        "fingerprint": key,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "scenes": count,
        "annotations": len(content["annotations"]),
        "base_categories": len(base),
        "novel_categories": len(novel),
        "fewest_base_instances": min((per_class[c["id"]] for c in base), default=0),
        "fewest_novel_instances": min((per_class[c["id"]] for c in novel), default=0),
    }


def _contact_sheet(root: Path, split: str = "test", columns: int = 4, rows: int = 3) -> Image.Image:
    """A dozen scenes with their boxes and names."""
    content = json.loads(annotation_path(root, split).read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    novel = {c["id"] for c in content["categories"] if c["frequency"] == "r"}
    sheet = Image.new("RGB", (SCENE_SIZE * columns, SCENE_SIZE * rows), "white")
    for i, image in enumerate(content["images"][: columns * rows]):
        with Image.open(root / image["file_name"]) as opened:
            scene = opened.convert("RGB")
        pen = ImageDraw.Draw(scene)
        for a in content["annotations"]:
            if a["image_id"] == image["id"]:
                x, y, w, h = a["bbox"]
                colour = "#ff5030" if a["category_id"] in novel else "#30d060"
                pen.rectangle((x, y, x + w - 1, y + h - 1), outline=colour, width=2)
                text = pen.textbbox((x + 2, max(y - 11, 0)), names[a["category_id"]])
                pen.rectangle(text, fill="black")
                pen.text((x + 2, max(y - 11, 0)), names[a["category_id"]], fill=colour)
        sheet.paste(scene, (i % columns * SCENE_SIZE, i // columns * SCENE_SIZE))
    return sheet


def build_scenes(
    root: str | Path,
    seed: int = 0,
    train: int = 2400,
    val: int = 200,
    test: int = 400,
    workers: int = 2,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compose all scenes and write their LVIS files; what is already there for the same inputs is kept.

    The same seed and drawings give the same bytes, whatever the number of workers. An interrupted build goes on where
    it stopped. A change of a parameter or a drawing builds the split it concerns anew.

    Args:
        root: the miniature's folder, holding `pairs.csv` and `drawings/`.
        seed: random seed.
        train, val, test: number of scenes.
        workers: processes that compose.
        progress: called with (split, scenes done, scenes in all).

    Returns:
        The manifest, also written to `scenes/manifest.json`: seed, and per split counts, fingerprint of the inputs and
        SHA-256 of the LVIS file.

    Raises:
        FileNotFoundError: `pairs.csv` or a drawing is missing.
        ValueError: a number of scenes below 1, or no drawing matches LVIS.
    """
    root, counts = Path(root), {"train": train, "val": val, "test": test}
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"{split} scenes: {count} is below 1")
    categories = read_categories(root)
    photos = write_backgrounds(root)
    manifest_path = root / "scenes" / "manifest.json"
    known = json.loads(manifest_path.read_text()) if manifest_path.exists() else {}
    manifest: dict[str, Any] = {"format": FORMAT, "seed": seed, "splits": dict(known.get("splits", {}))}
    for split, count in counts.items():
        before = manifest["splits"].get(split, {})
        manifest["splits"][split] = _build_split(
            root, split, count, seed, categories, photos[split], before, workers=workers, progress=progress
        )
        write_atomically(manifest_path, json.dumps(manifest, indent=1) + "\n")
    write_atomically(root / "novel_words.txt", "\n".join(novel_words(categories)) + "\n")
    with replacing(root / "scenes_contact_sheet.png") as sheet:
        _contact_sheet(root).save(sheet, "PNG")
    return manifest
