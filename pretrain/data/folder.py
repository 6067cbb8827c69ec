"""Image-text pairs from a table (CSV or Parquet) and a folder of images; or the images of a folder, without texts."""

import csv
import multiprocessing
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from pretrain.config import ConfigError
from pretrain.data.jpeg import (
    JpegPicture,
    check_regular,
    open_file,
    open_picture,
    picture_endings,
    unreadable,
    upright,
)


def read_table(path: str | Path, caption_reader: str = "a table of image-text pairs") -> list[dict[str, str]]:
    """The rows of a CSV or Parquet file with at least the columns `image`, and `caption` or `captions` ("a|b").

    A row with several captions and no `caption` of its own gets the first of them.

    Args:
        path: the file; or a folder, whose pictures are the rows.
        caption_reader: what needs captions, for messages; empty: nothing does, and a table without that column, or a
            folder, is taken: every row has an empty `caption`.

    Raises:
        ConfigError: if the file is missing, damaged, empty or lacks a column.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, caption_reader)
    if not path.is_file():
        remedy = "; `python tools/prepare_data.py mini` makes the miniature" if "mini" in path.parts else ""
        raise ConfigError(f"no table of image-text pairs at {path}{remedy}")
    if path.suffix == ".parquet":
        import pandas  # an optional format, an optional dependency

        try:
            rows = pandas.read_parquet(path).fillna("").astype(str).to_dict("records")
        except Exception as error:  # the readers behind pandas raise many types
            raise ConfigError(f"{path} cannot be read as Parquet ({_first_line(error)}): write it again") from error
    else:
        rows = _read_csv(path)
    if not rows:
        raise ConfigError(f"{path} has no rows")
    several = "captions" in rows[0]
    missing = {"image"} - rows[0].keys() if several or not caption_reader else {"image", "caption"} - rows[0].keys()
    if missing:
        reason = f": {caption_reader} needs captions" if "caption" in missing else ""
        raise ConfigError(
            f"{path} lacks the column(s) {', '.join(sorted(missing))}; it has {', '.join(rows[0])}{reason}"
        )
    for row in rows:
        row["caption"] = row.get("caption") or (next(iter(split_captions(row)), "") if several else "")
    return rows


def _read_folder(folder: Path, caption_reader: str) -> list[dict[str, str]]:
    """A row for every picture in a folder and those below it, in the order of their names."""
    if caption_reader:
        raise ConfigError(
            f"{folder} is a folder of images without captions: {caption_reader} needs captions; give a table with the "
            "columns image and caption, or shards"
        )
    endings, names, visited = picture_endings(), [], set()
    walk = os.walk(folder, onerror=_refuse_folder, followlinks=True)
    for place, below, files in tqdm(walk, "folders", delay=2.0, leave=False, disable=None):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in visited:  # a link to a folder that was or is being read
            below.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        shown = [name for name in files if not name.startswith(".") and name.lower().endswith(endings)]
        names += [os.path.relpath(os.path.join(place, name), folder) for name in shown]
    if not names:
        raise ConfigError(f"no picture in {folder} or below: files with {', '.join(endings[:8])} … count")
    return [{"image": name, "caption": ""} for name in sorted(names)]


def _refuse_folder(error: OSError) -> None:
    raise ConfigError(f"{error.filename} cannot be listed: {error.strerror}") from error


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, restval=""))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read as CSV in UTF-8 ({_first_line(error)}): save it again so") from error
    for row in rows:
        row.pop(None, None)  # values beyond the last column
    return rows


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def read_words(path: str | Path) -> list[str]:
    """The lines of a word list, for `data.withhold`.

    Raises:
        ConfigError: if there is no such file, or it is not UTF-8.
    """
    if not Path(path).is_file():
        raise ConfigError(f"data.withhold: no word list at {path}")
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"data.withhold: {path} is not UTF-8 text; save it as UTF-8") from error


def split_captions(row: dict[str, str]) -> list[str]:
    """The captions of a row's column `captions` ("a|b"), or its one `caption`; empty ones are left out."""
    captions = [caption.strip() for caption in (row.get("captions") or "").split("|")]
    return [caption for caption in captions if caption] or [c for c in [row.get("caption") or ""] if c.strip()]


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
        remedy = "; data.train_split=null trains on every row" if found == ["(none)"] else ""
        raise ConfigError(f"{table} has no row with split {split!r}; its splits: {', '.join(found)}{remedy}")
    return chosen


