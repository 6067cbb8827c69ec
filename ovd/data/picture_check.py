"""Look whether an annotation file's pictures are there and have the size that it says.

Only headers of a sample are opened; decoding every picture is left to training, which skips and counts bad ones.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ovd.data.lvis import picture_path

_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


@dataclass
class PictureReport:
    """Which pictures are missing, and which of the opened ones cannot be used as annotated (path: reason)."""

    pictures: int
    missing: list[str] = field(default_factory=list)
    sampled: int = 0
    unusable: dict[str, str] = field(default_factory=dict)

    def raise_if_bad(self, image_root: str | Path) -> None:
        """Raise ValueError when a picture is missing or unusable; the sentence names the first."""
        if self.missing:
            raise ValueError(
                f"{len(self.missing)} of {self.pictures} pictures are missing below {image_root}, the first is "
                f"{self.missing[0]}: give the folder that the file names are relative to, or complete the download"
            )
        for path, reason in self.unusable.items():
            raise ValueError(
                f"{len(self.unusable)} of {self.sampled} opened pictures do not fit their annotation, the first is "
                f"{path} ({reason}): the annotations belong to other files, or the picture is damaged"
            )


def check_pictures(ground_truth: dict[str, Any], image_root: str | Path, sample: int = 200) -> PictureReport:
    """Check that pictures exist and that some have their annotated size.

    Args:
        ground_truth: parsed LVIS or COCO file.
        image_root: folder the pictures' names are relative to.
        sample: how many to open, evenly spaced over the file.
    """
    images = ground_truth["images"]
    report, folders, present = PictureReport(len(images)), {}, []
    for image in images:
        path = picture_path(image, Path(image_root))
        folder, name = os.path.split(path)
        if folder not in folders:  # one listing a folder: far faster than asking for 100,000 files
            folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name in folders[folder]:
            present.append((path, image))
        else:
            report.missing.append(path)
    for path, image in present[:: max(1, -(-len(present) // max(1, sample)))] if sample else ():
        report.sampled += 1
        if reason := _wrong(path, image):
            report.unusable[path] = reason
    return report


def _wrong(path: str, image: dict) -> str:
    """Why a picture does not fit its entry, or an empty text."""
    try:
        with Image.open(path) as picture:
            sizes = {picture.size}
            if picture.getexif().get(0x0112) in _TURNED:
                sizes.add(picture.size[::-1])
            width, height = picture.size
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        return f"not a readable picture: {error}"
    if (image["width"], image["height"]) in sizes:
        return ""
    return f"{width} x {height} pixels, annotated as {image['width']} x {image['height']}"
