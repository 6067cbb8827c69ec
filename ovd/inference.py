"""Run a detector over picture files and write what it finds: one annotated PNG a picture, and results in files.

A file that cannot be read is reported and skipped; every file written is complete or absent. Videos are in
`ovd/video.py`, formats in `ovd/results_writer.py`, the command line in `ovd/commands/demo.py`, drawing in
`ovd/visualization.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ovd.data.images import ImageError, list_images, read_image
from ovd.detector import OpenVocabularyDetector
from ovd.results_writer import Item, ResultsWriter
from ovd.visualization import distinct_colours, draw_detections, write_png_atomic


@dataclass
class Summary:
    """What a run over pictures did.

    Attributes:
        results: the JSON file, where one was asked for.
        pictures: drawings written.
        detections: in all.
        failed: (file, reason) of each picture left out.
        files: what was written in each format.
    """

    results: Path
    pictures: list[Path] = field(default_factory=list)
    detections: int = 0
    failed: list[tuple[Path, str]] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)


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
    score_threshold: float | None = None,
    max_detections: int = 100,
    on_error: Callable[[Path, str], None] | None = None,
    progress: Callable[[Iterable], Iterable] | None = None,
    formats: Sequence[str] = ("json",),
    batch_size: int = 1,
    **options: Any,
) -> Summary:
    """Detect the detector's vocabulary in picture files.

    Writes `<output>/<name>.png` as it goes, and the files of `ResultsWriter` in the formats asked for.

    Args:
        detector: with a vocabulary.
        images: picture files.
        output: folder; made when missing.
        score_threshold: lowest score to keep, in 0..1; None takes that of `predict`.
        max_detections: most detections to keep for a picture.
        on_error: called with a file and the reason when it is left out.
        progress: wraps the list for display (`tqdm`-like).
        formats: some of `ovd.results_writer.FORMATS`.
        batch_size: pictures that go through the network together.
        options: further ones of `OpenVocabularyDetector.predict`.

    Raises:
        ValueError: the detector has no vocabulary, or a picture would be overwritten by its annotated copy.
    """
    if detector.vocabulary is None:
        raise ValueError("the detector has no vocabulary yet; call set_vocabulary first")
    output, words = Path(output), detector.vocabulary.words
    jobs = list(zip(images, output_names(images), strict=True))
    _refuse_overwriting(jobs, output)
    colours = distinct_colours(words)
    options = {"threshold": score_threshold, "max_detections": max_detections, "batch_size": batch_size, **options}
    with ResultsWriter(output, words, formats) as writer:
        summary = Summary(writer.json_path, files=writer.paths)
        waiting: list[tuple[Path, str, np.ndarray]] = []

        def detect() -> None:
            found = detector.predict([pixels for _, _, pixels in waiting], **options)
            for (path, name, pixels), detections in zip(waiting, found, strict=True):
                drawn = draw_detections(pixels, detections, colours=colours)
                summary.pictures.append(write_png_atomic(output / name, drawn))
                writer.add(Item(str(path), Path(name).stem, annotated=name), detections)
            waiting.clear()

        for path, name in progress(jobs) if progress else jobs:
            try:
                waiting.append((path, name, read_image(path)))
            except ImageError as error:
                summary.failed.append((path, str(error)))
                if on_error:
                    on_error(path, str(error))
            if len(waiting) == batch_size:
                detect()
        detect()
        summary.detections = writer.detections
    return summary


def _refuse_overwriting(jobs: Sequence[tuple[Path, str]], output: Path) -> None:
    originals = {image.resolve() for image, _ in jobs}
    for _, name in jobs:
        if (output / name).resolve() in originals:
            raise ValueError(
                f"{output / name} is one of the pictures and would be overwritten; give another output folder"
            )