def withhold_words(rows: list[dict[str, str]], words: Iterable[str]) -> tuple[list[dict[str, str]], int]:
    """Leave out the rows whose caption, captions or keywords contain one of the words (whole words, any case).

    Returns:
        The rows that stay, and how many were left out.
    """
    withheld = WordFilter(words)
    columns = ("captions", "keywords")
    kept = [
        row
        for row in rows
        if not withheld.matches([row["caption"], *(t for c in columns for t in (row.get(c) or "").split("|"))])
    ]
    return kept, len(rows) - len(kept)


class WordFilter:
    """Finds whole words, in any case, in texts."""

    def __init__(self, words: Iterable[str]):
        self._needles = [p for p in {self._padded(word) for word in words} if p.strip()]

    @staticmethod
    def _padded(text: str) -> str:
        return " " + " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split()) + " "

    def matches(self, texts: Iterable[str]) -> bool:
        """Whether one of the texts has one of the words."""
        if not self._needles:
            return False
        # Two spaces where one text ends and the next begins: no needle reaches across (keywords "hot|dog" keep "hot
        # dog").
        text = "".join(map(self._padded, texts))
        return any(needle in text for needle in self._needles)


class LeftOut:
    """Counts samples that training could not use, by kind and over all processes; the first one is shown at once."""

    def __init__(self, kinds: Iterable[str]):
        self._counts = {kind: multiprocessing.Value("q", 0) for kind in kinds}

    def add(self, kind: str, reason: object) -> None:
        """Count one sample."""
        count = self._counts[kind]
        with count.get_lock():
            count.value += 1
            first = count.value == 1
        if first:
            print(f"left out: {reason}", file=sys.stderr, flush=True)

    def __getitem__(self, kind: str) -> int:
        return self._counts[kind].value

    def total(self) -> int:
        """All kinds together."""
        return sum(count.value for count in self._counts.values())


class ImageStore:
    """Reads the images of a table; a file that cannot be decoded is counted and named, never silently replaced.

    Args:
        root: what the paths are relative to.
        preload: keep every decoded image in memory after its first use.
    """

    def __init__(self, root: Path, preload: bool = False):
        self._root, self._preload = Path(root), preload
        self._cache: dict[str, np.ndarray] = {}
        self._left_out = LeftOut(["broken"])

    def read(self, name: str) -> Image.Image:
        """RGBA for an image with transparency, RGB otherwise, upright.

        Raises:
            OSError: if it cannot be read; the message names the file.
        """
        if name in self._cache:
            return Image.fromarray(self._cache[name])
        path = self._root / name
        try:
            with open_file(path) as file:
                image = upright(file)
        except Exception as error:  # decoders raise many types
            raise unreadable(str(path), error) from error
        if self._preload:
            self._cache[name] = np.asarray(image)
        return image

    def open(self, name: str) -> Image.Image | JpegPicture:
        """As `read`, but a JPEG is not decoded before its size is known: for pictures that end up small.

        Raises:
            OSError: as `read`; damage inside a JPEG shows when it is resized.
        """
        if self._preload:
            return self.read(name)
        path = self._root / name
        try:
            check_regular(path)
            content = path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
            raise unreadable(str(path), error) from error
        return open_picture(content, str(path))

    def count_broken(self, name: str, error: OSError) -> None:
        """Count a read that failed; the first one is shown at once, the sum is in the run's summary."""
        self._left_out.add("broken", error)

    @property
    def broken(self) -> int:
        """Reads that failed so far, in all processes."""
        return self._left_out["broken"]

    def check(self, names: Iterable[str]) -> dict[str, str]:
        """Try to read every image; returns the broken ones with the reason (and fills the cache where it is on)."""
        broken = {}
        for name in names:
            try:
                self.read(name)
            except OSError as error:
                broken[name] = str(error)
        return broken


class TableSource:
    """The rows of a table with their images, for training: `read` gives what augmentation needs."""

    def __init__(self, rows: list[dict[str, str]], store: ImageStore):
        self._rows, self._store = rows, store
        self.remedy = "check data.root"

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> tuple[Image.Image | JpegPicture, dict]:
        """A picture and its row: `captions` (a list, not empty strings) and what the table has.

        Raises:
            OSError: if the image cannot be read.
        """
        row = self._rows[index]
        return self._store.open(row["image"]), {**row, "captions": split_captions(row)}

    def count_left_out(self, index: int, error: OSError) -> None:
        """Count a sample that `read`, or decoding what it gave, refused."""
        self._store.count_broken(self._rows[index]["image"], error)


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
        try:
            with open_file(path) as file:
                photo = file.convert("RGB")
        except Exception as error:  # decoders raise many types
            raise ConfigError(f"data.backgrounds: {unreadable(str(path), error)}; remove or replace it") from error
        photo.thumbnail((longest_side, longest_side), Image.Resampling.BILINEAR, reducing_gap=3.0)
        photos.append(photo)
    return photos
