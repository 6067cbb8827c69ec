"""Image-text pairs from a table (CSV or Parquet) and a folder of images."""

import csv
import multiprocessing
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pretrain.config import ConfigError


def read_table(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV or Parquet file with at least the columns `image` and `caption`.

    Raises:
        ConfigError: if the file is missing, empty or lacks a column.
    """
    path = Path(path)
    if not path.is_file():
        remedy = "; `python tools/prepare_data.py mini` makes the miniature" if "mini" in path.parts else ""
        raise ConfigError(f"no table of image-text pairs at {path}{remedy}")
    if path.suffix == ".parquet":
        import pandas  # an optional format, an optional dependency

        rows = pandas.read_parquet(path).fillna("").astype(str).to_dict("records")
    else:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    if not rows:
        raise ConfigError(f"{path} has no rows")
    missing = {"image", "caption"} - rows[0].keys()
    if missing:
        raise ConfigError(f"{path} lacks the column(s) {', '.join(sorted(missing))}; it has {', '.join(rows[0])}")
    return rows


def select_split(rows: list[dict[str, str]], split: str | None, table: str) -> list[dict[str, str]]:
    """Rows of one split (all of them for None).

    Raises:
        ConfigError: if no row has it.
    """
    if split is None:
        return rows
    chosen = [row for row in rows if row.get("split") == split]
    if not chosen:
        found = sorted({row.get("split") or "(none)" for row in rows})
        raise ConfigError(f"{table} has no row with split {split!r}; its splits: {', '.join(found)}")
    return chosen


def withhold_words(rows: list[dict[str, str]], words: Iterable[str]) -> tuple[list[dict[str, str]], int]:
    """Leave out the rows whose caption or keywords contain one of the words (whole words, any case).

    Returns:
        The rows that stay, and how many were left out.
    """

    def padded(text: str) -> str:
        return " " + " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split()) + " "

    needles = [p for p in {padded(word) for word in words} if p.strip()]
    kept = []
    for row in rows:
        # Two spaces where one text ends and the next begins: no needle reaches across (keywords "hot|dog" keep "hot
        # dog").
        text = "".join(map(padded, [row["caption"], *row.get("keywords", "").split("|")]))
        if not any(needle in text for needle in needles):
            kept.append(row)
    return kept, len(rows) - len(kept)


class ImageStore:
    """Reads the images of a table; a file that cannot be decoded is counted and named, never silently replaced.

    Args:
        root: what the paths are relative to.
        preload: keep every decoded image in memory after its first use.
    """

    def __init__(self, root: Path, preload: bool = False):
        self._root, self._preload = Path(root), preload
        self._cache: dict[str, np.ndarray] = {}
        self._broken = multiprocessing.Value("q", 0)  # shared with the processes that load

    def read(self, name: str) -> Image.Image:
        """RGBA for an image with transparency, RGB otherwise, upright.

        Raises:
            OSError: if it cannot be read; the message names the file.
        """
        if name in self._cache:
            return Image.fromarray(self._cache[name])
        path = self._root / name
        try:
            with Image.open(path) as file:
                has_alpha = file.mode in ("RGBA", "LA", "PA") or "transparency" in file.info
                image = ImageOps.exif_transpose(file).convert("RGBA" if has_alpha else "RGB")
        except Exception as error:  # decoders raise many types
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise OSError(f"{path} cannot be read as an image ({reason})") from error
        if self._preload:
            self._cache[name] = np.asarray(image)
        return image

    def count_broken(self, name: str, error: OSError) -> None:
        """Count a read that failed; the first one is shown at once, the sum is in the run's summary."""
        with self._broken.get_lock():
            self._broken.value += 1
            if self._broken.value == 1:
                print(f"left out: {error}", file=sys.stderr, flush=True)

    @property
    def broken(self) -> int:
        """Reads that failed so far, in all processes."""
        return self._broken.value

    def check(self, names: Iterable[str]) -> dict[str, str]:
        """Try to read every image; returns the broken ones with the reason (and fills the cache where it is on)."""
        broken = {}
        for name in names:
            try:
                self.read(name)
            except OSError as error:
                broken[name] = str(error)
        return broken


def read_backgrounds(folder: str | None, longest_side: int = 512) -> list[Image.Image]:
    """Photographs to put behind cut-outs, reduced to `longest_side` pixels; none for None.

    Raises:
        ConfigError: if the folder holds no JPEG or PNG.
    """
    if folder is None:
        return []
    paths = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise ConfigError(
            f"data.backgrounds: no JPEG or PNG in {folder}; `python tools/prepare_data.py mini` makes some"
        )
    photos = []
    for path in paths:
        photo = Image.open(path).convert("RGB")
        photo.thumbnail((longest_side, longest_side), Image.Resampling.BILINEAR, reducing_gap=3.0)
        photos.append(photo)
    return photos
