"""What was found in pictures and frames as files: COCO-style JSON, JSON lines, CSV, labelme and YOLO.

Every file is complete or absent; those that grow with the input are written as it goes. Drawings are made in
`ovd/inference.py` and `ovd/video.py`.
"""

import csv
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
from PIL import Image

from ovd.detections import Detections
from pretrain.atomic import replacing, write_atomically

FORMATS = ("json", "csv", "labelme", "yolo")
COLUMNS = ("file_name", "frame", "seconds", "width", "height", "name", "score", "x1", "y1", "x2", "y2")
YOLO_CLASSES = "classes.txt"


@dataclass(frozen=True)
class Item:
    """A picture, or one frame of a video.

    Attributes:
        file_name: the picture or the video, as the user gave it.
        name: for files that belong to it, without a suffix.
        annotated: name of the drawing, for pictures.
        frame, seconds: of a frame, from 0; None for pictures.
        pixels: of a frame, which has no file of its own.
    """

    file_name: str
    name: str
    annotated: str | None = None
    frame: int | None = None
    seconds: float | None = None
    pixels: np.ndarray | None = None


class ResultsWriter:
    """Write detections in the formats asked for; a context manager, and only what ends well leaves its files.

    `<stem>.json` (pictures) has `images` (id, file_name, width, height, annotated), `categories` (id from 1, name; in
    the order of the vocabulary) and `annotations` (id, image_id, category_id, bbox x y width height in pixels of the
    upright picture, area, score, iscrowd 0 and, if there are masks, segmentation as compressed run lengths).
    `<stem>.jsonl` (frames) has a line a frame: frame, seconds, width, height, detections (as annotations, with name).
    `<stem>.csv` has `COLUMNS`, a line a detection. `labelme/<name>.json`; `yolo/<name>.txt` with `yolo/classes.txt`.
    Labels of frames lie in `<stem>_frames/`, with the frames.

    Args:
        output: folder.
        words: the vocabulary.
        formats: some of `FORMATS`.
        stem: name of the files that are about all pictures.
        frames: the items are frames of one video.

    Raises:
        ValueError: an unknown format.
    """

    def __init__(
        self,
        output: Path,
        words: Sequence[str],
        formats: Sequence[str] = ("json",),
        stem: str = "detections",
        frames: bool = False,
    ) -> None:
        unknown = sorted(set(formats) - set(FORMATS))
        if unknown:
            raise ValueError(f"cannot save as {', '.join(unknown)}; known formats are {', '.join(FORMATS)}")
        self.output, self.words, self.formats, self.stem, self.frames = output, words, tuple(formats), stem, frames
        self.json_path = output / f"{stem}.json{'l' if frames else ''}"
        self.csv_path = output / f"{stem}.csv"
        self.label_folder = output / f"{stem}_frames" if frames else output
        self.detections = 0
        self._coco: dict[str, list[dict]] = {
            "images": [],
            "categories": [{"id": i + 1, "name": word} for i, word in enumerate(words)],
            "annotations": [],
        }
        self._files = ExitStack()
        self._lines: TextIO | None = None
        self._rows: Any = None

    def __enter__(self) -> "ResultsWriter":
        if "json" in self.formats and self.frames:
            self._lines = self._open(self.json_path)
        if "csv" in self.formats:
            self._rows = csv.writer(self._open(self.csv_path))
            self._rows.writerow(COLUMNS)
        return self

    def _open(self, path: Path) -> TextIO:
        temporary = self._files.enter_context(replacing(path))
        return self._files.enter_context(temporary.open("w", encoding="utf-8", newline=""))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            if "json" in self.formats and not self.frames:
                write_atomically(self.json_path, json.dumps(self._coco) + "\n")
            if "yolo" in self.formats:
                write_atomically(self.label_folder / "yolo" / YOLO_CLASSES, "".join(f"{w}\n" for w in self.words))
        self._files.__exit__(kind, error, trace)

    @property
    def paths(self) -> dict[str, Path]:
        """Where each format is: a file, or a folder of labels."""
        places = {"json": self.json_path, "csv": self.csv_path}
        return {name: places.get(name, self.label_folder / name) for name in self.formats}

    def add(self, item: Item, detections: Detections) -> None:
        """Write what was found in one picture or frame."""
        self.detections += len(detections)
        if self._lines is not None:
            self._lines.write(json.dumps(self._frame(item, detections)) + "\n")
        elif "json" in self.formats:
            self._add_to_coco(item, detections)
        if self._rows is not None:
            self._add_rows(item, detections)
        if "labelme" in self.formats:
            self._add_labelme(item, detections)
        if "yolo" in self.formats:
            write_atomically(self.label_folder / "yolo" / f"{item.name}.txt", detections.to_yolo())
            self._keep_frame("yolo", item)

    def _annotations(self, image_id: int, detections: Detections) -> list[dict]:
        found = detections.to_coco(image_id, category_ids=range(1, len(self.words) + 1))
        return [{**f, "area": f["bbox"][2] * f["bbox"][3], "iscrowd": 0} for f in found]

    def _add_to_coco(self, item: Item, detections: Detections) -> None:
        height, width = detections.image_size
        images, annotations = self._coco["images"], self._coco["annotations"]
        image = {"id": len(images) + 1, "file_name": item.file_name, "width": width, "height": height}
        images.append({**image, "annotated": item.annotated})
        for found in self._annotations(image["id"], detections):
            annotations.append({"id": len(annotations) + 1, **found})

    def _frame(self, item: Item, detections: Detections) -> dict[str, Any]:
        height, width = detections.image_size
        found = self._annotations(item.frame or 0, detections)
        found = [{"name": name, **f} for name, f in zip(detections.names, found, strict=True)]
        return {
            "frame": item.frame, "seconds": item.seconds, "width": width, "height": height, "detections": found,
        }  # fmt: skip

    def _add_rows(self, item: Item, detections: Detections) -> None:
        height, width = detections.image_size
        place = [item.file_name, item.frame, item.seconds, width, height]
        for name, score, box in zip(detections.names, detections.scores, detections.boxes.tolist(), strict=True):
            self._rows.writerow([*place, name, f"{score:.4f}", *(f"{value:.2f}" for value in box)])

    def _add_labelme(self, item: Item, detections: Detections) -> None:
        folder = self.label_folder / "labelme"
        # Relative, so that the folders can be moved together.
        source = os.path.relpath(Path(item.file_name).resolve(), folder.resolve())
        image = source if item.pixels is None else f"{item.name}.png"
        write_atomically(folder / f"{item.name}.json", json.dumps(detections.to_labelme(image), indent=1) + "\n")
        self._keep_frame("labelme", item)

    def _keep_frame(self, folder: str, item: Item) -> None:
        if item.pixels is not None:
            with replacing(self.label_folder / folder / f"{item.name}.png") as temporary:
                Image.fromarray(item.pixels).save(temporary, format="PNG")
