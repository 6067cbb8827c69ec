"""What the page does with what a stranger sends: check it against the limits, detect, and give back what is shown.

Nothing here knows of gradio. Every refusal is a `RequestError`: one sentence that may be shown to the stranger.
"""

import os
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovd.data.images import ImageError, read_image
from ovd.detections import Detections
from ovd.text.vocabulary import Vocabulary
from ovd.visualization import distinct_colours

MAX_DETECTIONS = 100
# Pillow knows dozens more, some of which start other programs (EPS) or are rarely used and little tested.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_SMALLEST_SHOWN = 640  # pixels, the longer side: letters on smaller pictures cannot be read


class RequestError(ValueError):
    """What a visitor asked for cannot be done; the message is meant for them."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for: bytes of the file, pixels of the picture, number of words and their letters."""

    file_bytes: int = 20 * 1024 * 1024
    pixels: int = 40_000_000
    words: int = 300
    letters: int = 10_000

    @property
    def sentence(self) -> str:
        """The limits in words, for the page."""
        megabytes, megapixels = self.file_bytes / 2**20, self.pixels / 1e6
        return f"Pictures up to {megabytes:g} MB and {megapixels:g} megapixels; up to {self.words} words."


@dataclass(frozen=True)
class Answer:
    """What the page shows: `picture` (H, W, 3) uint8 RGB, `rows` of [word, score, x1, y1, x2, y2], a sentence."""

    picture: np.ndarray
    rows: list[list[Any]]
    summary: str


def split_words(text: str | None, limits: Limits) -> tuple[str, ...]:
    """The words of a text field, separated by commas, semicolons or line ends; blanks dropped, repeats kept once.

    A text is never taken for the name of a file, as `Vocabulary.parse` would: this one comes from a stranger.

    Raises:
        RequestError: no words, or more of them than the limits allow.
    """
    text = text or ""
    if len(text) > limits.letters:
        raise RequestError(f"The words are {len(text)} letters long; at most {limits.letters} are taken.")
    for separator in (";", "\r", "\n"):
        text = text.replace(separator, ",")
    words = [word for word in (" ".join(piece.split()) for piece in text.split(",")) if word]
    if not words:
        raise RequestError("There are no words to look for; write some, separated by commas.")
    if len(words) > limits.words:
        raise RequestError(f"There are {len(words)} words; at most {limits.words} are taken at once.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of repeated words: they are simply looked for once
        return Vocabulary.from_words(words).words


def read_upload(path: str | os.PathLike | None, limits: Limits) -> np.ndarray:
    """Read an uploaded picture as upright RGB; size and pixels are checked before anything is decoded.

    Returns:
        (H, W, 3) uint8.

    Raises:
        RequestError: no file, too large, or not a picture; the sentence does not tell where files lie.
    """
    if not path or not Path(path).is_file():
        raise RequestError("There is no picture; choose one, or click on an example.")
    size = Path(path).stat().st_size
    if size > limits.file_bytes:
        raise RequestError(f"The file has {size / 2**20:.1f} MB; the limit is {limits.file_bytes / 2**20:g} MB.")
    refused = "This file cannot be read as a picture; use a JPEG, PNG or WebP that opens elsewhere."
    too_large = f"The picture has more than {limits.pixels / 1e6:g} megapixels, the limit; scale it down first."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower and is an error
            with Image.open(path, formats=FORMATS) as header:
                width, height = header.size
    except Image.DecompressionBombError as error:
        raise RequestError(too_large) from error
    except Exception as error:  # Pillow's parsers raise whatever a damaged header leads them to
        raise RequestError(refused) from error
    if width * height > limits.pixels:
        raise RequestError(too_large)
    try:
        return read_image(path)
    except (ImageError, MemoryError) as error:
        raise RequestError(refused) from error


class Finder:
    """One detector for all visitors, one request at a time: the vocabulary belongs to the request that set it.

    Args:
        detector: an `OpenVocabularyDetector`, or anything with its `set_vocabulary` and `predict`.
        limits: what a request may ask for.
    """

    def __init__(self, detector: Any, limits: Limits | None = None) -> None:
        self.detector = detector
        self.limits = limits or Limits()
        self._words: tuple[str, ...] | None = None
        self._lock = threading.Lock()

    def __call__(self, path: str | os.PathLike | None, text: str | None, threshold: float) -> Answer:
        """Find the words of `text` in the picture at `path`; detections from score `threshold` (0..1).

        Raises:
            RequestError: see `read_upload` and `split_words`; or a threshold outside 0..1.
        """
        words = split_words(text, self.limits)
        # A slider cannot leave its range, but a request need not come from the slider.
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise RequestError("The threshold must be a number from 0 to 1.")
        picture = read_upload(path, self.limits)
        with self._lock:
            if words != self._words:
                self._words = None  # if the next line fails, the detector's words are not known
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    self.detector.set_vocabulary(Vocabulary.from_words(words))
                self._words = words
            found = self.detector.predict(picture, threshold=float(threshold), max_detections=MAX_DETECTIONS)
        return show(picture, found, words)


def show(picture: np.ndarray, found: Detections, words: tuple[str, ...]) -> Answer:
    """Draw the detections and list them.

    Args:
        picture: (H, W, 3) uint8 RGB that was searched.
        found: detections in its pixels, best first.
        words: the vocabulary, for colours that differ.
    """
    scale = max(1.0, _SMALLEST_SHOWN / max(picture.shape[:2]))
    drawn = found.plot(picture, colours=distinct_colours(words), scale=scale) if len(found) else picture
    rows = [
        [name, round(float(score), 3), *(round(float(value), 1) for value in box)]
        for name, score, box in zip(found.names, found.scores, found.boxes, strict=True)
    ]
    counts = {name: found.names.count(name) for name in dict.fromkeys(found.names)}
    if not counts:
        return Answer(drawn, rows, "Nothing found; lower the threshold or try other words.")
    return Answer(drawn, rows, "Found: " + ", ".join(f"{name} ({count})" for name, count in counts.items()))
