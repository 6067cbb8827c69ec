"""Run a detector over picture files and write what it finds: one annotated PNG a picture and one COCO-style JSON file.

A file that cannot be read is reported and skipped; every file written is complete or absent. Command-line parsing is in
`tools/demo.py`, drawing in `ovd.visualization`.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ovd.data.images import ImageError, list_images, read_image
from ovd.detector import OpenVocabularyDetector
from ovd.visualization import distinct_colours, draw_detections, write_png_atomic
from pretrain.atomic import write_atomically

RESULTS = "detections.json"


@dataclass
class Summary:
    """What a run over pictures did: files written, detections in all, and (file, reason) of each picture left out."""

    results: Path
    pictures: list[Path] = field(default_factory=list)
    detections: int = 0
    failed: list[tuple[Path, str]] = field(default_factory=list)


def collect_images(paths: Iterable[str | Path]) -> list[Path]:
    """List the pictures of files and folders, each once, in the order given (folders sorted by name).

    Raises:
        ImageError: a path does not exist, or a folder holds no picture.
    """
    found = {}
    for path in paths:
        for image in list_images(path):
            found.setdefault(image.resolve(), image)
    return list(found.values())


def output_names(images: Sequence[Path]) -> list[str]:
    """Name the annotated pictures: `<stem>.png`, where two would share that `<stem>_<suffix>.png`, then numbered.

    The names differ without regard to case, since some file systems have none.
    """
    stems = [image.stem.casefold() for image in images]
    names: list[str] = []
    taken: set[str] = set()
    for image, stem in zip(images, stems, strict=True):
        suffix = image.suffix.lstrip(".")
        name = image.stem if stems.count(stem) == 1 or not suffix else f"{image.stem}_{suffix}"
        unique, number = name, 1
        while unique.casefold() in taken:
            number += 1
            unique = f"{name}_{number}"
        taken.add(unique.casefold())
        names.append(f"{unique}.png")
    return names


def detect_files(
    detector: OpenVocabularyDetector,
    images: Sequence[Path],
    output: str | Path,
    score_threshold: float = 0.3,
    max_detections: int = 100,
    on_error: Callable[[Path, str], None] | None = None,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> Summary:
    """Detect the detector's vocabulary in picture files.

    Writes `<output>/<name>.png` as it goes and `<output>/detections.json` at the end: `images` (id, file_name, width,
    height, annotated), `categories` (id from 1, name; in the order of the vocabulary), `annotations` (id, image_id,
    category_id, bbox x y width height in pixels of the upright picture, area, score, iscrowd 0 and, if there are
    masks, segmentation as compressed run lengths). Pictures without a detection are listed in `images`.

    Args:
        detector: with a vocabulary.
        images: picture files.
        output: folder; made when missing.
        score_threshold: lowest score to keep, in 0..1.
        max_detections: most detections to keep for a picture.
        on_error: called with a file and the reason when it is left out.
        progress: wraps the list for display (`tqdm`-like).

    Raises:
        ValueError: the detector has no vocabulary, or a picture would be overwritten by its annotated copy.
    """
    if detector.vocabulary is None:
        raise ValueError("the detector has no vocabulary yet; call set_vocabulary first")
    output, words = Path(output), detector.vocabulary.words
    summary = Summary(output / RESULTS)
    colours = distinct_colours(words)
    content: dict[str, list[dict]] = {
        "images": [],
        "categories": [{"id": i + 1, "name": word} for i, word in enumerate(words)],
        "annotations": [],
    }
    jobs = list(zip(images, output_names(images), strict=True))
    originals = {image.resolve() for image in images}
    for _, name in jobs:
        if (output / name).resolve() in originals:
            raise ValueError(
                f"{output / name} is one of the pictures and would be overwritten; give another output folder"
            )
    for path, name in progress(jobs) if progress else jobs:
        try:
            pixels = read_image(path)
        except ImageError as error:
            summary.failed.append((path, str(error)))
            if on_error:
                on_error(path, str(error))
            continue
        detections = detector.predict(pixels, score_threshold, max_detections)
        summary.pictures.append(write_png_atomic(output / name, draw_detections(pixels, detections, colours=colours)))
        height, width = detections.image_size
        image_id = len(content["images"]) + 1
        content["images"].append(
            {"id": image_id, "file_name": str(path), "width": width, "height": height, "annotated": name}
        )
        for found in detections.to_coco(image_id, category_ids=[c["id"] for c in content["categories"]]):
            w, h = found["bbox"][2:]
            number = len(content["annotations"]) + 1
            content["annotations"].append({"id": number, **found, "area": w * h, "iscrowd": 0})
    summary.detections = len(content["annotations"])
    write_atomically(summary.results, (json.dumps(content) + "\n").encode())
    return summary
